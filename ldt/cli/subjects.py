"""What commands work on: a checkpoint, or a config with weights, and labelled data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ldt.cli.exporting import find_data
from ldt.data.datamodule import DetectionDataModule
from ldt.data.folders import open_folder
from ldt.detectors.checkpoints import load_pruned
from ldt.detectors.models import input_settings
from ldt.detectors.opening import class_count, open_detector
from ldt.runs.run import checkpoint_of

FORMS = "CHECKPOINT [DATA] (of ldt, or a run), or CONFIG WEIGHTS DATA"


@dataclass
class Subject:
    """A detector and its data.

    Attributes:
        name: of the checkpoint or config.
        detector: built, with its weights.
        config: that it was built from; None for a checkpoint, which has its own.
        data: set up.
    """

    name: str
    detector: nn.Module
    config: str | None
    data: DetectionDataModule


def open_subject(given: Sequence[str], files: dict[str, str], trust: bool = False) -> Subject:
    """Open what was typed in one of the :data:`FORMS`.

    Args:
        given: a checkpoint of ldt or a run's directory and data, by default those of its run; or
            an mmdet config, weights and data.
        files: see :func:`ldt.data.folders.open_folder`.
        trust: of a checkpoint, see :func:`ldt.load_pruned`.

    Raises:
        ValueError: it is none of these, or the data have other classes than the detector.
        FileNotFoundError: a file or folder does not exist.
    """
    name, *rest = given
    if len(rest) > 2 or (len(rest) < 2 and name.endswith(".py")):
        raise ValueError(f"{len(given)} arguments given: {' '.join(given)}; allowed: {FORMS}")
    if len(rest) == 2:
        data = open_folder(Path(rest[1]), input_settings(name), files)
        data.setup("fit")
        detector = open_detector(name, rest[0]).model
        _check_classes(detector, data)
        return Subject(name, detector, name, data)
    file = checkpoint_of(name)
    found = find_data(file, Path(rest[0]) if rest else None, trust=trust, files=files)
    if found is None:
        raise ValueError(f"{name}: the data of its run are not there; give them: {name} DATA")
    found.setup("fit")
    detector = load_pruned(file, trust=trust)
    _check_classes(detector, found)
    return Subject(str(file), detector, None, found)


def _check_classes(detector: nn.Module, data: DetectionDataModule) -> None:
    classes = class_count(detector)
    if classes not in (None, len(data.classes)):
        raise ValueError(
            f"the detector predicts {classes} classes, the data have {len(data.classes)} "
            f"({', '.join(data.classes[:5])}, ...): use the data that it was trained for"
        )
