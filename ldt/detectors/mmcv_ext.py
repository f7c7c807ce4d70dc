"""Replacement of the compiled `mmcv._ext`: its functions, backed by torchvision's operators.

Imported under the name `mmcv._ext` (see `mmcv_ops.py`), not by `ldt` itself. It follows the calls
of mmcv's autograd Functions and `mmcv/ops/csrc/pytorch/pybind.cpp`: an output is a tensor to fill,
a gradient a zeroed tensor to add to. `columns`, `ones` and `im2col_step` concern scratch space,
which torchvision manages itself. float16 and bfloat16 are computed in float32.

Shapes: `input` (N, C, H, W); `rois` (K, 5), each (image index, x1, y1, x2, y2) in image pixels;
pooled maps (K, C, pooled height, pooled width); `weight` (O, C / groups, kH, kW); `offset`
(N, 2 * deform groups * kH * kW, H', W'), (y, x) of each kernel element in turn; `mask`
(N, deform groups * kH * kW, H', W').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

_torchvision = torch.ops.torchvision


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # mmcv checks `hasattr(_ext, name)` for every operator when mmcv.ops is imported, so the missing
    # ones must exist and raise only when they are called.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def operator(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(_missing(name))

    return operator


COMPILES = "torch>=2.6,<2.12"
"""The releases of torch that ldt supports and mmcv 2.1 compiles with; torch 2.12 needs C++20."""


def _missing(operator: str) -> str:
    return (
        f"mmcv's operator {operator!r} needs a compiled mmcv; this is mmcv-lite with torchvision's "
        f"operators, which do not include it. A compiled mmcv>=2.0.1,<2.2 needs {COMPILES}, and "
        f"torch {torch.__version__} is installed. In an environment with such a torch and a C++ "
        "compiler: pip uninstall mmcv-lite; pip install --no-build-isolation 'mmcv>=2.0.1,<2.2'"
    )


def get_compiler_version() -> str:
    """Return what `mmcv.utils.collect_env` reports as the C++ compiler."""
    return f"none (mmcv-lite, operators of torchvision {torchvision.__version__})"


def get_compiling_cuda_version() -> str:
    """Return what `mmcv.utils.collect_env` reports as the CUDA version of the operators."""
    return str(torch.version.cuda)


def _wide(tensor: Tensor) -> Tensor:
    # torchvision has no bfloat16 kernels; its own autocast uses float32 too.
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression: return the indices (M,) of kept boxes, best score first.

    `boxes` (N, 4) are (x1, y1, x2, y2) with width x2 - x1 + `offset`, `offset` 0 or 1. A box is
    removed if its IoU with a kept box of higher score is above `iou_threshold`.
    """
    # x2 + 1 is the right edge of a box whose x1 and x2 both count as pixels.
    edges = _wide(boxes) + boxes.new_tensor([0, 0, offset, offset])
    # mmcv compares in float32; torchvision on a CPU in float64, where float32(3 / 5) > 0.6.
    return _torchvision.nms(edges, _wide(scores), float(np.float32(iou_threshold)))


