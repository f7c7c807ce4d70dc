"""Laws of the two losses (eqs. 4-12): the fast form equals the slow ones, value and gradient."""

from functools import partial

import eigen_reference
import numpy as np
import pytest
import reference
import torch
from object_vectors import FEW, LABELS, SHAPE, grad_of, make_features, make_objects, make_vectors

from ldt import discriminant as D
from ldt.criteria.measures import eigenvalues

# --- eqs. 4-9 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "n_channels"), [(LABELS, 4), (LABELS, 23), (FEW, 6)])
def test_the_roots_of_scatter_and_eigenvalues_equal_the_reference(labels, n_channels):
    x_snc = make_vectors(labels, n_channels).detach()
    A, B = D.within_root(x_snc, D.classes_of(labels)), D.total_root(x_snc)
    eigs = eigenvalues(x_snc, labels, ridge=0.1, absolute=1e-6)
    for s, X in enumerate(x_snc.numpy()):
        S_w, S_b, S_t = reference.scatter(X, labels.numpy())
        np.testing.assert_allclose(A[s].mT @ A[s], S_w, atol=1e-12)
        np.testing.assert_allclose(B[s].mT @ B[s], S_t, atol=1e-12)
        slow = reference.eigenvalues(S_w, S_b, 0.1, 1e-6)
        np.testing.assert_allclose(eigs[s], slow, rtol=1e-9, atol=1e-9)


def test_classes_are_those_with_two_objects():
    rows, which, counts = D.classes_of(torch.tensor([9, 9, 5, 1, 1, 9]))
    assert rows.tolist() == [0, 1, 3, 4, 5]
    assert which.tolist() == [1, 1, 0, 0, 1]
    assert counts.tolist() == [2, 3]


def test_eigenvalues_ignore_scale_translation_rotation_and_order():
    x_snc = make_vectors(LABELS).detach()
    expected = eigenvalues(x_snc, LABELS, absolute=0.0)
    objects, channels = torch.randperm(len(LABELS)), torch.randperm(5)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    names = torch.tensor([4, 0, 0, 9, 0, 0, 0, 1])[LABELS]
    for x, labels in (
        (x_snc * 1e3, LABELS),
        (x_snc + torch.randn(5), LABELS),
        (x_snc @ rotation, LABELS),
        (x_snc[:, objects][:, :, channels], LABELS[objects]),
        (x_snc, names),
    ):
        torch.testing.assert_close(eigenvalues(x, labels, absolute=0.0), expected)


@pytest.mark.parametrize("n_channels", [5, 23])
def test_unsolvable_scales_make_the_loss_nan(n_channels):
    x_snc = make_vectors(LABELS, n_channels, n_scales=3).detach()
    expected = eigenvalues(x_snc, LABELS, absolute=0.0)
    x_snc[1, 0, 0] = torch.nan
    x_snc[2] = 0  # S_w is zero, and there is no ridge
    eigs = eigenvalues(x_snc, LABELS, absolute=0.0)
    torch.testing.assert_close(eigs[0], expected[0])
    for s in (1, 2):
        assert eigs[s].isnan().any()
        found = D.discriminants_of(x_snc[[0, s]], LABELS, absolute=0.0)
        assert found.loss_ld.isnan()  # a gradient scaler must see that the step is bad


def test_negative_ridges_are_refused():
    for options in ({"ridge": -0.1}, {"absolute": -1.0}):
        with pytest.raises(ValueError, match="neither may be negative"):
            D.discriminants_of(make_vectors(LABELS), LABELS, **options)


# --- eqs. 10-11 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spectrum", "n_classes", "phi", "K"),
    [
        ([0.1, 1.0, 2.0, 4.0], 80, 0.3, 2),  # above 1.2
        ([0.1, 1.0, 2.0, 4.0], 80, 0.0, 4),
        ([0.1, 1.0, 2.0, 4.0], 80, 0.25, 2),  # 1.0 is not above 1.0
        ([0.1, 1.0, 2.0, 4.0], 4, 0.0, 3),  # G - 1
        ([0.1, 1.0, 2.0, 4.0], 2, 0.3, 1),
        ([-3.0, -1.0, 0.0, 4.0], 4, 0.0, 1),  # zero and less never count
        ([-3.0, -2.0, -1.0, -0.1], 4, 0.5, 0),
        ([0.0, 0.0, 0.0, 0.0], 4, 0.5, 0),
        ([2.0, 2.0, 2.0, 2.0], 3, 0.5, 2),
    ],
)
def test_top_k_on_spectra_made_by_hand(spectrum, n_classes, phi, K):
    eigs = torch.tensor(spectrum, dtype=torch.float64)
    assert D.top_k(eigs, n_classes, phi).tolist() == [False] * (4 - K) + [True] * K


