"""The table of detectors in docs/detectors.md, made anew for one family of each kind."""

import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from sampled import sampled

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import zoo  # noqa: E402

FOLDERS = {path.name for path in zoo.CONFIGS.iterdir() if path.is_dir()}
TABLE = (ROOT / "docs/detectors.md").read_text().splitlines()
# transformer; deformable convolutions; depthwise; two stages, grouped; many branches
KINDS = ("detr", "centernet", "yolo", "regnet", "hrnet")
SLOW = ("regnet", "hrnet")  # at the image size of the table


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The models' processes are forked from one that has imported more than theirs would have."""
    forked.start_server()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "model"), sampled([(kind, zoo.FAMILIES[kind][-1]) for kind in KINDS], 2), ids=KINDS
)
def test_the_table_is_what_the_runner_finds(family: str, model: zoo.Model) -> None:
    if family in SLOW:  # what a row says does not depend on it
        model = replace(model, size=64)
    row = zoo.examined(family, model)
    assert row["outcome"] == "ok"
    cells = [line.split(" | ") for line in TABLE]
    known = [c[: zoo.EXPORTS] + [""] + c[zoo.EXPORTS + 1 :] for c in cells if len(c) > 2]
    assert zoo.line(row).split(" | ") in known  # without the export, which has tests of its own


def test_every_folder_of_configs_is_in_the_table_or_excluded() -> None:
    excluded = {name for names in zoo.EXCLUDED.values() for name in names.split()}
    folders = FOLDERS | {"clrnet"}  # of the maintained fork alone
    assert set(zoo.FAMILIES) | excluded == folders | set(zoo.LIBRARIES)
    assert not set(zoo.FAMILIES) & excluded
    rows = [line.split(" | ")[:2] for line in TABLE if line.startswith("| ")][1:]
    assert rows == [[f"| {family}", m.file] for family, ms in zoo.FAMILIES.items() for m in ms]


def test_nine_families_of_ten_go_through_all_steps() -> None:
    failed = {line.split(" | ")[0][2:] for line in TABLE if " | " in line and "| ok |" not in line}
    assert len(failed & set(zoo.FAMILIES)) <= len(zoo.FAMILIES) / 10


@pytest.mark.slow
def test_a_crash_and_a_hang_are_one_row_each() -> None:
    missing = zoo.Model("no_such_config")
    assert "build: ValueError" in zoo.examined("gfl", missing)["outcome"]
    late = zoo.examined("gfl", zoo.FAMILIES["gfl"][0], seconds=0.01)["outcome"]
    assert "not done after" in late
