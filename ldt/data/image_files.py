"""Image files: sizes from their headers, files that are cut off, images that two splits share."""

import contextlib
import filecmp
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
from PIL import Image

from ldt.config import DatasetConfig
from ldt.runs.inputs import cached

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MAX_PIXELS = DatasetConfig.max_pixels  # a decoded one takes three bytes a pixel, its copies more
MANY = 1000  # images; the sizes of more are cached
TAIL = 4096  # bytes
JPEG_END, PNG_END = b"\xff\xd9", b"\0\0\0\0IEND\xae\x42\x60\x82"
STRIPS = ((273, 279), (324, 325))  # TIFF's tags of where pixels are, and of how many bytes
ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap the sides
Size = tuple[int, int]  # width, height


class ImageError(ValueError):
    """An image that cannot be read, also where a loader's process reads it.

    torch makes an error of such a process anew, with that process's traceback as the message: only
    its last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"\n{__name__}.{type(self).__name__}: ")[2].rstrip())


def image_size(path: str | Path) -> Size:
    """Return (width, height) of an image as OpenCV decodes it: turned as its EXIF data say.

    Only the header is read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image or is damaged.
    """
    try:
        with Image.open(path) as image:
            # PIL turns TIFF by itself; `getexif` would decode a PNG that has no EXIF data
            turned = "exif" in image.info and image.format != "TIFF"
            if turned and image.getexif().get(ORIENTATION) in TRANSPOSED:
                return image.height, image.width
            return image.size
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # PIL raises many types for damaged files
        raise unreadable(path) from error


def unreadable(path: str | Path, reason: str = "damaged or not an image") -> ImageError:
    """Return the error for a file that is not an image."""
    return ImageError(f"cannot read the image {path}: {reason}; restore it")


def check_pixels(path: str | Path, size: Size, most: int) -> None:
    """Raise ImageError if an image has more pixels than allowed."""
    width, height = size
    if width * height > most:
        raise ImageError(
            f"the image {path} has {width}x{height} pixels, more than {most / 1e6:g} million: "
            f"shrink it, or type dataset.max_pixels={width * height}"
        )


def read_size(path: str | Path, most: int) -> Size:
    """Return the size of an image with at most so many pixels; see `image_size`."""
    with _of_any_size():
        size = image_size(path)
    check_pixels(path, size, most)
    return size


def image_sizes(paths: Sequence[str], most: int) -> list[Size]:
    """Return the size of every image; those of many are cached until a file changes.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: images are damaged or cut off, or one has more than `most` pixels.
    """
    if len(paths) < MANY:
        sizes = _read_all(paths, most)
    else:
        states = map(os.stat, paths)
        key = [(p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, states, strict=True)]
        found = cached(["whole images", *key], lambda: _read_all(paths, most))
        sizes = [(width, height) for width, height in found]
    for path, size in zip(paths, sizes, strict=True):
        check_pixels(path, size, most)
    return sizes


def _read_all(paths: Sequence[str], most: int) -> list[Size]:
    def read(path: str) -> Size | ValueError:
        try:
            width, height = image_size(path)
        except ValueError as error:
            return error
        whole = width * height > most or has_end(path) or decodes(path)
        return (width, height) if whole else unreadable(path)

    with _of_any_size(), ThreadPoolExecutor(8) as pool:  # hides the latency of network disks
        found = list(pool.map(read, paths))
    damaged = [error for error in found if isinstance(error, ValueError)]
    if damaged:
        more = f"; so are {len(damaged) - 1} other images" if damaged[1:] else ""
        raise ValueError(f"{damaged[0]}{more}") from damaged[0]
    return [size for size in found if not isinstance(size, ValueError)]


def has_end(path: str) -> bool:
    """Return whether an image file shows cheaply that it is not cut off.

    If it does not, as of formats without an end, only :func:`decodes` can tell.
    """
    with Image.open(path) as image, open(path, "rb") as file:
        if image.format == "TIFF":
            tags, size = getattr(image, "tag_v2", {}), os.fstat(file.fileno()).st_size
            parts = [
                part
                for starts, counts in STRIPS
                for part in zip(tags.get(starts, ()), tags.get(counts, ()), strict=False)
            ]
            return bool(parts) and all(start + count <= size for start, count in parts)
        end = JPEG_END if image.format in ("JPEG", "MPO") else PNG_END
        file.seek(-min(len(end), os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read() == end or image.format == "WEBP"  # whose header tells, and PIL reads it


def decodes(path: str) -> bool:
    """Return whether an image can be decoded to its end; OpenCV paints what a JPEG lacks grey."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # PIL raises many types for damaged files
        return False
    return cv2.imread(path) is not None


@contextlib.contextmanager
def _of_any_size() -> Iterator[None]:
    """Let PIL open large images: there is a limit of our own, which can be configured."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def shared_images(
    train: Sequence[str], val: Sequence[str], most: int | None = None
) -> list[tuple[str, str]]:
    """Return pairs of a training and a validation image that are one file, or equal ones.

    Args:
        train: image files.
        val: image files.
        most: files to be read at most; if there are more of equal size, contents are not compared.
    """
    known = [(path, os.stat(path)) for path in val]
    files = {(state.st_dev, state.st_ino): path for path, state in known}
    sizes = {state.st_size for _, state in known}
    pairs, rest = [], []
    for path in train:
        state = os.stat(path)
        if (own := (state.st_dev, state.st_ino)) in files:
            pairs.append((path, files[own]))
        elif state.st_size in sizes:
            rest.append(path)
    if most is None or len(rest) <= most:
        pairs += _equal(rest, [path for path, _ in known]) if rest else []
    return pairs


def _equal(train: Sequence[str], val: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of files with equal contents; of most files only the end is read."""
    wanted = {os.stat(path).st_size for path in train}
    ends: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for path in val:
        if os.stat(path).st_size in wanted:
            ends[_end(path)].append(path)
    found = []
    for path in train:
        others = ends.get(_end(path), ())
        if same := next((o for o in others if filecmp.cmp(path, o, shallow=False)), None):
            found.append((path, same))
    return found


def _end(path: str) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - TAIL))
        return size, file.read()
