"""Laws of the controls: as many channels of each group at random, and random weights."""

import pytest
import torch
from short_runs import tiny

import ldt
from ldt import experiment
from ldt.runs.run import open_run

pytestmark = pytest.mark.slow
OPTIONS = ["prune=oneshot", "recipe.retrain_epochs=0", "ldt.enabled=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One cut as the scores say, and its two controls, from one base."""
    place = tmp_path_factory.mktemp("controls")
    given = {"scored": [], "random": ["prune.channels=random"], "fresh": ["prune.weights=fresh"]}
    for name, more in given.items():
        options = [*OPTIONS, *more, f"dataset.cache={place}"]
        if name != "scored":  # no second base training
            checkpoint = f"detector.checkpoint={place / 'scored/round-0.ckpt'}"
            options += ["recipe.epochs=0", checkpoint]
        experiment.run(tiny(place / name, *options), place / name)
    return {name: open_run(place / name) for name in given}


def removed(run):
    return {name: set(cut.removed.tolist()) for name, cut in run.cuts[1].items()}


def test_random_channels_leave_the_widths_as_they_are(runs):
    scored, random = removed(runs["scored"]), removed(runs["random"])
    assert {k: len(v) for k, v in scored.items()} == {k: len(v) for k, v in random.items()}
    assert scored != random
    sizes = [[run.rows[-1][key] for key in ("params", "multiply_adds")] for run in runs.values()]
    assert sizes[0] == sizes[1] == sizes[2]


def test_fresh_weights_are_not_those_of_the_base(runs):
    scored, fresh = (
        ldt.load_pruned(runs[name].checkpoint()).state_dict() for name in ("scored", "fresh")
    )
    assert {k: v.shape for k, v in scored.items()} == {k: v.shape for k, v in fresh.items()}
    assert removed(runs["scored"]) == removed(runs["fresh"])
    drawn = [k for k, v in scored.items() if v.dim() == 4]
    assert not any(torch.equal(scored[key], fresh[key]) for key in drawn)
    bias = [v for k, v in fresh.items() if k.endswith("gfl_cls.bias")]
    assert all(v.mean() < -4 for v in bias)  # as mmdet initialises it, for rare objects
