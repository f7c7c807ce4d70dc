"""Files that are not ours: nothing in them is executed."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
from pruned_files import data_of, pruned_checkpoint
from torch import nn

import ldt
from ldt.callbacks.checkpoint_io import LAST, PREVIOUS, AtomicCheckpointIO, resumable
from ldt.deployment.prediction import Predictor
from ldt.detectors.weights import load_weights


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


CALL = {"type": "subprocess.run", "args": ["touch", "trap"]}
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
    "no classes": (without("classes"), "classes: Field required"),
    "no record": (lambda record: record.clear(), "Field required"),
}


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


@pytest.mark.slow
def test_mutated_records_run_nothing(benign: Path):
    counts, escapes = mutations.outcomes(benign, number=150, seed=0)
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
