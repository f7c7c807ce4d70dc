"""Reading of weights and checkpoints, whoever wrote them."""

import pickletools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import torch

from ldt.runs.files import check_archive, open_regular

PICKLES = 5  # that a file of torch before 1.6 begins with
# what the pickles that torch accepts may call to allocate memory that is not in the file
ALLOCATING = ("builtins bytearray", "__builtin__ bytearray")


def load_plain(path: Path, allowed: Sequence[Callable | tuple[Callable, str]] = ()) -> Any:
    """Load tensors and plain data from a file of ``torch.save``.

    Args:
        path: of the file.
        allowed: what it may call besides torch's own, as for ``torch.serialization.safe_globals``.

    Raises:
        Exception: it is damaged or contains more; torch raises many types.
    """
    with open_regular(path) as file:
        for pickle in _pickles(path, file):
            for operation, argument, _ in pickletools.genops(pickle):
                if operation.name == "GLOBAL" and argument in ALLOCATING:
                    raise ValueError(f"it calls {argument}")
    with torch.serialization.safe_globals([*allowed]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _pickles(path: Path, file: IO[bytes]) -> Iterator[IO[bytes]]:
    if not is_zipfile(file):
        file.seek(0)
        yield from [file] * PICKLES
        return
    check_archive(path, path.stat().st_size)  # torch does not compress
    with ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as pickle:
                    yield pickle
