"""Undocumented parts of mmengine that are replaced while ldt reads configs and builds detectors."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import cast

from mmengine.config import config, utils
from mmengine.model import BaseDataPreprocessor, BaseModule
from mmengine.registry import registry
from torch import nn


@contextmanager
def registered_types_only() -> Iterator[None]:
    """Keep mmengine from resolving a ``type`` as the path of any Python object, in the context.

    It would import and call ``os.system``, so a checkpoint's model config could run any code.
    """
    look_up = registry.get_object_from_string
    registry.get_object_from_string = lambda _: None
    try:
        yield
    finally:
        registry.get_object_from_string = look_up


@contextmanager
def packages_by_importlib() -> Iterator[None]:
    """Find the package of a config's ``_base_`` (``mmdet::...``) by importlib, in the context.

    mmengine asks ``pkg_resources``, which setuptools has removed, and reads all metafiles of the
    package for every config, which takes longer than the config.
    """
    known = config.is_installed, config.get_installed_path, config._get_external_cfg_path
    config.is_installed = lambda package: find_spec(package) is not None
    config.get_installed_path = package_folder
    config._get_external_cfg_path = _path_in_metafile
    try:
        yield
    finally:
        config.is_installed, config.get_installed_path, config._get_external_cfg_path = known


def _path_in_metafile(folder: str, file: str) -> str:
    """Return what mmengine finds; raise its ValueError for what no metafile names."""
    if (found := _asked_once(folder, file)) is None:
        raise ValueError(f"no metafile of {folder} names {file}")
    return found


@cache
def _asked_once(folder: str, file: str) -> str | None:
    """Return the path of a packaged config; None if no metafile of the package names it."""
    try:
        return utils._get_external_cfg_path(folder, file)
    except ValueError:
        return None


def copy_without_waiting(preprocessor: BaseDataPreprocessor) -> None:
    """Let a preprocessor copy batches to a GPU while the host goes on.

    Its argument of this name would be part of the model's config, which tells detectors apart.
    """
    preprocessor._non_blocking = True


def swaps_channels(preprocessor: BaseDataPreprocessor) -> bool:
    """Return whether a preprocessor reverses the order of an image's channels."""
    return bool(getattr(preprocessor, "_channel_conversion", False))


def initialise_again(detector: nn.Module) -> None:
    """Give a detector random weights, as when it was built; no files are loaded."""
    for module in detector.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        if isinstance(module, BaseModule):
            module._is_init = False  # otherwise `init_weights` only warns
            if isinstance(module.init_cfg, dict) and "checkpoint" in module.init_cfg:
                module.init_cfg = None
    cast(BaseModule, detector).init_weights()


def package_folder(package: str) -> str:
    """Return the folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package!r} is not installed")
    return next(iter(spec.submodule_search_locations))
