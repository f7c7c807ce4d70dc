"""Let mmdet's detectors predict with tensors of fixed shapes, so that this can be traced.

mmdet drops rows: candidates below a score, boxes of no size, boxes that another one suppresses.
Within :func:`fixed_shapes` they stay, with score 0. Scores, boxes and labels of what is left are
mmdet's own, bit for bit, since greedy suppression does not depend on candidates of lower score.
A second stage is given the best proposal once more in place of a suppressed one.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from mmcv.ops import nms as greedy_nms
from mmcv.ops.deform_conv import deform_conv2d
from mmcv.ops.masked_conv import masked_conv2d
from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d
from mmcv.ops.nms import batched_nms
from mmcv.ops.roi_align import roi_align
from mmdet.models.layers import bbox_nms
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.utils import filter_scores_and_topk
from torch import Tensor
from torch.overrides import TorchFunctionMode

PACKAGES = ("mmdet.", "mmcv.ops")  # whose modules hold what is replaced
Pair = tuple[int, int]


@contextmanager
def fixed_shapes(most: int, candidates: int | None = None) -> Iterator[None]:
    """Keep the rows that mmdet's heads would drop, in the block.

    Args:
        most: detections of an image.
        candidates: boxes of an image, those of the highest scores, that suppress one another; None:
            all. Fewer are faster, and change nothing while ``most`` of them survive.

    Raises:
        ValueError: in the block, when a detector suppresses boxes in a way that drops no rows.
    """
    with _replaced(_replacements(most, candidates)), _RowsStay():
        yield


def _replacements(most: int, candidates: int | None) -> dict[Any, Any]:
    """Return what takes the place of functions of mmdet, mmcv and torch."""

    def suppress(
        boxes: Tensor,
        scores: Tensor,
        idxs: Tensor,
        nms_cfg: Mapping[str, Any] | None,
        class_agnostic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return _suppress(boxes, scores, idxs, nms_cfg, class_agnostic, most, candidates)

    return {
        filter_scores_and_topk: _best,
        batched_nms: suppress,
        bbox_nms.multiclass_nms: _suppress_classes,
        deform_conv2d: _deform_conv,
        modulated_deform_conv2d: _modulated_deform_conv,
        masked_conv2d: _unmasked_conv,
        roi_align: _roi_align,
        SingleRoIExtractor.forward: _regions,
        torch.onnx.is_in_onnx_export: lambda: False,  # mmdet 3.3 then imports what it has not
    }


@contextmanager
def _replaced(replacements: Mapping[Any, Any]) -> Iterator[None]:
    """Replace functions in every module that holds them, in the block."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(PACKAGES) or name == "torch.onnx"
    ]
    places: list[tuple[Any, str, Any]] = []
    for module in [*modules, SingleRoIExtractor]:
        for name, value in list(vars(module).items()):
            if callable(value) and _hashable(value) and value in replacements:
                places.append((module, name, value))
    try:
        for module, name, value in places:
            setattr(module, name, replacements[value])
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)


def _hashable(value: object) -> bool:
    return getattr(type(value), "__hash__", None) is not None


class _RowsStay(TorchFunctionMode):
    """Read ``x[mask]`` as ``x`` with zeros for the others, where ``x`` are scores.

    A mask of rows is a vector of bool; scores are a vector of floats, and boxes and labels stay as
    they are. In-place operations on slices, which are lost in a trace, become assignments.
    """

    def __init__(self) -> None:
        super().__init__()
        self._slices: deque[tuple[Tensor, Tensor, Any]] = deque(maxlen=8)  # slice, of what, which

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            tensor: Tensor = args[0]
            index: Any = args[1]
            if isinstance(index, tuple) and _is_row_mask(index[0]):
                mask = cast(Tensor, index[0])
                rows = mask.view(-1, *[1] * (tensor.ndim - 1))
                return torch.where(rows, tensor, 0)[(slice(None), *index[1:])]
            if _is_row_mask(index):
                kept = cast(Tensor, index)
                return torch.where(kept, tensor, 0) if _are_scores(tensor) else tensor.clone()
            part = func(*args)
            if isinstance(index, tuple) and any(isinstance(each, slice) for each in index):
                self._slices.append((part, tensor, index))
            return part
        if func is Tensor.all and _is_row_mask(args[0]) and not (args[1:] or kwargs):
            return False  # `if not mask.all(): x = x[mask]`, which the traced image must not decide
        if func is Tensor.sum and _is_row_mask(args[0]) and not (args[1:] or kwargs):
            return int(args[0].shape[0])  # `if mask.sum() == 0: continue`, likewise
        if func is Tensor.clamp_:
            for part, tensor, index in self._slices:
                if part is args[0]:
                    tensor[index] = part.clamp(*args[1:], **kwargs)
                    return tensor[index]
        return func(*args, **kwargs)


