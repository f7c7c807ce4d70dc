"""Forward passes of a detector up to its neck, its raw output maps and its predictors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import cast

import numpy as np
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention
from mmdet.models.detectors import BaseDetector, TwoStageDetector
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.autograd.graph import Node

from ldt.config.names import below
from ldt.pruning.attention import Products
from ldt.pruning.hooks import outputs_of
from ldt.pruning.tokens import Places

ENCODER = "encoder"  # of mmdet's detectors with a transformer behind the neck

MapsForward = Callable[..., list[Tensor]]


def find_neck(detector: nn.Module, name: str = "auto") -> nn.Module:
    """Find the module whose output feeds the head: ``neck``, or the backbone if there is none.

    Raises:
        ValueError: the detector has no module ``name``, or neither neck nor backbone.
    """
    for candidate in ["neck", "backbone"] if name == "auto" else [name]:
        with suppress(AttributeError):
            return detector.get_submodule(candidate)
    children = ", ".join(child for child, _ in detector.named_children())
    raise ValueError(
        f"detector.neck={name!r}: {type(detector).__name__} has no such module. "
        f"Its parts are: {children}. Name the module whose output feeds the head, e.g. "
        "detector.neck=neck"
    )


def as_maps(output: object) -> tuple[Tensor, ...]:
    """Return the output of a neck as a tuple of feature maps [N, C, h, w].

    Raises:
        ValueError: it is something else.
    """
    maps = (output,) if isinstance(output, Tensor) else output
    if isinstance(maps, (list, tuple)) and all(isinstance(m, Tensor) and m.ndim == 4 for m in maps):
        return tuple(maps)
    raise ValueError(
        f"the neck returns {type(output).__name__}, not feature maps [N, C, h, w]; choose another "
        "module with detector.neck=<module>"
    )


@contextmanager
def neck_maps(detector: nn.Module, name: str = "auto") -> Iterator[list[Tensor]]:
    """Collect the neck's feature maps [N, C, h, w], one per scale, of a forward in the context.

    The hook is removed afterwards, since it would keep the autograd graph of the last batch alive.
    """
    maps: list[Tensor] = []
    places = Places() if below(name, [ENCODER]) else None

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> None:
        if places and isinstance(output, Tensor) and output.ndim == 3:
            output = [own for own, located in places.maps(output) if located]
        maps[:] = as_maps(output)

    hook = find_neck(detector, name).register_forward_hook(keep)
    try:
        with places.recorded(detector) if places else nullcontext():
            yield maps
    finally:
        hook.remove()


def raw_forward(detector: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the raw output maps of images [N, 3, H, W] as a flat list, for tracing and counting.

    For a two-stage detector these are the outputs of its region proposal network and of its second
    stage. The latter gets as many regions as in testing, on all scales, but not the network's own
    proposals: these have no gradient and change when the network is pruned.
    """
    test_cfg = getattr(detector, "test_cfg", None)
    rpn = test_cfg.get("rpn") if test_cfg else None
    samples = [_sample(images, rpn.max_per_img if rpn else 1000) for _ in images]
    if not hasattr(detector, "roi_head"):
        return list(_tensors(detector(images, samples, mode="tensor")))
    return list(_tensors(_two_stage_outputs(cast(TwoStageDetector, detector), images, samples)))


def _two_stage_outputs(
    detector: TwoStageDetector, images: Tensor, samples: list[DetDataSample]
) -> list[object]:
    """Return the outputs of the region proposal network and of the second stage."""
    maps = detector.extract_feat(images)
    rpn_outputs: list[object] = []
    regions = [sample.proposals for sample in samples]
    if detector.with_rpn:
        heads = [m for m in detector.rpn_head.modules() if hasattr(m, "predict_by_feat")]
        with outputs_of(heads) as rpn_outputs:
            proposals = detector.rpn_head.predict(maps, samples, rescale=False)
        if not rpn_outputs:  # learnt proposals, which come with features of their own
            regions = proposals
    return [rpn_outputs, detector.roi_head.forward(maps, regions, samples)]


def neck_forward(detector: nn.Module, images: Tensor, name: str = "auto") -> list[Tensor]:
    """Return the neck's feature maps of images [N, 3, H, W], or what a transformer reads of them.

    Tracing needs no more if a transformer follows (:func:`has_transformer_head`).
    """
    if own := getattr(detector, "forward_for_tracing", None):
        return own(images)
    with neck_maps(detector, name) as maps:
        cast(BaseDetector, detector).extract_feat(images)
    return maps


def has_transformer_head(detector: nn.Module) -> bool:
    """Return whether a transformer processes the neck's feature maps."""
    if hasattr(detector, "forward_for_tracing"):
        return True
    attention = (nn.MultiheadAttention, Products, MultiScaleDeformableAttention)
    layers = (n for n, m in detector.named_modules() if isinstance(m, attention))
    return any(not name.startswith(("backbone.", "neck.")) for name in layers)


