"""Arrays of a stranger's run are what their headers say, and the headers what is in the file."""

import io
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from summaries import configured

from ldt.evaluation import kept_detections
from ldt.report import open_run
from ldt.runs import arrays, files
from ldt.runs.files import DamagedError

KINDS = {"a": ("fi", 1)}


def header(shape, dtype="'<f8'", fortran=False):
    text = f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    padded = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


def archive(path, **parts):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(f"{name}.npy", content)


def pickled():
    content = io.BytesIO()
    np.save(content, np.array([print], dtype=object), allow_pickle=True)
    return content.getvalue()


FALSE = {
    "more than there is": header("(10000000000000,)") + bytes(80),
    "more than memory": header("(2**62,)".replace("2**62", str(2**62))) + bytes(80),
    "a product that overflows": header(f"({2**32}, {2**32})") + bytes(8),
    "less than there is": header("(1,)") + bytes(80),
    "a negative length": header("(-10,)") + bytes(80),
    "objects": pickled(),
    "texts": header("(10,)", "'<U2'") + bytes(80),
    "fields": header("(10,)", "[('x', '<f8')]") + bytes(80),
    "another number of dimensions": header("(5, 2)") + bytes(80),
    "no dimensions": header("()") + bytes(8),
    "a code for a header": header("__import__('os').abort()"),
    "another version": b"\x93NUMPY\x09\x00" + bytes(80),
    "no header": b"",
    "a type without size": header("(10000000000000,)", "'<U0'"),
}


@pytest.mark.parametrize("content", FALSE.values(), ids=FALSE)
def test_a_false_header_is_refused_before_memory_is_taken(tmp_path, content, monkeypatch):
    archive(tmp_path / "a.npz", a=content)
    monkeypatch.setattr(np, "frombuffer", lambda *_: pytest.fail("it is read"))
    with pytest.raises(DamagedError, match=r"a\.npz is damaged"):
        arrays.read(tmp_path / "a.npz", KINDS)


def test_an_archive_that_lies_about_its_size_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    archive(path, a=header("(10,)") + bytes(80))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 10**6)  # of the part, unpacked
    path.write_bytes(content)
    with pytest.raises(DamagedError):
        arrays.read(path, KINDS)


def test_a_compressed_bomb_is_not_unpacked(tmp_path):
    archive(tmp_path / "a.npz", a=header("(12500000,)") + bytes(10**8))
    assert (tmp_path / "a.npz").stat().st_size < 200_000
    with pytest.raises(DamagedError, match="unpacks to more than 32 MiB"):
        arrays.read(tmp_path / "a.npz", KINDS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save: Callable[..., None]):
    known = {"a": np.arange(5.0), "b/x": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": 1}
    save(tmp_path / "a.npz", **known)
    found = arrays.read(tmp_path / "a.npz", {"a": ("f", 1), "b/": ("i", 2)})
    assert found.keys() == {"a", "b/x"}
    assert all(np.array_equal(found[name], known[name]) for name in found)


CUTS = {
    "more than there are": ([1.0, 2.0], [2]),
    "a negative one": ([1.0, 2.0], [-1]),
    "one twice": ([1.0, 2.0], [1, 1]),
    "shares": ([1.0, 2.0], [0.5]),
    "texts for scores": (["high"], [0]),
    "a single score": (1.0, [0]),
}


@pytest.mark.parametrize(("scores", "removed"), CUTS.values(), ids=CUTS)
def test_a_cut_removes_channels_that_there_are(tmp_path, scores, removed):
    folder = configured(tmp_path, "a", {"seed": 0})
    np.savez(folder / files.scores(1), **{"score/x": scores, "removed/x": removed})
    with pytest.raises(DamagedError, match=r"scores-1\.npz is damaged"):
        open_run(folder).cuts  # noqa: B018


COLUMNS = {
    "a row for many": ("area", np.zeros(1, np.float32)),
    "fewer rows": ("image", np.zeros(1, np.int64)),
    "boxes of two numbers": ("box", np.zeros((3, 2), np.int32)),
    "objects": ("classes", np.array(["a", None], dtype=object)),
    "classes without end": ("classes", np.full(20_000, "a")),
    "none": ("label", None),
}


@pytest.mark.parametrize(("name", "values"), COLUMNS.values(), ids=COLUMNS)
def test_detections_have_as_many_rows_in_each_column(tmp_path, name, values):
    table = np.zeros((3, 11))
    path = tmp_path / "detections-0.npz"
    kept_detections.save(path, table, ("a",))
    assert len(kept_detections.load(path)[0]) == 1
    with np.load(path) as content:
        changed = dict(content) | {name: values}
    np.savez(path, **{key: value for key, value in changed.items() if value is not None})
    with pytest.raises(DamagedError, match=r"detections-0\.npz is damaged"):
        kept_detections.load(path)
