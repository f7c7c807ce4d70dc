"""Which runs are seeds of one another, what they are called, and their numbers."""

import csv
import io
import math
import re

import numpy as np
import pytest
from summaries import configured, row

from ldt.report import open_runs
from ldt.report.tables import compare, write
from ldt.report.terminal import KITTI
from ldt.runs.aggregate import cells, summarise
from ldt.runs.identity import flatten


def config(seed=0, **changed):
    method = {"name": "ldt", "ranking": "global"}
    return {
        "seed": seed,
        "method": method,
        "recipe": {"epochs": 9},
        "dataset": {"root": "/x"},
    } | changed


def pruned(study, name, ap, seed=0, keys=None, **changed):
    rounds = [row(0, AP=0.5), row(1, AP=ap, params=changed.pop("params", 100_000))]
    configured(study, name, config(seed, **(keys or {})), seed=seed, rounds=rounds, **changed)


def test_runs_that_differ_in_seed_and_place_only_are_one_cell(tmp_path):
    pruned(tmp_path, "a", 0.3, seed=0)
    pruned(tmp_path, "b", 0.4, seed=1, keys={"dataset": {"root": "/y"}, "run_name": "b"})
    (cell,) = cells(open_runs(tmp_path))
    assert cell.label == "LDT"
    means = summarise([cell]).iloc[0]
    assert means["seeds"] == 2
    assert math.isclose(means["AP"], 0.35)
    assert math.isclose(means["AP_std"], np.std([0.3, 0.4], ddof=1))
    assert math.isclose(means["base"], 0.5)


def test_runs_of_equal_seed_count_as_one(tmp_path):
    for name, ap, seed in (("a", 0.2, 0), ("b", 0.4, 0), ("c", 0.5, 1)):
        pruned(tmp_path, name, ap, seed)
    means = summarise(cells(open_runs(tmp_path))).iloc[0]
    assert means["seeds"] == 2
    assert math.isclose(means["AP"], 0.4)  # of 0.3 and 0.5


def test_a_single_seed_has_no_deviation(tmp_path):
    pruned(tmp_path, "a", 0.3)
    found = cells(open_runs(tmp_path))
    assert math.isnan(summarise(found)["AP_std"].iloc[0])
    assert compare(found)[0]["AP"].text == "0.300"


def test_other_settings_make_other_cells_and_are_named(tmp_path):
    for name, ranking in (("a", "global"), ("b", "uniform")):
        pruned(tmp_path, name, 0.3, keys={"method": {"name": "ldt", "ranking": ranking}})
    assert [c.label for c in cells(open_runs(tmp_path))] == [
        "LDT (ranking=global)",
        "LDT (ranking=uniform)",
    ]


def test_many_differences_are_numbered_and_noted(tmp_path):
    pruned(tmp_path, "a", 0.3, seed=0)
    pruned(tmp_path, "a2", 0.3, seed=1)
    keys = {"recipe": {f"{letter}_quite_long_key": 1 for letter in "abc"}}
    pruned(tmp_path, "b", 0.3, keys=keys)
    found = cells(open_runs(tmp_path))
    assert [cell.label for cell in found] == ["LDT", "LDT #2"]
    assert "a_quite_long_key=1" in write(found, "markdown").splitlines()[-1]


def test_rates_of_one_setting_share_a_label(tmp_path):
    for name, rate in (("a", 0.5), ("b", 0.7)):
        plan = {"rate": rate, "rounds": 1, "budget": "params"}
        pruned(tmp_path, name, 0.3, keys={"prune": {"rate": rate}}, plan=plan)
    found = cells(open_runs(tmp_path))
    assert [(cell.label, cell.rate) for cell in found] == [("LDT", 0.5), ("LDT", 0.7)]


