"""mmcv's operators that sample a feature map, against their definitions, cell by cell."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from ldt.detectors.mmcv_ops import install

install()
import mmcv.ops  # noqa: E402
from mmcv import _ext  # noqa: E402

pytestmark = pytest.mark.skipif(
    not _ext.__file__.endswith("mmcv_ext.py"), reason="a compiled mmcv is installed and in use"
)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def bilinear(plane, y, x):
    """`plane` (C, H, W) at (y, x); 0 from one cell outside on, where mmcv gives no gradient."""
    value = plane.new_zeros(plane.shape[0])
    if not (-1 < y < plane.shape[1] and -1 < x < plane.shape[2]):
        return value
    top, left = (math.floor(torch.as_tensor(place).item()) for place in (y, x))
    for row, from_row in ((top, top + 1 - y), (top + 1, y - top)):
        for col, from_col in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < plane.shape[1] and 0 <= col < plane.shape[2]:
                value = value + plane[:, row, col] * from_row * from_col
    return value


# ---------------------------------------------------------------- regions of interest

ROIS = torch.tensor(
    [
        [0, 1.3, 2.1, 9.7, 8.2],
        [1, 0.0, 0.0, 11.9, 10.2],
        [1, -6.4, -3.1, 4.2, 5.3],  # sticks out at the top left
        [0, 8.6, 7.3, 25.0, 19.0],  # and at the bottom right
        [0, 4.1, 4.2, 4.6, 4.9],  # smaller than a cell
    ],
    dtype=torch.float64,
)


def bilinear_clamped(plane, y, x):
    """The same, but a point up to one cell outside takes the border's value (RoIAlign)."""
    height, width = plane.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(plane.shape[0])
    return bilinear(plane, min(max(y, 0), height - 1), min(max(x, 0), width - 1))


def roi_align_by_definition(feats, roi, size, scale, ratio, aligned):
    image, *corners = roi.tolist()
    x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in corners)
    h, w = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1), max(x2 - x1, 1))
    h, w = h / size[0], w / size[1]
    ny, nx = (ratio or math.ceil(h)), (ratio or math.ceil(w))

    def bin_mean(i, j):
        points = [
            (y1 + (i + (a + 0.5) / ny) * h, x1 + (j + (b + 0.5) / nx) * w)
            for a in range(ny)
            for b in range(nx)
        ]
        return sum(bilinear_clamped(feats[int(image)], *p) for p in points) / len(points)

    bins = [bin_mean(i, j) for i in range(size[0]) for j in range(size[1])]
    return torch.stack(bins, 1).view(-1, *size)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(aligned, ratio):
    feats, size, scale = doubles(2, 3, 6, 7), (2, 3), 0.5
    out = mmcv.ops.RoIAlign(size, scale, ratio, aligned=aligned)(feats, ROIS)
    slow = [roi_align_by_definition(feats, r, size, scale, ratio, aligned) for r in ROIS]
    torch.testing.assert_close(out, torch.stack(slow))
    assert gradcheck(
        lambda f: mmcv.ops.roi_align(f, ROIS, size, scale, ratio, "avg", aligned), (feats,)
    )


def test_roi_align_maximum_is_refused():
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'.*needs torch"):
        mmcv.ops.roi_align(doubles(2, 3, 6, 7), ROIS, 2, 1.0, 2, "max", True)


