"""Undocumented parts of mmengine that are replaced while ldt reads configs and builds detectors."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from mmengine.config import config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import registry


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

    mmengine asks ``pkg_resources``, which setuptools has removed.
    """
    known = config.is_installed, config.get_installed_path
    config.is_installed = lambda package: find_spec(package) is not None
    config.get_installed_path = package_folder
    try:
        yield
    finally:
        config.is_installed, config.get_installed_path = known


def copy_without_waiting(preprocessor: BaseDataPreprocessor) -> None:
    """Let a preprocessor copy batches to a GPU while the host goes on.

    Its argument of this name would be part of the model's config, which tells detectors apart.
    """
    preprocessor._non_blocking = True


def package_folder(package: str) -> str:
    """Return the folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package!r} is not installed")
    return next(iter(spec.submodule_search_locations))
