"""Objects on feature maps: their cells, their vectors and the attention around them (eqs. 1-3, 15).

Shape suffixes, one letter per dimension: n images, k boxes, c channels, h rows, w columns.
"""

import torch
from torch import Tensor
from torchvision.ops import roi_pool

from ldt.objects import Objects

ATTENTION_A, ATTENTION_B = 1.2, 0.062  # strength and decay of the attention, the paper's
OBJECTS_AT_ONCE = 64  # attention: 64 distance maps of 208 x 336 cells are 18 MB


def cell_boxes(boxes: Tensor, shape: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Return the cells that boxes touch (eq. 1): [K, 4] int64, (x1, y1, x2, y2), both inclusive.

    `boxes` [K, 4] are in pixels of the padded input of size `shape`; the stride, shape / map_hw, is
    fractional if the size of the map was rounded up. The first cell is floor(x1 / stride), the last
    ceil(x2 / stride) - 1, clamped to the map; every box has at least one cell.
    """
    sides = []
    for axis, (pixels, cells) in enumerate(zip(reversed(shape), reversed(map_hw), strict=True)):
        # Multiply first, in float64: a box edge on a cell border is exactly on it then.
        edges = boxes[:, axis::2].double() * cells / pixels
        first = edges[:, 0].floor().long().clamp(0, cells - 1)
        last = (edges[:, 1].ceil().long() - 1).clamp(max=cells - 1).maximum(first)
        sides.append(torch.stack([first, last], dim=1))
    return torch.stack(sides, dim=2).flatten(1)


def object_vectors(feat_nchw: Tensor, objects: Objects) -> Tensor:
    """Return each channel's maximum inside each object's box (eqs. 1-3): [K, C], with gradient.

    Only cells inside the box are considered: neck outputs have no ReLU, so the zeros of a mask
    would clip negative values. float64 features stay float64, all others become float32. For K = 0
    the result is an empty tensor that is part of the autograd graph.

    Raises:
        ValueError: an object's image is outside the batch.
    """
    n, _, h, w = feat_nchw.shape
    # The pooling operator does not check indices: a wrong one would read out of bounds.
    image = objects.image.tolist()  # on the CPU, so nothing waits
    if image and not 0 <= min(image) <= max(image) < n:
        raise ValueError(
            f"objects.image goes from {min(image)} to {max(image)}, but the features hold {n} "
            "images: give each object its index in the batch, from 0"
        )
    feat_nchw = feat_nchw.to(torch.promote_types(feat_nchw.dtype, torch.float32))
    cells = cell_boxes(objects.boxes, objects.shape, (h, w))
    image_k = objects.image.to(cells, non_blocking=True)
    rois = torch.cat([image_k[:, None], cells], dim=1).to(feat_nchw)
    return roi_pool(feat_nchw, rois, output_size=1, spatial_scale=1.0).flatten(1)


def attention(
    objects: Objects,
    map_hw: tuple[int, int],
    n_images: int,
    a: float = ATTENTION_A,
    b: float = ATTENTION_B,
) -> Tensor:
    """Return the attention of each cell of a map (eq. 15): [n_images, h, w] float32, in [0, 1].

    It is 1 in the cells of an object's box, and min(1, a * d2^-b) outside, where d2 is the squared
    distance, in cells of this map, from the cell's centre (column + 0.5, row + 0.5) to the box
    centre divided by the stride. A cell has the maximum over the objects of its image; images
    without objects have zeros.

    Raises:
        ValueError: a or b is not positive, so attention would not decay.
    """
    if a <= 0 or b <= 0:
        raise ValueError(
            f"a={a} and b={b} must be positive; the paper has a={ATTENTION_A}, b={ATTENTION_B}"
        )
    # Attention decreases with distance, so its maximum is at the smallest distance.
    d2_nhw = torch.full((n_images, *map_hw), torch.inf, device=objects.boxes.device)
    for image, d2_hw in enumerate(d2_nhw):
        for boxes in objects.of_image(image).boxes.split(OBJECTS_AT_ONCE):
            d2_khw = _squared_distances(boxes, objects.shape, map_hw)
            d2_hw.copy_(torch.cat([d2_hw[None], d2_khw]).amin(0))  # d2_khw may be empty
    return (a * d2_nhw.pow(-b)).clamp(max=1)


def _squared_distances(boxes: Tensor, shape: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Return squared distances of cells to box centres, in cells, 0 inside boxes: [K, h, w]."""
    cells = cell_boxes(boxes, shape, map_hw)
    squared, inside = [], []
    for axis, (pixels, n_cells) in ((1, (shape[0], map_hw[0])), (0, (shape[1], map_hw[1]))):
        index = torch.arange(n_cells, device=boxes.device)
        centre = boxes[:, axis::2].double().mean(1, keepdim=True) * n_cells / pixels
        squared.append((index + 0.5 - centre).square().float())
        inside.append((index >= cells[:, axis, None]) & (index <= cells[:, axis + 2, None]))
    d2_khw = squared[0][:, :, None] + squared[1][:, None, :]
    return d2_khw.masked_fill_(inside[0][:, :, None] & inside[1][:, None, :], 0)
