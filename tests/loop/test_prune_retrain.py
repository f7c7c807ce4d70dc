"""Laws of the plan, and of the loop on real runs: rounds, checkpoints, optimizer, resuming."""

import itertools
from shutil import copytree

import forked
import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from sampled import sampled
from short_runs import rows, summary, tiny
from small import SCOPE
from torch import nn

import ldt
from ldt import experiment
from ldt.build import build_data
from ldt.criteria.base import Criterion
from ldt.detectors.adapter import Calibration, Detector
from ldt.detectors.batch_norm import reestimate_batch_norms
from ldt.detectors.forward import raw_forward
from ldt.evaluation.profiling import count_parameters
from ldt.loop.gradual_masking import GradualPruning
from ldt.loop.schedule import PruningSchedule
from ldt.module import DetectorModule
from ldt.pruning.budget import TOLERANCE, Limits, UnreachableRateError
from ldt.runtimes.latency_table import LatencyTarget

# The plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_every_round_keeps_the_same_share_of_what_is_left(rate, rounds):
    plan = PruningSchedule(rate=rate, rounds=rounds, base_epochs=1, retrain_epochs=1)
    kept = [1 - plan.removed_share(t) for t in range(rounds + 1)]
    assert kept[0] == 1.0
    assert kept[-1] == pytest.approx(1 - rate)
    shares = [after / before for before, after in itertools.pairwise(kept)]
    assert shares == pytest.approx([shares[0]] * rounds)


@pytest.mark.parametrize(
    ("base", "retrain", "rounds"), [(3, 2, 2), (0, 2, 3), (1, 1, 1), (4, 1, 0), (2, 0, 0)]
)
def test_phases_tile_the_run(base, retrain, rounds):
    plan = PruningSchedule(rate=0.5, rounds=rounds, base_epochs=base, retrain_epochs=retrain)
    ends = [epoch for epoch in range(plan.total_epochs) if plan.is_last_epoch(epoch)]
    phases = [base] * (base > 0) + [retrain] * rounds
    assert ends == [end - 1 for end in itertools.accumulate(phases)]
    assert plan.total_epochs == sum(phases)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"rate": 0.0},
            r"prune.rate=0.0; allowed: .* \(e.g. prune.rate=0.5\)",
        ),
        ({"rate": 1.0}, r"prune.rate=1.0"),
        ({"rate": 25}, r"prune.rate=25"),
        ({"rate": float("nan")}, r"prune.rate=nan"),
        ({"budget": "param"}, r"prune.budget='param'; choose params, macs, latency or flops"),
        ({"rounds": -1}, r"prune.rounds"),
        ({"base_epochs": -1}, r"recipe.epochs"),
        (
            {"retrain_epochs": -1},
            r"recipe.retrain_epochs=-1; allowed: a whole number of",
        ),
        ({"repair": "gn"}, r"prune.repair='gn'; allowed: none, bn, lstsq"),
        ({"rounds": 0, "base_epochs": 0}, r"nothing to do"),
        (
            {"latency": LatencyTarget(target_ms=3)},
            r"prune.latency.target_ms=3 is of prune.budget=latency, not of params; type",
        ),
        ({"ranking": "local"}, r"method.ranking='local'; allowed: global,"),
        ({"inner_rounds": 0}, r"method.inner_rounds=0; allowed: a whole number of at least 1"),
        ({"images": 0}, r"prune.images=0"),
        ({"batch_size": 0}, r"prune.batch_size=0"),
        ({"limits": Limits(max_layer_rate=1.5)}, r"prune.max_layer_rate=1.5"),
        ({"limits": Limits(min_channels=0)}, r"prune.min_channels=0"),
    ],
)
def test_a_value_out_of_range_names_its_key(wrong, message):
    right = {"rate": 0.5, "rounds": 2, "base_epochs": 1, "retrain_epochs": 1}
    with pytest.raises(ValueError, match=message):
        PruningSchedule(**right | wrong)


# Runs -----------------------------------------------------------------------------------------


