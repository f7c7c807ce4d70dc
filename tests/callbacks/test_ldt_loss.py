"""Laws of the LDT terms: their weights over time, their memory, and several processes."""

from datetime import timedelta

import forked
import lightning as L
import pytest
import torch
import torch.distributed as dist
from short_runs import rows, tiny
from test_module import MANY, collated, fit, many, module_of

from ldt import experiment
from ldt.callbacks import ldt_weights
from ldt.callbacks.ldt_loss import LDTLoss, gather_vectors
from ldt.callbacks.ldt_weights import squared_gradient_norms
from ldt.discriminant import discriminants_of, location_aware_discriminants
from ldt.location import object_vectors

WIDTHS = (6, 6, 4)


class Watched(LDTLoss):
    """Keeps what went in and came out of each step, without the graph."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def __call__(self, features, objects, detection):
        logs = super().__call__(features, objects, detection)
        self.steps.append(
            ([f.detach() for f in features], objects, {k: float(v) for k, v in logs.items()})
        )
        return logs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_terms_are_there_while_training_only():
    names = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            names.extend(pl_module.loss_terms)

    module = module_of()
    logged = fit(module, [many()], LDTLoss(alpha=5e-4, beta=7.5), Look()).callback_metrics
    assert names == ["ldt"]
    assert module.loss_terms == {}
    assert {"train/loss_ld", "train/loss_cov", "train/share_ld", "train/share_cov"} <= set(logged)
    scales = [key for key in logged if key.startswith("train/eigenvalue_")]
    assert len(scales) == 4 == len([key for key in logged if "discriminants_" in key])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("epochs", "shares"), [(1.5, [1 / 3, 2 / 3, 1, 1]), (0, [1, 1, 1, 1])])
def test_alpha_and_beta_rise_linearly_over_the_warm_up(epochs, shares):
    terms = Watched(alpha=0.3, beta=2.0, ridge=0.2, warmup_epochs=epochs)
    fit(module_of(), [many(), many()], terms, epochs=2)
    for share, (features, objects, logs) in zip(shares, terms.steps, strict=True):
        bare = location_aware_discriminants(features, objects, ridge=0.2)
        assert logs["loss_ld"] == pytest.approx(0.3 * share * float(bare.loss_ld), rel=1e-4)
        assert logs["loss_cov"] == pytest.approx(2.0 * share * float(bare.loss_cov), rel=1e-4)
        assert logs["discriminants_0"] == int(bare.counts[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_warm_up_counts_optimizer_steps():
    terms = Watched(alpha=0.3, beta=7.5, warmup_epochs=1.5)
    fit(module_of(), [many()] * 4, terms, epochs=2, accumulate_grad_batches=2)
    shares = [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]  # two steps an epoch
    for share, (features, objects, logs) in zip(shares, terms.steps, strict=True):
        bare = location_aware_discriminants(features, objects)
        assert logs["loss_ld"] == pytest.approx(0.3 * share * float(bare.loss_ld), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_memory_is_the_last_batches_without_gradient():
    batches = [many(), collated(MANY[:2], [1, 0]), collated(MANY[1:], [2, 2, 1]), many()]
    terms = Watched(alpha=1.0, beta=7.5, warmup_epochs=0, memory=2)
    fit(module_of(), batches, terms)
    seen = [
        ([object_vectors(f, objects) for f in features], objects.labels)
        for features, objects, _ in terms.steps
    ]
    for step, (vectors, labels) in enumerate(seen):
        earlier = seen[max(0, step - 2) : step]
        memory = None
        if earlier:
            joined = [torch.cat(scale) for scale in zip(*(v for v, _ in earlier), strict=True)]
            memory = joined, torch.cat([old for _, old in earlier])
        expected = discriminants_of(vectors, labels, memory=memory)
        logged = terms.steps[step][2]["loss_ld"]
        assert logged == pytest.approx(float(expected.loss_ld), rel=1e-3)
    assert not any(v.requires_grad for vectors, _ in terms._memory for v in vectors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_memory_is_forgotten_when_the_neck_gets_another_width():
    module, terms = module_of(), Watched(alpha=1.0, beta=7.5, warmup_epochs=0, memory=3)

    class Narrow(L.Callback):
        """Halves the maps that LDT sees, as a cut through the neck does."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                whole = pl_module.loss_terms["ldt"]
                pl_module.loss_terms["ldt"] = lambda maps, *rest: whole(
                    [f[:, :24] for f in maps], *rest
                )

    fit(module, [many()], terms, Narrow(), epochs=3)
    features, objects, logs = terms.steps[1]
    alone = location_aware_discriminants(features, objects)
    assert {f.shape[1] for f in features} == {24}
    assert logs["loss_ld"] == pytest.approx(float(alone.loss_ld), rel=1e-4)
    assert len(terms._memory) == 2  # the two batches of the narrow neck


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("covariance", ["mean", "correlation"])
def test_a_step_never_waits_for_the_device(monkeypatch, covariance):
    """A tensor on the device `meta` has no values: reading one in Python raises."""
    monkeypatch.setattr(ldt_weights, "EPOCH_STEPS", 0)  # measuring reads norms
    seen = []

    class Elsewhere(LDTLoss):
        def __call__(self, features, objects, detection):
            features = [f.to("meta") for f in features]
            objects = objects._replace(boxes=objects.boxes.to("meta"))
            logs = super().__call__(features, objects, detection.to("meta"))
            seen.append({key: value.is_meta for key, value in logs.items()})
            return {}

    terms = Elsewhere(alpha=1.0, beta=1.0, memory=2, covariance=covariance)
    fit(module_of(), [many()] * 4, terms)
    assert len(seen) == 4
    assert all(all(step.values()) for step in seen)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_cut_empties_the_memory(tmp_path, monkeypatch):
    """Also one that leaves the neck's widths as they are."""
    sizes = []

    def note(self, trainer, pl_module):
        sizes.append(len(self._memory))

    monkeypatch.setattr(LDTLoss, "on_train_epoch_start", note)
    options = ["method=l1", "ldt.enabled=true", "ldt.memory=9", "prune.scope=[backbone]"]
    plan = ["recipe.epochs=2", "recipe.retrain_epochs=2", "prune.rate=0.3", "recipe.ema=0.1"]
    for every in (0, 1):  # averaged weights are put in for a validation, and taken out again
        config = tiny(tmp_path, *options, *plan, f"trainer.validate_every={every}")
        experiment.run(config, tmp_path / f"run-{every}")
    assert sizes == [0, 2, 0, 2, 0, 2] * 2
    one, two = (rows(tmp_path / f"run-{every}") for every in (0, 1))
    assert one == two