def test_covariance_penalty_by_hand():
    S_t = torch.tensor([[[9.0, -1, 2], [-1, 9, 3], [2, 3, 9]], [[5.0, 0, 0], [0, 6, 0], [0, 0, 7]]])
    assert D.covariance_penalty(S_t, "sum").item() == 12
    assert D.covariance_penalty(S_t, "mean").item() == 2
    assert D.covariance_penalty(torch.ones(2, 1, 1)).item() == 0


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"phi=1\.0 must be in"):
        D.top_k(torch.ones(3), 3, 1.0)
    with pytest.raises(ValueError, match='"mean" or "sum" or "correlation"'):
        D.discriminants_of(make_vectors(LABELS), LABELS, covariance="max")


# --- the fast form and the slow one --------------------------------------------------------------


def spread(n, n_classes, seed=0):
    """Labels of `n` objects in classes of very different sizes."""
    weights = torch.arange(1.0, n_classes + 1) ** 2
    rng = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, n, replacement=True, generator=rng)


def tied():
    """Three classes at the corners of a triangle: their two discriminants are equal."""
    corners = torch.eye(3, 8, dtype=torch.float64)
    noise = 0.1 * torch.cat([corners, -corners])
    return torch.cat([corner + noise for corner in corners])[None]


CASES = {
    "fewer objects than channels": (make_vectors(LABELS, 24), LABELS),
    "more objects than channels": (make_vectors(spread(80, 3), 12), spread(80, 3)),
    "as many objects as channels": (make_vectors(LABELS, 10), LABELS),
    "many unbalanced classes": (make_vectors(spread(90, 20), 30), spread(90, 20)),
    "more classes than channels": (make_vectors(spread(150, 20), 6), spread(150, 20)),
    "no positive eigenvalue": (
        torch.stack([-torch.eye(4, 9), torch.eye(4, 9)]).repeat_interleave(2, 1)[:, :4].double(),
        torch.tensor([0, 1, 0, 1]),
    ),
    "constant features": (torch.full((2, 10, 12), 3.0, dtype=torch.float64), LABELS),
    "equal objects": (make_vectors(FEW, 12).detach().repeat(1, 3, 1), FEW.repeat(3)),
    "tied eigenvalues": (tied(), torch.arange(3).repeat_interleave(6)),
}


