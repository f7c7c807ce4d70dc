"""Where to tap a detector: its neck, its raw output maps, its predictors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor, nn


def find_neck(detector: nn.Module, name: str = "auto") -> nn.Module:
    """The module whose output feeds the head: ``neck``, or the backbone where there is none.

    Raises:
        ValueError: ``name`` is no module of the detector, or none can be found.
    """
    modules = dict(detector.named_modules())
    candidates = ["neck", "backbone"] if name == "auto" else [name]
    for candidate in candidates:
        if isinstance(modules.get(candidate), nn.Module):
            return modules[candidate]
    children = ", ".join(child for child, _ in detector.named_children())
    raise ValueError(
        f"detector.neck={name!r}: {type(detector).__name__} has no such module. "
        f"Its parts are: {children}. Name the module whose output feeds the head, e.g. "
        "detector.neck=neck"
    )


def as_maps(output: Any) -> tuple[Tensor, ...]:
    """The neck's output as a tuple of maps [N, C, h, w].

    Raises:
        ValueError: the module gives something else.
    """
    maps = (output,) if isinstance(output, Tensor) else output
    if isinstance(maps, (list, tuple)) and all(isinstance(m, Tensor) and m.ndim == 4 for m in maps):
        return tuple(maps)
    raise ValueError(
        f"the tapped module gives {type(output).__name__}, not maps [N, C, h, w]; name another "
        "one with detector.neck=<module>"
    )


@contextmanager
def neck_maps(detector: nn.Module, name: str = "auto") -> Iterator[list[Tensor]]:
    """Within it, a forward fills the list with the neck's maps [N, C, h, w], one per scale.

    The hook does not stay: it would hold on to the autograd graph of the last batch.
    """
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        maps[:] = as_maps(output)

    hook = find_neck(detector, name).register_forward_hook(keep)
    try:
        yield maps
    finally:
        hook.remove()


def raw_forward(detector: nn.Module, images: Tensor) -> list[Tensor]:
    """The raw output maps of a batch [N, 3, H, W], flat, as tracing and counting need them.

    A two-stage detector gives those of its region proposal network and of its second stage, which
    gets as many regions as it is tested with, spread over all scales: what the network itself
    proposes has no gradient and differs from one cut to the next.
    """
    parts: Any = detector
    rpn = getattr(parts, "test_cfg", None) and parts.test_cfg.get("rpn")
    samples = [_sample(images, rpn.max_per_img if rpn else 1000) for _ in images]
    if not hasattr(detector, "roi_head"):
        return list(_tensors(detector(images, samples, mode="tensor")))
    maps, first = parts.extract_feat(images), []
    regions = [sample.proposals for sample in samples]
    if parts.with_rpn:
        heads = [m for m in parts.rpn_head.modules() if hasattr(m, "predict_by_feat")]
        hooks = [m.register_forward_hook(lambda *call: first.append(call[-1])) for m in heads]
        try:
            proposed = parts.rpn_head.predict(maps, samples, rescale=False)
        finally:
            for hook in hooks:
                hook.remove()
        if not first:  # learnt regions, with features of their own
            regions = proposed
    return list(_tensors([first, parts.roi_head.forward(maps, regions, samples)]))


def neck_forward(detector: nn.Module, images: Tensor, name: str = "auto") -> list[Tensor]:
    """The neck's maps of a batch [N, 3, H, W]: all of a detector that tracing has to see, where a
    transformer follows (:func:`has_transformer_head`), which stays whole.
    """
    with neck_maps(detector, name) as maps:
        extract: Any = detector.extract_feat
        extract(images)
    return maps


def has_transformer_head(detector: nn.Module) -> bool:
    """Whether a transformer reads the neck's maps."""
    kinds = (nn.MultiheadAttention, MultiScaleDeformableAttention)
    layers = (n for n, m in detector.named_modules() if isinstance(m, kinds))
    return any(not name.startswith(("backbone.", "neck.")) for name in layers)


def forward_for_tracing(detector: nn.Module, name: str = "auto") -> Callable[..., list[Tensor]]:
    """What tracing runs, called with the detector and images: see :func:`has_transformer_head`."""
    return partial(neck_forward, name=name) if has_transformer_head(detector) else raw_forward


def _sample(images: Tensor, regions: int) -> DetDataSample:
    """A data sample with centred regions of six scales and one object as large as the image."""
    height, width = images.shape[2:]
    shape = (int(height), int(width))
    about = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), shape)
    sample = DetDataSample(metainfo={**about, "scale_factor": (1.0, 1.0)})
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


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _tensors(item)


@contextmanager
def eval_with_gradients(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients for all parameters; both are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in grads:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted in grads:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode


def find_predictors(detector: nn.Module, images: Tensor, neck: str = "auto") -> list[str]:
    """Names of the layers whose outputs are never pruned: those that make the raw output maps.

    From each map the autograd graph is followed back until a convolution or linear layer is met.
    Where the head is a transformer, or has layers that do not take part (a mask quality head, a
    training branch), the layers that make the neck's maps are among them: tracing cannot see what
    else reads these.
    """
    made_by: dict[Any, str] = {}
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, DeformConv2d, ModulatedDeformConv2d)
    layers = {n: m for n, m in detector.named_modules() if isinstance(m, kinds)}
    unused = {name for name in layers if not name.startswith(("backbone.", "neck."))}

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            made_by[output.grad_fn] = name
            unused.discard(name)

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in layers.items()]
    try:
        with eval_with_gradients(detector), neck_maps(detector, neck) as maps:
            outputs = raw_forward(detector, images)
    finally:
        for hook in hooks:
            hook.remove()
    outputs += maps if unused or has_transformer_head(detector) else []
    stack: list[Any] = [m.grad_fn for m in outputs if m.requires_grad]
    found, seen = set(), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in made_by:
            found.add(made_by[node])
        else:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return sorted(found)