def test_runs_without_rounds_are_unpruned(tmp_path):
    plan = {"rate": 0.5, "rounds": 0, "budget": "params"}
    for name, losses in (("a", True), ("b", False)):
        changed = {"method": "none", "ldt": losses, "rounds": [row(0)], "plan": plan}
        configured(tmp_path, name, config(ldt={"enabled": losses}), **changed)
    found = cells(open_runs(tmp_path))
    assert [cell.label for cell in found] == ["unpruned", "unpruned, LDT losses"]
    assert not any(cell.pruned for cell in found)


def test_a_null_is_as_good_as_a_missing_key():
    assert flatten({"a": {"b": None, "c": [1]}, "d": {}}) == {"a.c": [1]}


# Tables for papers ----------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Two methods of one rate and a third of another; the first has two seeds."""
    pruned(tmp_path, "a0", 0.3, 0, method="l1")
    pruned(tmp_path, "a1", 0.4, 1, method="l1")
    pruned(tmp_path, "b", 0.36, method="ldt_x", latency_ms=3)
    plan = {"rate": 0.7, "rounds": 1, "budget": "params"}
    pruned(tmp_path, "c", 0.9, method="ldt_x", plan=plan)
    return cells(open_runs(tmp_path))


def test_what_is_better_by_more_than_both_deviations_is_marked(tmp_path):
    values = {"l1": (0.3, 0.4), "ldt": (0.5, 0.52), "px": (0.49, 0.51)}
    for method, aps in values.items():
        for seed, ap in enumerate(aps):
            pruned(tmp_path, f"{method}{seed}", ap, seed, method=method, latency_ms=5 - seed)
    table = {row["method"].text: row for row in compare(cells(open_runs(tmp_path)))}
    assert not any(row["AP"].best for row in table.values())  # 0.51 and 0.50, both ± 0.014
    few = [run for run in open_runs(tmp_path) if not run.name.startswith("px")]
    table = {row["method"].text: row for row in compare(cells(few))}
    assert {name: row["AP"].best for name, row in table.items()} == {"L1": False, "LDT": True}
    assert "**0.510 ± 0.014**" in write(cells(few), "markdown")
    assert "\\textbf{51.0 $\\pm$ 1.4}" in write(cells(few), "latex")
    assert not any(row["latency (ms)"].best for row in table.values())
    assert not any(row["parameters (M)"].best for row in table.values())  # the budget itself


def test_nothing_is_best_where_nothing_was_measured(tmp_path):
    for method in ("l1", "px"):
        for seed in (0, 1):
            pruned(tmp_path, f"{method}{seed}", math.nan, seed, method=method)
    assert not any(row["AP"].best for row in compare(cells(open_runs(tmp_path))))


def test_a_single_seed_is_not_known_to_be_better(three):
    assert not any(row[title].best for row in compare(three) for title in ("AP", "latency (ms)"))


def test_change_and_speed_up_are_those_of_each_seed(three):
    for cell, shown in zip(three, compare(three), strict=True):
        pairs = [(run.rows[0], run.rows[-1]) for run in cell.runs]
        change = np.mean([after["AP"] - before["AP"] for before, after in pairs])
        speed_up = np.mean([before["latency_ms"] / after["latency_ms"] for before, after in pairs])
        assert shown["change"].text.startswith(f"{change:+.3f}")
        assert shown["speed-up"].text.startswith(f"{speed_up:.2f}")


def test_markdown_has_a_line_a_cell(three):
    lines = write(three, "markdown").splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(three)
    assert "0.350 ± 0.071" in lines[2]


def test_kittis_own_metric_is_compared_where_it_was_measured(tmp_path):
    for method, value in (("l1", 0.7), ("px", 0.8)):
        last = row(1, kitti_easy=0.9, kitti_moderate=value, kitti_hard=0.5)
        configured(tmp_path, method, config(), method=method, rounds=[row(0), last])
    table = {line["method"].text: line for line in compare(cells(open_runs(tmp_path)))}
    assert table["L1"]["kitti_moderate"].text == "0.700"
    assert table["PX"]["kitti_moderate"].text == "0.800"
    titles = list(table["L1"])
    assert titles[titles.index("mAP") + 1 :][:3] == list(KITTI)


