"""Lists of image ids: text files with one id a line, those of the benchmark in ``conf/images``."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ldt.config import conf_dir

Id = TypeVar("Id", str, int)
MOST_TOLD = 3  # ids


def list_file(name: str, key: str) -> Path:
    """Return the file of a list, given by its path or as the name of one in ``conf/images``.

    Args:
        name: as configured.
        key: the configuration key, for messages.

    Raises:
        FileNotFoundError: there is none.
    """
    own = conf_dir() / "images"
    for file in (own / f"{name}.txt", Path(name).expanduser()):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in own.glob("*.txt")))
    raise FileNotFoundError(
        f"{key}={name}: no such list; allowed: a text file with one image id a line, or one of "
        f"{known} (e.g. {key}=/data/ids.txt)"
    )


def listed_ids(name: str, key: str, there: Sequence[Id]) -> list[Id]:
    """Return the ids of a list, in its order, all of which must be in the data.

    Args:
        name: a file, or the name of one in ``conf/images``.
        key: the configuration key, for messages.
        there: ids of the data.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: it is empty, has an id twice, or one that the data lack.
    """
    file, known = list_file(name, key), {str(each): each for each in there}
    wanted = file.read_text("utf-8-sig", errors="replace").split()
    if not wanted:
        raise ValueError(f"{key}={name}: {file} is empty; expected one image id a line")
    if twice := [each for each, count in Counter(wanted).items() if count > 1]:
        raise ValueError(f"{key}={name}: {file} lists {len(twice)} ids twice: {twice[0]}, ...")
    if missing := [each for each in wanted if each not in known]:
        told = ", ".join(missing[:MOST_TOLD])
        raise ValueError(
            f"{key}={name}: {len(missing)} of its {len(wanted)} images are not in the data: {told}"
            f"{', ...' * (len(missing) > MOST_TOLD)}; type another dataset.root or {key}"
        )
    return [known[each] for each in wanted]
