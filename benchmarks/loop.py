"""Training throughput of ldt compared with mmengine's Runner: same detector, data and batch.

    python benchmarks/loop.py [--epochs 3]

Epochs of the two loops alternate in one process, so that a noisy machine slows both alike; the
ratio is that of the medians, without each loop's first epoch. Without a GPU, seconds are the CPU
time of the process that trains. LDT is off, for the Runner lacks it, and so is the NHWC order of
feature maps. Both write their log files; ours runs all of a run's callbacks.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from omegaconf import OmegaConf

from ldt.build import build_data, build_loop, build_module, build_schedule, build_trainer
from ldt.config import register
from ldt.runs import files

OPTIONS = ["recipe.channels_last=false", "recipe.epochs=2", "trainer.limit_val_batches=0"]
ROOT = Path(__file__).resolve().parents[1]


def now() -> float:
    """Return the time when a GPU has finished its work, or the CPU time of this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # other work on a shared machine does not count


class Clock(L.Callback):
    """Seconds of each epoch of a Lightning fit."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self._start = now()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(now() - self._start)


class RunnerClock(Hook):
    """Seconds of each epoch of a Runner's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def before_train_epoch(self, runner: Runner) -> None:
        self._start = now()

    def after_train_epoch(self, runner: Runner) -> None:
        self.seconds.append(now() - self._start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs
    fast, reference = throughput(["trainer=cpu"], epochs)
    unit = "images/s" if torch.cuda.is_available() else "images per CPU second"
    print(f"ours {fast:.1f} {unit}, mmengine's Runner {reference:.1f} {unit}")
    print(f"ratio {fast / reference:.3f}")


def throughput(overrides: list[str], epochs: int) -> tuple[float, float]:
    """Return images per second of this loop and of the Runner, for a configuration."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", ["method=none", "run_name=benchmark", *OPTIONS, *overrides])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    images = len(data.dataset("train"))
    module = build_module(config, plain, data)
    twin = copy.deepcopy(module.detector)
    ours, theirs = [], []
    for _ in range(epochs):
        ours.append(lightning_epoch(module, data, config))
        theirs.append(runner_epoch(twin, data, plain["recipe"]))
    return images / statistics.median(ours), images / statistics.median(theirs)


def lightning_epoch(module, data, config) -> float:
    """Seconds of the second of two epochs, so that workers are warm."""
    clock, plan = Clock(), build_schedule(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / files.CONFIG).touch()  # checkpoints are written only where a run is
        trainer = build_trainer(config, plan, build_loop(config, plan, folder), folder)
        trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]
        trainer.fit(module, datamodule=data)
    return clock.seconds[-1]


def runner_epoch(detector: torch.nn.Module, data, recipe: dict) -> float:
    """Time an epoch of a Runner with the same loader, optimizer and clipping."""
    clock = RunnerClock()
    clip = {"clip_grad": {"max_norm": recipe["clip_grad"]}} if recipe["clip_grad"] else {}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=detector,
            work_dir=folder,
            train_dataloader=data.train_dataloader(),
            train_cfg={"by_epoch": True, "max_epochs": 2},
            optim_wrapper=ConfigDict(optimizer=recipe["optimizer"], **clip),
            default_hooks={"checkpoint": None},  # type: ignore[arg-type]
            custom_hooks=[clock],
            default_scope="mmdet",
            log_level="ERROR",
            experiment_name=f"benchmark-{time.time_ns()}",
        )
        runner.train()
    return clock.seconds[-1]


if __name__ == "__main__":
    main()
