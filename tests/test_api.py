"""`ldt.prune` and what goes with it: without Hydra, Lightning or a recipe."""

import doctest
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from mmengine.config import Config
from omegaconf import OmegaConf
from short_runs import tiny
from small import RETINANET, composed, randomise_norms
from torch import nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance

import ldt
from ldt import api, experiment
from ldt.build import build_data
from ldt.criteria.base import Criterion
from ldt.criteria.methods import find_method
from ldt.detectors import batch_norm, checkpoints
from ldt.detectors.adapter import Calibration, Detector
from ldt.detectors.forward import raw_forward
from ldt.detectors.models import build, model_config
from ldt.evaluation.layers import write_inventory
from ldt.evaluation.profiling import count_macs, count_parameters
from ldt.pruning.budget import TOLERANCE, UnreachableRateError
from ldt.runs.files import read_json

SIZE = (64, 128)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    module = build_data(tiny(tmp_path_factory.mktemp("scenes")))
    module.prepare_data()
    module.setup("fit")
    return module


def config_of(*overrides: str) -> dict[str, Any]:
    chosen: Any = OmegaConf.to_container(composed(*overrides).detector, resolve=True)
    return model_config(chosen["config"], chosen["options"], n_classes=3, pretrained=False)


def detector_of(config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    detector = build(config).eval()
    randomise_norms(detector, torch.Generator().manual_seed(0))
    return detector


@pytest.fixture(scope="module")
def config():
    return config_of("detector=gfl_tiny")


@pytest.fixture
def detector(config):
    return detector_of(config)


def sizes(detector: nn.Module) -> dict[str, int]:
    macs = count_macs(detector, lambda x: raw_forward(detector, x), (1, 3, *SIZE))
    return {"params": count_parameters(detector), "macs": macs}


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def outputs(detector: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return raw_forward(detector, torch.randn(2, 3, *SIZE, generator=torch.manual_seed(1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criterion", "budget"),
    [("ldt", "macs"), ("group_fisher", "params"), ("chip", "flops"), ("l1", "params")],
)
def test_the_rate_is_met_on_a_copy(detector, data, criterion, budget):
    before = deepcopy(detector)
    result = ldt.prune(detector, data, rate=0.3, criterion=criterion, budget=budget)
    assert same(detector, before)
    assert type(result.detector) is type(detector)
    key = "params" if budget == "params" else "macs"
    assert 1 - sizes(result.detector)[key] / sizes(detector)[key] == pytest.approx(
        0.3, abs=TOLERANCE
    )
    network = result.table().loc["(network)"]
    assert network[["params", "macs"]].to_dict() == sizes(detector)
    assert network[["params_kept", "macs_kept"]].to_dict() == {
        f"{name}_kept": size for name, size in sizes(result.detector).items()
    }

    assert result.detector.training is False


@pytest.mark.slow
def test_in_place_prunes_the_given_detector(detector, data):
    result = ldt.prune(detector, data, keep=0.7, inplace=True)
    assert result.detector is detector


@pytest.mark.slow
def test_images_may_be_a_module_a_data_set_or_batches(detector, data):
    loader = data.calibration_dataloader(8, 4)
    given = {"module": data, "loader": loader, "batches": list(loader), "set": loader.dataset}
    found = {
        name: ldt.prune(detector, images, rate=0.3, calibration_images=8, batch_size=4)
        for name, images in given.items()
    }
    for result in found.values():
        assert same(result.detector, found["module"].detector)


@pytest.mark.slow
def test_criteria_of_one_class_have_names_of_their_own(detector, data):
    criteria = ["l1", *(GroupMagnitudeImportance(p=p) for p in (1, 2))]
    found = ldt.sensitivity(
        detector, data, criteria=criteria, rates=[0.5], calibration_images=2, validation_images=2
    )
    one, other = "GroupMagnitudeImportance", "GroupMagnitudeImportance 2"
    assert {criterion for criterion, _ in found.curves()} == {"l1", one, other}
    for values in found.harm().values():
        assert values["l1"] == values[one]
    assert any(values[one] != values[other] for values in found.harm().values())


def test_only_so_many_images_are_looked_at(data):
    loader = data.calibration_dataloader(8, 3)
    for images in (data, loader, list(loader), loader.dataset):
        counts = [len(b["data_samples"]) for b in api.calibration_batches(images, 5, 3)]
        assert counts == [3, 2]
        assert counts == [len(b["inputs"]) for b in api.calibration_batches(images, 5, 3)]


@pytest.mark.slow
def test_a_pruned_detector_is_saved_loaded_exported_and_pruned_again(
    detector, config, data, tmp_path
):
    result = ldt.prune(detector, data, rate=0.3, config=Config({"model": config}))
    file = result.save(tmp_path / "pruned.ckpt")
    loaded = ldt.load_pruned(file)
    for one, other in zip(outputs(result.detector), outputs(loaded), strict=True):
        assert torch.equal(one, other)
    exported = ldt.export(file, tmp_path / "exported")
    assert (exported / "config.py").is_file()
    again = ldt.prune(file, data, rate=0.3)  # of what is left
    share = sizes(again.detector)["params"] / sizes(detector)["params"]
    assert share == pytest.approx(0.49, abs=2 * TOLERANCE)
    once_more = ldt.load_pruned(again.save(tmp_path / "again.ckpt"))
    assert same(once_more, again.detector)


@pytest.mark.slow
def test_a_config_and_weights_are_a_detector(detector, config, data, tmp_path):
    torch.save({"state_dict": detector.state_dict()}, tmp_path / "weights.pth")
    Config({"model": config}).dump(tmp_path / "config.py")
    built = ldt.prune(detector, data, rate=0.3)
    for given in (tmp_path / "config.py", Config({"model": config})):
        opened = ldt.prune(given, data, rate=0.3, weights=tmp_path / "weights.pth")
        assert same(opened.detector, built.detector)
        opened.save(tmp_path / "pruned.ckpt")


@pytest.mark.slow
def test_another_family_with_an_instance_of_a_criterion(data):
    class Width(Criterion):
        def collect(self, target, graph, batches):
            assert [len(batch.images) for batch in batches] == [8]

        def channel_scores(self, layer):
            return layer.weight.flatten(1).abs().mean(1)

    detector = detector_of(config_of(*RETINANET))
    result = ldt.prune(detector, data, rate=0.3, criterion=Width(), ranking="uniform")
    assert 1 - sizes(result.detector)["params"] / sizes(detector)["params"] == pytest.approx(
        0.3, abs=TOLERANCE
    )


@pytest.mark.slow
def test_it_removes_what_a_run_removes(detector, config, data, tmp_path):
    torch.save({"state_dict": detector.state_dict()}, tmp_path / "weights.pth")
    overrides = ["recipe.epochs=0", f"detector.checkpoint={tmp_path}/weights.pth", "prune=oneshot"]
    overrides += ["prune.rate=0.3", "method=l1"]
    folder = tmp_path / "run"
    experiment.run(tiny(tmp_path, *overrides), folder)
    write_inventory(folder)
    images = data.calibration_dataloader(8, 16)
    result = ldt.prune(detector, images, rate=0.3, criterion="l1", input_size=SIZE)
    layers = read_json(folder / "structure.json")["rounds"]["1"]
    assert result.after == {
        name: {key: value for key, value in sizes.items() if key != "latency_ms"}
        for name, sizes in layers.items()
    }


def test_batch_norms_get_the_average_over_the_batches(detector, data):
    adapter = Detector(detector, SIZE)
    batches = list(Calibration(adapter, data.calibration_dataloader(8, 4)))
    first, seen = detector.backbone.conv1, []  # type: ignore[union-attr]
    hook = first.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    counted = batch_norm.reestimate_batch_norms(adapter, batches)
    hook.remove()
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counted == len(norms) > 0
    norm: Any = detector.backbone.bn1  # type: ignore[union-attr]
    mean = torch.stack([maps.mean((0, 2, 3)) for maps in seen]).mean(0)
    variance = torch.stack([maps.var((0, 2, 3)) for maps in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert all(norm.momentum == 0.1 and not norm.training for norm in norms)


@pytest.mark.slow
def test_without_re_estimation_the_norms_are_those_that_were(detector, data):
    result = ldt.prune(detector, data, rate=0.3, criterion="l1", repair="none")
    known = {float(v) for v in detector.backbone.bn1.running_mean}  # type: ignore[union-attr]
    kept: Any = result.detector
    assert {float(v) for v in kept.backbone.bn1.running_mean} < known


@pytest.mark.slow
def test_random_scores_depend_on_the_seed_only(detector, data):
    def layers(seed):
        state = torch.random.get_rng_state()
        found = ldt.prune(detector, data, rate=0.3, criterion="random", seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        return found.record.kept

    one, same_, other = layers(0), layers(0), layers(1)
    assert all((one[name] == same_[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"either rate= .* or keep="),
        ({"rate": 0.3, "keep": 0.7}, r"either rate= .* or keep="),
        ({"rate": 1.3}, r"rate=1.3"),
        (
            {"rate": 0.3, "criterion": "hrnk"},
            r"criterion='hrnk' is unknown; did you mean hrank\? choose",
        ),
        ({"rate": 0.3, "criterion": "group_fisher_gradual"}, r"works without training"),
        ({"rate": 0.3, "criterion": "none"}, r"works without training"),
        ({"rate": 0.3, "budget": "time"}, r"budget='time'; choose params, macs, latency or flops"),
        ({"rate": 0.3, "ranking": "best"}, r"ranking='best'; choose one of global"),
        ({"rate": 0.3, "repair": "gn"}, r"repair='gn'; allowed: none, bn, lstsq"),
        ({"rate": 0.3, "scope": ["head"]}, r"has no part 'head'. Its parts are: .*backbone"),
        ({"rate": 0.3, "neck": "nek"}, r"'nek'.*has no such module"),
        ({"rate": 0.3, "images": []}, r"holds no image"),
        ({"rate": 0.3, "images": iter(())}, r"holds no image"),
        ({"rate": 0.3, "images": None}, r"images is a NoneType; give a data loader"),
        ({"rate": 0.3, "images": "/data"}, r"images is a str; give a data loader"),
        ({"rate": 0.3, "images": torch.ones(1)}, r"images is a Tensor; give a data loader"),
        ({"keep": 1.0}, r"keep=1.0; allowed: a number above 0 and below 1"),
        ({"rate": "half"}, r"^rate='half'; allowed: a number above 0 and below 1"),
        ({"rate": 0.3, "criterion": None}, r"criterion=None; give a name such as 'ldt'"),
        ({"rate": 0.3, "criterion": 3}, r"criterion=3; give a name such as 'ldt'"),
        ({"rate": 0.3, "scope": "neck"}, r"^scope='neck'; allowed: a list, .*e.g. scope=\['back"),
        ({"rate": 0.3, "input_size": 128}, r"^input_size=128; allowed: 2 values, each a whole num"),
        ({"rate": 0.3, "input_size": (416,)}, r"^input_size=\(416,\); allowed: 2 values"),
        ({"rate": 0.3, "classes": "car"}, r"^classes='car'; allowed: a list"),
        ({"rate": 0.3, "classes": ["a", "b"]}, r"2 names; the detector predicts 3 classes"),
        ({"rate": 0.3, "predictors": "bbox_head"}, r"^predictors='bbox_head'; allowed: a list"),
        ({"rate": 0.3, "neck": 3}, r"^neck=3; allowed: a text"),
        ({"rate": 0.3, "resize": 5}, r"^resize=5; allowed: "),
        ({"rate": 0.3, "limits": 5}, r"^limits=5; allowed: .*Limits"),
        ({"rate": 0.3, "seed": -1}, r"^seed=-1; allowed: a whole number of at least 0"),
        ({"rate": 0.3, "images": [1, 2]}, r"images holds a int; give a data loader"),
        ({"rate": 0.3, "images": [{"img": 1}]}, r"images holds a dict; give .*data_samples"),
        ({"rate": 0.3, "calibration_images": 0}, r"^calibration_images=0; allowed"),
        ({"rate": 0.3, "batch_size": 0}, r"^batch_size=0; allowed"),
    ],
)
def test_what_is_wrong_is_told(detector, data, wrong, message):
    given = {"images": data, **wrong}
    with pytest.raises(ValueError, match=message):
        ldt.prune(detector, given.pop("images"), **given)


def test_what_is_no_detector_is_told(data):
    for other, kind in ((torch.nn.Linear(2, 2), "Linear"), (3, "int")):
        with pytest.raises(ValueError, match=rf"detector is a {kind}; give an mmdet detector"):
            ldt.prune(other, data, rate=0.3)


@pytest.mark.slow
def test_a_detector_in_half_precision_is_refused(detector, data):
    for kind in (torch.float16, torch.bfloat16, torch.complex64):
        other = deepcopy(detector).to(kind)
        with pytest.raises(
            ValueError, match=rf" is {kind}; allowed: torch.float32, which detector"
        ):
            ldt.prune(other, data, rate=0.3)


@pytest.mark.slow
def test_wrong_overrides_of_training_are_told():
    with pytest.raises(ValueError, match=r"^prune.raet=1: unknown key; did you mean prune.rate\?"):
        ldt.train("prune.raet=1")
    with pytest.raises(ValueError, match=r"prune=oneshott: did you mean oneshot\?"):
        ldt.train("prune=oneshott")


@pytest.mark.slow
def test_an_unreachable_rate_names_itself_and_its_unit(detector, data):
    for budget, unit in (("params", "parameters"), ("macs", "MACs")):
        with pytest.raises(
            UnreachableRateError, match=rf"rate=0.99 .*[\d,]+ {unit} must be removed"
        ):
            ldt.prune(detector, data, rate=0.99, budget=budget)


@pytest.mark.slow
def test_saving_needs_a_folder_and_the_config(detector, data, tmp_path):
    result = ldt.prune(detector, data, rate=0.3, criterion="l1")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        result.save(tmp_path / "missing" / "x.ckpt")
    with pytest.raises(ValueError, match=r"config='my_config.py'"):
        result.save(tmp_path / "x.ckpt")


def test_every_method_of_conf_that_prunes_at_once_can_be_named():
    names = ("ldt", "hrank", "group_fisher", "chip", "px", "taylor", "obd", "l1", "l2", "lamp")
    for name in (*names, "fpgm", "random"):
        assert find_method(name).criterion is not None
    assert find_method("group_fisher").inner_rounds == 10
    assert find_method("chip").ranking == "uniform"


def test_metrics_are_those_of_the_validation(detector, data):
    found = api.evaluate(detector, data.val_dataloader(), data.classes)
    assert 0 <= found["AP"] <= 1
    assert set(found) >= {"AP", "AP50", "mAP"}


@pytest.mark.slow
def test_examples_in_docstrings_run(detector, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ldt.prune(
        detector, data, rate=0.3, config=Config({"model": config_of("detector=gfl_tiny")})
    )
    names = {"ldt": ldt, "detector": detector, "images": data, "result": result}
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS),
    )
    tried = 0
    for thing in (
        api.prune,
        api.PruningResult,
        api.evaluate,
        checkpoints.load_pruned,
        experiment.train,
    ):
        for test in finder.find(thing, globs=dict(names)):
            tried += runner.run(test).attempted
    assert tried >= 13
    assert runner.failures == 0


@pytest.mark.slow
def test_neither_lightning_nor_hydra_is_imported():
    code = (
        "import ldt, sys; ldt.prune; import ldt.api; "
        "print([n for n in ('lightning', 'hydra') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
