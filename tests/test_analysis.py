"""What is said of a neck equals what the equations say, image by image."""

import numpy as np
import pytest
import reference
import torch
from test_module import collated, many, module_of

from ldt.analysis import neck_statistics
from ldt.detectors import neck_maps


@pytest.mark.filterwarnings("ignore")
def test_share_and_correlation_are_those_of_all_object_vectors():
    detector = module_of().detector
    alone = collated([[4, 4, 30, 60]], [2])  # a class with one object does not count
    loader = [many(), collated([[8, 30, 60, 60], [70, 0, 120, 40]], [1, 0]), alone]
    found = neck_statistics(detector, loader, ridge=0.2)
    scales, labels = [[] for _ in found], []
    for batch in loader:
        data = detector.data_preprocessor(batch, False)
        with torch.no_grad(), neck_maps(detector) as maps:
            detector.extract_feat(data["inputs"])
        boxes = data["data_samples"][0].gt_instances.bboxes.numpy()
        image = np.zeros(len(boxes), dtype=int)
        labels += data["data_samples"][0].gt_instances.labels.tolist()
        for rows, feature in zip(scales, maps, strict=True):
            rows.append(reference.object_vectors(feature.numpy(), boxes, image, (64, 128)))
    y = np.array(labels)
    assert len(found) == 4
    for statistics, rows in zip(found, scales, strict=True):
        X = np.concatenate(rows)
        S_w, S_b, _ = reference.scatter(X[y < 2], y[y < 2])
        eigs = reference.eigenvalues(S_w, S_b, 0.2, 1e-6)
        share = eigs[-1] / eigs[eigs > 0].sum()  # two classes: one discriminant
        assert statistics["share"] == pytest.approx(share, rel=1e-4)
        assert statistics["eigenvalue"] == pytest.approx(eigs[-1], rel=1e-4)
        correlation = np.abs(np.corrcoef(X.T))
        off = correlation[~np.eye(len(correlation), dtype=bool)]
        assert statistics["correlation"] == pytest.approx(off.mean(), rel=1e-4)
