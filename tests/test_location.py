"""Laws of objects on feature maps: eqs. 1-3 and 15."""

import numpy as np
import pytest
import reference
import torch
from object_vectors import MAPS, SHAPE, grad_of, make_features, make_objects

from ldt import location
from ldt.location import attention, cell_boxes, object_vectors
from ldt.objects import Objects

# --- eqs. 1-3 ------------------------------------------------------------------------------------

BOXES = {
    "inside": [17.0, 9.0, 50.0, 41.0],
    "smaller than a cell": [33.1, 18.2, 34.0, 19.0],
    "on cell borders": [16.0, 8.0, 32.0, 24.0],
    "over the border": [-20.0, 80.0, 40.0, 200.0],
    "the whole input": [0.0, 0.0, 130.0, 96.0],
    "outside": [500.0, -90.0, 600.0, -50.0],
    "without area, on a border": [16.0, 16.0, 16.0, 16.0],
}


@pytest.mark.parametrize("map_hw", MAPS)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_cell_boxes_are_the_mask_of_eq_1(box, map_hw):
    x1, y1, x2, y2 = cell_boxes(torch.tensor([box]), SHAPE, map_hw)[0].tolist()
    cells = np.zeros(map_hw, dtype=bool)
    cells[y1 : y2 + 1, x1 : x2 + 1] = True
    np.testing.assert_array_equal(cells, reference.mask(box, SHAPE, map_hw))


def test_cell_boxes_by_hand():
    boxes = torch.tensor([[16.0, 8.0, 32.0, 25.0], [60.0, 60.0, 64.0, 64.0]])
    cells = cell_boxes(boxes, (64, 64), (8, 8))
    assert cells.dtype == torch.int64
    assert cells.tolist() == [[2, 1, 3, 3], [7, 7, 7, 7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_object_vectors_are_the_maxima_inside_the_boxes(dtype):
    objects = make_objects(20)
    for feat_nchw in make_features(dtype=dtype):
        feat_nchw = feat_nchw.detach() - 5  # all negative: a zero-filled mask would give zeros
        vectors = object_vectors(feat_nchw, objects)
        expected = reference.object_vectors(
            feat_nchw.double().numpy(), objects.boxes.numpy(), objects.image.numpy(), SHAPE
        )
        assert vectors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_array_equal(vectors.numpy(), expected)  # a maximum has no rounding


def test_gradient_of_object_vectors_is_one_per_object_and_channel_inside_its_box():
    objects, (feat_nchw, *_) = make_objects(1), make_features()
    grad = grad_of(object_vectors(feat_nchw, objects).sum(), feat_nchw)
    image, mask = int(objects.image[0]), reference.mask(objects.boxes[0].numpy(), SHAPE, MAPS[0])
    inside = grad[image][:, torch.tensor(mask)]
    torch.testing.assert_close(inside.sum(1), torch.ones_like(inside[:, 0]))
    assert grad.abs().sum() == inside.numel() / mask.sum()


def test_image_outside_the_batch_is_refused():
    objects = make_objects(4, n_images=3)._replace(image=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="from 0 to 3, but the features hold 3 images"):
        object_vectors(make_features()[0], objects)


# --- eq. 15 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_hw", MAPS)
@pytest.mark.parametrize("at_once", [1, 5, 64])
def test_attention_equals_a_loop_over_cells(monkeypatch, map_hw, at_once):
    monkeypatch.setattr(location, "OBJECTS_AT_ONCE", at_once)
    objects = make_objects(9, n_images=2)
    for a, b in ((1.2, 0.062), (0.7, 0.5)):
        found = attention(objects, map_hw, 3, a, b)
        boxes, image = objects.boxes.double().numpy(), objects.image.numpy()
        expected = reference.attention(boxes, image, SHAPE, map_hw, 3, a, b)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert (found[2] == 0).all()  # no object in the third image


def test_attention_by_hand():
    # One-cell box at cell (0, 0) of a map with stride 8; its centre is (0.5, 0.5) in cells.
    objects = Objects(
        torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([0]), torch.tensor([0]), (8, 2408)
    )
    row = attention(objects, (1, 301), 1)[0, 0]
    assert row[0] == 1
    assert (row[:5] == 1).all()  # 1.2 * 16^-0.062 = 1.01 at a distance of 4, clamped
    assert row[5] < 1
    assert row[50].item() == pytest.approx(0.74, abs=0.005)
    assert row[300].item() == pytest.approx(0.59, abs=0.005)


def test_attention_without_decay_is_refused():
    for a, b in ((0.0, 0.062), (1.2, 0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            attention(make_objects(), (3, 5), 3, a, b)
