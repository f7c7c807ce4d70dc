"""The command `ldt export`: save a pruned detector as a folder for mmdet's tools.

The folder contains ``config.py``, a plain mmdet config, and ``weights.pth``. After ``import ldt``,
it can be loaded with ``mmdet.apis.init_detector`` and ``mmdet.apis.DetInferencer``.
"""

import ast
import pprint
from pathlib import Path
from typing import Any

import torch

from ldt.detectors.checkpoints import detector_of, read, resize_steps
from ldt.detectors.models import build, drop_pretrained
from ldt.pruning import structure
from ldt.runs.files import check_target, write_text, writing

CONFIG, WEIGHTS = "config.py", "weights.pth"


def export(checkpoint: str | Path, folder: str | Path, trust: bool = False) -> Path:
    """Write the detector of a checkpoint as ``config.py`` and ``weights.pth``.

    The config is complete for inference: the model with its pruned structure, classes, test
    pipeline with the preprocessing used in training, test data loader (set its ``data_root`` and
    ``ann_file``) and visualizer. Loading it requires the package ldt.

    Args:
        checkpoint: see :func:`ldt.load_pruned`.
        folder: output folder, created if necessary; existing files are overwritten.
        trust: see :func:`ldt.load_pruned`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`ldt.load_pruned`.
        ValueError: the checkpoint was written by an earlier version of ldt, without preprocessing.
        ValueError: the folder cannot be written.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        check_target(folder / name)
    content = read(checkpoint, trust)
    about, resize = content["ldt"], resize_steps(content, checkpoint)
    state = detector_of(content).state_dict()
    config = {
        "default_scope": "mmdet",
        "custom_imports": _imports(about["model"]),
        "model": _model(about, state),
        **_images(resize, tuple(about["classes"])),
        "visualizer": {"type": "DetLocalVisualizer", "vis_backends": [], "name": "visualizer"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, _python(config))
    meta = {"dataset_meta": {"classes": tuple(about["classes"]), "palette": "random"}}
    with writing(folder / WEIGHTS) as draft:
        torch.save({"state_dict": state, "meta": meta}, draft)
    return folder


def _python(config: dict[str, Any]) -> str:
    """Return a config as Python source: an assignment of a literal for each key.

    mmengine's own ``dump`` pastes keys unquoted. When it reads a config, it replaces ``{{...}}``
    in the source, even inside strings.

    Raises:
        ValueError: a value is not plain data.
    """
    lines = []
    for key, value in config.items():
        literal = pprint.pformat(value, width=100, sort_dicts=False).replace("{{", r"{\x7b")
        if not key.isidentifier() or ast.literal_eval(literal) != value:
            raise ValueError(f"the config cannot be written: {key} is not plain data")
        lines.append(f"{key} = {literal}\n")
    return "".join(lines)


def _imports(model: dict[str, Any]) -> dict[str, Any]:
    """Return the custom imports of the detector's config plus ``ldt.pruned``."""
    own = model.get("custom_imports", {}).get("imports", [])
    own = [own] if isinstance(own, str) else own
    return {"imports": [*own, "ldt.pruned"], "allow_failed_imports": False}


def _model(about: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the unpruned detector's config with type PrunedDetector and the pruned shapes."""
    unpruned = build(about["model"], initialise=False)
    sizes, shapes = structure.changes(unpruned, about["structure"], state)
    model = {key: value for key, value in about["model"].items() if key != "custom_imports"}
    drop_pretrained(model)  # further training starts from the exported weights
    own = {"detector": model.pop("type"), "sizes": sizes, "shapes": shapes}
    return {"type": "PrunedDetector", **model, **own}


def _images(resize: list[dict[str, Any]], classes: tuple[str, ...]) -> dict[str, Any]:
    annotations = {"type": "LoadAnnotations", "with_bbox": True}
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    pack = {"type": "PackDetInputs", "meta_keys": keys}
    pipeline = [{"type": "LoadImageFromFile"}, *resize, annotations, pack]
    dataset = {
        "type": "CocoDataset",
        "data_root": "",
        "ann_file": "",
        "data_prefix": {"img": ""},
        "metainfo": {"classes": classes, "palette": None},  # COCO's has 80 colours
        "test_mode": True,
        "pipeline": pipeline,
    }
    loader = {
        "batch_size": 1,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": dataset,
    }
    return {"test_pipeline": pipeline, "test_dataloader": loader}