def _overlaps(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    # IoU (N,) of a box (4,) with others (N, 4); a side is x2 - x1 + offset. 0 / 0 is NaN, as in C.
    def area(corners: np.ndarray) -> np.ndarray:
        sides = corners[..., 2:] - corners[..., :2] + offset
        return sides[..., 0] * sides[..., 1]

    first, last = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    sides = np.maximum(last - first + offset, 0)
    shared = sides[:, 0] * sides[:, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return shared / (area(box) + area(others) - shared)


def softnms(
    boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float,
    min_score: float, method: int, offset: int,
) -> Tensor:  # fmt: skip
    """Soft-NMS (1704.04503): fill `dets` and return the indices (M,) of kept boxes, best first.

    The best box of those left is kept, and the score of each other box is multiplied by a weight
    that depends on its IoU o with it: 0 (`method` 0) or 1 - o (1) where o >= `iou_threshold`, or
    exp(-o^2 / `sigma`) (2). Boxes whose score falls below `min_score` are dropped. The first M rows
    of `dets` (N, 5) are the kept boxes and their final scores. Computed on the CPU.
    """
    corners, left = _wide(boxes).cpu().numpy(), _wide(scores).cpu().numpy().copy()
    threshold, least = np.float32(iou_threshold), np.float32(min_score)
    order, i = np.arange(len(left)), 0
    while i < len(order):
        candidates = left[order[i:]]  # NaN after two empty boxes have met: less than nothing, in C
        best = i if np.isnan(candidates[0]) else i + int(np.nanargmax(candidates))
        order[[i, best]] = order[[best, i]]
        rest = order[i + 1 :]
        overlaps = _overlaps(corners[order[i]], corners[rest], offset)
        if method == 2:
            left[rest] *= np.exp(-(overlaps**2) / np.float32(sigma))
        else:
            left[rest] *= np.where(overlaps >= threshold, (1 - overlaps) * method, 1)
        # mmcv fills the gaps from the end, which decides between boxes of equal scores
        stays = ~(left[rest] < least)
        count = int(stays.sum())
        rest[:count][~stays[:count]] = rest[count:][stays[count:]][::-1]
        i, order = i + 1, order[: i + 1 + count]
    kept = torch.from_numpy(order).to(boxes.device)
    dets[: len(kept), :4] = boxes[kept]
    dets[: len(kept), 4] = torch.from_numpy(left[order])
    return kept


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return what each box that NMS keeps suppresses: lists of indices, the kept box first.

    `dets` (N, 5) are boxes and scores. A box belongs to the first kept box, in the order of scores,
    with which its IoU is at least `iou_threshold` (Prime Sample Attention, 1904.04821).
    """
    rows = _wide(dets).detach().cpu().numpy()
    order = np.argsort(-rows[:, 4], kind="stable")
    groups = []
    while len(order):
        first, rest = order[0], order[1:]
        matched = _overlaps(rows[first, :4], rows[rest, :4], 0) >= np.float32(iou_threshold)
        groups.append([int(first), *rest[matched].tolist()])
        order = rest[~matched]
    return groups


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
    aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
    pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Fill `output` with the mean of the bilinear samples of each bin (Mask R-CNN, 1703.06870).

    Raises:
        NotImplementedError: `pool_mode` is 0, the maximum, which torchvision does not have.
    """
    if pool_mode != 1:
        raise NotImplementedError(_missing("roi_align with pool_mode='max'"))
    sampling = (spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    output.copy_(_torchvision.roi_align(_wide(input), _wide(rois), *sampling))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
    aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
    pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Add the gradient of `roi_align_forward` with respect to its input to `grad_input`."""
    size = (aligned_height, aligned_width, *grad_input.shape)
    grad_input += _torchvision._roi_align_backward(
        _wide(grad_output), _wide(rois), spatial_scale, *size, sampling_ratio, aligned
    )


def _bins(start: Tensor, end: Tensor, count: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    # First cell, last cell and emptiness of `count` bins of [start, end], each (K, count).
    size = (end - start)[:, None] / count
    steps = torch.arange(count, device=start.device)
    first = (steps * size + start[:, None]).floor().clamp(0, limit)
    stop = ((steps + 1) * size + start[:, None]).ceil().clamp(0, limit)
    return first, stop - 1, (stop <= first) | (size <= 0)


def roi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor,
    pooled_height: int, pooled_width: int, spatial_scale: float,
) -> None:  # fmt: skip
    """Fill `output` with the maximum of each bin and `argmax` with its cell y * W + x.

    Fast R-CNN (1504.08083) as implemented by mmcv: a region is [x1, x2 + 1] * spatial_scale without
    rounding, and a bin contains all cells that it touches. An empty bin has value 0 and cell -1.
    """
    feats = _wide(input)
    image, x1, y1, x2, y2 = _wide(rois).unbind(1)
    left, right, no_width = _bins(
        x1 * spatial_scale, (x2 + 1) * spatial_scale, pooled_width, input.shape[3]
    )
    top, bottom, no_height = _bins(
        y1 * spatial_scale, (y2 + 1) * spatial_scale, pooled_height, input.shape[2]
    )
    # torchvision rounds a region to whole cells before it divides it, mmcv does not. Whole cells
    # are not changed, so each bin is passed as a region of its own with a single bin.
    corners = (left[:, None], top[..., None], right[:, None], bottom[..., None])
    cells = torch.broadcast_tensors(image[:, None, None], *corners)
    value, cell = _torchvision.roi_pool(feats, torch.stack(cells, -1).view(-1, 5), 1.0, 1, 1)
    empty = (no_width[:, None] | no_height[..., None])[:, None]
    grid = (len(rois), pooled_height, pooled_width, input.shape[1])
    output.copy_(value.view(grid).permute(0, 3, 1, 2).masked_fill(empty, 0))
    argmax.copy_(cell.view(grid).permute(0, 3, 1, 2).masked_fill(empty, -1))


def roi_pool_backward(
    grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor,
    pooled_height: int, pooled_width: int, spatial_scale: float,
) -> None:  # fmt: skip
    """Add each pooled gradient to `grad_input` at its cell in `argmax`."""
    size = (pooled_height, pooled_width, *grad_input.shape)
    grad_input += _torchvision._roi_pool_backward(
        _wide(grad_output), _wide(rois), argmax, spatial_scale, *size
    )


_Geometry = tuple[int, int, int, int, int, int, int, int]
"""Stride, padding, dilation (y before x each), groups, deform groups: torchvision's order."""


def _as_large_as_output(maps: Tensor, input: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    # mmcv's kernels index an image's offsets like an output map whatever their shape, and DyHead
    # (2106.08322) passes larger ones, which torchvision refuses.
    sizes = []
    for axis in (0, 1):
        stride, pad, dilation = geometry[axis], geometry[axis + 2], geometry[axis + 4]
        reach = dilation * (weight.shape[axis + 2] - 1) + 1
        sizes.append((input.shape[axis + 2] + 2 * pad - reach) // stride + 1)
    cells = maps.shape[1] * sizes[0] * sizes[1]
    return maps.flatten(1)[:, :cells].view(*maps.shape[:2], *sizes)


def _add_leading(total: Tensor, part: Tensor) -> None:
    # Add the gradient of the part that `_as_large_as_output` returns.
    flat = part.flatten(1)
    total.view(len(total), -1)[:, : flat.shape[1]] += flat


def _deform_args(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None,
    geometry: _Geometry,
) -> tuple[Tensor | int | bool, ...]:  # fmt: skip
    # Arguments of torchvision's forward and backward; a missing mask or bias must be a tensor too.
    offset = _as_large_as_output(offset, input, weight, geometry)
    mask = None if mask is None else _as_large_as_output(mask, input, weight, geometry)
    some_mask = input.new_zeros(len(input), 1) if mask is None else mask
    some_bias = input.new_zeros(len(weight)) if bias is None else bias
    tensors = (input, weight, offset, some_mask, some_bias)
    return (*map(_wide, tensors), *geometry, mask is not None)


def _offset_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, geometry: _Geometry
) -> Tensor:
    # mmcv gives no gradient to points at -1 or less, or at the size or more; torchvision gives one
    # at exactly -1, where a padded convolution with offsets of 0 starts at dilation 1.
    stride, pad, dilation = geometry[:2], geometry[2:4], geometry[4:6]
    shifts = _as_large_as_output(offset, input, weight, geometry)
    shifts = _wide(shifts).unflatten(1, (geometry[7], *weight.shape[2:], 2))
    outside = torch.zeros_like(shifts[:, :, :, :, 0], dtype=torch.bool)
    for axis in (0, 1):
        cells = torch.arange(shifts.shape[axis - 2], device=grad.device) * stride[axis] - pad[axis]
        taps = torch.arange(weight.shape[axis + 2], device=grad.device) * dilation[axis]
        start = taps[:, None] + cells
        start = start[:, None, :, None] if axis == 0 else start[None, :, None, :]
        points = shifts[:, :, :, :, axis] + start
        outside |= (points <= -1) | (points >= input.shape[axis + 2])
    return grad.view_as(shifts).masked_fill(outside.unsqueeze(4), 0).view_as(grad)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Fill `output` (N, O, H', W') with a deformable convolution, version 1 (1703.06211)."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    args = _deform_args(input, weight, offset, None, None, geometry)
    output.copy_(_torchvision.deform_conv2d(*args))


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor,
    weight: Tensor, columns: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """Add the gradients of `deform_conv_forward` to `gradInput` and `gradOffset`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    args = _deform_args(input, weight, offset, None, None, geometry)
    grads = _torchvision._deform_conv2d_backward(_wide(gradOutput), *args)
    gradInput += grads[0]
    _add_leading(gradOffset, _offset_gradient(grads[2], input, weight, offset, geometry))


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor,
    ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """Add `scale` times the gradient of `deform_conv_forward` to `gradWeight`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # mmcv does not pass the weight here, whose gradient depends on its shape only.
    args = _deform_args(input, torch.zeros_like(gradWeight), offset, None, None, geometry)
    gradWeight += scale * _torchvision._deform_conv2d_backward(_wide(gradOutput), *args)[1]


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
    output: Tensor, columns: Tensor,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Fill `output` (N, O, H', W') with a deformable convolution, version 2 (1811.11168)."""
    geometry = (
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, deformable_group),
    )
    args = _deform_args(input, weight, offset, mask, bias if with_bias else None, geometry)
    output.copy_(_torchvision.deform_conv2d(*args))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
    columns: Tensor, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor,
    grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
    dilation_h: int, dilation_w: int, group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Add the gradients of `modulated_deform_conv_forward` to the five `grad_*` of its inputs."""
    geometry = (
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w),
        *(group, deformable_group),
    )
    args = _deform_args(input, weight, offset, mask, bias if with_bias else None, geometry)
    grads = _torchvision._deform_conv2d_backward(_wide(grad_output), *args)
    grad_input += grads[0]
    grad_weight += grads[1]
    _add_leading(grad_offset, _offset_gradient(grads[2], input, weight, offset, geometry))
    _add_leading(grad_mask, grads[3])
    if with_bias:  # otherwise mmcv passes an empty one
        grad_bias += grads[4]


def _carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    n, channels, height, width = features.shape
    patches = F.unfold(features, kernel, padding=kernel // 2)
    patches = patches.view(n, groups, channels // groups, kernel**2, height, width)
    weights = masks.view(n, groups, kernel**2, height, scale, width, scale)
    out = torch.einsum("ngckhw,ngkhawb->ngchawb", patches, weights)
    return out.reshape(n, channels, height * scale, width * scale)


def carafe_forward(
    features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor,
    output: Tensor, kernel_size: int, group_size: int, scale_factor: int,
) -> None:  # fmt: skip
    """Fill `output` with `features` upsampled by CARAFE (1905.02188).

    `masks` (N, groups * kernel ** 2, scale * H, scale * W) are the weights of the cells in the
    kernel window around the cell that an output cell lies in. `rfeatures` stores the features for
    the backward pass.
    """
    rfeatures.copy_(features)
    output.copy_(_carafe(_wide(features), _wide(masks), kernel_size, group_size, scale_factor))


def carafe_backward(
    top_grad: Tensor, rfeatures: Tensor, masks: Tensor, rtop_grad: Tensor,
    rbottom_grad_hs: Tensor, rbottom_grad: Tensor, rmask_grad: Tensor, bottom_grad: Tensor,
    mask_grad: Tensor, kernel_size: int, group_size: int, scale_factor: int,
) -> None:  # fmt: skip
    """Add the gradients of `carafe_forward` to `bottom_grad` (features) and `mask_grad`."""
    leaves = [_wide(tensor).detach().requires_grad_() for tensor in (rfeatures, masks)]
    with torch.enable_grad():  # gradients are disabled within autograd Functions
        output = _carafe(leaves[0], leaves[1], kernel_size, group_size, scale_factor)
    grads = torch.autograd.grad(output, leaves, _wide(top_grad))
    bottom_grad += grads[0]
    mask_grad += grads[1]


def masked_im2col_forward(
    im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor,
    kernel_h: int, kernel_w: int, pad_h: int, pad_w: int,
) -> None:  # fmt: skip
    """Fill `col` (C * kH * kW, K) with the windows of the first image around K cells, stride 1."""
    columns = F.unfold(_wide(im[:1]), (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    width = im.shape[3] + 2 * pad_w - kernel_w + 1
    col.copy_(columns[:, mask_h_idx * width + mask_w_idx])


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor,
    height: int, width: int, channels: int,
) -> None:  # fmt: skip
    """Write the columns of `col` (C, K) to K cells of the first image."""
    im[0, :, mask_h_idx, mask_w_idx] = col


def ms_deform_attn_forward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
    sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int,
) -> Tensor:  # fmt: skip
    """Multi-scale deformable attention (Deformable DETR, 2010.04159), by mmcv's torch code.

    By itself mmcv uses this code on CPUs only. `value` (N, sum of H * W, heads, dim),
    `value_spatial_shapes` (levels, 2) of (H, W), `sampling_locations` (N, queries, heads, levels,
    points, 2) of (x, y) in [0, 1], `attention_weights` the same without the last dimension. Returns
    (N, queries, heads * dim).
    """
    # Imported here because mmcv.ops imports this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    output = multi_scale_deformable_attn_pytorch(
        _wide(value), value_spatial_shapes, _wide(sampling_locations), _wide(attention_weights)
    )
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
    sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor,
    grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor, im2col_step: int,
) -> None:  # fmt: skip
    """Add the gradients of `ms_deform_attn_forward` to the three `grad_*` of its inputs."""
    inputs = (value, sampling_locations, attention_weights)
    leaves = [_wide(tensor).detach().requires_grad_() for tensor in inputs]
    values, points, weights = leaves
    with torch.enable_grad():  # gradients are disabled within autograd Functions
        output = ms_deform_attn_forward(
            values, value_spatial_shapes, value_level_start_index, points, weights, im2col_step
        )
    grads = torch.autograd.grad(output, leaves, _wide(grad_output))
    for total, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        total += grad


def _focal_terms(
    input: Tensor, target: Tensor, weight: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Sign (+1 for the target class, -1 elsewhere), signed logit and factor, each (N, classes).
    positive = target[:, None] == torch.arange(input.shape[1], device=input.device)
    sign = positive.to(_wide(input).dtype) * 2 - 1
    factor = torch.where(positive, alpha, 1 - alpha).to(sign.dtype)
    if weight.numel():
        factor = factor * weight[target][:, None]
    return sign, sign * _wide(input), factor


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` with the focal loss of each logit, eq. 5 of RetinaNet (1708.02002).

    `input` and `output` (N, classes), `target` (N,) where the number of classes is the background,
    `weight` (classes,) or empty. mmdet calls this on GPUs only, for RetinaNet, ATSS, YOLOF, ...
    """
    _, logit, factor = _focal_terms(input, target, weight, alpha)
    output.copy_(-factor * torch.sigmoid(-logit) ** gamma * F.logsigmoid(logit))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Add the derivative of each loss with respect to its logit to `grad_input` (appendix B)."""
    sign, logit, factor = _focal_terms(input, target, weight, alpha)
    p, not_p = torch.sigmoid(logit), torch.sigmoid(-logit)
    inner = gamma * p * F.logsigmoid(logit) - not_p
    grad_input += sign * factor * not_p**gamma * inner
