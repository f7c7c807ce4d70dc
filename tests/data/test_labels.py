"""What is known from the labels alone is checked before any training."""

import json

import pytest
import torch
from sampled import sampled
from short_runs import rows
from small import composed
from test_coco import box, content, write_coco

from ldt import experiment
from ldt.build import build_data, build_module, check_labels
from ldt.config import as_dict
from ldt.detectors.checkpoints import read
from ldt.detectors.models import build, model_config
from ldt.runs.files import round_checkpoint


def coco(folder, *overrides, **annotations):
    """The configuration of a run on three images of COCO's layout; annotations by split."""
    root = folder / "coco"
    if not root.exists():
        write_coco(root, content())
        for split, given in annotations.items():
            doc = content() | {"annotations": [{"id": i, **a} for i, a in enumerate(given)]}
            (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(doc))
    given = ("dataset=coco", f"dataset.root={root}", "dataset.classes=[cat,dog,bird]")
    sizes = ("dataset.scale=[64,64]", "dataset.workers=0", "recipe.batch_size=2")
    plan = ("recipe.epochs=2", "recipe.retrain_epochs=1", "prune=oneshot", "prune.rate=0.3")
    report = ("report.latency_runs=0", "report.pictures=0", "trainer=cpu", "run_name=labels")
    return composed(*given, *sizes, *plan, *report, *overrides)


CATS = [box(image, 5, corner) for image in (11, 12, 13) for corner in ((4, 5), (30, 20))]


@pytest.mark.slow
def test_objects_are_counted_without_crowds(tmp_path):
    assert build_data(coco(tmp_path)).object_counts("train") == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("annotations", "options", "expected"),
    [
        (CATS, [], True),
        (CATS, ["ldt.background=true"], True),
        (CATS, ["ldt.background=false", "method=l1"], False),
        ([*CATS, box(11, 7), box(12, 7)], [], False),
        ([*CATS, box(11, 7), box(12, 7)], ["ldt.background=true"], True),
        ([*CATS, box(11, 7)], [], True),  # a single dog has no covariance
    ],
)
def test_the_background_is_a_class_where_a_second_one_is_missing(
    tmp_path, annotations, options, expected
):
    config = coco(tmp_path, *options, train=annotations)
    assert check_labels(config, build_data(config)) is expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("annotations", "options", "told"),
    [
        ([], [], "none of the training images has an object of cat, dog, bird"),
        (
            CATS,
            ["ldt.background=false"],
            "method=ldt needs two .*have 6 cat: type ldt.back",
        ),
        (CATS, ["ldt.background=false", "method=l1", "ldt.enabled=true"], "method=l1 needs two"),
        (CATS, ["ldt.background=false", "ldt.enabled=false"], "method=ldt needs two"),
    ],
)
def test_labels_that_do_not_suffice_are_refused_before_training(
    tmp_path, annotations, options, told
):
    with pytest.raises(ValueError, match=told):
        experiment.run(coco(tmp_path, *options, train=annotations), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_new_predictors_that_nothing_trains_are_refused(tmp_path, caplog):
    untrained = ["recipe.epochs=0", "recipe.retrain_epochs=0", "method=l1"]
    config = coco(tmp_path, *untrained, train=[*CATS, box(11, 7)])
    plain, data = as_dict(config), build_data(config)
    own = plain["detector"]
    source = build(model_config(own["config"], own["options"], n_classes=80, pretrained=False))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    config.detector.checkpoint = own["checkpoint"] = str(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"another number of classes than the 3 .*recipe\.epochs="):
        build_module(config, plain, data)
    config.recipe.retrain_epochs = plain["recipe"]["retrain_epochs"] = 1
    caplog.clear()
    build_module(config, plain, data)
    assert "recipe.epochs=0 leaves the new ones untrained: the round `base`" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", sampled(["power", "neck", "discriminant"]))
def test_a_run_with_one_class_trains_prunes_and_draws(tmp_path, caplog, source):
    options = [f"method.criterion.source={source}", "ldt.alpha=auto", "ldt.beta=auto"]
    folder = tmp_path / "run"
    experiment.run(coco(tmp_path, *options, "ldt.memory=1", train=CATS, val=[]), folder)
    assert rows(folder)[1]["rate"] == pytest.approx(0.3, abs=0.01)
    record = read(folder / round_checkpoint(1))["ldt"]
    assert record["background"] is True
    assert all(weight > 0 for weight in record["term_constants"]["ldt"]["weights"].values())
    assert "none of the validation images has an object: metrics will be nan" in caplog.text
