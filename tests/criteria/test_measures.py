"""Laws of the measures of object vectors on a whole set of images."""

import numpy as np
import pytest
import torch
from eigen_reference import scatter
from object_vectors import LABELS, make_vectors

from ldt.criteria.measures import (
    channel_ratio,
    discriminant_directions,
    discriminant_share,
    discriminative_channels,
    eigenvalues,
)
from ldt.discriminant import mean_abs_correlation


def test_discriminant_directions_solve_eq_9():
    labels = torch.cat([LABELS, torch.tensor([5])])  # one object of class 5: left out
    x_nc = make_vectors(labels)[0]
    S_w, S_b, _ = scatter(x_nc[:-1], LABELS)
    S_w = S_w + (0.1 * S_w.trace() / 5 + 1e-6) * torch.eye(5)
    V = discriminant_directions(x_nc, labels, phi=1e-3)
    eigs = eigenvalues(x_nc[:-1], LABELS)[-2:]
    torch.testing.assert_close(S_b @ V, S_w @ V * eigs)
    torch.testing.assert_close(V.mT @ S_w @ V, torch.eye(2, dtype=torch.float64))
    assert not V.requires_grad
    with pytest.raises(ValueError, match="raise the ridge"):
        discriminant_directions(x_nc * torch.nan, labels)


def test_channel_ratio_is_the_eigenvalue_problem_of_one_channel():
    x_nc = make_vectors(LABELS)[0].detach()
    for members in LABELS.unique()[:, None] == LABELS:
        x_nc[members, 1] -= x_nc[members, 1].mean()  # equal class means: (S_b)_11 < 0
    ratio = channel_ratio(x_nc, LABELS)
    for c in range(5):
        eig = eigenvalues(x_nc[:, [c]], LABELS, ridge=0.0, absolute=0.0)
        torch.testing.assert_close(ratio[c], eig[0].clamp(min=0))
    assert (ratio > 0).tolist() == [True, False, True, True, True]
    assert (channel_ratio(1e4 * x_nc, LABELS) - ratio).abs().max() < 1e-9 * ratio.max()


def test_channel_ratio_of_dormant_channels_and_single_objects():
    labels = torch.cat([LABELS, torch.tensor([5])])
    x_nc = make_vectors(labels)[0].detach()
    x_nc[:, 2] = 0.25
    ratio = channel_ratio(x_nc, labels)
    assert ratio[2] == 0
    torch.testing.assert_close(ratio, channel_ratio(x_nc[:-1], LABELS))
    with pytest.raises(ValueError, match="use more images"):
        channel_ratio(x_nc[:3], torch.tensor([0, 0, 1]))


def test_discriminative_channels_by_hand():
    ratio = torch.tensor([0.0, 5.0, 0.2, 10.0, 1.0])
    assert discriminative_channels(ratio, 0.1, 0).tolist() == [False, True, False, True, False]
    assert discriminative_channels(ratio, 0.1, 3).tolist() == [False, True, False, True, True]
    assert discriminative_channels(ratio, 0.9, 99).all()
    assert discriminative_channels(torch.zeros(4), 0.1, 2).sum() == 2
    with pytest.raises(ValueError, match="phi"):
        discriminative_channels(ratio, -0.1, 1)


def test_discriminant_share_by_hand():
    eigs = torch.tensor([[-5.0, 1.0, 3.0, 6.0], [-1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    assert discriminant_share(eigs, 1).tolist() == pytest.approx([0.6, 0.0])
    assert discriminant_share(eigs, 2).tolist() == pytest.approx([0.9, 0.0])
    assert discriminant_share(eigs, 99).tolist() == pytest.approx([1.0, 0.0])


def test_mean_abs_correlation_equals_numpy_without_dormant_channels():
    x_nc = make_vectors(LABELS)[0].detach()
    expected = np.abs(np.corrcoef(x_nc.T)[~np.eye(5, dtype=bool)]).mean()
    assert mean_abs_correlation(x_nc).item() == pytest.approx(expected)
    dormant = torch.tensor([0.0, 0.1, 1e6]).expand(len(x_nc), 3)
    with_dormant = torch.cat([x_nc, dormant + 0.0], dim=1)
    assert mean_abs_correlation(with_dormant).item() == pytest.approx(expected)
    assert mean_abs_correlation(dormant) == 0
    assert mean_abs_correlation(x_nc[:, [0, 0]] * torch.tensor([1, -3])).item() == pytest.approx(1)
