"""Build any mmdet detector from its config, and find where to tap it."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention
from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope, registry
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from ldt.discriminant import Objects

log = logging.getLogger(__name__)


def use_mmdet() -> None:
    """Register mmdet's modules and make ``mmdet`` the default scope (idempotent)."""
    register_all_modules(init_default_scope=False)
    setattr(SSDHead, "loss_cls", None)  # noqa: B010 - mmdet 3.3 asks every dense head for it, and this one has none
    MMLogger.get_current_instance().setLevel(logging.WARNING)  # it prints every initial tensor
    if DefaultScope.get_current_instance() is None:
        DefaultScope.get_instance("ldt", scope_name="mmdet")


def model_config(
    config: str, options: dict[str, Any], n_classes: int, pretrained: bool
) -> dict[str, Any]:
    """The ``model`` part of an mmdet config as plain data, with our changes.

    The config's ``custom_imports`` go with it, under their own name.

    Args:
        config: an mmdet config file, or ``mmdet::<family>/<file>`` for a packaged one.
        options: merged into ``model``, by mmengine's rules (``_delete_`` works).
        n_classes: replaces every ``num_classes``.
        pretrained: keep the ``init_cfg`` entries that load pretrained backbones.

    Raises:
        ValueError: no such config, or it defines no ``model``.
    """
    use_mmdet()
    try:
        whole = Config.fromfile(_config_file(config))
    except (OSError, KeyError, ImportError, SyntaxError) as error:
        raise ValueError(
            f"detector.config={config!r} cannot be read ({error}). Give a file, or a packaged "
            "config such as mmdet::gfl/gfl_r50_fpn_1x_coco.py"
        ) from error
    if "model" not in whole:
        raise ValueError(f"detector.config={config!r} defines no `model`; is it an mmdet config?")
    whole.merge_from_dict({"model": options})
    model: Any = ConfigDict(whole.model).to_dict()
    _set_num_classes(model, n_classes)
    if not pretrained:
        drop_pretrained(model)
    if "custom_imports" in whole:
        model["custom_imports"] = ConfigDict(whole.custom_imports).to_dict()
    return _plain(model)


def _config_file(config: str) -> str:
    """The path of ``package::family/file``; mmengine's own look-up needs pkg_resources."""
    package, separator, file = config.partition("::")
    if not separator:
        return config
    return str(Path(import_module(package).__path__[0]) / ".mim" / "configs" / file)


def _set_num_classes(node: Any, n_classes: int) -> None:
    """Replace ``num_classes`` in every head below ``node``, in place."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "num_classes" and isinstance(value, int):
                node[key] = n_classes
            else:
                _set_num_classes(value, n_classes)
    elif isinstance(node, (list, tuple)):
        for item in node:
            _set_num_classes(item, n_classes)


def drop_pretrained(node: Any) -> None:
    """Remove every ``init_cfg`` that would load a file, in place."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if isinstance(init, dict) and (init.get("type") == "Pretrained" or "checkpoint" in init):
            node["init_cfg"] = None
        if "pretrained" in node:
            node["pretrained"] = None
        for value in node.values():
            drop_pretrained(value)
    elif isinstance(node, (list, tuple)):
        for item in node:
            drop_pretrained(item)


def _plain(node: Any) -> Any:
    """Plain dicts, lists, strings and numbers, so that a checkpoint can carry the config."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return tuple(_plain(value) for value in node)
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise ValueError(
        f"the mmdet config holds {node!r} ({type(node).__name__}), which a checkpoint cannot "
        "carry; write it as text or a number"
    )


def build(model: dict[str, Any], initialise: bool = True) -> nn.Module:
    """Build an mmdet detector from ``model_config``'s plain data.

    Args:
        model: the model config.
        initialise: run mmdet's weight initialisation (False when weights are loaded next).

    Raises:
        KeyError: a ``type`` is not registered.
        RuntimeError: pretrained weights are asked for and cannot be had.
        ImportError: a module of its ``custom_imports`` cannot be found.
    """
    use_mmdet()
    parts = {key: value for key, value in model.items() if key != "custom_imports"}
    _import(model.get("custom_imports", {"imports": []}))
    with _registered_types_only():
        detector = MODELS.build(ConfigDict(parts))
    if initialise:
        try:
            detector.init_weights()
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"the pretrained backbone could not be loaded ({error}). Without a network, put "
                "the file into torch's hub cache, name a local file with "
                "+detector.options.backbone.init_cfg.checkpoint=<file>, or train from scratch with "
                "detector.pretrained=false"
            ) from error
    return detector


@contextmanager
def _registered_types_only() -> Iterator[None]:
    """Within it, mmengine does not take a ``type`` for the path of any Python object.

    It would find and call ``os.system``, so a checkpoint's model config could run anything.
    """
    look_up = registry.get_object_from_string
    registry.get_object_from_string = lambda _: None
    try:
        yield
    finally:
        registry.get_object_from_string = look_up


def _import(custom: dict[str, Any]) -> None:
    """Import the modules that an mmdet config asks for, which register its own parts."""
    try:
        import_modules_from_strings(**custom)
    except ImportError as error:
        raise ImportError(
            f"the detector's config imports {custom['imports']}, of which one cannot be imported "
            f"({error}); put its folder on PYTHONPATH"
        ) from error


def load_weights(detector: nn.Module, path: str | Path, predictors: Sequence[str]) -> None:
    """Load a published or own state dict, the predictors excepted where shapes differ.

    Args:
        detector: an mmdet detector.
        path: ``{"state_dict": ...}`` or a bare state dict; ``module.`` prefixes are removed.
        predictors: module names whose shapes may differ (another number of classes).

    Raises:
        ValueError: the file belongs to another detector (the message counts and names the keys),
            or cannot be read as plain tensors.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"detector.checkpoint={str(path)!r}: no such file")
    content = _read(path)
    state = content.get("state_dict", content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"detector.checkpoint={str(path)!r} holds no state dict of tensors")
    state = {key.removeprefix("module.").removeprefix("detector."): v for key, v in state.items()}
    # what mmdet 2 averaged beside the model; a later file's `state_dict` is the average itself
    state = {key: value for key, value in state.items() if not key.startswith("ema_")}
    own = detector.state_dict()
    new_head = {
        key
        for key, value in own.items()
        if key in state
        and state[key].shape != value.shape
        and any(key.startswith(f"{name}.") for name in predictors)
    }
    wrong = sorted(key for key in own if key not in state or state[key].shape != own[key].shape)
    wrong = [key for key in wrong if key not in new_head]
    unknown = sorted(set(state) - set(own))
    if wrong or unknown:
        pruned = " or to a pruned one, which ldt.load_pruned opens" if "ldt" in content else ""
        raise ValueError(
            f"detector.checkpoint={str(path)!r} belongs to another detector{pruned}: "
            f"{len(wrong)} of {len(own)} tensors are missing or have another shape "
            f"(first: {wrong[:3]}), {len(unknown)} are unknown (first: {unknown[:3]}). "
            "Choose the `detector` (and its options) that the file was made with"
        )
    if new_head:
        log.warning("new predictors (another number of classes): %s", sorted(new_head))
    detector.load_state_dict({k: v for k, v in state.items() if k not in new_head}, strict=False)


