"""Laws of kept detections and of AP over resampled images."""

import numpy as np
import pytest
import torch
from detections import CLASSES, random_samples

from ldt.evaluation import kept_detections
from ldt.evaluation.detection_rows import images_of
from ldt.evaluation.metrics import DetectionMetrics, coco_ap
from ldt.evaluation.resampled_ap import average_precision, match


@pytest.fixture(scope="module")
def tables():
    """Tables of validations, and the metrics of each."""
    found = []
    for seed in range(6):
        metrics = DetectionMetrics(CLASSES)
        metrics.update(random_samples(seed))
        found.append((metrics.compute(), metrics.measured))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("most", [2, 100])
def test_the_fast_ap_is_that_of_the_metrics(tables, most):
    for _, table in tables:
        images = images_of(table, len(CLASSES))
        [fast] = average_precision(match(images, len(CLASSES), most))
        assert fast == pytest.approx(coco_ap(images, len(CLASSES), most)[0]["AP"], abs=2e-6)


def test_weights_of_images_are_copies_of_them(tables):
    generator = np.random.default_rng(0)
    images = images_of(tables[0][1], len(CLASSES))
    weights = generator.multinomial(len(images), [1 / len(images)] * len(images), size=3)
    weights[1] = np.arange(len(images)) < 4  # four of the images, once each
    fast = average_precision(match(images, len(CLASSES)), weights)
    for row, ap in zip(weights, fast, strict=True):
        copies = [image for image, count in zip(images, row, strict=True) for _ in range(count)]
        slow = coco_ap(copies, len(CLASSES))[0]["AP"]
        # equal scores within a copy are a step of the curve here, and an order of chance there
        assert ap == pytest.approx(slow, abs=0.02 if max(row) > 1 else 2e-6)
    assert np.isnan(average_precision(match(images, len(CLASSES)), np.zeros((1, len(images)))))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [(2, 1000, "label"), (2, -2, "label"), (3, np.nan, "finite"), (4, np.inf, "finite"),
     (0, 7, "kind")],
)  # fmt: skip
def test_detections_that_no_validation_has_are_damaged(tables, tmp_path, column, value, told):
    table = tables[0][1].copy()
    row = np.flatnonzero(table[:, 0] == 1)[0]  # a detection
    table[row, column] = value
    with pytest.raises(ValueError, match=told):
        kept_detections._check_values(table, len(CLASSES))


@pytest.mark.slow
def test_kept_detections_have_the_metrics_of_the_validation(tables, tmp_path):
    whole = np.concatenate([table for _, table in tables])
    whole[:, 1] += 1000 * np.repeat(np.arange(len(tables)), [len(table) for _, table in tables])
    shaken = whole.copy()
    shaken[:, 4:8] += np.random.default_rng(0).normal(0, 0.3, (len(whole), 4))
    for table, tolerance in ((shaken, 1e-3), (whole, 2e-6)):  # the latter has whole pixels
        known = coco_ap(images_of(table, len(CLASSES)), len(CLASSES))[0]["AP"]
        kept_detections.save(tmp_path / "a.npz", table, CLASSES)
        images, classes = kept_detections.load(tmp_path / "a.npz")
        assert classes == CLASSES
        assert len(images) == 120
        [ap] = average_precision(match(images, len(classes)))
        assert ap == pytest.approx(known, abs=tolerance)
    assert (tmp_path / "a.npz").stat().st_size < 16 * len(whole)  # of 88 bytes a row


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"report\.detections=true"):
        kept_detections.load(tmp_path / "detections-0.npz")
    (tmp_path / "a.npz").write_bytes(b"PK" + bytes(torch.arange(99).tolist()))
    with pytest.raises(ValueError, match="is damaged"):
        kept_detections.load(tmp_path / "a.npz")