@pytest.mark.parametrize(("x_snc", "labels"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("options", [(5e-3, 0.1, 1e-6), (0.3, 1e-3, 1e-2)], ids=["paper", "other"])
def test_value_and_gradient_equal_those_of_all_eigenvalues(x_snc, labels, options):
    x_snc = x_snc.detach().requires_grad_()
    phi, ridge, absolute = options
    found = D.discriminants_of(x_snc, labels, phi=phi, ridge=ridge, absolute=absolute)
    loss_ld, loss_cov, counts = eigen_reference.losses(x_snc, labels, phi, ridge, absolute)
    assert found.counts.tolist() == counts.tolist()
    for fast, slow in ((found.loss_ld, loss_ld), (found.loss_cov, loss_cov)):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-12)
        expected = grad_of(slow, x_snc)
        size = expected.abs().max().item()
        torch.testing.assert_close(grad_of(fast, x_snc), expected, rtol=0, atol=1e-7 * size + 1e-14)


def test_with_memory_the_gradient_is_that_of_all_eigenvalues():
    labels = torch.cat([LABELS, spread(40, 3)])
    x_snc = make_vectors(labels, 30)
    now, earlier = x_snc[:, :10], x_snc[:, 10:]
    found = D.discriminants_of(now, LABELS, memory=(earlier, labels[10:])).loss_ld
    slow, *_ = eigen_reference.losses(x_snc, labels, D.PHI, D.RIDGE, D.RIDGE_ABSOLUTE)
    torch.testing.assert_close(found, slow, rtol=1e-8, atol=0)
    expected = grad_of(slow, x_snc)[:, :10]
    grad = grad_of(found, x_snc)
    torch.testing.assert_close(grad[:, :10], expected, rtol=0, atol=1e-7 * expected.abs().max())
    assert not grad[:, 10:].any()


@pytest.mark.parametrize(("n", "c"), [(10, 24), (80, 12)])
def test_factorisations_are_small_and_not_differentiated(monkeypatch, n, c):
    sizes = []

    def watched(whole, matrix):
        sizes.append(matrix.shape[-1])
        assert not matrix.requires_grad
        return whole(matrix)

    for name in ("eigh", "cholesky_ex"):
        monkeypatch.setattr(torch.linalg, name, partial(watched, getattr(torch.linalg, name)))
    labels = spread(n, 3)
    D.discriminants_of(make_vectors(labels, c), labels).loss_ld.backward()
    assert len(sizes) == 2
    assert max(sizes) <= min(n, c)


# --- correlations --------------------------------------------------------------------------------


def correlations(x_snc):
    return D.discriminants_of(x_snc, LABELS, covariance="correlation").loss_cov


@pytest.mark.slow
def test_the_correlation_penalty_is_that_of_numpy():
    x_snc = make_vectors(LABELS)
    off = ~np.eye(5, dtype=bool)
    expected = sum(np.abs(np.corrcoef(x.T)[off]).mean() for x in x_snc.detach().numpy())
    assert correlations(x_snc).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(correlations, x_snc)


def test_the_correlation_penalty_ignores_the_scale_of_every_channel():
    x_snc = make_vectors(LABELS).detach()
    sizes = torch.tensor([1.0, 0.1, 7.0, 30.0, 0.5])
    found = correlations(x_snc * sizes)
    torch.testing.assert_close(found, correlations(x_snc))
    shrunk = D.discriminants_of(x_snc / 2, LABELS).loss_cov
    torch.testing.assert_close(shrunk, D.discriminants_of(x_snc, LABELS).loss_cov / 4)


@pytest.mark.parametrize("dead", [0.0, 3.0, 1e6, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_channels_leave_the_correlation_penalty_finite(dead, dtype):
    alive = make_vectors(LABELS).detach()
    x_snc = torch.cat([alive, torch.full_like(alive[..., :2], dead)], -1).to(dtype).requires_grad_()
    penalty = correlations(x_snc)
    torch.testing.assert_close(penalty.double(), correlations(alive), rtol=1e-5, atol=0)
    grad = grad_of(penalty, x_snc)
    assert grad.isfinite().all()
    assert not grad[..., 5:].any()
    nothing = torch.full_like(x_snc, dead).requires_grad_()
    assert correlations(nothing) == 0
    assert not grad_of(correlations(nothing), nothing).any()


# --- no waiting for a device ---------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["mean", "correlation"])
def test_a_step_never_waits_for_the_device(covariance):
    """A tensor on the device `meta` has no values: reading one in Python raises."""
    objects = make_objects()
    objects = objects._replace(boxes=objects.boxes.to("meta"))
    features = [f.detach().to("meta").requires_grad_() for f in make_features((6, 24, 6))]
    memory = [torch.empty(10, f.shape[1], device="meta") for f in features], LABELS
    found = D.location_aware_discriminants(features, objects, covariance=covariance, memory=memory)
    (found.loss_ld + found.loss_cov).backward()
    assert all(f.grad.shape == f.shape for f in features)
    with pytest.raises(RuntimeError, match="meta"):
        float(found.largest[0])


# --- the whole of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["mean", "sum"])
@pytest.mark.parametrize("widths", [(6, 6, 6), (6, 3, 6), (24, 12, 6)])
def test_losses_equal_the_reference(widths, covariance):
    objects, features = make_objects(), make_features(widths)
    labels = objects.labels.clone()
    labels[4] = 77  # one object of its own class
    objects = objects._replace(labels=labels)
    found = D.location_aware_discriminants(
        features, objects, phi=0.05, ridge=0.02, absolute=1e-3, covariance=covariance
    )
    boxes, image = objects.boxes.numpy(), objects.image.numpy()
    X = [reference.object_vectors(f.detach().numpy(), boxes, image, SHAPE) for f in features]
    expected = reference.losses(X, labels.numpy(), 0.05, 0.02, 1e-3, covariance)
    np.testing.assert_allclose(found.loss_ld.item(), expected[0], rtol=1e-9)
    np.testing.assert_allclose(found.loss_cov.item(), expected[1], rtol=1e-9)
    assert found.counts.tolist() == expected[2]


def test_largest_follows_the_order_of_scales_of_mixed_widths():
    x = [make_vectors(LABELS, c, 1, seed=s)[0] for s, c in enumerate((4, 7, 4, 5))]
    found = D.discriminants_of(x, LABELS)
    expected = [eigenvalues(v, LABELS)[-1].item() for v in x]
    assert found.largest.tolist() == pytest.approx(expected)
    assert len(set(expected)) == 4


def test_a_class_with_one_object_changes_nothing():
    labels = torch.cat([LABELS, torch.tensor([5])])
    x_snc = make_vectors(labels)
    with_it, without = D.discriminants_of(x_snc, labels), D.discriminants_of(x_snc[:, :-1], LABELS)
    torch.testing.assert_close(with_it, without)
    grad = grad_of(with_it.loss_ld + with_it.loss_cov, x_snc)
    assert grad[:, -1].abs().max() == 0
    assert grad[:, :-1].abs().min() > 0


@pytest.mark.parametrize("labels", [[], [3], [2, 2, 2], [0, 1, 2]])
def test_less_than_two_classes_give_a_zero_with_a_gradient(labels):
    objects = make_objects(len(labels))._replace(labels=torch.tensor(labels, dtype=torch.int64))
    features = make_features()
    found = D.location_aware_discriminants(features, objects)
    assert found.loss_ld.item() == found.loss_cov.item() == 0
    assert found.counts.tolist() == [0, 0, 0]
    for loss in (found.loss_ld, found.loss_cov):
        for feat_nchw in features:
            assert torch.equal(grad_of(loss, feat_nchw), torch.zeros_like(feat_nchw))


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "n_channels"), [(LABELS, 4), (LABELS, 14), (FEW, 6)])
@pytest.mark.parametrize("loss", ["loss_ld", "loss_cov"])
def test_gradients_are_those_of_finite_differences(loss, labels, n_channels):
    x_snc = make_vectors(labels, n_channels)

    def loss_of(x):
        return getattr(D.discriminants_of(x, labels, covariance="sum"), loss)

    assert torch.autograd.gradcheck(loss_of, x_snc)


@pytest.mark.slow
def test_gradients_reach_the_features_through_boxes():
    objects = make_objects(8, n_classes=2)
    (_, _, feat_nchw) = make_features((3, 3, 3))

    def losses_of(feat):
        return D.location_aware_discriminants([feat], objects)[:2]

    assert torch.autograd.gradcheck(losses_of, feat_nchw)


def test_gradients_are_finite_under_equal_eigenvalues():
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    noise = 0.1 * torch.cat([corners, -corners])  # the same for each class, alike in all channels
    x_snc = torch.cat([corner + noise for corner in corners])[None].requires_grad_()
    labels = torch.arange(3).repeat_interleave(6)
    eigs = eigenvalues(x_snc, labels)
    torch.testing.assert_close(eigs[0, 1], eigs[0, 2])  # tied by symmetry
    grad = grad_of(D.discriminants_of(x_snc, labels).loss_ld, x_snc)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0


def test_dormant_and_constant_features_have_finite_gradients():
    for value in (0.0, 3.0):
        x_snc = torch.full((2, len(LABELS), 5), value, requires_grad=True)
        found = D.discriminants_of(x_snc, LABELS)
        assert found.counts.tolist() == [0, 0]
        assert grad_of(found.loss_ld + found.loss_cov, x_snc).isfinite().all()


def test_autocast_does_not_reach_the_solver():
    objects, features = make_objects(), make_features(dtype=torch.float32)
    x_snc = make_vectors(LABELS).float()
    expected = D.discriminants_of(x_snc, LABELS)
    plain = D.location_aware_discriminants(features, objects)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of_vectors = D.discriminants_of(x_snc, LABELS)
        found = D.location_aware_discriminants(features, objects)
        low = D.location_aware_discriminants([f.bfloat16() for f in features], objects)
    torch.testing.assert_close(of_vectors, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert low.loss_ld.isfinite()
    assert low.loss_ld.dtype == torch.float32


def test_memory_is_earlier_objects_without_gradient():
    x_snc, earlier = make_vectors(LABELS), make_vectors(FEW, seed=1)
    found = D.discriminants_of(x_snc, LABELS, memory=(earlier, FEW))
    both = torch.cat([x_snc, earlier], dim=1)
    expected = D.discriminants_of(both, torch.cat([LABELS, FEW]))
    torch.testing.assert_close(found, expected)
    assert grad_of(found.loss_ld, x_snc).abs().min() > 0
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        grad_of(found.loss_ld, earlier)


def test_memory_rescues_a_class_with_one_object_in_the_batch():
    labels, old = torch.tensor([0, 0, 1]), torch.tensor([1])
    x_snc, earlier = make_vectors(labels), make_vectors(old, seed=1)
    assert D.discriminants_of(x_snc, labels).counts.tolist() == [0, 0]
    assert D.discriminants_of(x_snc, labels, memory=(earlier, old)).counts.tolist() == [1, 1]


def test_memory_of_another_width_is_refused():
    memory = (make_vectors(FEW, 4), FEW)
    with pytest.raises(ValueError, match="clear the memory"):
        D.discriminants_of(make_vectors(LABELS, 5), LABELS, memory=memory)