class _Buffer:
    """Stands for mmengine's HistoryBuffer in a published checkpoint; what it held is not used."""

    def __setstate__(self, state: Any) -> None:
        """Take nothing."""


def _nothing(*_: Any) -> None:
    """Stands for the lookup of HistoryBuffer's own methods."""


def _published() -> list[Any]:
    """What mmdet's published checkpoints hold beside tensors: logs of their training."""
    scalars = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
    numpy = [np.ndarray, np.dtype, *scalars]
    names = ("numpy.core.multiarray", "numpy._core.multiarray")
    multiarray: Any = import_module(names[hasattr(np, "_core")])
    for function in (multiarray._reconstruct, multiarray.scalar):
        numpy += [(function, f"{name}.{function.__name__}") for name in names]
    buffer = (_Buffer, "mmengine.logging.history_buffer.HistoryBuffer")
    return [*numpy, buffer, (_nothing, "builtins.getattr")]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_published()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise ValueError(
            f"detector.checkpoint={str(path)!r} is damaged or holds more than tensors, plain data "
            f"and mmengine's log buffers ({type(error).__name__}: {str(error)[:200]}). A file that "
            "you trust becomes loadable by torch.save({'state_dict': torch.load(path, "
            "weights_only=False)['state_dict']}, path)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"detector.checkpoint={str(path)!r} holds a {type(content).__name__}, not a state dict"
        )
    return content


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
    transformer follows (:func:`attends`), which stays whole.
    """
    with neck_maps(detector, name) as maps:
        extract: Any = detector.extract_feat
        extract(images)
    return maps


def attends(detector: nn.Module) -> bool:
    """Whether a transformer reads the neck's maps."""
    kinds = (nn.MultiheadAttention, MultiScaleDeformableAttention)
    layers = (n for n, m in detector.named_modules() if isinstance(m, kinds))
    return any(not name.startswith(("backbone.", "neck.")) for name in layers)


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
def evaluating(model: nn.Module) -> Iterator[None]:
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
        with evaluating(detector), neck_maps(detector, neck) as maps:
            outputs = raw_forward(detector, images)
    finally:
        for hook in hooks:
            hook.remove()
    outputs += maps if unused or attends(detector) else []
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


def objects_of(samples: Sequence[DetDataSample], shape: tuple[int, int]) -> Objects:
    """The labelled objects of a batch, in pixels of the network input (ignored ones left out)."""
    boxes, labels, image = [], [], []
    for index, sample in enumerate(samples):
        instances: Any = sample.gt_instances
        found = instances.bboxes
        found = getattr(found, "tensor", found)
        boxes.append(found)
        labels.append(instances.labels)
        image.append(torch.full((len(found),), index, dtype=torch.long, device=found.device))
    return Objects(torch.cat(boxes).float(), torch.cat(labels).long(), torch.cat(image), shape)


def quiet() -> None:
    """Silence what the libraries say that a user can do nothing about."""
    for told in (
        "torch.meshgrid",
        "does not have many workers",
        "Trying to infer the `batch_size`",
        "`num_anchors` is deprecated",
        "torch.cuda.amp.autocast",
        "LeafSpec",
        "have overridden `transfer_batch_to_device`",
        "exists and is not empty",  # a run's folder, which is meant to be gone on with
        "smaller than the logging interval",
        "out of bounds, the drawn",  # of boxes in a picture
        "sync_dist=True",  # the metrics join the tables of all processes themselves
    ):
        warnings.filterwarnings("ignore", message=f".*{re.escape(told)}")
    for name in ("faster_coco_eval", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
