"""The page of a study: complete, safe, and alive in a browser."""

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from browser import needs_chromium, opened
from PIL import Image
from summaries import configured, row

from ldt.cli import main
from ldt.report import open_runs
from ldt.report.images import album
from ldt.report.page import page
from ldt.report.study_figures import MOST_POINTS, by_round, pareto, thinned, trade_off, training
from ldt.report.tables import write
from ldt.runs.aggregate import cells
from ldt.runs.files import read_json, write_json

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
APS = {"chip": (0.31, 0.33), "ldt": (0.38, 0.36), "l1": (0.2, 0.25)}


def log(seed):
    return [{"step": s, "train/loss": 3 / s + seed, "train/loss_ld": -s} for s in (10, 20, 30)]


@pytest.fixture
def study(tmp_path):
    """Three methods, two seeds each, with logs and pictures; a failed run and an unfinished one."""
    for method, aps in APS.items():
        for seed, ap in enumerate(aps):
            config = {"seed": seed, "method": {"name": method}, "recipe": {"note": EVIL}}
            rounds = [
                row(0, latency_ms=20),
                row(1, AP=ap),
                row(2, AP=ap - 0.02, latency_ms=5 + seed),
            ]
            name = f"{method}-s{seed}"
            folder = configured(
                tmp_path, name, config, log(seed), method=method, seed=seed, rounds=rounds
            )
            (folder / "pictures").mkdir()
            noise = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
            for kind in ("channels", "detections"):
                Image.fromarray(noise).save(folder / "pictures" / f"{kind}.png")
    for name in ("broken", "started"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
    write_json(
        tmp_path / "broken/summary.json", {"status": "failed", "error": f"ValueError: {EVIL}"}
    )
    return tmp_path


# Figures --------------------------------------------------------------------------------------


def test_the_front_has_what_no_other_point_beats():
    x, y = [3, 1, 2, 1, 4], [0.5, 0.2, 0.5, 0.3, 0.4]
    assert pareto(x, y) == [3, 2]
    assert pareto([], []) == []


def test_nothing_outside_of_the_front_is_undominated():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 50))
    front = set(pareto(x.tolist(), y.tolist()))
    for i in range(50):
        beaten = any(
            (x[j] <= x[i] and y[j] > y[i]) or (x[j] < x[i] and y[j] >= y[i]) for j in range(50)
        )
        assert (i in front) == (not beaten)


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


@pytest.mark.slow
def test_lines_join_the_means_over_seeds_and_bands_have_their_width(study):
    figure = trade_off(cells(open_runs(study)))
    _, band, line = named(figure, "LDT")[:3]  # dots, band, line of the first panel
    assert np.allclose(line.x, [0.21, 0.63])
    assert np.allclose(line.y, [0.35, 0.4])
    spread = np.std([0.36, 0.34], ddof=1)
    assert np.allclose(band.y, [0.35 + spread, 0.4, 0.4, 0.35 - spread])


def test_the_unpruned_detector_is_dashed_in_every_panel(study):
    lines = named(trade_off(cells(open_runs(study))), "unpruned")
    assert len(lines) == 3
    assert all(line.line.dash == "dash" and np.allclose(line.y, 0.4) for line in lines)


@pytest.mark.slow
def test_rounds_and_training_have_a_panel_for_each_quantity(study):
    found = cells(open_runs(study))
    assert [note.text for note in by_round(found).layout.annotations][1:] == [
        "parameters (M)", "MACs (G)", "latency (ms)",
    ]  # fmt: skip
    figure = training(found)
    assert [note.text for note in figure.layout.annotations] == ["loss", "loss_ld"]
    assert len(figure.data) == 2 * 3  # the runs of a method are one trace
    with pytest.raises(ValueError, match=r"no run has logged train/none"):
        training(found, "train/none")
    with pytest.raises(ValueError, match="no finished run"):
        trade_off([])


def test_long_curves_are_thinned_to_their_means():
    import pandas as pd

    curve = pd.Series(np.arange(1000.0), index=np.arange(1000) * 10)
    thin = thinned(curve)
    assert len(thin) <= MOST_POINTS
    assert thin.index[-1] == 9990
    assert np.isclose(thin.mean(), curve.mean())


# Pictures -------------------------------------------------------------------------------------


def test_pictures_beyond_the_limit_are_counted(study):
    runs = open_runs(study)
    whole = album(runs, 20)
    assert {kind: len(own) for kind, own in whole.pictures.items()} == {
        "channels": 6,
        "detections": 6,
    }
    assert whole.left_out == 0
    size = len(whole.pictures["channels"][0].url)
    some = album(runs, 3.5 * size / 1e6)
    assert sum(map(len, some.pictures.values())) == 12 - some.left_out == 3
    assert album(runs, 0).left_out == 12


