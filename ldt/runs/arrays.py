"""Arrays of runs (``.npz``), whoever wrote them: headers are read and checked before any content.

A header may claim any shape and type. What is read is as large as the header says, as the archive
says, and as its kind of file allows; objects, which would be pickled Python, are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np

from ldt.runs import files

Kinds = Mapping[str, tuple[str, int]]  # by the name, or its beginning with a "/": kinds, dimensions
SUFFIX = ".npy"
MOST_ARRAYS = 10_000
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: Path, kinds: Kinds, most: int = files.LARGEST_FILE) -> dict[str, np.ndarray]:
    """Read the arrays of a file; others than those of ``kinds`` are left out.

    Args:
        path: a file of ``np.savez`` or ``np.savez_compressed``.
        kinds: of each array the letters of its ``dtype.kind`` that are allowed, and its number of
            dimensions. ``score/`` stands for all arrays whose names begin with it.
        most: bytes of all arrays together.

    Raises:
        DamagedError: it is no such file, too large, or an array is not what its header, or
            ``kinds``, say.
    """
    with files.reading(path), files.open_regular(path) as content:
        files.check_archive(path, most)
        with ZipFile(content) as archive:
            parts = archive.infolist()
            if len(parts) > MOST_ARRAYS or len({part.filename for part in parts}) < len(parts):
                raise ValueError(f"more than {MOST_ARRAYS} arrays, or one twice")
            found = {}
            for part in parts:
                name = part.filename.removesuffix(SUFFIX)
                expected = kinds.get(name) or kinds.get(f"{name.partition('/')[0]}/")
                if expected is not None:
                    with archive.open(part) as file:
                        found[name] = _read(file, name, part.file_size, *expected)
    return found


def _read(file: IO[bytes], name: str, size: int, kinds: str, dimensions: int) -> np.ndarray:
    """Read an array of ``size`` bytes, its header included."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"{name}: a header of another version")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype.hasobject or dtype.kind not in kinds or len(shape) != dimensions:
        raise ValueError(f"{name}: {dtype} in {len(shape)} dimensions")
    claimed = dtype.itemsize
    for length in shape:  # numbers of Python: a product does not overflow
        claimed *= length
    if min(shape, default=0) < 0 or claimed != size - file.tell():
        raise ValueError(f"{name}: its header says {claimed} bytes; it has {size - file.tell()}")
    values = np.frombuffer(file.read(claimed), dtype)
    return values.reshape(shape, order="F" if fortran else "C").copy()