class Watch:
    """Looks at the optimizer before each training step, and keeps the module.

    Attributes:
        lrs: the learning rate of each step.
        strays: how many parameters the optimizer holds too much or too little, at each step.
    """

    def __init__(self, monkeypatch, at=None, then=None):
        self.lrs, self.strays, self.module = [], [], None
        plain = DetectorModule.training_step

        def step(module, batch, index):
            if module.global_step == at:
                then()
            (group,) = module.trainer.optimizers[0].param_groups
            self.module = module
            self.lrs.append(group["lr"])
            self.strays.append(len(set(group["params"]) ^ set(module.parameters())))
            return plain(module, batch, index)

        monkeypatch.setattr(DetectorModule, "training_step", step)


def weights(file):
    return torch.load(file, weights_only=True)["state_dict"]


def equal(one, two):
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """A finished run of two rounds whose phases have two steps each, and what was watched."""
    folder = tmp_path_factory.mktemp("two_rounds")
    lr = ["recipe.schedule=cosine", "recipe.optimizer.lr=0.004", "recipe.warmup=0"]
    lr += ["recipe.min_lr=0", "recipe.retrain_lr=0.25"]
    more = ["ldt.memory=2", "ldt.warmup_epochs=0"]
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        experiment.run(tiny(folder, *lr, *more), folder / "run")
    return folder / "run", watch


