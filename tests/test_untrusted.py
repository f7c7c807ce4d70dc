"""Files that are not ours: nothing in them is executed."""

import inspect
import os
import re
import resource
import struct
import subprocess
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import mutations
import numpy as np
import pytest
import torch
import yaml
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import Config
from mmengine.logging import MessageHub
from omegaconf import OmegaConf
from pruned_files import data_of, pruned_checkpoint
from short_runs import tiny
from summaries import configured, summary
from torch import nn

import ldt
from ldt.callbacks.checkpoint_io import LAST, PREVIOUS, AtomicCheckpointIO, resumable
from ldt.cli import repetition
from ldt.deployment.prediction import Predictor
from ldt.detectors import untrusted
from ldt.detectors.models import model_config, use_mmdet
from ldt.detectors.weights import load_weights
from ldt.runs import files
from ldt.runs.refusal import is_refusal
from ldt.runs.run import load_config, open_run, open_runs


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_malicious_file_is_refused(tmp_path: Path, wrapped: bool):
    trap, file = tmp_path / "trap", tmp_path / "evil.pth"
    bad = Malicious(trap)
    torch.save({"state_dict": {"weight": bad}, "ldt": {}} if wrapped else bad, file)
    with pytest.raises(ValueError, match="damaged"):
        load_weights(nn.Linear(2, 2), file, [])
    with pytest.raises(ValueError, match="damaged"):
        ldt.load_pruned(file)
    (tmp_path / LAST).write_bytes(file.read_bytes())
    assert resumable(tmp_path) is None
    assert not trap.exists()


def test_the_trap_would_have_worked(tmp_path: Path):
    file = tmp_path / "evil.pth"
    torch.save(Malicious(tmp_path / "trap"), file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "trap").exists()


