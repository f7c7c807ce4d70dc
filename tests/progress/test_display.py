"""What a run shows: in a terminal, and in a log."""

import json
import logging
import re
import time
import warnings

import pytest
from screen import screen
from short_runs import TINY, command, rows, tiny

from ldt import experiment, progress
from ldt.progress import console, display
from ldt.progress.console import ConsoleHandler
from ldt.progress.steps import BASE, MEASURE, Steps
from ldt.runs.files import read_rows

LONG = "word " * 40
FORMAT = logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S")


@pytest.fixture
def logged():
    """Log lines go to the console, as Hydra configures it."""
    handler, root = ConsoleHandler(), logging.getLogger()
    handler.setFormatter(FORMAT)
    level = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield
    root.removeHandler(handler)
    root.setLevel(level)


def shown_steps(rounds=2):
    steps = Steps.of_run(9, 2, rounds, 100, 40, 16)
    progress.show(steps)
    return steps


# Terminals --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("rounds", [0, 2, 30])
def test_no_line_is_wider_than_the_terminal_at_any_step(in_terminal, width, rounds):
    in_terminal(width)
    with progress.running("x" * 200):
        console.terminal().print(display.display().draw())
        steps = shown_steps(rounds)
        for step in list(steps.all):
            progress.begin(step.name, step.round)
            step.epoch, step.done = 1, step.images
            console.terminal().print(display.display().draw())
    text = console.terminal().file.getvalue()
    lines = [line for line in screen(text) if line]
    assert max(map(len, lines)) <= width
    for step in steps.all if width > 40 else ():
        assert any(line.startswith(steps.label(step)) for line in lines)


def test_log_lines_prints_and_warnings_are_whole_and_above_the_display(in_terminal, logged):
    file = in_terminal(80)
    with progress.running("loading"):
        shown_steps()
        progress.begin(BASE)
        for i in range(3):
            logging.getLogger("x").info("line %d %s", i, LONG)
            print(f"printed {i}")
            display.display()._live.refresh()
            progress.advance(10)
        between = screen(file.getvalue())
        warnings.simplefilter("always")
        progress.begin(MEASURE)
    lines = screen(file.getvalue())
    assert [line for line in between if line.startswith("step 1 of")] == [between[-2]]
    assert not any("━" in line or "step" in line for line in lines)  # nothing is left of it
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert text.count(LONG.strip()) == 3
    assert [line for line in lines if line.startswith("printed")] == [
        f"printed {i}" for i in range(3)
    ]
    wrapped = [line for line in lines if line.startswith("  ")]
    assert all(line.startswith(" " * 10 + "word") for line in wrapped)  # below the message


def test_items_are_counted_in_place_of_the_steps_of_the_run(in_terminal):
    file, seen = in_terminal(80), []
    with progress.running():
        shown_steps()
        progress.begin(BASE)
        for item in progress.track("abc", "timing layers"):
            seen.append(item)
            display.display()._live.refresh()
            (line,) = filter(None, screen(file.getvalue()))
            assert line.rstrip(" .") == f"timing layers {len(seen)}/3"
        assert display.display().line().startswith("base")
    assert seen == list("abc")


def test_paths_are_not_broken_by_line_feeds(in_terminal, logged):
    file = in_terminal(80)
    path = f"/{'long' * 40}"
    logging.getLogger("x").info("see %s for more", path)
    assert f"see {path} for more\n" in file.getvalue()


def test_what_is_logged_while_held_comes_after_what_is_printed(in_terminal, logged):
    file = in_terminal(80)
    with progress.held():
        logging.getLogger("x").info("second")
        console.print_lines("first")
    lines = screen(file.getvalue())
    assert [line.split()[-1] for line in lines if line] == ["first", "second"]


