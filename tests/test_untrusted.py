"""Files that are not ours: nothing in them is executed."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
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


@pytest.mark.parametrize("part", ["model", "backbone", "norm_cfg"])
def test_a_model_config_cannot_call_what_is_not_registered(tmp_path: Path, part: str):
    trap = tmp_path / "trap"
    call = {"type": "subprocess.run", "args": ["touch", str(trap)]}
    resnet = {"type": "ResNet", "depth": 18, "norm_cfg": call}
    evil = {
        "model": call,
        "backbone": {"type": "RetinaNet", "backbone": call, "neck": None, "bbox_head": None},
        "norm_cfg": {"type": "RetinaNet", "backbone": resnet, "neck": None, "bbox_head": None},
    }
    assert MODELS.get("subprocess.run") is subprocess.run  # mmengine alone would call it
    about = {"model": evil[part], "classes": [], "structure": {}}
    torch.save({"state_dict": {}, "ldt": about}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"is not in|Cannot find"):
        ldt.load_pruned(tmp_path / "evil.ckpt")
    assert not trap.exists()


@pytest.mark.parametrize("nested", [False, True])
def test_a_pipeline_cannot_call_what_is_not_registered(tmp_path: Path, nested: bool):
    trap = tmp_path / "trap"
    call = {"type": "subprocess.run", "args": ["touch", str(trap)]}
    steps = [{"type": "Compose", "transforms": [call]}] if nested else [call]
    torch.save({"state_dict": {}, "ldt": {"resize": steps}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="mmdet cannot build the pipeline"):
        Predictor(tmp_path / "evil.ckpt")
    assert not trap.exists()


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
