"""Laws of the distillation from the unpruned base."""

from copy import deepcopy
from pathlib import Path
from shutil import copytree

import pandas as pd
import pytest
import torch
from short_runs import rows, tiny
from small import case, composed
from torch.nn.functional import softmax

from ldt import experiment
from ldt.build import check_config
from ldt.callbacks.distillation import (
    Distillation,
    channel_wise_divergence,
    check_head,
    find_readers,
    kept_channels,
)
from ldt.config import as_dict
from ldt.detectors.forward import eval_with_gradients
from ldt.loop.round_record import RoundRecord
from ldt.module import DetectorModule
from ldt.runs import identity

DISTILL = ("distill.neck=0.5", "distill.head=0.5", "distill.temperature=2")


def test_equal_maps_have_no_divergence_and_no_gradient():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = channel_wise_divergence(x, x, 2.0)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-7, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_that_of_a_slow_sum(temperature):
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    expected = 0.0
    for own, other in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        p, q = (softmax(m.flatten().double() / temperature, 0) for m in (other, own))
        expected += float((p * (p / q).log()).sum()) * temperature**2 / (2 * 3)
    found = channel_wise_divergence(student, teacher, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    shifted = channel_wise_divergence(student + 3, teacher - 2, temperature)
    torch.testing.assert_close(found, shifted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gfl_tiny", pytest.param("yolox_nano", marks=pytest.mark.slow)])
def test_the_maps_are_compared_channel_by_channel_after_two_cuts(name):
    """Only channels of the neck's maps are removed, so those that are left stay what they were."""
    subject = case(name)
    teacher, student = deepcopy(subject.target), subject.target
    readers = find_readers(teacher, ("neck",))
    assert all(readers)
    names = {group for own in readers for group, _ in own}
    watch = Distillation(Path(), ("neck",), neck=1.0)
    for first in (0, 1):
        with eval_with_gradients(student.model):
            graph = student.trace(("neck",))
        channels = {g: [first, graph.groups[g].size // 2] for g in names}
        record = RoundRecord()
        record.add({g: torch.zeros(graph.groups[g].size) for g in names}, channels)
        graph.remove(channels)
        watch.cut(record)
    with torch.no_grad():
        own, theirs = (d.features(subject.batches[0]) for d in (student, teacher))
    kept = watch.state_dict()["kept"]
    for scale, (mine, other, by) in enumerate(zip(own, theirs, readers, strict=True)):
        left = other[:, kept_channels(other.shape[1], by, kept)]
        assert mine.shape == left.shape
        assert mine.shape[1] == other.shape[1] - 4
        if scale < 3:  # GFL's fourth is computed from the third
            torch.testing.assert_close(mine, left)


def test_a_weight_of_zero_is_the_same_run_as_none():
    off, temperature, on = (
        as_dict(composed("run_name=x", *keys))
        for keys in ((), ["distill.temperature=4"], ["distill.neck=1"])
    )
    essences = [identity.essence(config) for config in (off, temperature, on)]
    assert essences[0] == essences[1] != essences[2]
    del off["distill"]
    assert identity.essence(off) == essences[0]


@pytest.mark.parametrize("key", ["neck=-1", "head=-1", "temperature=0"])
def test_what_is_wrong_is_refused(key):
    with pytest.raises(ValueError, match=f"distill.{key.split('=')[0]}"):
        check_config(composed("run_name=x", f"distill.{key}"))


def test_heads_whose_predictors_are_not_maps_are_refused():
    detector = case("gfl_tiny").target
    check_head(detector)
    detector.predictors = ["neck.fpn_convs.0.conv"]
    with pytest.raises(ValueError, match=r"type distill\.head=0"):
        check_head(detector)


@pytest.mark.slow
def test_a_killed_run_with_a_teacher_ends_as_one_that_was_not(tmp_path, monkeypatch):
    options = [*DISTILL, "prune=oneshot", "recipe.retrain_epochs=2", "recipe.ema=0.05"]
    options += ["trainer.log_every_n_steps=1", "trainer.precision=bf16-mixed"]
    config, epochs = tiny(tmp_path, *options), []

    def step(module, batch, index, plain=DetectorModule.training_step):
        if index == 0:
            epochs.append(module.current_epoch)
            if epochs == [0, 1, 2]:  # in mid retraining
                copytree(tmp_path / "whole", tmp_path / "killed")
        return plain(module, batch, index)

    monkeypatch.setattr(DetectorModule, "training_step", step)
    experiment.run(config, tmp_path / "whole")
    experiment.run(config, tmp_path / "killed")
    assert epochs == [0, 1, 2, 2]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    own, other, base = (
        torch.load(tmp_path / name, weights_only=True)["state_dict"]
        for name in ("whole/round-1.ckpt", "killed/round-1.ckpt", "whole/round-0.ckpt")
    )
    assert list(own) == list(other) == list(base)  # nothing of the teacher is kept
    assert all(torch.equal(own[key], other[key]) for key in own)
    (log,) = (tmp_path / "whole").glob("logs*/metrics.csv")
    for part in ("neck", "head"):
        values = pd.read_csv(log)[f"train/loss_distill_{part}"].dropna()
        assert len(values) == 4  # of the steps after the cut
        assert (values > 0).all()
