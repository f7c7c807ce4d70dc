"""Laws of alpha and beta that follow from gradients: what they aim at, when, and for how long."""

import logging

import pytest
import torch
from short_runs import tiny
from test_ldt_loss import Watched
from test_module import MANY, collated, fit, many, module_of

from ldt import experiment
from ldt.callbacks import ldt_weights
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.callbacks.ldt_weights import TermWeights, squared_gradient_norms
from ldt.detectors.checkpoints import read
from ldt.runs.files import round_checkpoint

AUTO = {"alpha": "auto", "beta": "auto"}
ONE_CLASS = collated(MANY[:2], [1, 1])


def auto(**shares):
    return TermWeights({"ld": "auto", "cov": "auto"}, {"ld": 0.05, "cov": 0.05} | shares)


def test_gradient_norms_are_those_of_the_concatenated_maps():
    maps = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3)]
    losses = [sum((m**3).sum() for m in maps), maps[1].sum(), torch.zeros((), requires_grad=True)]
    for scale in (1.0, 1024.0):
        found = squared_gradient_norms(losses, maps, scale)
        whole = torch.cat([3 * m.detach().square().flatten() for m in maps])
        torch.testing.assert_close(
            found, torch.stack([whole @ whole, found.new_tensor(120), 0 * found[0]])
        )
    assert all(m.grad is None for m in maps)


def test_a_weight_gives_the_median_step_its_share():
    weights = auto(cov=0.2)
    for norms in ([2, 4, 1], [2, 0, 1], [2, 8, 2], [2, float("inf"), 1], [2, 40, 10]):
        assert not weights.known
        weights.add(norms, 3)
    assert weights.known == pytest.approx({"ld": 0.05 / 4, "cov": 0.2 / 1})
    before = dict(weights.known)
    weights.add([1, 1, 1], 3)
    assert weights.known == before
    assert weights.measured == before  # of the new epoch


@pytest.mark.parametrize("renewed", [False, True])
def test_a_renewed_weight_gives_each_epoch_its_share(renewed):
    """The detection loss's gradient falls, that of L_LD grows, and L_cov's weight is given."""
    weights = TermWeights({"ld": "auto", "cov": 2.0}, {"ld": 0.05, "cov": 0.05}, renewed)
    weights.add([1, 1, 1], 1)
    first = dict(weights.known)
    for detection, discriminant in ((0.8, 3), (0.5, 8), (0.1, 20)):
        weights.begin_epoch(3)
        for norms in (
            [detection, discriminant, 1],
            [detection, 0, 1],
            [detection, discriminant, 1],
        ):
            weights.add(norms, 1)
        share = weights.known["ld"] * discriminant / detection
        assert weights.measured["ld"] == pytest.approx(share)
        assert weights.known["cov"] == first["cov"] == 2.0
        assert share == pytest.approx(0.05) if renewed else weights.known == first
        before = dict(weights.known)
        weights.add([1, 1, 1], 1)  # a step of the epoch that is not measured
        assert weights.known == before


def test_a_given_weight_is_kept_beside_an_estimated_one():
    weights = TermWeights({"ld": "auto", "cov": 7.5}, {"ld": 0.1, "cov": 0.05})
    assert weights.known == {}
    weights.add([1, 2, 5], 1)
    assert weights.known == {"ld": 0.05, "cov": 7.5}