def test_metrics_that_no_run_has_are_not_compared(three):
    assert not set(KITTI) & set(compare(three)[0])


def test_latex_is_escaped_and_has_percentages(three):
    text = write(three, "latex")
    assert "ldt\\_x" in text
    assert "50 \\% of parameters" in text
    assert "35.0 $\\pm$ 7.1" in text
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    assert body.count("\\\\") == len(three)


def test_csv_has_the_unrounded_numbers(three):
    import pandas as pd

    read = pd.read_csv(io.StringIO(write(three, "csv")))
    assert np.allclose(read["AP"], [0.35, 0.36, 0.9])
    assert read["params"].tolist() == [100_000] * 3


HOSTILE = r"=a|b\|c_%&#${d}~^<img src=x>[e](f)`g`*h*"


@pytest.fixture
def hostile(tmp_path):
    """A cell whose names would be read as markup, and as a formula, and a note with two lines."""
    pruned(tmp_path, "a", 0.3, method=HOSTILE, detector="@d", dataset="+1+1")
    keys = {"recipe": {"epochs": 5, "schedule": "x\n\\input{/etc/passwd}\n|"}, "base": "y" * 40}
    pruned(tmp_path, "b", -0.4, keys=keys, method=HOSTILE, detector="@d", dataset="+1+1")
    return cells(open_runs(tmp_path))


def test_markup_in_names_is_text_in_markdown(hostile):
    lines = write(hostile, "markdown").splitlines()
    bars = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines[:4]]
    assert len(set(bars)) == 1  # unescaped ones
    assert r"=a\|b\\\|c_%&#${d}~^\<img src=x\>\[e\](f)\`g\`\*h\*" in "".join(lines).replace(
        r"\&", "&"
    )
    assert len(lines) == 4 + 4  # a note a line, after an empty one


def test_markup_in_names_is_text_in_latex(hostile):
    text = write(hostile, "latex")
    assert "c\\_\\%\\&\\#\\$\\{d\\}\\textasciitilde" in text
    assert not [line for line in text.splitlines() if line.startswith(("\\input", "|"))]
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    assert not re.search(r"(?<!\\)[%#$_~^]", body.replace("$\\pm$", ""))


@pytest.mark.parametrize(
    ("title", "label"),
    [("a\n\x1b[31mb", "a\ufffd\ufffd[31mb"), ("", "LDT"), ([1], "LDT"), (100 * "x", 48 * "x")],
)
def test_a_title_is_short_and_can_be_printed(tmp_path, title, label):
    pruned(tmp_path, "a", 0.2, keys={"method": {"name": "ldt", "title": title}})
    (cell,) = cells(open_runs(tmp_path))
    assert cell.label == label


def test_what_is_written_can_be_printed(tmp_path):
    keys = {
        "a\n\\input{/etc/passwd}\n\x1b[31m": 1,
        **{f"a_rather_long_key_{i}": i for i in range(4)},
    }
    for name, more in (("a", {}), ("b", keys)):
        pruned(tmp_path, name, 0.2, keys=more, method=HOSTILE, detector="@d", dataset="+1+1")
    hostile = cells(open_runs(tmp_path))
    assert "input" in write(hostile, "markdown").splitlines()[-1]
    for kind in ("markdown", "latex", "csv"):
        assert all(line.isprintable() for line in write(hostile, kind).splitlines())


def test_names_are_no_formulas_in_a_spreadsheet_and_numbers_are_numbers(hostile):
    read = list(csv.DictReader(io.StringIO(write(hostile, "csv"))))
    assert [line["method"][:2] for line in read] == ["'="] * 2
    assert {(line["detector"], line["dataset"]) for line in read} == {("'@d", "'+1+1")}
    assert [float(line["AP"]) for line in read] == [0.3, -0.4]