@pytest.fixture(scope="module")
def benign(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("benign")
    return pruned_checkpoint(folder / "round-1.ckpt", data_of(folder), "detector=gfl_tiny")


def without(key: str) -> Any:
    return lambda record: record.pop(key)


def put(value: Any, *keys: Any) -> Any:
    """A change of a record: a value at the end of a path of keys."""

    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def unfolding() -> list[Any]:
    """Thirty lists that are a thousand million leaves for who walks them."""
    found: list[Any] = []
    for _ in range(30):
        found = [found, found]
    return found


CALL = {"type": "subprocess.run", "args": ["touch", "trap"]}
RESIZE = {"type": "Resize", "scale": [64, 64], "keep_ratio": False}
URL = "http://127.0.0.1:9/evil.pth"
ATTACKS = {
    "a call as model": (put(CALL, "model"), "not a registered part"),
    "a call as backbone": (put(CALL, "model", "backbone"), "not a registered part"),
    "a call as norm": (put(CALL, "model", "backbone", "norm_cfg"), "not a registered part"),
    "a call while resizing": (put([CALL], "resize"), "resize: type='subprocess.run'"),
    "a call in a composed step": (
        put([{"type": "Compose", "transforms": [CALL]}], "resize"),
        "resize: type='Compose'",
    ),
    "a module that is not imported": (
        put({"type": "mmpretrain.ConvNeXt"}, "model", "backbone"),
        "not a registered part",
    ),
    "a package that would be imported": (
        put("mmpretrain", "model", "backbone", "_scope_"),
        "allowed: mmdet, mmcv, mmengine",
    ),
    "a pickle of a teacher": (put(URL, "model", "backbone", "teacher_ckpt"), "would load a file"),
    "code of a teacher": (put("evil.py", "model", "teacher_config"), "would load a file"),
    "code of its own": (put({"imports": ["antigravity"]}, "model", "custom_imports"), "--trust"),
    "a key that is code": (put(1, "model", "a': print(), 'b"), "allowed: letters"),
    "a text that is a path": (put("/etc/passwd", "model", "backbone", "style"), "short text"),
    "a network without end": (put(10**9, "model", "neck", "out_channels"), "numbers up to"),
    "a layer of no size": (put(True, "structure", "backbone.conv1", "out_channels"), "integer"),
    "an image without end": (put([10**6, 10**6], "input_size"), "8192"),
    "a class that moves the cursor": (put(["\x1b[2J"] * 3, "classes"), "cannot be printed"),
    "an operator that is code": (
        put("__import__('os').system('touch trap')", "model", "test_cfg", "nms", "type"),
        "not a registered part",
    ),
    "a type that loads": (put({"type": "BertModel"}, "model", "neck"), "loads files"),
    "an initialisation that is code": (
        put({"type": "os.system"}, "model", "backbone", "init_cfg"),
        "not a registered part",
    ),
    "padding without end": (
        put(2**15, "model", "data_preprocessor", "pad_size_divisor"),
        "numbers from 1 to 512",
    ),
    "padding to nothing": (
        put(0, "model", "data_preprocessor", "pad_size_divisor"),
        "numbers from 1 to 512",
    ),
    "steps without end": (put([RESIZE] * 2000, "resize"), "resize has 2000 steps"),
    "an enormous image": (
        put([RESIZE | {"scale": [8192, 8192]}], "resize"),
        "resize.scale=8192x8192; allowed: at most",
    ),
    "one enormous image of several": (
        put([RESIZE | {"scale": [[64, 64], [8192, 8192]]}], "resize"),
        "resize.scale=8192x8192; allowed: at most",
    ),
    "too few classes": (put(["a", "b"], "classes"), "names 2 classes, but its detector predicts 3"),
    "not one class": (put([], "classes"), "names 0 classes, but its detector predicts 3"),
    "more classes than weights": (put(65000, "model", "bbox_head", "num_classes"), "detector"),
    "a size that is no number": (
        put(float("nan"), "model", "backbone", "depth"),
        "numbers up to 65536",
    ),
    "a number of many digits": (put(10**400, "model", "backbone", "depth"), "numbers up to 65536"),
    "a plugin": (
        put([{"cfg": CALL, "stages": [True]}], "model", "backbone", "plugins"),
        "not a registered part",
    ),
    "a base": (put(URL, "model", "_base_"), "allowed: letters"),
    "lists of lists": (put(unfolding(), "model", "backbone", "depth"), "too large or nested"),
    "a layer twice as wide": (
        put(2**15, "structure", "backbone.conv1", "out_channels"),
        "builds has",
    ),
    "a layer without groups": (put(0, "structure", "backbone.conv1", "groups"), "builds has"),
    "no classes": (without("classes"), "classes: Field required"),
    "no record": (lambda record: record.clear(), "Field required"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "told"), ATTACKS.values(), ids=ATTACKS)
def test_a_record_can_say_only_what_is_known(benign: Path, tmp_path: Path, change: Any, told: str):
    content = torch.load(benign, weights_only=True)
    change(content["ldt"])
    torch.save(content, tmp_path / "evil.ckpt")
    for opened in (ldt.load_pruned, Predictor, lambda file: ldt.export(file, tmp_path / "out")):
        with pytest.raises(ValueError, match=re.escape(told)) as refused:
            opened(tmp_path / "evil.ckpt")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_mmengine_alone_would_make_the_call():
    assert MODELS.get("subprocess.run") is subprocess.run


def test_weights_that_a_config_names_are_in_the_file(benign: Path, tmp_path: Path):
    content = torch.load(benign, weights_only=True)
    backbone = content["ldt"]["model"]["backbone"]
    backbone["init_cfg"] = [{"type": "Pretrained", "checkpoint": URL}]
    backbone["pretrained"] = URL
    torch.save(content, tmp_path / "a.ckpt")
    ours, theirs = ldt.load_pruned(benign).state_dict(), ldt.load_pruned(tmp_path / "a.ckpt")
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())


TENSORS = {
    "larger than stored": lambda own: torch.zeros(1).expand(10**6, 10**6),
    "of no memory": lambda own: own.to("meta"),
    "sparse": lambda own: own.to_sparse(),
    "no tensor": lambda own: own.tolist(),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_a_tensor_is_as_large_as_it_says(benign: Path, tmp_path: Path, change: Any):
    content = torch.load(benign, weights_only=True)
    key = "detector.backbone.conv1.weight"
    content["state_dict"][key] = change(content["state_dict"][key])
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"state_dict has 'detector\.backbone\.conv1\.weight'"):
        ldt.load_pruned(tmp_path / "evil.ckpt")