def forwards_for_tracing(
    detector: nn.Module, scope: Sequence[str], name: str = "auto"
) -> tuple[MapsForward, MapsForward | None]:
    """Return the function of (detector, images) that pruning runs, and the part of it to trace.

    The latter is None if it is the same. Behind a neck that a transformer follows nothing is
    traced, and nothing is run unless the scope names parts there.
    """
    if not has_transformer_head(detector):
        return raw_forward, None
    to_neck = partial(neck_forward, name=name_of_maps(name))
    behind = any(not below(part, ("backbone", "neck")) for part in scope)
    return (raw_forward, to_neck) if behind else (to_neck, None)


def name_of_maps(neck: str) -> str:
    """Return which module's output tracing ends with: not the encoder, if LDT uses its output."""
    return "auto" if below(neck, [ENCODER]) else neck


def _sample(images: Tensor, regions: int) -> DetDataSample:
    """Create a data sample: centred regions of six scales and one object of the image's size."""
    height, width = images.shape[2:]
    shape = (int(height), int(width))
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), shape)
    sample = DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0)})
    scale = 2.0 ** -(torch.arange(regions, device=images.device) % 6)
    ends = images.new_tensor([-width, -height, width, height])
    centre = images.new_tensor([width, height, width, height])
    boxes = (centre + scale[:, None] * ends) / 2
    sample.proposals = InstanceData(bboxes=boxes)
    sample.gt_instances = InstanceData(
        bboxes=boxes[:1],
        labels=torch.zeros(1, dtype=torch.long, device=images.device),
        masks=BitmapMasks(np.ones((1, *shape), dtype=np.uint8), *shape),
    )
    return sample


def one_image(image: Tensor, size: tuple[int, int]) -> dict[str, list]:
    """Return an image as a batch for testing; its detections are in pixels of the image.

    Args:
        image: [3, H, W], pixel values as mmdet loads them.
        size: (H, W) as numbers, which a traced tensor does not have.
    """
    height, width = size
    about = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "img_path": ""}
    border = np.array([0, height, 0, width], dtype=np.float32)  # for CornerNet's family
    return {
        "inputs": [image],
        "data_samples": [DetDataSample(metainfo={**about, "border": border})],
    }


def _tensors(node: object) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _tensors(item)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode; every module has its own mode again on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def eval_with_gradients(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode with gradients for all parameters; restore both on exit."""
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model), torch.enable_grad():  # mmdet's eval() freezes parameters
        for parameter, _ in grads:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, required in grads:
                parameter.requires_grad_(required)


LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, DeformConv2d, ModulatedDeformConv2d)


def find_predictors(detector: nn.Module, images: Tensor, neck: str = "auto") -> list[str]:
    """Return the names of the layers that compute the raw output maps and are never pruned.

    From each map the autograd graph is followed back to the first convolution or linear layer. If
    the head is a transformer, or has layers that the forward does not use (a mask quality head, a
    training branch), the layers that compute the neck's maps are included: tracing cannot see all
    consumers of these maps.
    """
    layers = {n for n, m in detector.named_modules() if isinstance(m, LAYERS)}
    with neck_maps(detector, neck) as maps, calls_of_layers(detector) as layer_of:
        outputs = raw_forward(detector, images)
        if hasattr(detector, "forward_for_tracing"):
            maps[:] = neck_forward(detector, images, neck)
    unused = {
        n for n in layers - set(layer_of.values()) if not n.startswith(("backbone.", "neck."))
    }
    outputs += maps if unused or has_transformer_head(detector) else []
    return sorted(_last_layers(outputs, layer_of))


def makers_of_maps(detector: nn.Module, images: Tensor, neck: str = "auto") -> list[str]:
    """Return the names of the layers that compute the neck's maps."""
    with calls_of_layers(detector) as layer_of:
        maps = neck_forward(detector, images, neck)
    return sorted(_last_layers(maps, layer_of))


@contextmanager
def calls_of_layers(detector: nn.Module) -> Iterator[dict[Node | None, str]]:
    """Collect the autograd node of every call of a layer, with the layer's name, in the context."""
    layer_of: dict[Node | None, str] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layer_of[output.grad_fn] = name

        return hook

    with ExitStack() as hooks, eval_with_gradients(detector):
        for name, module in detector.named_modules():
            if isinstance(module, LAYERS):
                hooks.callback(module.register_forward_hook(recorder(name)).remove)
        yield layer_of


def _last_layers(outputs: list[Tensor], layer_of: dict[Node | None, str]) -> set[str]:
    """Follow the autograd graph from the outputs back to the first layers in ``layer_of``."""
    stack = [m.grad_fn for m in outputs if m.requires_grad]
    found, seen = set(), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in layer_of:
            found.add(layer_of[node])
        else:
            stack.extend(parent for parent, _ in node.next_functions)
    return found
