"""What is said of a neck equals what the equations say, image by image."""

import numpy as np
import pytest
import reference
import torch
from test_module import collated, many, module_of

from ldt.detectors.forward import neck_maps
from ldt.evaluation.neck_statistics import neck_spaces, neck_statistics


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_share_and_correlation_are_those_of_all_object_vectors():
    detector = module_of().detector
    alone = collated([[4, 4, 30, 60]], [2])  # a class with one object does not count
    loader = [many(), collated([[8, 30, 60, 60], [70, 0, 120, 40]], [1, 0]), alone]
    found = neck_statistics(detector, loader, ridge=0.2)
    rows, y = _vectors(detector, loader)
    assert len(found) == 4
    for statistics, X in zip(found, rows, strict=True):
        S_w, S_b, _ = reference.scatter(X[y < 2], y[y < 2])
        eigs = reference.eigenvalues(S_w, S_b, 0.2, 1e-6)
        share = eigs[-1] / eigs[eigs > 0].sum()  # two classes: one discriminant
        assert statistics["share"] == pytest.approx(share, rel=1e-4)
        assert statistics["eigenvalue"] == pytest.approx(eigs[-1], rel=1e-4)
        correlation = np.abs(np.corrcoef(X.T))
        off = correlation[~np.eye(len(correlation), dtype=bool)]
        assert statistics["correlation"] == pytest.approx(off.mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_space_is_that_of_all_object_vectors_with_two_in_their_class():
    detector = module_of().detector
    alone = collated([[4, 4, 30, 60]], [2])
    loader = [many(), collated([[8, 30, 60, 60], [70, 0, 120, 40]], [1, 0]), alone]
    rows, labels = _vectors(detector, loader)
    found = neck_spaces(detector, loader, ridge=0.2)
    kept = labels < 2
    assert [space.scale for space in found] == [0, 1, 2, 3]
    for space, X in zip(found, rows, strict=True):
        assert space.labels.tolist() == labels[kept].tolist()
        S_w, S_b = reference.scatter(X[kept], labels[kept])[:2]
        assert np.allclose(space.ratio, (np.diag(S_b) / np.diag(S_w)).clip(min=0), rtol=1e-3)
        eigs = reference.eigenvalues(S_w, S_b, 0.2, 1e-6)
        assert np.allclose(space.eigenvalues, eigs[::-1], atol=1e-4 * eigs.max())
        assert np.allclose(space.activity, X[kept].std(0, ddof=1), rtol=1e-4)
        assert space.max_discriminants == 1
        assert space.power == pytest.approx(eigs.max(), rel=1e-4)
        assert space.projections.shape == (kept.sum(), 1)
        assert np.allclose(space.projections.mean(0), 0, atol=1e-6)
        # one discriminant, scaled by v^T (S_w + r I) v = 1: its own scatter between the classes is
        # the eigenvalue
        _, between = reference.scatter(space.projections, labels[kept])[:2]
        assert between.item() == pytest.approx(eigs.max(), rel=1e-3)


@pytest.mark.slow
def test_objects_of_a_single_class_make_no_space():
    detector = module_of().detector
    with pytest.raises(ValueError, match="use more images"):
        neck_spaces(detector, [collated([[4, 4, 30, 60], [8, 8, 40, 40]], [2, 2])])


def _vectors(detector, loader):
    """Object vectors of every scale, image by image, and their labels."""
    detector.eval()
    scales, labels = [], []
    for batch in loader:
        data = detector.data_preprocessor(batch, False)
        with torch.no_grad(), neck_maps(detector) as maps:
            detector.extract_feat(data["inputs"])
        boxes = data["data_samples"][0].gt_instances.bboxes.numpy()
        image = np.zeros(len(boxes), dtype=int)
        labels += data["data_samples"][0].gt_instances.labels.tolist()
        scales.append([
            reference.object_vectors(feature.numpy(), boxes, image, (64, 128)) for feature in maps
        ])  # fmt: skip
    return [np.concatenate(rows) for rows in zip(*scales, strict=True)], np.array(labels)
