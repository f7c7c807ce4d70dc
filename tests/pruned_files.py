"""Checkpoints of detectors that were built, cut and saved, but not trained, and scenes for them."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from small import composed, random_channels, randomise_norms
from torch import nn

from ldt.build import build_module
from ldt.data.roadscenes import RoadScenesDataModule
from ldt.detectors.forward import eval_with_gradients, raw_forward
from ldt.detectors.models import build, model_config
from ldt.pruning import structure
from ldt.pruning.graph import PruningGraph

SIZE = (64, 128)  # of what a cut run's rounds were made for
NARROW: dict[str, Any] = {
    "backbone": {"depth": 18, "base_channels": 8, "frozen_stages": -1, "norm_eval": False},
    "neck": {
        "in_channels": [8, 16, 32, 64],
        "out_channels": 16,
        "start_level": 0,
        "num_outs": 4,
        "add_extra_convs": False,
    },
    "bbox_head": {
        "in_channels": 16,
        "feat_channels": 16,
        "stacked_convs": 1,
        "norm_cfg": {"type": "GN", "num_groups": 4, "requires_grad": True},
        "anchor_generator": {"octave_base_scale": 4, "strides": [4, 8, 16, 32]},
    },
}


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
    with eval_with_gradients(module.detector):
        graph = module.adapter.trace(["backbone", "neck"])
        graph.remove(random_channels(graph, seed=0))
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, file)
    return file


def write_cut_run(folder: Path) -> nn.Module:
    """The rounds of a run whose backbone lost half of its channels; the detector that is left."""
    torch.manual_seed(0)
    model = model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", NARROW, 3, pretrained=False)
    detector = build(model)
    _save(detector, model, folder / "round-0.ckpt")
    with eval_with_gradients(detector):
        graph = PruningGraph(detector, raw_forward, torch.zeros(1, 3, *SIZE), ["backbone"])
        graph.remove({n: list(range(g.size // 2)) for n, g in graph.groups.items() if g.parts == 1})
    _save(detector, model, folder / "round-1.ckpt")
    return detector


def _save(detector: nn.Module, model: dict[str, Any], path: Path) -> None:
    about = {
        "model": model,
        "classes": ["Car", "Pedestrian", "Cyclist"],
        "structure": structure.record(detector),
        "predictors": [],
        "neck": "neck",
        "input_size": list(SIZE),
    }
    state = {f"detector.{key}": value for key, value in detector.state_dict().items()}
    torch.save({"state_dict": state, "ldt": about}, path)