@pytest.mark.slow
def test_a_run_in_a_terminal(tmp_path, in_terminal, logged):
    width = 80
    file = in_terminal(width)
    folder = tmp_path / "tiny"
    experiment.run(tiny(tmp_path, "method=l1", "recipe.epochs=2"), folder)
    text = file.getvalue()
    lines = screen(text)
    assert not any("━" in line for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= width
    assert lines[0] == "tiny"
    banner = "\n".join(lines[:14])
    for word in ("training: 8 images", "Car ", "M parameters", "G MACs", "50%", "in 2 rounds",
                 "2 epochs, 1 epoch after each cut", str(folder)):  # fmt: skip
        assert word in " ".join(banner.split())
    numbers = read_rows(folder / "rounds.csv")
    table = {line.split()[0]: line.split() for line in lines if re.match("base  |[12]  ", line)}
    for row in numbers:
        cells = table["base" if row["round"] == 0 else str(row["round"])]
        assert f"{row['AP']:.3f}" in cells
        assert f"{row['params'] * 1e-6:.3f}" in cells
        if row["round"]:
            assert f"{row['AP'] - numbers[0]['AP']:+.3f}" in cells
            cut = next(line for line in lines if f"cut {row['round']}/2:" in line)
            assert "layers have fewer channels" in cut
    assert display.display()._live is None


# Logs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_output_of_a_command_has_every_epoch_once_and_no_control_character(tmp_path):
    arguments = ["method=l1", "recipe.epochs=3", "recipe.retrain_epochs=2", "trainer=cpu"]
    given = [*TINY, f"dataset.cache={tmp_path}", *arguments, "study=s", "run_name=x"]
    done = command(*given, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    epochs = re.findall(r"  (base|retrain \d/2)  epoch (\d/\d)  loss ", text)
    assert epochs == [
        *(("base", f"{i}/3") for i in (1, 2, 3)),
        *((f"retrain {t}/2", f"{i}/2") for t in (1, 2) for i in (1, 2)),
    ]
    log = (tmp_path / "runs/s/x/run.log").read_text()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", log)
    assert "recipe.retrain_epochs=2" in log  # the command
    assert "\n  retrain_epochs: 2\n" in log  # the configuration
    assert all(f"  {name}  epoch {number}  loss" in log for name, number in epochs)
    assert rows(tmp_path / "runs/s/x")


@pytest.mark.slow
def test_a_resumed_run_shows_where_it_goes_on(tmp_path, caplog, monkeypatch):
    config = tiny(tmp_path, "method=l1", "recipe.epochs=2", "recipe.retrain_epochs=3",
                  "prune.rounds=1")  # fmt: skip

    def stopped(text):
        if "retrain 1/1  epoch 2/3" in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress, "say", stopped)
        with pytest.raises(SystemExit):
            experiment.run(config, tmp_path / "run")
    caplog.set_level("INFO")
    experiment.run(config, tmp_path / "run")
    (resumed,) = [t for r in caplog.records if (t := r.getMessage()).startswith("resumed")]
    assert resumed == "resumed: goes on with retrain 1/1, epoch 2 of 3"
    epochs = re.findall(r"retrain 1/1  epoch (\d)/3  loss", caplog.text)
    assert epochs == ["2", "3"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


def test_a_log_is_never_silent_for_long_and_grows_slowly(monkeypatch, caplog):
    """A long step: a line after `SILENCE` seconds, then after a tenth of its time so far."""
    caplog.set_level("INFO")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = display.Display()
    shown.steps = Steps.of_run(1, 0, 0, 100, 40, 16, clock=time.monotonic)
    shown.steps.begin(BASE, 0)
    monkeypatch.setattr(console, "printed", now[0])
    times = []
    for _ in range(200_000):
        now[0] += 0.5
        if shown._is_due():
            times.append(now[0] - 1000)
            monkeypatch.setattr(console, "printed", now[0])
    gaps = [later - earlier for earlier, later in zip([0, *times], times, strict=False)]
    assert max(gaps[:9]) <= display.SILENCE
    assert all(gap <= max(display.SILENCE, 0.12 * t) for gap, t in zip(gaps, times, strict=True))
    assert len(times) < 150  # in 28 hours


def test_other_ranks_are_silent(in_terminal, logged, monkeypatch):
    file = in_terminal(80)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with progress.running("loading"):
        shown_steps()
        progress.begin(BASE)
        logging.getLogger("x").warning("not shown")
        logging.getLogger("x").error("an error")
    assert "an error" in file.getvalue()
    assert len(file.getvalue().splitlines()) == 1


def test_nothing_is_shown_in_a_forked_process(in_terminal):
    in_terminal(80)
    with progress.running("loading"):
        shown = display.display()
        live = shown._live
        shown.forget()
        assert (shown._live, shown.steps) == (None, None)
        shown._live, shown.depth = live, 1
