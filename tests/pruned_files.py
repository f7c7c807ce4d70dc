"""Checkpoints of detectors that were built, cut and saved, but not trained, and scenes for them."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from small import composed, random_channels, randomise_norms

from ldt.assembly import build_module
from ldt.data.kitti import RoadScenesDataModule
from ldt.taps import evaluating


def data_of(scenes: Path, scale: tuple[int, int] = (128, 64), **options: Any) -> Any:
    """A data module of three validation scenes, 64x150, written below `scenes`."""
    small: Any = {"train": 1, "val": 3, "height": 64, "width": 150, "scale": scale}
    module = RoadScenesDataModule(cache=str(scenes), **small, **options)
    module.prepare_data()
    module.setup("validate")
    return module


def pruned_checkpoint(file: Path, data: Any, *overrides: str) -> Path:
    """A checkpoint of an untrained detector that has lost channels at random."""
    config = composed(*overrides, "run_name=x", "+detector.options.test_cfg.score_thr=0.0")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    module = build_module(config, plain, data)
    randomise_norms(module, torch.Generator().manual_seed(0))
    with evaluating(module.detector):
        graph = module.trace(["backbone", "neck"])
        graph.remove(random_channels(graph, seed=0))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, file)
    return file