def test_a_share_outside_of_the_healthy_range_is_told_once():
    weights = TermWeights({"ld": 1e-4, "cov": 1.0}, {"ld": 0.05, "cov": 0.05})
    told = []
    for norms in ([1, 1, 0.1], [1, 1, 0.2], [1, 100, 0.4], [1, 1, 0.1]):
        weights.begin_epoch()
        weights.add(norms, 1)
        told.append([message.split()[3] for message in weights.unhealthy()])
    assert told == [["alpha*L_LD"], [], ["beta*L_cov"], ["alpha*L_LD"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ldt_is_off_until_the_rate_is_warm_and_the_memory_full(monkeypatch):
    monkeypatch.setattr(ldt_weights, "STEPS", 2)
    terms = Watched(**AUTO, warmup_epochs=0.5, memory=2)
    module = module_of(epochs=2, warmup=3)
    batches = [many()] * 4 + [ONE_CLASS] + [many()] * 5
    fit(module, batches, terms, epochs=2)  # a tenth of 20 steps is 2
    alphas = [logs["alpha"] for *_, logs in terms.steps]
    # warm after 3 steps; measured in the fourth and in the fifth, whose memory has two classes
    assert alphas[:5] == [0] * 5
    assert [logs["loss_ld"] for *_, logs in terms.steps[:5]] == [0] * 5
    full = terms.weights.known["ld"]
    rising = [full * k / 5 for k in range(1, 6)]
    assert alphas[5:10] == pytest.approx(rising)
    assert alphas[10:] == pytest.approx([full] * 10)
    assert terms.steps[-1][2]["loss_ld"] < 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_share_is_that_of_the_gradients_in_the_step():
    """In a single step, the weighted gradients are exactly the asked shares of the detection's."""
    found = {}

    class Look(LDTLoss):
        def __call__(self, features, objects, detection):
            logs = super().__call__(features, objects, detection)
            if self.weights.known and "ld" not in found:
                again = super().__call__(features, objects, detection)
                assert all(f.grad is None for f in features)
                losses = detection, again["loss_ld"], again["loss_cov"]
                norms = squared_gradient_norms(losses, features).sqrt()
                found.update(ld=norms[1] / norms[0], cov=norms[2] / norms[0])
            return logs

    terms = Look(**AUTO, alpha_share=0.1, beta_share=0.02, warmup_epochs=0)
    fit(module_of(epochs=1, warmup=0), [many()], terms)
    assert found == pytest.approx({"ld": 0.1, "cov": 0.02}, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_measuring_leaves_the_training_as_it_is(monkeypatch):
    weights = {}
    for steps in (0, 3):
        monkeypatch.setattr(ldt_weights, "EPOCH_STEPS", steps)
        module = module_of(epochs=1)
        fit(module, [many()] * 4, LDTLoss(alpha=1e-2, beta=1.0, warmup_epochs=0))
        weights[steps] = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.equal(weights[0], weights[3])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_an_estimation_works_in_mixed_precision(precision):
    terms = LDTLoss(**AUTO, warmup_epochs=0)
    fit(module_of(epochs=1, warmup=0), [many()] * 3, terms, precision=precision)
    assert all(0 < weight < 1e4 for weight in terms.weights.known.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_are_estimated_again_in_each_epoch_and_stored():
    terms = Watched(**AUTO, warmup_epochs=0, estimation="epoch")
    module = module_of(epochs=3, warmup=0)
    fit(module, [many()] * 4, terms, epochs=3)
    alphas = [float(logs["alpha"]) for *_, logs in terms.steps]
    # known from the first step on, and renewed by the four steps of the second and third epoch
    assert [len(set(part)) for part in (alphas[1:8], alphas[8:])] == [1, 1]
    assert len({alphas[1], alphas[8], terms.weights.known["ld"]}) == 3
    assert module.term_constants["ldt"]["weights"] == terms.weights.known
    assert terms.weights.measured["ld"] == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_without_a_second_class_ldt_stays_off_and_says_so(caplog):
    terms = LDTLoss(**AUTO, warmup_epochs=0)
    fit(module_of(epochs=1, warmup=0), [ONE_CLASS] * 3, terms)
    assert terms.weights.known == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_runs_from_a_shared_base_use_its_weights(tmp_path, caplog):
    """They are estimated in the base, stored with its weights, and kept after every cut."""
    caplog.set_level(logging.INFO, "ldt.callbacks.ldt_loss")
    options = ["method=ldt", "base=shared", "ldt=default", "recipe.epochs=2", "ldt.memory=1"]
    experiment.run(tiny(tmp_path, *options), tmp_path / "run")
    (base,) = tmp_path.glob("base-*")
    known = read(base / round_checkpoint(0))["ldt"]["term_constants"]["ldt"]["weights"]
    assert all(weight > 0 for weight in known.values())
    told = [r.getMessage() for r in caplog.records if r.name == "ldt.callbacks.ldt_loss"]
    assert len([text for text in told if text.startswith("ldt: alpha")]) == 1
    for t in range(3):
        kept = read(tmp_path / "run" / round_checkpoint(t))["ldt"]["term_constants"]["ldt"]
        assert kept["weights"] == known


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_stopped_within_an_estimation_ends_as_if_it_had_not(tmp_path, monkeypatch):
    options = ["method=ldt", "ldt=default", "recipe.epochs=4", "ldt.memory=1", "prune=oneshot"]
    config = tiny(tmp_path, *options)
    monkeypatch.setattr(ldt_weights.TermWeights, "settle", settle_late)
    experiment.run(config, tmp_path / "whole")

    def stop(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(LDTLoss, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            experiment.run(config, tmp_path / "parted")
    experiment.run(config, tmp_path / "parted")
    one, two = (read(tmp_path / name / round_checkpoint(1)) for name in ("whole", "parted"))
    assert one["ldt"]["term_constants"] == two["ldt"]["term_constants"] != {}
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key


SETTLE = TermWeights.settle


def settle_late(self):
    """Settle once five steps are measured, in the third epoch of two steps each."""
    if len(self._ratios) >= 5:
        SETTLE(self)