def _is_row_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == 1


def _are_scores(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.is_floating_point()


def _best(
    scores: Tensor, score_thr: float, topk: int, results: Any = None
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return the highest scores: mmdet's ``filter_scores_and_topk`` with a fixed number of rows."""
    rows, classes = int(scores.shape[0]), int(scores.shape[1])
    scores = torch.where(scores > score_thr, scores, 0).flatten()
    count = rows * classes if topk < 0 else min(topk, rows * classes)
    scores, found = scores.topk(count)
    keep = torch.div(found, classes, rounding_mode="trunc")
    if isinstance(results, dict):
        results = {key: value[keep] for key, value in results.items()}
    elif isinstance(results, list):
        results = [value[keep] for value in results]
    elif results is not None:
        results = results[keep]
    return scores, found - keep * classes, keep, results


def _suppress(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    nms_cfg: Mapping[str, Any] | None,
    class_agnostic: bool,
    most: int,
    candidates: int | None,
) -> tuple[Tensor, Tensor]:
    """Return ``most`` rows [most, 5] and their indices: mmcv's ``batched_nms``."""
    options = dict(nms_cfg or {})
    kind = options.pop("type", "nms")
    if kind not in ("nms", greedy_nms):
        raise ValueError(f"its boxes are suppressed by {kind}, which lowers scores one by one")
    if boxes.shape[-1] != 4:
        raise ValueError("its boxes are rotated")
    scores = scores.flatten()
    count = min(int(scores.shape[0]), candidates or sys.maxsize)
    scores, order = scores.topk(count)
    boxes, idxs = boxes[order], idxs[order]
    if nms_cfg is not None:
        scores = scores * _survivors(boxes, scores, idxs, options, class_agnostic)
    limit = options.get("max_num", -1)
    scores, best = scores.topk(min(count, most, limit if limit > 0 else most))
    best = torch.where(scores > 0, best, best[0])
    return torch.cat([boxes[best], scores[:, None]], -1), order[best]


def _survivors(
    boxes: Tensor, scores: Tensor, idxs: Tensor, options: Mapping[str, Any], class_agnostic: bool
) -> Tensor:
    """Return 1 for every box that no better one suppresses, 0 for the others: [n], float."""
    there = scores > 0
    boxes = torch.where(there[:, None], boxes, 0)
    if not options.get("class_agnostic", class_agnostic):
        boxes = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None]
    # those that are not there lie on each other, so that they suppress one another
    boxes = torch.where(there[:, None], boxes, boxes.new_tensor([-2.0, -2.0, -1.0, -1.0]))
    offset = options.get("offset", 0)
    edges = boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes
    threshold = options.get("iou_threshold", options.get("iou_thr"))
    kept = torchvision.ops.nms(edges, scores, float(np.float32(threshold)))
    return torch.zeros_like(scores).index_fill(0, kept, 1.0)


def _suppress_classes(
    multi_bboxes: Tensor,
    multi_scores: Tensor,
    score_thr: float,
    nms_cfg: Mapping[str, Any],
    max_num: int = -1,
    score_factors: Tensor | None = None,
    return_inds: bool = False,
    box_dim: int = 4,
) -> tuple[Tensor, ...]:
    """Return boxes with scores, labels and indices: mmdet's ``multiclass_nms``."""
    rows, classes = int(multi_scores.shape[0]), int(multi_scores.shape[1]) - 1
    if multi_bboxes.shape[1] > box_dim:
        boxes = multi_bboxes.view(rows, -1, box_dim)
    else:
        boxes = multi_bboxes[:, None].expand(rows, classes, box_dim)
    scores = multi_scores[:, :-1]
    labels = torch.arange(classes, device=scores.device).view(1, -1).expand_as(scores)
    scores = torch.where(scores > score_thr, scores, 0)
    if score_factors is not None:
        scores = scores * score_factors.view(-1, 1)
    labels = labels.reshape(-1)
    nms: Any = bbox_nms.batched_nms  # as it is replaced now
    dets, keep = nms(boxes.reshape(-1, box_dim), scores.reshape(-1), labels, nms_cfg)
    if max_num > 0:
        dets, keep = dets[:max_num], keep[:max_num]
    return (dets, labels[keep], keep) if return_inds else (dets, labels[keep])


def _unmasked_conv(
    features: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int | Pair = 0,
    stride: int | Pair = 1,
) -> Tensor:
    """Convolve everywhere: what lies outside of the mask is left out later."""
    return F.conv2d(features, weight, bias, stride, padding)


def _roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:
    """RoI align with mmcv's arguments."""
    if pool_mode != "avg":
        raise ValueError(f"its RoI align pools by {pool_mode}")
    return torchvision.ops.roi_align(
        input, rois, output_size, spatial_scale, sampling_ratio, aligned
    )


def _regions(
    self: SingleRoIExtractor,
    feats: tuple[Tensor, ...],
    rois: Tensor,
    roi_scale_factor: float | None = None,
) -> Tensor:
    """Return the features of every region: taken from all scales, of which its own one counts."""
    if len(feats) == 1:
        return self.roi_layers[0](feats[0], rois)
    scales = self.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = self.roi_rescale(rois, roi_scale_factor)
    parts = [
        torch.where((scales == index).view(-1, 1, 1, 1), layer(maps, rois), 0)
        for index, (layer, maps) in enumerate(zip(self.roi_layers, feats, strict=False))
    ]
    return torch.stack(parts).sum(0)


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Deformable convolution, version 1, with mmcv's arguments."""
    return _modulated_deform_conv(
        input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups
    )


def _modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Deformable convolution, version 2, with mmcv's arguments: as samples and a convolution.

    No runtime but ONNX Runtime has the operator itself; all have bilinear sampling.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    size = _sizes(input), _sizes(weight)[2:]
    out = [
        (size[0][axis + 2] + 2 * padding[axis] - dilation[axis] * (size[1][axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis in (0, 1)
    ]
    offset = _leading(offset, out)
    mask = None if mask is None else _leading(mask, out)
    if not torch.jit.is_tracing():
        return torchvision.ops.deform_conv2d(
            input, offset, weight, bias, stride, padding, dilation, mask
        )
    (_, channels, height, width), kernel = size
    taps, per_group = kernel[0] * kernel[1], channels // deform_groups
    moves = offset.view(deform_groups, taps, 2, *out)
    rows, columns = (
        (
            torch.arange(out[axis]) * stride[axis] - padding[axis]
        )  # where the kernel's first element of an output cell lies
        for axis in (0, 1)
    )
    tap = torch.arange(taps)
    y = moves[:, :, 0] + ((tap // kernel[1] * dilation[0]).view(-1, 1, 1) + rows.view(1, -1, 1)).to(
        input
    )
    x = moves[:, :, 1] + (
        (tap % kernel[1] * dilation[1]).view(-1, 1, 1) + columns.view(1, 1, -1)
    ).to(input)
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    grid = grid.view(deform_groups, taps * out[0], out[1], 2)
    parts = input.view(deform_groups, per_group, height, width)
    samples = F.grid_sample(parts, grid, "bilinear", "zeros", align_corners=True)
    samples = samples.view(deform_groups, per_group, taps, *out)
    if mask is not None:
        samples = samples * mask.view(deform_groups, 1, taps, *out)
    samples = samples.view(1, channels * taps, *out)
    return F.conv2d(samples, weight.flatten(1)[..., None, None], bias, groups=groups)


def _leading(maps: Tensor, size: list[int]) -> Tensor:
    """Return maps as large as the output, as mmcv reads larger ones (DyHead's)."""
    if list(_sizes(maps)[2:]) == size:
        return maps
    cells = int(maps.shape[1]) * size[0] * size[1]
    return maps.flatten(1)[:, :cells].view(int(maps.shape[0]), int(maps.shape[1]), *size)


def _sizes(tensor: Tensor) -> list[int]:
    return [int(side) for side in tensor.shape]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