def roi_pool_by_definition(feats, roi, size, scale):
    image, x1, y1, x2, y2 = roi.tolist()
    x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale

    def cells(start, end, count, i, limit):
        step = (end - start) / count
        first, stop = math.floor(start + i * step), math.ceil(start + (i + 1) * step)
        return slice(min(max(first, 0), limit), min(max(stop, 0), limit)) if step > 0 else slice(0)

    out = feats.new_zeros(feats.shape[1], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = cells(y1, y2, size[0], i, feats.shape[2])
            cols = cells(x1, x2, size[1], j, feats.shape[3])
            patch = feats[int(image), :, rows, cols].flatten(1)
            if patch.numel():
                out[:, i, j] = patch.amax(1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("size", "scale"), [((2, 3), 0.5), ((1, 1), 1.0), ((4, 5), 0.3)])
def test_roi_pool(size, scale):
    feats = doubles(2, 3, 6, 7)
    nothing = torch.tensor([[0, 5, 5, 2, 8], [1, 90, 90, 95, 95]]).double()  # turned round; outside
    rois = torch.cat([ROIS, nothing])
    out = mmcv.ops.RoIPool(size, scale)(feats, rois)
    slow = torch.stack([roi_pool_by_definition(feats, r, size, scale) for r in rois])
    torch.testing.assert_close(out, slow)
    assert (out[-2:] == 0).all()
    seed = torch.randn_like(out)
    (fast_grad,) = torch.autograd.grad(out, feats, seed)
    (slow_grad,) = torch.autograd.grad(slow, feats, seed)
    torch.testing.assert_close(fast_grad, slow_grad)
    assert gradcheck(lambda f: mmcv.ops.roi_pool(f, rois, size, scale), (feats,))


@pytest.mark.parametrize("op", [mmcv.ops.RoIAlign((2, 2), 0.5), mmcv.ops.RoIPool((2, 2), 0.5)])
def test_no_regions_give_an_empty_map(op):
    feats = doubles(2, 3, 6, 7)
    out = op(feats, ROIS[:0])
    assert out.shape == (0, 3, 2, 2)
    out.sum().backward()
    assert (feats.grad == 0).all()


# ---------------------------------------------------------------- deformable convolution


def deform_conv_by_definition(x, offset, weight, mask, stride, pad, dilation, groups, deform):
    batch, channels = x.shape[:2]
    out_channels, _, kh, kw = weight.shape
    _, _, height, width = offset.shape
    taps = offset.view(batch, deform, kh, kw, 2, height, width)
    gates = mask.view(batch, deform, kh, kw, height, width)
    parts = x.view(batch, deform, channels // deform, *x.shape[2:])

    def cell(n, i, j):
        columns = x.new_zeros(channels, kh, kw)
        for a in range(kh):
            for b in range(kw):
                for d in range(deform):
                    y = i * stride[0] - pad[0] + a * dilation[0] + taps[n, d, a, b, 0, i, j]
                    z = j * stride[1] - pad[1] + b * dilation[1] + taps[n, d, a, b, 1, i, j]
                    sampled = bilinear(parts[n, d], y, z) * gates[n, d, a, b, i, j]
                    columns.view(deform, -1, kh, kw)[d, :, a, b] = sampled
        by_group = zip(weight.chunk(groups), columns.chunk(groups), strict=True)
        return torch.cat([(w * c).sum((1, 2, 3)) for w, c in by_group])

    out = [cell(n, i, j) for n in range(batch) for i in range(height) for j in range(width)]
    return torch.stack(out).view(batch, height, width, out_channels).permute(0, 3, 1, 2)


# stride, padding, dilation (y, x), groups, deform groups: all unlike, so that no two can be swapped
GEOMETRIES = [((1, 1), (1, 1), (1, 1), 1, 1), ((2, 1), (1, 0), (1, 2), 2, 4)]


def deform_inputs(geometry, kernel=(3, 2)):
    stride, pad, dilation, groups, deform = geometry
    x, weight = doubles(2, 4, 6, 7), doubles(6, 4 // groups, *kernel)
    like = F.conv2d(x, weight, None, stride, pad, dilation, groups)
    taps = deform * kernel[0] * kernel[1]
    return x, doubles(2, 2 * taps, *like.shape[2:]), doubles(2, taps, *like.shape[2:]), weight


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deform_conv_v1(geometry):
    x, offset, mask, weight = deform_inputs(geometry)

    def run(x, offset, weight):
        return mmcv.ops.deform_conv2d(x, offset, weight, *geometry)

    slow = deform_conv_by_definition(x, offset, weight, torch.ones_like(mask), *geometry)
    torch.testing.assert_close(run(x, offset, weight), slow)
    assert gradcheck(run, (x, offset, weight), fast_mode=True)
    plain = F.conv2d(x, weight, None, *geometry[:4])
    torch.testing.assert_close(run(x, torch.zeros_like(offset), weight), plain)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_points_on_cells_and_at_the_border_have_the_gradients_of_mmcv(geometry):
    x, offset, mask, weight = deform_inputs(geometry)
    offset = torch.randint(-3, 4, offset.shape).double().requires_grad_()

    def gradients(output):
        inputs = (x, offset, weight, mask)
        return torch.autograd.grad(output, inputs, torch.ones_like(output), materialize_grads=True)

    fast = mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, None, *geometry)
    slow = deform_conv_by_definition(x, offset, weight, mask, *geometry)
    for one, other in zip(gradients(fast), gradients(slow), strict=True):
        torch.testing.assert_close(one, other)
    plain = mmcv.ops.deform_conv2d(x, offset, weight, *geometry)
    ones = torch.ones_like(mask)
    modulated = mmcv.ops.modulated_deform_conv2d(x, offset, ones, weight, None, *geometry)
    for one, other in zip(gradients(plain), gradients(modulated), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deform_conv_v2(geometry, with_bias):
    x, offset, mask, weight = deform_inputs(geometry)
    bias = doubles(len(weight)) if with_bias else None

    def run(x, offset, mask, weight, bias):
        return mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry)

    shift = bias[:, None, None] if with_bias else 0
    slow = deform_conv_by_definition(x, offset, weight, mask, *geometry) + shift
    torch.testing.assert_close(run(x, offset, mask, weight, bias), slow)
    assert gradcheck(run, (x, offset, mask, weight, bias), fast_mode=True)


def test_larger_offsets_are_read_in_the_order_of_the_output():
    x, offset, mask, weight = deform_inputs(GEOMETRIES[0])
    size = (offset.shape[2] + 2, offset.shape[3] + 1)

    def larger(maps):
        filled = doubles(*maps.shape[:2], *size).detach()
        filled.flatten(1)[:, : maps[0].numel()] = maps.detach().flatten(1)
        return filled.requires_grad_()

    def run(x, offset, mask, weight):
        return mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, None, *GEOMETRIES[0])

    offsets, masks = larger(offset), larger(mask)
    torch.testing.assert_close(run(x, offsets, masks, weight), run(x, offset, mask, weight))
    assert gradcheck(run, (x, offsets, masks, weight), fast_mode=True)


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 1, 2), (5, 2, 3)])
def test_carafe(kernel, groups, scale):
    x, masks = doubles(2, 4, 3, 4), doubles(2, groups * kernel**2, 3 * scale, 4 * scale)

    def run(x, masks):
        return mmcv.ops.carafe(x, masks, kernel, groups, scale)

    slow = torch.zeros(2, 4, 3 * scale, 4 * scale, dtype=torch.float64)
    padded = F.pad(x, [kernel // 2] * 4)
    for n, c, i, j in itertools.product(range(2), range(4), range(3 * scale), range(4 * scale)):
        patch = padded[n, c, i // scale :, j // scale :][:kernel, :kernel]
        own = masks[n, :, i, j].view(groups, kernel, kernel)[c * groups // 4]
        slow[n, c, i, j] = (patch * own).sum()
    torch.testing.assert_close(run(x, masks), slow)
    assert gradcheck(run, (x, masks), fast_mode=True)


def test_a_masked_convolution_is_the_convolution_where_the_mask_is():
    layer = mmcv.ops.MaskedConv2d(3, 4, 3, padding=1)
    x, mask = torch.randn(1, 3, 5, 6), torch.rand(1, 5, 6) > 0.5
    torch.testing.assert_close(layer(x, mask), layer(x) * mask)


def test_deform_layers_start_as_plain_convolutions():
    x = torch.randn(2, 4, 6, 7)
    v1 = mmcv.ops.DeformConv2dPack(4, 6, 3, padding=1)
    torch.testing.assert_close(v1(x), F.conv2d(x, v1.weight, None, padding=1))
    v2 = mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1)  # its mask starts at sigmoid(0)
    torch.testing.assert_close(v2(x), F.conv2d(x, v2.weight, v2.bias, padding=1) / 2)


def test_deform_conv_weight_gradient_is_scaled_and_added():
    x, offset, _, weight = deform_inputs(GEOMETRIES[0])
    out = mmcv.ops.deform_conv2d(x, offset, weight, *GEOMETRIES[0])
    seed, none = torch.randn_like(out), x.new_empty(0)
    (grad,) = torch.autograd.grad(out, weight, seed)
    total = torch.ones_like(weight)
    _ext.deform_conv_backward_parameters(
        *(x.detach(), offset.detach(), seed, total, none, none),
        *(2, 3, 1, 1, 1, 1, 1, 1, 1, 1),
        scale=0.5,
        im2col_step=1,
    )
    torch.testing.assert_close(total, 1 + grad / 2)


# ---------------------------------------------------------------- deformable attention


def attention_by_definition(value, shapes, points, weights):
    batch, _, heads, dim = value.shape
    levels = value.split([h * w for h, w in shapes.tolist()], 1)
    out = value.new_zeros(batch, points.shape[1], heads, dim)
    for n, q, h, lvl, p in torch.ones(points.shape[:-1]).nonzero().tolist():
        height, width = shapes[lvl].tolist()
        plane = levels[lvl][n, :, h].T.view(dim, height, width)
        x, y = points[n, q, h, lvl, p].tolist()
        sampled = bilinear(plane, y * height - 0.5, x * width - 0.5)
        out[n, q, h] += weights[n, q, h, lvl, p] * sampled
    return out.flatten(2)


def test_deformable_attention_as_a_gpu_calls_it():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    shapes = torch.tensor([[4, 5], [2, 3]])
    start = torch.tensor([0, 20])
    value, weights = doubles(2, 26, 2, 3), doubles(2, 3, 2, 2, 2)
    points = (torch.rand(2, 3, 2, 2, 2, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()

    def run(value, points, weights):
        return MultiScaleDeformableAttnFunction.apply(value, shapes, start, points, weights, 64)

    slow = attention_by_definition(value, shapes, points, weights)
    torch.testing.assert_close(run(value, points, weights), slow)
    assert gradcheck(run, (value, points, weights), fast_mode=True)


# ---------------------------------------------------------------- half precision

COARSE_ROIS = ROIS.round()  # the same numbers in every precision
OPERATORS = {
    "roi_align": lambda x, o, m, w: mmcv.ops.roi_align(x, COARSE_ROIS.to(x), 2, 0.5),
    "roi_pool": lambda x, o, m, w: mmcv.ops.roi_pool(x, COARSE_ROIS.to(x), 2, 0.5),
    "deform_conv": lambda x, o, m, w: mmcv.ops.deform_conv2d(x, o, w, *GEOMETRIES[0]),
    "modulated_deform_conv": lambda x, o, m, w: mmcv.ops.modulated_deform_conv2d(
        x, o, m, w, None, *GEOMETRIES[0]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_is_float32_rounded(name, dtype):
    rounded = [t.detach().to(dtype) for t in deform_inputs(GEOMETRIES[0])]
    results = []
    for kind in (torch.float32, dtype):
        x, *others = (t.to(kind, copy=True) for t in rounded)
        x.requires_grad_()
        out = OPERATORS[name](x, *others)
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        results.append((out, grad))
    for exact, low in zip(*results, strict=True):
        assert low.dtype == dtype
        assert torch.equal(low, exact.to(dtype))
