"""The command `ldt repeat`: run the configuration of an earlier run again."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldt.config import as_dict
from ldt.detectors.models import TRANSFORMERS, is_packaged, use_mmdet
from ldt.detectors.untrusted import check_parts, import_parts
from ldt.experiment import run
from ldt.runs.refusal import refusing
from ldt.runs.run import load_config


def renamed(config: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration with study and run name taken from the new directory.

    A logger that names its runs would otherwise continue the original run.
    """
    own: dict[str, Any] = {"study": folder.resolve().parent.name, "run_name": folder.name}
    if "study" in config.logger:
        own["logger"] = {"study": "${study}", "name": "${run_name}"}
    found = OmegaConf.merge(config, own)
    assert isinstance(found, DictConfig)
    return found


def repeat(earlier: Path, folder: Path, trust: bool = False) -> None:
    """Run the configuration of an earlier run again.

    Args:
        earlier: the directory of the run.
        folder: the directory for the repetition.
        trust: run the Python code that the configuration names: classes, and the mmdet config.

    Raises:
        FileNotFoundError: there is no run at ``earlier``.
        FileExistsError: ``folder`` is a file, or the run itself.
        ValueError: see :func:`ldt.experiment.run`; or trust is needed.
    """
    with refusing():
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; type a new folder")
        if folder.resolve() == earlier.resolve():
            raise FileExistsError(f"{folder} is the run itself; type a new folder")
        config = renamed(load_config(earlier, trust), folder)
        if not trust:
            _check_detector(config.detector)
    run(config, folder)


def _check_detector(detector: DictConfig) -> None:
    """Check that a detector is one of mmdet's own with options that load nothing.

    Raises:
        ValueError: it is not.
    """
    if not is_packaged(detector.config):
        raise ValueError(
            f"the run reads detector.config={detector.config}, which is Python code: where you "
            "trust it type --trust"
        )
    use_mmdet()
    try:
        options = as_dict(detector.options)
        if detector.config == TRANSFORMERS and options.get("name") is not None:
            raise ValueError(f"it fetches detector.options.name={str(options['name'])[:100]!r}")
        import_parts(options, trust=False)
        check_parts({k: v for k, v in options.items() if k != "custom_imports"}, "detector.options")
    except ValueError as error:
        raise ValueError(f"{error}; where you trust it type --trust") from error