# The page -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_holds_everything_and_links_to_nothing(study):
    text = page(study, open_runs(study), 0)
    assert text.count("Plotly.newPlot(") >= 3
    for name in (*(f"{m}-s{s}" for m in APS for s in (0, 1)), "broken", "started"):
        assert name in text
    assert "12 more pictures" in text
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?(http|//)""", text)


@pytest.mark.slow
def test_a_noisy_latency_is_marked_wherever_it_is_shown(study):
    one, other = (read_json(study / f"ldt-s{seed}/summary.json") for seed in (0, 1))
    for found in (one, other):
        found["rounds"][-1]["latency_p90_ms"] = 1.2 * found["rounds"][-1]["latency_ms"]
    write_json(study / "ldt-s1/summary.json", other)
    assert "~" not in write(cells(open_runs(study)), "markdown")
    one["rounds"][-1]["latency_p90_ms"] = 1.3 * one["rounds"][-1]["latency_ms"]
    write_json(study / "ldt-s0/summary.json", one)
    table = write(cells(open_runs(study)), "markdown")
    latency, speed_up = re.findall(r"~[\d.]+", table)  # means of both seeds
    assert latency == "~5.5"
    assert "~: noisy" in table
    text = page(study, open_runs(study), 0)
    assert re.findall(r">(~[\d.]+)", text)[::2] == ["~5.5", "~5.0"]  # and their speed-ups
    assert f">{speed_up}" in text
    assert "~: noisy" in text


@pytest.mark.slow
def test_runs_lead_to_their_files_from_wherever_the_page_is(study, tmp_path):
    for place in (None, study, tmp_path / "else where"):
        text = page(study, open_runs(study), 0, place)
        links = [unquote(link) for link in re.findall(r'<td[^>]*><a href="([^"]+)"', text)]
        assert links
        for link in links:
            assert ((place or study) / link).resolve().is_relative_to(study.resolve())
            assert Path(os.path.normpath((place or study) / link)).exists()


@pytest.mark.slow
def test_layers_are_shown_before_and_after(study):
    sizes = {"in": 3, "out": 16, "params": 1234, "multiply_adds": 5678, "latency_ms": 0.5}
    rounds = {"0": {"backbone.conv": sizes}, "1": {"backbone.conv": sizes | {"out": 9}}}
    write_json(study / "ldt-s0/structure.json", {"rounds": rounds, "groups": {}})
    text = page(study, open_runs(study), 0)
    (table,) = re.findall(r'<table class="sortable" id="layers-\d+">.*?</table>', text, re.DOTALL)
    values = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    assert values[:5] == ["backbone.conv", "3", "3", "16", "9"]
    assert values[5:] == ["1,234", "1,234", "5,678", "5,678", "0.500", "0.500"]


@pytest.mark.slow
def test_text_of_configurations_and_errors_is_escaped(study):
    text = page(study, open_runs(study), 20)
    assert EVIL not in text
    assert "&lt;script&gt;" in text


@pytest.mark.slow
def test_the_command_writes_the_page_into_the_study(study, capsys):
    main(["report", str(study)])
    assert capsys.readouterr().out.strip() == str(study / "report.html")
    assert (study / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert len(open_runs(study)) == 8  # the report is not taken for a run


def test_tables_are_printed_or_written(study, capsys, tmp_path):
    main(["report", str(study), "--format", "markdown"])
    printed = capsys.readouterr().out
    assert printed.startswith("| dataset |")
    main(["report", str(study), "--format", "markdown", "--out", str(tmp_path / "new/table.md")])
    assert (tmp_path / "new/table.md").read_text() == printed


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "no study at .*nowhere; studies in .*: none"),
        ("ldt-s0", "ldt-s0 is a run; give its study"),
        ("empty", "no finished run in .*empty, which has 0 runs"),
    ],
)
def test_what_cannot_be_compared_is_told(study, capsys, place, told):
    (study / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(study / place)])
    assert re.search(told, capsys.readouterr().err.replace("\n", " "))


def test_a_study_of_failures_tells_them(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    write_json(
        tmp_path / "a/summary.json", {"status": "failed", "error": "ValueError: rate too high"}
    )
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path)])
    assert "a: ValueError: rate too high" in capsys.readouterr().err


# In a browser ---------------------------------------------------------------------------------


def column(page, index):
    cells = page.locator(f"#cells tbody td:nth-child({index})")
    return [float(text.split()[0]) for text in cells.all_inner_texts()]


@needs_chromium
def test_in_a_browser_it_is_quiet_drawn_sortable_and_safe(study):
    pytest.importorskip("playwright")
    main(["report", str(study)])
    with opened(study / "report.html") as tab:
        page = tab.page
        assert tab.complaints == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
        assert page.title() == f"{study.name}: comparison of runs"
        assert page.locator(".js-plotly-plot").count() == 3
        assert page.locator(".js-plotly-plot .scatterlayer .trace .points path").count() > 50
        heading = page.locator("#cells thead th", has_text=re.compile("^AP$"))
        place = page.locator("#cells thead th").all_inner_texts().index("AP") + 1
        for order in ("ascending", "descending"):
            heading.locator("button").click()
            assert heading.get_attribute("aria-sort") == order
            values = column(page, place)
            assert values == sorted(values, reverse=order == "descending")
        assert len(set(values)) == 3
        page.locator("#pictures button").first.click()
        assert page.locator("dialog").is_visible()
        assert tab.complaints == []


@needs_chromium
def test_what_was_not_measured_is_sorted_last(study):
    pytest.importorskip("playwright")
    file = study / "l1-s0/summary.json"
    known = json.loads(file.read_text())
    del known["rounds"][-1]["latency_ms"]
    write_json(file, known)
    main(["report", str(study)])
    with opened(study / "report.html") as tab:
        heading = tab.page.locator("#all-runs thead th", has_text="latency")
        for _ in range(2):
            heading.locator("button").click()
            assert tab.page.locator("#all-runs tbody tr").last.inner_text().startswith("l1-s0")
