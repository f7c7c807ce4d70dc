import numpy as np
import pytest
import reference
import torch

from ldt import discriminant as D

SHAPE = (96, 130)  # 130 is no multiple of 8: the maps below were rounded up, strides are fractional
MAPS = ((12, 17), (6, 9), (3, 5))


def make_objects(n=14, n_images=3, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(-10, (120, 90), (n, 2))
    boxes = np.concatenate([start, start + rng.uniform(1, 60, (n, 2))], axis=1)
    labels = rng.permutation(np.arange(n) % n_classes)
    return D.Objects(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(labels),
        torch.tensor(rng.integers(0, n_images, n)),
        SHAPE,
    )


def make_features(widths=(6, 6, 6), n_images=3, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n_images, c, h, w, generator=rng, dtype=dtype).requires_grad_()
        for c, (h, w) in zip(widths, MAPS, strict=True)
    ]


def make_vectors(labels, n_channels=5, n_scales=2, seed=0):
    """Gaussian classes with separate means, [S, N, C] float64."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n_scales, len(labels), n_channels, generator=rng, dtype=torch.float64)
    means = torch.randn(n_scales, 100, n_channels, generator=rng, dtype=torch.float64)
    return (x + 2 * means[:, labels]).requires_grad_()


def eigenvalues_of(x_snc, labels, **options):
    S_w, S_b, _ = D.scatter(x_snc, labels)
    return D.eigenvalues(S_w, S_b, **options)


def grad_of(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


LABELS = torch.tensor([7, 0, 3, 0, 7, 3, 3, 0, 7, 0])
FEW = torch.tensor([0, 1, 1, 0])  # N <= C below: S_w is singular


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
    x1, y1, x2, y2 = D.cell_boxes(torch.tensor([box]), SHAPE, map_hw)[0].tolist()
    cells = np.zeros(map_hw, dtype=bool)
    cells[y1 : y2 + 1, x1 : x2 + 1] = True
    np.testing.assert_array_equal(cells, reference.mask(box, SHAPE, map_hw))


def test_cell_boxes_by_hand():
    boxes = torch.tensor([[16.0, 8.0, 32.0, 25.0], [60.0, 60.0, 64.0, 64.0]])
    cells = D.cell_boxes(boxes, (64, 64), (8, 8))
    assert cells.dtype == torch.int64
    assert cells.tolist() == [[2, 1, 3, 3], [7, 7, 7, 7]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_object_vectors_are_the_maxima_inside_the_boxes(dtype):
    objects = make_objects(20)
    for feat_nchw in make_features(dtype=dtype):
        feat_nchw = feat_nchw.detach() - 5  # all negative: a zero-filled mask would give zeros
        vectors = D.object_vectors(feat_nchw, objects)
        expected = reference.object_vectors(
            feat_nchw.double().numpy(), objects.boxes.numpy(), objects.image.numpy(), SHAPE
        )
        assert vectors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        np.testing.assert_array_equal(vectors.numpy(), expected)  # a maximum has no rounding


def test_gradient_of_object_vectors_is_one_per_object_and_channel_inside_its_box():
    objects, (feat_nchw, *_) = make_objects(1), make_features()
    grad = grad_of(D.object_vectors(feat_nchw, objects).sum(), feat_nchw)
    image, mask = int(objects.image[0]), reference.mask(objects.boxes[0].numpy(), SHAPE, MAPS[0])
    inside = grad[image][:, torch.tensor(mask)]
    torch.testing.assert_close(inside.sum(1), torch.ones_like(inside[:, 0]))
    assert grad.abs().sum() == inside.numel() / mask.sum()


def test_image_outside_the_batch_is_refused():
    objects = make_objects(4, n_images=3)._replace(image=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="from 0 to 3, but the features hold 3 images"):
        D.object_vectors(make_features()[0], objects)


# --- eqs. 4-9 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "n_channels"), [(LABELS, 4), (LABELS, 23), (FEW, 6)])
def test_scatter_and_eigenvalues_equal_the_reference(labels, n_channels):
    x_snc = make_vectors(labels, n_channels).detach()
    matrices = D.scatter(x_snc.float(), labels)
    eigs = D.eigenvalues(*matrices[:2], ridge=0.1, absolute=1e-6)
    for s, X in enumerate(x_snc.float().double().numpy()):
        expected = reference.scatter(X, labels.numpy())
        for fast, slow in zip(matrices, expected, strict=True):
            assert fast.dtype == torch.float64
            np.testing.assert_allclose(fast[s], slow, atol=1e-12)
        slow = reference.eigenvalues(*expected[:2], 0.1, 1e-6)
        np.testing.assert_allclose(eigs[s], slow, rtol=1e-9, atol=1e-9)


def test_scatter_refuses_a_class_with_one_object_and_says_what_to_do():
    labels = torch.tensor([0, 0, 5, 1, 1])
    x_snc = make_vectors(labels)
    with pytest.raises(ValueError, match="drop_singletons"):
        D.scatter(x_snc, labels)
    keep = D.drop_singletons(labels)
    assert keep.tolist() == [True, True, False, True, True]
    S_w, *_ = D.scatter(x_snc[:, keep], labels[keep])
    assert S_w.isfinite().all()


def test_eigenvalues_ignore_scale_translation_rotation_and_order():
    x_snc = make_vectors(LABELS).detach()
    expected = eigenvalues_of(x_snc, LABELS, absolute=0.0)
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
        torch.testing.assert_close(eigenvalues_of(x, labels, absolute=0.0), expected)


def test_unsolvable_scales_are_nan_and_the_others_stay():
    S_w, S_b, _ = D.scatter(make_vectors(LABELS, n_scales=3).detach(), LABELS)
    expected = D.eigenvalues(S_w, S_b)
    S_w[1, 0, 0] = torch.nan
    S_w[2] = -torch.eye(5)  # not positive definite
    eigs = D.eigenvalues(S_w, S_b, absolute=0.0)
    torch.testing.assert_close(eigs[0], expected[0], atol=1e-4, rtol=1e-4)
    assert eigs[1:].isnan().all()
    assert D.ld_loss(eigs, 3).isnan()  # a gradient scaler must see that the step is bad


def test_negative_ridges_are_refused():
    S_w, S_b, _ = D.scatter(make_vectors(LABELS), LABELS)
    for options in ({"ridge": -0.1}, {"absolute": -1.0}):
        with pytest.raises(ValueError, match="neither may be negative"):
            D.eigenvalues(S_w, S_b, **options)


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
    eigs = torch.tensor(spectrum, dtype=torch.float64, requires_grad=True)
    mask = D.top_k(eigs, n_classes, phi)
    assert mask.tolist() == [False] * (4 - K) + [True] * K
    loss = D.ld_loss(torch.stack([eigs, eigs]), n_classes, phi)
    assert loss.item() == pytest.approx(-2 * sum(spectrum[4 - K :]) / max(K, 1))
    loss.backward()
    torch.testing.assert_close(eigs.grad, -2.0 * mask.double() / max(K, 1))


def test_covariance_penalty_by_hand():
    S_t = torch.tensor([[[9.0, -1, 2], [-1, 9, 3], [2, 3, 9]], [[5.0, 0, 0], [0, 6, 0], [0, 0, 7]]])
    assert D.covariance_penalty(S_t, "sum").item() == 12
    assert D.covariance_penalty(S_t, "mean").item() == 2
    assert D.covariance_penalty(torch.ones(2, 1, 1)).item() == 0


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"phi=1\.0 must be in"):
        D.top_k(torch.ones(3), 3, 1.0)
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        D.covariance_penalty(torch.ones(1, 2, 2), "max")


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
    expected = [eigenvalues_of(v, LABELS)[-1].item() for v in x]
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
    eigs = eigenvalues_of(x_snc, labels)
    torch.testing.assert_close(eigs[0, 1], eigs[0, 2])  # tied by symmetry
    grad = grad_of(D.ld_loss(eigs, 3), x_snc)
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
    expected = eigenvalues_of(x_snc, LABELS)
    plain = D.location_aware_discriminants(features, objects)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eigs = eigenvalues_of(x_snc, LABELS)
        found = D.location_aware_discriminants(features, objects)
        low = D.location_aware_discriminants([f.bfloat16() for f in features], objects)
    assert eigs.dtype == torch.float64
    torch.testing.assert_close(eigs, expected, rtol=0, atol=0)
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


# --- directions, channels, and the measures of an evaluation ------------------------------------


def test_discriminant_directions_solve_eq_9():
    labels = torch.cat([LABELS, torch.tensor([5])])  # one object of class 5: left out
    x_nc = make_vectors(labels)[0]
    S_w, S_b, _ = D.scatter(x_nc[:-1], LABELS)
    S_w = S_w + (0.1 * S_w.trace() / 5 + 1e-6) * torch.eye(5)
    V = D.discriminant_directions(x_nc, labels, phi=1e-3)
    eigs = eigenvalues_of(x_nc[:-1], LABELS)[-2:]
    torch.testing.assert_close(S_b @ V, S_w @ V * eigs)
    torch.testing.assert_close(V.mT @ S_w @ V, torch.eye(2, dtype=torch.float64))
    assert not V.requires_grad
    with pytest.raises(ValueError, match="raise the ridge"):
        D.discriminant_directions(x_nc * torch.nan, labels)


def test_channel_ratio_is_the_eigenvalue_problem_of_one_channel():
    x_nc = make_vectors(LABELS)[0].detach()
    for members in LABELS.unique()[:, None] == LABELS:
        x_nc[members, 1] -= x_nc[members, 1].mean()  # equal class means: (S_b)_11 < 0
    ratio = D.channel_ratio(x_nc, LABELS)
    for c in range(5):
        eig = eigenvalues_of(x_nc[:, [c]], LABELS, ridge=0.0, absolute=0.0)
        torch.testing.assert_close(ratio[c], eig[0].clamp(min=0))
    assert (ratio > 0).tolist() == [True, False, True, True, True]
    assert (D.channel_ratio(1e4 * x_nc, LABELS) - ratio).abs().max() < 1e-9 * ratio.max()


def test_channel_ratio_of_dormant_channels_and_single_objects():
    labels = torch.cat([LABELS, torch.tensor([5])])
    x_nc = make_vectors(labels)[0].detach()
    x_nc[:, 2] = 0.25
    ratio = D.channel_ratio(x_nc, labels)
    assert ratio[2] == 0
    torch.testing.assert_close(ratio, D.channel_ratio(x_nc[:-1], LABELS))
    with pytest.raises(ValueError, match="use more images"):
        D.channel_ratio(x_nc[:3], torch.tensor([0, 0, 1]))


def test_discriminative_channels_by_hand():
    ratio = torch.tensor([0.0, 5.0, 0.2, 10.0, 1.0])
    assert D.discriminative_channels(ratio, 0.1, 0).tolist() == [False, True, False, True, False]
    assert D.discriminative_channels(ratio, 0.1, 3).tolist() == [False, True, False, True, True]
    assert D.discriminative_channels(ratio, 0.9, 99).all()
    assert D.discriminative_channels(torch.zeros(4), 0.1, 2).sum() == 2
    with pytest.raises(ValueError, match="phi"):
        D.discriminative_channels(ratio, -0.1, 1)


def test_discriminant_share_by_hand():
    eigs = torch.tensor([[-5.0, 1.0, 3.0, 6.0], [-1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    assert D.discriminant_share(eigs, 1).tolist() == pytest.approx([0.6, 0.0])
    assert D.discriminant_share(eigs, 2).tolist() == pytest.approx([0.9, 0.0])
    assert D.discriminant_share(eigs, 99).tolist() == pytest.approx([1.0, 0.0])


def test_mean_abs_correlation_equals_numpy_without_dormant_channels():
    x_nc = make_vectors(LABELS)[0].detach()
    expected = np.abs(np.corrcoef(x_nc.T)[~np.eye(5, dtype=bool)]).mean()
    assert D.mean_abs_correlation(x_nc).item() == pytest.approx(expected)
    dormant = torch.tensor([0.0, 0.1, 1e6]).expand(len(x_nc), 3)
    with_dormant = torch.cat([x_nc, dormant + 0.0], dim=1)
    assert D.mean_abs_correlation(with_dormant).item() == pytest.approx(expected)
    assert D.mean_abs_correlation(dormant) == 0
    assert D.mean_abs_correlation(x_nc[:, [0, 0]] * torch.tensor([1, -3])).item() == pytest.approx(
        1
    )


# --- eq. 15 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_hw", MAPS)
@pytest.mark.parametrize("at_once", [1, 5, 64])
def test_attention_equals_a_loop_over_cells(monkeypatch, map_hw, at_once):
    monkeypatch.setattr(D, "OBJECTS_AT_ONCE", at_once)
    objects = make_objects(9, n_images=2)
    for a, b in ((1.2, 0.062), (0.7, 0.5)):
        found = D.attention(objects, map_hw, 3, a, b)
        boxes, image = objects.boxes.double().numpy(), objects.image.numpy()
        expected = reference.attention(boxes, image, SHAPE, map_hw, 3, a, b)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert (found[2] == 0).all()  # no object in the third image


def test_attention_by_hand():
    # One-cell box at cell (0, 0) of a map with stride 8; its centre is (0.5, 0.5) in cells.
    objects = D.Objects(
        torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([0]), torch.tensor([0]), (8, 2408)
    )
    row = D.attention(objects, (1, 301), 1)[0, 0]
    assert row[0] == 1
    assert (row[:5] == 1).all()  # 1.2 * 16^-0.062 = 1.01 at a distance of 4, clamped
    assert row[5] < 1
    assert row[50].item() == pytest.approx(0.74, abs=0.005)
    assert row[300].item() == pytest.approx(0.59, abs=0.005)


def test_attention_without_decay_is_refused():
    for a, b in ((0.0, 0.062), (1.2, 0.0)):
        with pytest.raises(ValueError, match="must be positive"):
            D.attention(make_objects(), (3, 5), 3, a, b)