# Several processes ----------------------------------------------------------------------------

SPLITS = ((5, 7), (0, 12), (0, 0))  # objects on each of two processes


def whole_batch(count):
    """Inputs of a shared layer per object, and labels of 3 classes."""
    generator = torch.Generator().manual_seed(count)
    return (
        torch.randn(count, 8, generator=generator, dtype=torch.float64),
        torch.arange(count) % 3,
    )


def loss_and_gradient(inputs, labels, distributed):
    """The LDT losses of the layer's outputs on three scales, and the layer's gradient."""
    generator = torch.Generator().manual_seed(1)
    layer = torch.randn(8, sum(WIDTHS), generator=generator, dtype=torch.float64)
    layer.requires_grad_()
    vectors = list((inputs @ layer).split(WIDTHS, dim=1))
    if distributed:
        vectors, labels = gather_vectors(vectors, labels)
    found = discriminants_of(vectors, labels)
    loss = found.loss_ld + 3 * found.loss_cov
    (gradient,) = torch.autograd.grad(loss, layer)
    return loss.detach(), gradient


def gradient_ratio(inputs, labels, distributed):
    """The norm of L_LD's gradient at the vectors, over that of a loss averaged over objects."""
    vectors = [part.clone().requires_grad_() for part in inputs.split((4, 4), dim=1)]
    objects = torch.tensor(float(len(labels)))
    if distributed:
        dist.all_reduce(objects)  # as mmdet's heads do, times the number of processes below
        objects = objects / dist.get_world_size()
    detection = sum(v.square().sum() for v in vectors) / objects.clamp(min=1)
    found = gather_vectors(vectors, labels) if distributed else (vectors, labels)
    squared = squared_gradient_norms([discriminants_of(*found).loss_ld, detection], vectors)
    if distributed:
        dist.all_reduce(squared)
    return (squared[0] / squared[1].clamp(min=1e-9)).sqrt()


def child(rank, folder):
    """One of two processes: its part of every split, averaged as DDP averages gradients."""
    patience = timedelta(seconds=forked.PATIENCE)
    dist.init_process_group("gloo", f"file://{folder}/meet", patience, 2, rank)
    found = []
    for split in SPLITS:
        inputs, labels = (part.split(split)[rank] for part in whole_batch(sum(split)))
        loss, gradient = loss_and_gradient(inputs, labels, distributed=True)
        dist.all_reduce(gradient)
        found.append((loss, gradient / 2, gradient_ratio(inputs, labels, distributed=True)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one_that_has_the_whole_batch(tmp_path):
    forked.start_server()
    other = forked.CONTEXT.Process(target=child, args=(1, str(tmp_path)))
    other.start()
    child(0, str(tmp_path))
    other.join(forked.PATIENCE)
    assert other.exitcode == 0
    for index, split in enumerate(SPLITS):
        whole = whole_batch(sum(split))
        loss, gradient = loss_and_gradient(*whole, distributed=False)
        expected = loss, gradient, gradient_ratio(*whole, distributed=False)
        assert all(bool(part.any()) == (sum(split) > 0) for part in expected)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[index]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
