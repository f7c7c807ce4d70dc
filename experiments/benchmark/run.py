"""Run a stage of the benchmark: cell by cell on one core, skipping what is finished.

python experiments/benchmark/run.py development detector=yolox_nano detector.checkpoint=yolox.pth \
    dataset=kitti dataset.root=/data/kitti
python experiments/benchmark/run.py test ...        # with the same overrides
python experiments/benchmark/run.py test ... --plan  # the hours only

Before the first cell it prints how many hours the plan takes, as measured from finished cells or a
short probe, and which scores it drops to keep within its limit. Times are those of the CPU, so that
other processes do not count. A stopped stage goes on with the same command. development ends by
freezing what every method has chosen, which test needs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import contextlib
import io
import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark.clock import CUT, EPOCH, Clock, table
from benchmark.plan import BASE, FULL, STAGES, Cell, Plan, best
from benchmark.records import CHOICES, Records

from ldt.config.paths import quote_paths
from ldt.experiment import composed, run
from ldt.runs import DONE, files

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RECORDS = HERE / "records"
INTERRUPTED = 130  # exit code of a run after Ctrl-C
CHANGED = ("detector=", "dataset=")  # of the overrides, what the plan depends on


class Stage:
    """The cells of a stage in one study.

    Args:
        plan: the plan.
        given: overrides of the command, for every cell.
        runs: directory of all studies.
        records: directory of what finished cells have found, and of the frozen choices.
    """

    def __init__(
        self,
        plan: Plan,
        given: Sequence[str],
        runs: Path = ROOT / "runs",
        records: Path = RECORDS,
    ) -> None:
        self.plan, self.given = plan, list(given)
        self.study = f"benchmark_{plan.name}"
        self.folder = runs / self.study
        self.records = Records(records / plan.name)
        self.clock = Clock(self.records.folder)
        self.frozen = self.records.folder / CHOICES

    # Cells --------------------------------------------------------------------------------

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that are not finished."""
        return [cell for cell in cells if self.records.row(cell) is None]

    def accuracy(self, cell: Cell) -> float | None:
        """Return the AP of a finished cell."""
        row = self.records.row(cell)
        return row["AP"] if row else None

    def run(self, cell: Cell, study: str = "", more: Sequence[str] = ()) -> float:
        """Run a cell in a process of its own, so that nothing of it outlives it.

        An error is logged, not raised.

        Returns:
            The CPU seconds it took.
        """
        study = study or self.study
        folder = self.folder.parent / study / cell.name
        # last, so that nobody can change it on the command line by mistake
        own = [*cell.overrides, *more, f"study={study}", f"run_name={cell.name}"]
        child = os.fork()
        if not child:
            _end(lambda: run(composed(*quote_paths([*self._common(), *own])), folder, True))
        _, status, used = os.wait4(child, 0)
        if os.waitstatus_to_exitcode(status) == INTERRUPTED:
            raise KeyboardInterrupt
        return used.ru_utime + used.ru_stime

    def _common(self) -> list[str]:
        """Return the overrides of all cells; those of the command come last, so that they win."""
        first = [key for key in self.given if key.startswith(CHANGED)]
        others = [key for key in self.given if not key.startswith(CHANGED)]
        return ["experiment=benchmark", *first, *self.plan.shared, *others]

    def tidy(self, cell: Cell) -> None:
        """Remove the checkpoints of a finished cell that nothing needs any more."""
        folder = self.folder / cell.name
        kept = {files.round_checkpoint(1)} if cell.kind == FULL else set()
        for file in folder.glob("*.ckpt*"):
            if file.name not in kept:
                file.unlink()
        for base in self.folder.glob(f"base-*/{files.LAST}*"):
            if files.read_json(base.parent / files.SUMMARY).get("status") == DONE:
                base.unlink()

    # Time ---------------------------------------------------------------------------------

    def probe(self, cells: Sequence[Cell]) -> None:
        """Measure an epoch of each training and a cut by each score of which nothing is known."""
        unknown = self.clock.unknown(self.left(cells))
        study = f"{self.study}_probe"
        for place, cell in enumerate(unknown, 1):
            say(f"probe {place} of {len(unknown)}: {cell.sort}")
            base = Cell(BASE, cell.training, cell.replicate, self._unpruned(cell), 1)
            whole = self.run(base, study, ["recipe.epochs=1"])
            if self.clock.measured(f"{EPOCH} {cell.training}") is None:
                step = replace(base, switch="step")
                rest = self.run(step, study, ["recipe.epochs=1", "trainer.limit_train_batches=1"])
                self.clock.add(f"{EPOCH} {cell.training}", max(whole - rest, 0.1))
            if cell.score:
                keys = ["recipe.epochs=1", "recipe.retrain_epochs=0"]
                self.clock.add(f"{CUT} {cell.score}", self.run(cell, study, keys))
        shutil.rmtree(self.folder.parent / study, ignore_errors=True)

    def _unpruned(self, cell: Cell) -> tuple[str, ...]:
        """Return the overrides of the base of a cell."""
        pruning = ("method", "prune.", "recipe.")
        return (*(k for k in cell.overrides if not k.startswith(pruning)), "method=none")

    def fitting(self, stages: Sequence[str], hours: float) -> tuple[list[Cell], float]:
        """Drop the last scores until stages fit the hours; return their cells, and the hours.

        Finished cells count with what they took, so that a limit holds for the whole.

        Raises:
            ValueError: they do not fit with the fewest scores.
        """
        dropped: list[str] = []
        while True:
            cells = [cell for stage in stages for cell in self.counted(stage)]
            needed = self.clock.total(cells) / 3600
            if needed <= hours:
                break
            shorter = self.plan.without_last_score()
            if shorter is None:
                raise ValueError(
                    f"the plan takes {needed:.1f} hours with the fewest scores, more than --hours "
                    f"{hours:g}; type a larger --hours, or fewer epochs or images"
                )
            dropped += [
                f"{score} ({'not at all' if score not in shorter.scores else 'not retrained'})"
                for score in self.plan.scores
                if score not in shorter.scores
                or (score in self.plan.main and score not in shorter.main)
            ]
            self.plan = shorter
        if dropped:
            say(f"dropped, to keep within {hours:g} hours: {', '.join(dropped)}")
        return cells, needed

    def counted(self, stage: str) -> list[Cell]:
        """Return the cells of a stage; before there are choices, as many of their kind."""
        if stage == "development":
            return [*self.plan.development(), *self.plan.finals(None), *self.plan.switched(None)]
        return self.plan.test(None, stage)

    # Stages -------------------------------------------------------------------------------

    def develop(self) -> None:
        """Run the trials, retrain the best, and freeze the choices."""
        trials, switched = self.plan.development(), self.plan.switched(None)
        self._all("development", trials, [], [*self.plan.finals(None), *switched])
        finalists = self._best(trials, self.plan.content["finalists"])
        finals = self.plan.finals(finalists)
        self._all("development", finals, trials, switched)
        choices = {s: {b: own[0] for b, own in by.items()} for s, by in finalists.items()}
        for score, by in self._best(finals, 1).items():
            choices[score] |= {budget: own[0] for budget, own in by.items()}
        self._all("development", self.plan.switched(choices), [*trials, *finals], [])
        failed = [cell.name for cell in self.left([*trials, *finals])]
        if failed:
            say(f"{len(failed)} cells have failed, see their run.log: {', '.join(failed)}")
        budgets = set(self.plan.content["budgets"])
        if any(set(choices.get(score, ())) != budgets for score in self.plan.scores):
            say("a score has no finished trial: nothing is frozen")
            return
        frozen = {"choices": choices, "main": list(self.plan.main), "given": self._kept()}
        self.frozen.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(self.frozen, frozen)
        say(f"frozen: {self.frozen}")

    def _best(self, cells: Sequence[Cell], count: int) -> dict[str, dict[str, list[str]]]:
        """Return the best trials by score and budget, over replicates and trainings."""
        values: dict[tuple[str, str], dict[str, list[float]]] = {}
        for cell in cells:
            if cell.score and (ap := self.accuracy(cell)) is not None:
                own = values.setdefault((cell.score, cell.budget), {})
                own.setdefault(cell.trial, []).append(ap)
        found: dict[str, dict[str, list[str]]] = {}
        for (score, budget), trials in values.items():
            found.setdefault(score, {})[budget] = best(trials, count)
        return found

    def _kept(self) -> list[str]:
        """Return the overrides of the command that results depend on: those without a path."""
        return [key for key in self.given if "/" not in key]

    def choices(self) -> dict[str, dict[str, str]]:
        """Return the frozen choices, and keep to their scores.

        Raises:
            ValueError: development has not ended, or was made with other overrides.
        """
        if not self.frozen.is_file():
            raise ValueError(
                f"no {self.frozen}: nothing is chosen yet; run the stage development first"
            )
        frozen = json.loads(self.frozen.read_text("utf-8"))
        if frozen["given"] != self._kept():
            raise ValueError(
                f"{self.frozen} was made with {' '.join(frozen['given'])}, not with "
                f"{' '.join(self._kept())}: type the same"
            )
        self.plan = replace(self.plan, scores=tuple(frozen["choices"]), main=tuple(frozen["main"]))
        return frozen["choices"]

    def _all(
        self, stage: str, cells: Sequence[Cell], done: Sequence[Cell], later: Sequence[Cell]
    ) -> None:
        """Run cells, telling after each how much of the stage is done and when it will end.

        Args:
            stage: name of the stage.
            cells: the cells.
            done: those of the stage before them.
            later: as many as will follow them.
        """
        total = len(done) + len(cells) + len(later)
        began, used = time.time(), 0.0
        for place, cell in enumerate(cells):
            if self.records.row(cell):
                continue
            seconds = self.run(cell)
            used += seconds
            self.records.add(cell, self.folder / cell.name, stage)
            if self.records.row(cell):
                self.clock.add(cell.sort, seconds)
                self.tidy(cell)
            left = self.clock.total(self.left([*cells[place + 1 :], *later]))
            pace = (time.time() - began) / used  # other processes may use the core
            ap = self.accuracy(cell)
            end = time.strftime("%a %H:%M", time.localtime(time.time() + left * pace))
            say(
                f"[{len(done) + place + 1}/{total}] {cell.name}: "
                f"{'failed' if ap is None else f'AP {ap:.3f}'}, {seconds:.0f} s; "
                f"{left / 3600:.2f} h of one core left, at this pace until {end}"
            )