def test_a_compressed_archive_is_not_unpacked(benign: Path, tmp_path: Path):
    with ZipFile(benign) as old, ZipFile(tmp_path / "a.ckpt", "w", ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, bytes(part.file_size))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        ldt.load_pruned(tmp_path / "a.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", [b"builtins", b"__builtin__"])
def test_a_small_file_calls_nothing_that_allocates_much(tmp_path: Path, module, zipped):
    call = b"c" + module + b"\nbytearray\n\x8a\x08" + struct.pack("<q", 6 * 10**9) + b"\x85R."
    file = tmp_path / "evil.ckpt"
    torch.save({}, file, _use_new_zipfile_serialization=zipped)
    if zipped:
        with ZipFile(file) as old, ZipFile(tmp_path / "new", "w") as new:
            for part in old.infolist():
                whole = old.read(part.filename)
                new.writestr(part, b"\x80\x02" + call if part.filename.endswith(".pkl") else whole)
        (tmp_path / "new").replace(file)
    else:
        file.write_bytes(file.read_bytes().replace(b"}q\x00.", call))
        assert b"bytearray" in file.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (ldt.load_pruned, lambda path: load_weights(nn.Identity(), path, [])):
        with pytest.raises(ValueError, match="damaged"):
            load(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.slow
@pytest.mark.parametrize("head", [{"feat_channels": 2**16}, {"stacked_convs": 2**16}])
def test_a_small_file_builds_no_huge_detector(benign: Path, tmp_path: Path, head: dict[str, int]):
    content = torch.load(benign, weights_only=True)
    wide = {"stacked_convs": 2, "norm_cfg": {"type": "GN", "num_groups": 1}}
    content["ldt"]["model"]["bbox_head"].update(wide | head)
    torch.save(content, tmp_path / "evil.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="far larger than its weights"):
        ldt.load_pruned(tmp_path / "evil.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB


def test_names_of_classes_are_data(benign: Path, tmp_path: Path):
    """mmengine replaces {{...}} in the source of a config, quotes and all."""
    names = ["<b>'\"", "{{$HOME:x}} {{fileDirname}}", "\"{{$N:'}}"]
    content = torch.load(benign, weights_only=True)
    content["ldt"]["classes"] = names
    torch.save(content, tmp_path / "a.ckpt")
    config = Config.fromfile(ldt.export(tmp_path / "a.ckpt", tmp_path / "out") / "config.py")
    assert list(config.test_dataloader.dataset.metainfo.classes) == names
    assert config.model.backbone == content["ldt"]["model"]["backbone"]


@pytest.mark.slow
def test_all_that_loads_a_file_while_it_is_built_is_known():
    """The parts of mmdet whose constructors load something are those that the gate knows."""
    loads = re.compile(r"from_pretrained|load_checkpoint\(|fromfile|\bopen\(|\beval\([^)]")
    use_mmdet()
    found = {
        name
        for registry in (MODELS, TASK_UTILS, MODELS.root, TASK_UTILS.root)
        for name, kind in registry.module_dict.items()
        for base in (kind.__mro__ if inspect.isclass(kind) else ())
        if base.__module__.partition(".")[0] in untrusted.SCOPES and "__init__" in vars(base)
        if loads.search(inspect.getsource(base.__init__))
    }
    distilling = {"KnowledgeDistillationSingleStageDetector", "LAD"}  # their keys are refused
    assert distilling <= found <= distilling | set(untrusted.LOADING_TYPES)


@pytest.mark.parametrize(
    "family",
    [
        "gfl/gfl_r50_fpn_1x_coco",
        "detr/detr_r50_8xb2-150e_coco",
        "fpg/faster-rcnn_r50_fpg_crop640-50e_coco",
        "lad/lad_r50-paa-r101_fpn_2xb8_coco_1x",
        "yolox/yolox_x_8xb8-300e_coco",
        "rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco",
        "carafe/faster-rcnn_r50_fpn-carafe_1x_coco",
        "yolo/yolov3_d53_8xb8-320-273e_coco",
    ],
)
def test_detectors_of_mmdet_are_let_in(family: str):
    model = model_config(f"mmdet::{family}.py", {}, None, pretrained=True)
    record = {"model": model, "classes": [], "structure": {}, "predictors": [], "neck": "neck"}
    found = untrusted.checked({"state_dict": {}, "ldt": {**record, "input_size": [64, 64]}})
    assert "://" not in str(found)  # without what they would fetch
    kept = {key: value for key, value in model.items() if "teacher" not in key}
    assert kept.keys() <= found["ldt"]["model"].keys()


@pytest.mark.slow
def test_what_a_record_builds_is_never_a_command(benign: Path):
    content = torch.load(benign, weights_only=True)
    changed = [content | {"ldt": record} for record in mutations.hostile(content["ldt"])]
    assert len(changed) > 5
    counts, escapes = mutations.watched(content, changed)
    assert not escapes
    assert counts == {"refused": len(changed)}


@pytest.mark.slow
def test_mutated_records_run_nothing(benign: Path):
    # by hand: python tests/mutations.py --number 10000
    counts, escapes = mutations.outcomes(benign, number=60, seed=0)
    assert not escapes
    assert set(counts) == {"refused", "opened"}


def test_a_published_file_loads_with_its_logs(tmp_path: Path):
    hub = MessageHub.get_instance("published")
    hub.update_scalar("train/loss", np.float64(1.5))
    hub.update_info("epoch", 3)
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    content = {
        "meta": {"classes": ("a",), "lr": np.float32(0.1)},
        "state_dict": {f"module.{key}": value for key, value in source.state_dict().items()},
        "message_hub": hub.state_dict(),
    }
    torch.save(content, tmp_path / "published.pth")
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(tmp_path / "published.pth", weights_only=True)
    load_weights(target, tmp_path / "published.pth", [])
    assert torch.equal(source.weight, target.weight)


# Runs -----------------------------------------------------------------------------------------

NESTED = "[" * 10**5 + "]" * 10**5
BOMBS = {  # by the name of a file
    "config.yaml": [
        "a: &a [x, x]\n"
        + "".join(
            f"{k}: &{k} [*{chr(ord(k) - 1)}, *{chr(ord(k) - 1)}]\n"
            for k in "bcdefghijklmnopqrstuvwxyz"
        ),
        "a: &a {x: 1}\nb: {<<: *a}",
        f"a: {NESTED}",
        "a: " + "x" * (files.LARGEST_CONFIG + 1),
    ],
    "summary.json": [NESTED, " " * (files.LARGEST_FILE + 1)],
    "rounds.csv": ["round\n" + "1" * (files.LARGEST_FILE + 1)],
}


@pytest.mark.parametrize(
    ("name", "text"), [(n, text) for n in BOMBS for text in BOMBS[n]], ids=lambda text: text[:12]
)
def test_no_file_of_a_run_is_read_without_end(tmp_path: Path, name: str, text: str):
    (tmp_path / "good").mkdir()
    files.write_json(tmp_path / "good" / "summary.json", summary())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("a: 1")
    (tmp_path / "bad" / name).write_text(text)
    bad, good = open_runs(tmp_path)
    assert good.finished
    assert f"{name} is damaged" in bad.row["error"]


def test_scores_that_unpack_to_more_than_a_run_has_are_not_unpacked(tmp_path: Path):
    configured(tmp_path, "a", {"a": 1})
    zeros = np.zeros(files.LARGEST_FILE // 8 + 1)
    np.savez_compressed(tmp_path / "a" / "scores-1.npz", **{"score/x": zeros})
    with pytest.raises(ValueError, match="unpacks to more than 32 MiB"):
        open_run(tmp_path / "a").cuts  # noqa: B018


FOREIGN = {
    "a call": ({"logger": {"_target_": "os.system"}}, "names os.system"),
    "a call in a list": ({"method": {"criterion": {"x": [{"_target_": "a.b"}]}}}, "names a.b"),
    "a transform": ({"recipe": {"pipeline": [{"type": "evil.T"}]}}, "names evil.T"),
    "an optimizer": ({"recipe": {"optimizer": {"type": "os.system"}}}, "names os.system"),
    "a resolver": ({"study": "${from_config:evil.py}"}, "is not resolved"),
    "a config": ({"detector": {"config": "evil.py"}}, "detector.config=evil.py, which is Python"),
    "a config outside": (
        {"detector": {"config": "mmdet::../../evil.py"}},
        "evil.py, which is Python code",
    ),
    "a package": ({"detector": {"config": "evil::evil.py"}}, "evil::evil.py, which is Python code"),
    "weights": (
        {"detector": {"options": {"backbone": {"init_cfg": {"checkpoint": URL}}}}},
        "would load a file",
    ),
    "an operator": (
        {"detector": {"options": {"test_cfg": {"nms": {"type": "print()"}}}}},
        "not a registered part",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "told"), FOREIGN.values(), ids=FOREIGN)
def test_repeating_a_run_runs_no_code_of_its_author(tmp_path: Path, change: Any, told: str):
    config: Any = OmegaConf.to_container(tiny(tmp_path), resolve=True)
    configured(tmp_path, "a", OmegaConf.merge(config, OmegaConf.create(change)))
    with pytest.raises(ValueError, match=re.escape(told)) as refused:
        repetition.repeat(tmp_path / "a", tmp_path / "b")
    assert is_refusal(refused.value)
    assert not (tmp_path / "b").exists()


def test_scenes_are_generated_where_a_stranger_says_only_with_trust(tmp_path: Path):
    run, named = tmp_path / "study/run", tmp_path / "named"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"dataset: {{cache: {named}}}\n")
    assert load_config(run).dataset.cache is None
    assert load_config(run, trust=True).dataset.cache == str(named)
    (named / "roadscenes-0123456789").mkdir(parents=True)
    assert load_config(run).dataset.cache == str(named)


HUGE = {  # in a configuration: what it would allocate, start or read
    "scenes": {"dataset": {"train": 10**12}},
    "pixels of a scene": {"dataset": {"height": 10**6}},
    "pixels of the input": {"dataset": {"scale": [10**6, 10**6]}},
    "processes": {"dataset": {"workers": 10**6}},
    "a seed": {"seed": 10**400},
    "a share": {"prune": {"rate": float("inf")}},
    "a text for a number": {"prune": {"images": "many"}},
    "a group for a number": {"recipe": {"epochs": {"a": 1}}},
    "an unknown key": {"recipe": {"epoch": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", HUGE.values(), ids=HUGE)
def test_values_of_a_run_are_those_that_a_command_takes(tmp_path: Path, change: Any):
    config: Any = OmegaConf.to_container(tiny(tmp_path), resolve=True)
    for group, value in change.items():
        config[group] = config[group] | value if isinstance(value, dict) else value
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(files.DamagedError, match=r"config\.yaml is damaged \(.*remove the run"):
        load_config(folder)


def test_what_ldt_itself_names_needs_no_trust(tmp_path: Path):
    config: Any = OmegaConf.to_container(tiny(tmp_path, "logger=wandb"), resolve=True)
    folder = configured(tmp_path, "a", config)
    assert load_config(folder).logger._target_ == "ldt.callbacks.wandb_logger.WandbRun"
    config["dataset"]["_target_"] = "own_data.Photos"
    folder = configured(tmp_path, "b", config)
    with pytest.raises(ValueError, match=r"names own_data\.Photos.*type --trust"):
        load_config(folder)
    assert load_config(folder, trust=True).dataset._target_ == "own_data.Photos"


# Checkpoints ----------------------------------------------------------------------------------


def saved(folder: Path, number: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"ldt": {}, "number": number}, folder / LAST)


def number(file: Path | None) -> int:
    assert file is not None
    return torch.load(file, weights_only=True)["number"]


def test_the_newest_whole_checkpoint_is_resumed(tmp_path: Path, caplog: Any):
    assert resumable(tmp_path) is None
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    assert number(resumable(tmp_path)) == 2
    last = tmp_path / LAST
    last.write_bytes(last.read_bytes()[:-200])
    assert number(resumable(tmp_path)) == 1
    assert str(last) in caplog.text
    last.unlink()  # a kill between two moves
    assert number(resumable(tmp_path)) == 1
    (tmp_path / PREVIOUS).write_bytes(b"")
    assert resumable(tmp_path) is None


def test_a_disk_that_is_full_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: Any):
    saved(tmp_path, 1)

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"cannot write .*last.ckpt.*free disk space.*intact"):
            saved(tmp_path, 2)
    assert number(resumable(tmp_path)) == 1
    assert [file.name for file in tmp_path.iterdir()] == [LAST]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_torch_says_that_the_disk_is_full():
    with pytest.raises((OSError, RuntimeError)), open("/dev/full", "wb") as file:
        torch.save(torch.zeros(100_000), file)