@pytest.mark.slow
def test_each_round_reaches_its_rate(two_rounds):
    folder, _ = two_rounds
    found = rows(folder)
    plan = PruningSchedule(rate=0.5, rounds=2, base_epochs=1, retrain_epochs=1)
    assert [row["round"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["rate"] == row["params_rate"]
        assert row["rate"] == pytest.approx(plan.removed_share(row["round"]), abs=TOLERANCE)
        assert row["rate"] == pytest.approx(1 - row["params"] / found[0]["params"])
        assert {"AP", "mAP", "multiply_adds"} <= set(row)


@pytest.mark.slow
def test_a_rounds_checkpoint_is_the_detector_of_its_row(two_rounds):
    folder, _ = two_rounds
    for row in summary(folder)["rounds"]:
        file = folder / f"round-{row['round']}.ckpt"
        detector = ldt.load_pruned(file)
        assert count_parameters(detector) == row["params"]
        assert file.stat().st_size == row["file_bytes"]
        assert detector.dataset_meta["classes"] == ("Car", "Pedestrian", "Cyclist")


@pytest.mark.slow
def test_the_pruned_detector_predicts_the_same_in_a_new_process(two_rounds, tmp_path):
    folder, watch = two_rounds
    image = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    torch.save(image, tmp_path / "image.pt")
    detector, threads = watch.module.detector.eval(), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        before = raw_forward(detector, image)
    torch.set_num_threads(threads)
    (tmp_path / "predict.py").write_text(PREDICT)
    done = forked.run(str(tmp_path / "predict.py"), str(folder / "round-2.ckpt"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = [m for maps in torch.load(tmp_path / "maps.pt") for m in maps]
    assert [m.shape for m in after] == [m.shape for m in before]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


PREDICT = """
import sys, ldt, torch
torch.set_num_threads(1)
detector = ldt.load_pruned(sys.argv[1])
with torch.no_grad():
    found = detector(torch.load("image.pt"), mode="tensor")
torch.save([[m for m in maps] for maps in found], "maps.pt")
"""


@pytest.mark.slow
def test_each_phase_has_its_parameters_and_its_own_schedule(two_rounds):
    _, watch = two_rounds
    assert watch.strays == [0] * 6
    fall = [1, 0.5]  # a cosine at 0 and 90 degrees, anew in each phase
    assert watch.lrs == pytest.approx([0.004 * f for f in fall] + [0.001 * f for f in fall * 2])


@pytest.mark.slow
def test_scores_and_removed_channels_are_kept(two_rounds):
    folder, _ = two_rounds
    for round_ in (1, 2):
        arrays = dict(np.load(folder / f"scores-{round_}.npz"))
        removed = {key: value for key, value in arrays.items() if key.startswith("removed/")}
        assert removed
        for key, channels in removed.items():
            scores = arrays[key.replace("removed/", "score/")]
            gone = set(channels.tolist())
            stays = [score for index, score in enumerate(scores) if index not in gone]
            assert max(scores[channels], default=0) <= min(stays)  # the lowest of a group go


def run_and_kill(config, folder, monkeypatch):
    """Run into `<folder>/whole`; `<folder>/killed` is what a kill in the pruned phase leaves."""
    with monkeypatch.context() as patch:
        Watch(patch, at=5, then=lambda: copytree(folder / "whole", folder / "killed"))
        experiment.run(config, folder / "whole")
    assert not (folder / "killed/summary.json").exists()


def resume(config, folder, monkeypatch):
    """Go on in `<folder>/killed`; nothing may tell it from the run that was not killed."""
    watch = Watch(monkeypatch)
    experiment.run(config, folder / "killed")
    assert set(watch.strays) == {0}
    assert rows(folder / "killed") == rows(folder / "whole")
    one, two = (weights(folder / run / "round-1.ckpt") for run in ("whole", "killed"))
    assert equal(one, two)
    return watch


@pytest.mark.slow
@pytest.mark.parametrize("workers", sampled([1, 0]))  # which fetch ahead
def test_a_run_killed_in_a_pruned_phase_ends_as_if_it_had_not_been(tmp_path, monkeypatch, workers):
    phases = ["prune=oneshot", "recipe.retrain_epochs=3", "recipe.retrain_lr=0.5"]
    config = tiny(tmp_path, *phases, f"dataset.workers={workers}")
    run_and_kill(config, tmp_path, monkeypatch)
    watch = resume(config, tmp_path, monkeypatch)
    assert len(watch.lrs) == 4  # of eight steps in all: the epoch of the kill and the last one
    assert (tmp_path / "killed/logs-2/metrics.csv").is_file()


@pytest.mark.slow
def test_the_average_follows_the_cut_and_survives_a_kill(tmp_path, monkeypatch):
    average = ["recipe.ema=0.05", "recipe.augment=mosaic", "recipe.plain_epochs=1"]
    config = tiny(tmp_path, "prune=oneshot", "recipe.retrain_epochs=2", *average)
    run_and_kill(config, tmp_path, monkeypatch)
    watch = resume(config, tmp_path, monkeypatch)
    last = torch.load(tmp_path / "killed/last.ckpt", weights_only=True)
    final = ldt.load_pruned(tmp_path / "killed/round-1.ckpt")
    assert int(last["averaging_state"]["n_averaged"]) == 4  # steps since the cut
    assert {k: v.shape for k, v in last["state_dict"].items()} == {
        k: v.shape for k, v in last["current_model_state"].items()
    }
    averaged = {k.removeprefix("detector."): v for k, v in last["state_dict"].items()}
    assert equal(averaged, dict(final.state_dict()))
    assert equal(averaged, dict(watch.module.detector.state_dict()))


@pytest.mark.slow
def test_without_base_training_the_first_cut_comes_at_once(two_rounds, tmp_path, monkeypatch):
    base = two_rounds[0] / "round-0.ckpt"
    watch = Watch(monkeypatch)
    options = ["recipe.epochs=0", f"detector.checkpoint={base}", "prune.budget=flops"]
    experiment.run(tiny(tmp_path, *options, "prune.rate=0.3"), tmp_path / "run")
    assert len(watch.lrs) == 4  # two phases of two steps
    assert equal(weights(base), weights(tmp_path / "run/round-0.ckpt"))
    found, known = rows(tmp_path / "run"), rows(two_rounds[0])[0]
    assert {key: found[0][key] for key in known} == pytest.approx(known, nan_ok=True)
    assert found[2]["multiply_adds_rate"] == pytest.approx(0.3, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("base", [0, 1])
def test_without_retraining_each_round_is_cut_repaired_and_measured(
    two_rounds, tmp_path, monkeypatch, base
):
    options = [f"recipe.epochs={base}", "recipe.retrain_epochs=0", "ldt.warmup_epochs=0"]
    options += [f"detector.checkpoint={two_rounds[0] / 'round-0.ckpt'}"] * (base == 0)
    config, watch = tiny(tmp_path, *options), Watch(monkeypatch)
    experiment.run(config, tmp_path / "run")
    assert len(watch.lrs) == 2 * base
    found = rows(tmp_path / "run")
    assert [row["round"] for row in found] == [0, 1, 2]
    data = build_data(config)
    data.setup("fit")
    for row in found:
        detector = ldt.load_pruned(tmp_path / f"run/round-{row['round']}.ckpt")
        measured = ldt.evaluate(detector, data.val_dataloader(), data.classes)
        assert {key: row[key] for key in measured} == pytest.approx(measured, nan_ok=True)
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        adapter = Detector(detector, (64, 128))
        batches = Calibration(adapter, data.calibration_dataloader(8, 16))
        reestimate_batch_norms(adapter, batches)
        close = [torch.allclose(before[k], v, atol=1e-5) for k, v in detector.state_dict().items()]
        assert all(close) is (row["round"] > 0)


@pytest.mark.slow
def test_masking_without_retraining_ends_when_the_budget_is_saved(tmp_path):
    config = tiny(tmp_path, *GRADUAL, "prune=iterative", "recipe.retrain_epochs=0")
    experiment.run(config, tmp_path / "run")
    plan = PruningSchedule(rate=0.5, rounds=2, base_epochs=1, retrain_epochs=0)
    for row in rows(tmp_path / "run"):
        assert row["rate"] == pytest.approx(plan.removed_share(row["round"]), abs=TOLERANCE)


@pytest.mark.slow
def test_frozen_stages_train_from_the_first_cut_on(tmp_path, monkeypatch):
    part = "++detector.options.backbone"
    options = [f"{part}.frozen_stages=2", f"{part}.norm_eval=true"]
    options += [f"{part}.norm_cfg={{type:BN,requires_grad:false}}"]
    config = tiny(
        tmp_path, *options, "prune=oneshot", "recipe.retrain_epochs=3", "ldt.enabled=false"
    )
    held: list[set[str]] = []  # of each epoch

    def without_gradient(module, _):
        parts = module.detector.named_parameters()
        held[-1] |= {n for n, p in parts if n.startswith(SCOPE) and p.grad is None}

    def still(module, batch, index, plain=DetectorModule.training_step):
        norms = [m for m in module.detector.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 20
        assert not any(norm.training for norm in norms)
        if index == 0:
            held.append(set())
        return plain(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(DetectorModule, "training_step", still)
        patch.setattr(DetectorModule, "on_before_optimizer_step", without_gradient)
        Watch(patch, at=5, then=lambda: copytree(tmp_path / "whole", tmp_path / "killed"))
        experiment.run(config, tmp_path / "whole")
    assert "backbone.layer1.0.conv1.weight" in held[0]
    assert "backbone.bn1.weight" in held[0]
    assert held[1:] == [set()] * 3
    exported = ldt.export(tmp_path / "whole" / "round-1.ckpt", tmp_path / "exported")
    loaded = ldt.load_pruned(tmp_path / "whole" / "round-1.ckpt")
    for detector in (loaded, init_detector(str(exported / "config.py"), device="cpu")):
        detector.train()
        assert all(p.requires_grad for n, p in detector.named_parameters() if n.startswith(SCOPE))
    base = ldt.load_pruned(tmp_path / "whole" / "round-0.ckpt").train()
    assert not base.backbone.layer1[0].conv1.weight.requires_grad
    experiment.run(config, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    one, two = (weights(tmp_path / run / "round-1.ckpt") for run in ("whole", "killed"))
    assert equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["params", "flops"])
def test_an_unreachable_rate_is_told_before_any_training(tmp_path, monkeypatch, budget):
    watch, asked = Watch(monkeypatch), ["prune.rate=0.99", f"prune.budget={budget}"]
    with pytest.raises(
        UnreachableRateError, match=r"must be removed, .* can be: .*smaller prune.rate"
    ):
        experiment.run(tiny(tmp_path, *asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert watch.lrs == []


@pytest.mark.slow
def test_a_misspelt_scope_is_told_before_any_training(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    with pytest.raises(
        ValueError, match=r"prune.scope=\['backbone', 'nekc'\].*no part 'nekc'.*neck"
    ):
        experiment.run(tiny(tmp_path, "prune.scope=[backbone,nekc]"), tmp_path / "run")
    assert watch.lrs == []


# Inner rounds and masking while training ---------------------------------------------------------


class KeptScores(Criterion):
    """Scores that stay with their channels whatever else goes."""

    def collect(self, target, graph, batches):
        norms = {layer: norm for layer, norm in graph.feature_modules.items() if norm is not layer}
        self.values = {layer: norm.running_var for layer, norm in norms.items()}
        self.values |= {
            layer: layer.bias.abs() for layer in graph.feature_modules if layer not in norms
        }

    def channel_scores(self, layer):
        return self.values[layer]


@pytest.mark.slow
def test_inner_rounds_remove_what_one_round_does_where_scores_stay(tmp_path):
    options = ["prune=oneshot", "method=random", "method.ranking=global", "prune.rate=0.4"]
    options += [f"method.criterion={{_target_: {__name__}.KeptScores}}"]
    found = []
    for inner in (1, 4):
        folder = tmp_path / str(inner)
        experiment.run(tiny(tmp_path, *options, f"method.inner_rounds={inner}"), folder)
        assert rows(folder)[1]["rate"] == pytest.approx(0.4, abs=TOLERANCE)
        found.append(dict(np.load(folder / "scores-1.npz")))
    one, several = found
    assert list(one) == list(several)
    differing = total = 0
    for key, values in one.items():
        if key.startswith("score/"):
            assert np.array_equal(values, several[key])
        else:
            differing += len(np.setxor1d(values, several[key]))
            total += len(values)
    assert differing <= 4 < total / 50  # steps that are passed over to meet the rate exactly


GRADUAL = [
    "method=group_fisher_gradual",
    "method.gradual.interval=1",
    "method.gradual.channels=90",
    "prune=oneshot",
    "recipe.optimizer.lr=0.004",
    "recipe.warmup=0",
    "recipe.schedule=constant",
]


@pytest.mark.slow
@pytest.mark.parametrize("momentum", sampled(["0.1", "null"]))
def test_masking_while_training_meets_the_rate_and_survives_a_kill(tmp_path, monkeypatch, momentum):
    config = tiny(tmp_path, *GRADUAL, f"recipe.ema={momentum}")
    run_and_kill(config, tmp_path, monkeypatch)
    resume(config, tmp_path, monkeypatch)
    base, pruned = rows(tmp_path / "whole")
    assert pruned["rate"] == pytest.approx(0.5, abs=TOLERANCE)
    assert pruned["criterion/channels_per_event"] == 90
    arrays = np.load(tmp_path / "whole/scores-1.npz")
    gone = sum(len(arrays[key]) for key in arrays if key.startswith("removed/"))
    assert 90 * (pruned["criterion/events"] - 1) < gone <= 90 * pruned["criterion/events"]
    assert base["rate"] == 0


@pytest.mark.slow
def test_masking_has_its_own_epochs_and_a_fifth_of_the_learning_rate(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    experiment.run(tiny(tmp_path, *GRADUAL, "method.gradual.channels=200"), tmp_path / "run")
    events = int(rows(tmp_path / "run")[1]["criterion/events"])
    masking = 2 * ((events + 1) // 2)  # whole epochs of two steps
    assert watch.lrs == pytest.approx([0.004] * 2 + [0.0008] * masking + [0.004] * 2)
    assert watch.strays == [0] * len(watch.lrs)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"channels": 0}, {"lr": 0.0}])
def test_masking_names_a_key_out_of_range(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"method.gradual.{key}={value}; allowed: "):
        GradualPruning(**wrong)


def test_the_interval_counts_optimizer_steps_and_every_batch_adds_its_gradients(monkeypatch):
    seen = []
    fisher = type("Fisher", (), {"add": lambda self: seen.append("batch")})()
    gradual = GradualPruning(interval=2)
    gradual._fisher, gradual.done = fisher, False
    monkeypatch.setattr(gradual, "_mask", lambda _: seen.append("event"))
    for stepped in (False, True, False, True, True, True):
        gradual.after_batch(stepped)
    assert seen == ["batch"] * 4 + ["event"] + ["batch"] * 2 + ["event"]
