"""What a cut leaves is measured before it is retrained, and nothing else changes by it."""

import csv

import pytest
import torch
from short_runs import rows, tiny

import ldt
from ldt import experiment
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.runs import files

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def cut(row):
    return {key: value for key, value in row.items() if key.startswith("cut/")}


def config(folder, *more):
    return tiny(folder, "report.before_retraining=true", "method=l1", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts")
    experiment.run(config(folder), folder / "whole")
    return folder


def test_it_is_what_a_run_without_retraining_ends_with(whole):
    experiment.run(config(whole, "recipe.retrain_epochs=0", "prune=oneshot"), whole / "cut")
    experiment.run(config(whole, "prune=oneshot"), whole / "retrained")
    (_, alone), (base, row) = rows(whole / "cut"), rows(whole / "retrained")
    assert cut(base) == cut(alone) == {}
    assert set(cut(row)) >= {"cut/AP", "cut/AP50", "cut/mAP"}
    assert cut(row) == pytest.approx({key: alone[key[4:]] for key in cut(row)}, nan_ok=True)


def test_the_run_is_the_same_without_it(whole):
    experiment.run(config(whole, "report.before_retraining=false"), whole / "without")
    found = rows(whole / "whole")
    assert all(cut(row) for row in found[1:])
    assert [{k: v for k, v in row.items() if k not in cut(row)} for row in found] == rows(
        whole / "without"
    )
    one, two = (ldt.load_pruned(whole / name / files.round_checkpoint(2)).state_dict()
                for name in ("whole", "without"))  # fmt: skip
    assert all(torch.equal(one[key], value) for key, value in two.items())


def test_it_survives_a_stop_while_retraining(whole, monkeypatch):
    def stop(trainer, module, *_):
        if trainer.current_epoch == 2:  # the second retraining; the last file is of the first
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(LDTLoss, "on_train_epoch_start", lambda self, *given: stop(*given))
        with pytest.raises(RuntimeError, match="stopped"):
            experiment.run(config(whole, "ldt.enabled=true"), whole / "parted")
    experiment.run(config(whole, "ldt.enabled=true"), whole / "parted")
    experiment.run(config(whole, "ldt.enabled=true"), whole / "at-once")
    assert rows(whole / "parted") == rows(whole / "at-once")
    with (whole / "parted/rounds.csv").open() as file:
        assert all(float(row["cut/AP"]) >= 0 for row in list(csv.DictReader(file))[1:])