def _end(work: Callable[[], object]) -> NoReturn:
    """Do the work of a forked process, and end it."""
    code = 1
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a table for each run
            work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def say(text: str) -> None:
    """Print a line at once, also into a file."""
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("overrides", nargs="*", help="of every cell: detector=... dataset=...")
    parser.add_argument("--hours", type=float, help="limit of the plan; default: that of the plan")
    parser.add_argument("--plan", action="store_true", help="print the hours, run nothing")
    parser.add_argument(
        "--records", type=Path, default=RECORDS,
        help="folder of what finished cells have found; with a new one all is run again",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    try:
        start(given.stage, given.overrides, given.hours, given.plan, records=given.records)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def start(
    name: str,
    overrides: Sequence[str],
    hours: float | None = None,
    only_plan: bool = False,
    **places: Path,
) -> Stage:
    """Run a stage.

    Args:
        name: of the stage.
        overrides: of every cell.
        hours: limit; None: that of the plan.
        only_plan: print the hours, and run nothing but a probe.
        places: ``file`` of the plan, directories ``runs`` and ``records``.
    """
    logging.getLogger().setLevel(logging.WARNING)
    groups = dict(key.split("=", 1) for key in overrides if key.startswith(CHANGED))
    for group in ("detector", "dataset"):
        if group not in groups:
            raise ValueError(f"type {group}=...")
    file = places.pop("file", HERE / "plan.yaml")
    plan = Plan.read(groups["detector"], groups["dataset"], file)
    stage = Stage(plan, overrides, **places)
    first = stage.counted("development")[0]
    config = composed(*quote_paths([*stage._common(), *first.overrides, "run_name=first"]))
    recipe = config.recipe
    stage.plan = replace(plan, epochs=recipe.epochs, retrain_epochs=recipe.retrain_epochs)
    choices = None if name == "development" else stage.choices()
    stage.folder.mkdir(parents=True, exist_ok=True)
    with files.locked(stage.folder / files.LOCK):
        # the limit is one of development and test together
        counted = ("development", "test") if name != "reserved" else (name,)
        stage.probe([cell for one in counted for cell in stage.counted(one)])
        limit = stage.plan.content["hours"] if hours is None else hours
        _, whole = stage.fitting(counted, limit)
        own = stage.counted(name)
        left = stage.left(own)
        say(f"{name}, {stage.study}: {len(own) - len(left)} of {len(own)} cells are finished")
        say("\n".join(table(own, stage.clock.seconds)))
        say(
            f"{stage.clock.total(left) / 3600:.2f} hours left; {' and '.join(counted)} together "
            f"{whole:.2f} of at most {limit:g} hours of one core"
        )
        if only_plan:
            return stage
        if name == "development":
            stage.develop()
        else:
            stage._all(name, stage.plan.test(choices, name), [], [])
    return stage


if __name__ == "__main__":
    os.nice(19)
    main()
