"""The cells of the benchmark: which runs a stage consists of, by `plan.yaml`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
STAGES = ("development", "test", "reserved")
BASE, LIGHT, FULL, LONGER, WIDTHS, SCRATCH = (
    *("unpruned", "light", "full", "longer", "widths", "scratch"),
)
OWN = "_own"  # ends the names of trials with a score's own option
PRIMARY = "macs"  # the budget of the primary endpoint
SCORE = "ldt"  # the score in question


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark.

    Attributes:
        kind: ``unpruned``, the base; ``light`` (cut, no training); ``full`` (cut and retrained);
            and the controls ``longer`` (unpruned, for as long as base and retraining), ``widths``
            (the score's widths, random channels), ``scratch`` (its architecture from random
            weights).
        training: of base and retraining.
        score: of a cut, else empty.
        trial: what of the score's trials, else empty.
        budget: of a cut, else empty.
        replicate: fold or seed.
        overrides: of the run, beside those that all cells share.
        epochs: of training in this run itself.
        switch: a setting of the plan that is on.
    """

    kind: str
    training: str
    replicate: int
    overrides: tuple[str, ...]
    epochs: int
    score: str = ""
    trial: str = ""
    budget: str = ""
    switch: str = ""

    @property
    def name(self) -> str:
        """Name of the run."""
        parts = (self.kind, self.training, self.score, self.trial, self.budget, self.switch)
        return "-".join([*(part for part in parts if part), f"r{self.replicate}"])

    @property
    def sort(self) -> str:
        """What takes as long as this cell."""
        return " ".join(p for p in (self.kind, self.training, self.score, self.switch) if p)


Choices = Mapping[str, Mapping[str, str]]  # score: budget: trial


@dataclass(frozen=True)
class Plan:
    """The plan for a detector and a data set.

    Attributes:
        content: of `plan.yaml`.
        detector: name of the detector.
        dataset: name of the data set.
        scores: those that are not dropped.
        main: those that are retrained.
        epochs: of base training.
        retrain_epochs: of retraining.
    """

    content: Mapping[str, Any]
    detector: str
    dataset: str
    scores: tuple[str, ...]
    main: tuple[str, ...]
    epochs: int
    retrain_epochs: int

    @classmethod
    def read(
        cls,
        detector: str,
        dataset: str,
        file: Path = HERE / "plan.yaml",
        epochs: int = 1,
        retrain_epochs: int = 1,
    ) -> "Plan":
        """Read the plan.

        Args:
            detector: name of an option of ``detector``.
            dataset: name of an option of ``dataset``.
            file: the plan.
            epochs: of base training, as configured.
            retrain_epochs: of retraining.

        Raises:
            ValueError: the plan does not have them.
        """
        content = yaml.safe_load(file.read_text("utf-8"))
        for key, name in (("detectors", detector), ("datasets", dataset)):
            if name not in content[key]:
                known = ", ".join(content[key])
                raise ValueError(f"{key[:-1]}={name} is not in {file}; allowed: {known}")
        scores, main = tuple(content["scores"]), tuple(content["main"])
        return cls(content, detector, dataset, scores, main, epochs, retrain_epochs)

    @property
    def name(self) -> str:
        """What distinguishes the files of this plan."""
        return f"{self.detector}_{self.dataset}"

    @property
    def shared(self) -> list[str]:
        """Overrides of all stages."""
        own = self.content["datasets"][self.dataset]
        return [*self.content["detectors"][self.detector], *own.get("keys", ())]

    @property
    def same_images(self) -> bool:
        """Whether all replicates are measured on the same images."""
        return bool(self.content["datasets"][self.dataset].get("same_images"))

    @property
    def trials(self) -> list[str]:
        """Names of the trials of each score: a ranking, and ``own`` with the score's option."""
        rankings = self.content["rankings"]
        return [*rankings, *(f"{ranking}{OWN}" for ranking in rankings[:2])]

    def replicates(self, stage: str) -> list[int]:
        """Return the folds or seeds of a stage."""
        return self.content["datasets"][self.dataset][stage]["replicates"]

    def without_last_score(self) -> "Plan | None":
        """Return a shorter plan: without a score that is not retrained, else without a main one."""
        others = [score for score in self.scores if score not in self.main]
        if others:
            kept = tuple(score for score in self.scores if score != others[-1])
            return replace(self, scores=kept)
        if len(self.main) > 3:  # the score, random and a rival
            kept = tuple(score for score in self.scores if score != self.main[-1])
            return replace(self, scores=kept, main=self.main[:-1])
        return None

    # Cells --------------------------------------------------------------------------------

    def development(self) -> list[Cell]:
        """Return the cells of the trials without training, with their bases."""
        cells = list(self._bases("development"))
        for replicate, training, score, budget in self._grid("development", self.scores):
            for trial in self.trials:
                one = self._cut(LIGHT, "development", training, score, trial, budget, replicate)
                cells.append(one)
        return cells

    def finals(self, finalists: Mapping[str, Mapping[str, Sequence[str]]] | None) -> list[Cell]:
        """Return the cells that retrain the best trials.

        Args:
            finalists: trials by score and budget; None: as many as there will be, to count them.
        """
        cells = []
        for replicate, training, score, budget in self._grid("development", self.main):
            first = self.trials[: self.content["finalists"]]
            for trial in finalists[score][budget] if finalists else first:
                one = self._cut(FULL, "development", training, score, trial, budget, replicate)
                cells.append(one)
        return cells

    def switched(self, choices: Choices | None) -> list[Cell]:
        """Return the cells with each switch on; None for the choices, to count them."""
        cells = []
        for name, overrides in self.content["switches"].items():
            for replicate, training, score, budget in self._grid("development", self.main):
                trial = choices[score][budget] if choices else self.trials[0]
                one = self._cut(FULL, "development", training, score, trial, budget, replicate)
                both = (*one.overrides, *overrides)
                cells.append(replace(one, overrides=both, switch=name))
        return cells

    def test(self, choices: Choices | None, stage: str = "test") -> list[Cell]:
        """Return the cells of the test, or of the reserved replicates, replicate by replicate."""
        cells: list[Cell] = list(self._bases(stage))
        for kind, scores in ((FULL, self.main), (LIGHT, self.scores)):
            for replicate, training, score, budget in self._grid(stage, scores):
                trial = choices[score][budget] if choices else self.trials[0]
                cells.append(self._cut(kind, stage, training, score, trial, budget, replicate))
        cells += self._controls(stage, choices)
        if stage == "reserved":
            cells += self._variants(choices)
        order = {replicate: place for place, replicate in enumerate(self.replicates(stage))}
        return sorted(cells, key=lambda cell: order[cell.replicate])  # whole replicates first

    def _controls(self, stage: str, choices: Choices | None) -> Iterator[Cell]:
        both = self.epochs + self.retrain_epochs
        for replicate in self.replicates(stage):
            for training, keys in self.content["trainings"].items():
                own = ("method=none", f"recipe.epochs={both}", *keys)
                overrides = (*self._replicate(stage, replicate), *own)
                yield Cell(LONGER, training, replicate, overrides, both)
            for budget in self.content["budgets"]:
                trial = choices[SCORE][budget] if choices else self.trials[0]
                cut = self._cut(FULL, stage, "ldt", SCORE, trial, budget, replicate)
                random = (*cut.overrides, "prune.channels=random")
                yield replace(cut, kind=WIDTHS, overrides=random)
                if budget == PRIMARY:
                    fresh = ("prune.weights=fresh", f"recipe.retrain_epochs={both}")
                    yield replace(
                        cut, kind=SCRATCH, overrides=(*cut.overrides, *fresh), epochs=both
                    )

    def _variants(self, choices: Choices | None) -> Iterator[Cell]:
        for name, variant in self.content["variants"].items():
            score = variant["score"]
            for replicate, training, _, budget in self._grid("reserved", [score]):
                trial = choices[score][budget] if choices else self.trials[0]
                cut = self._cut(FULL, "reserved", training, score, trial, budget, replicate)
                both = (*cut.overrides, *variant["overrides"])
                yield replace(cut, overrides=both, switch=name)

    def _grid(self, stage: str, scores: Sequence[str]) -> Iterator[tuple[int, str, str, str]]:
        for replicate in self.replicates(stage):
            for training in self.content["trainings"]:
                for score in scores:
                    for budget in self.content["budgets"]:
                        if self._has(stage, training, score, budget):
                            yield replicate, training, score, budget

    def _has(self, stage: str, training: str, score: str, budget: str) -> bool:
        """Return whether a stage has a score with a training.

        The score in question is tried with both. Its rivals get the first, which is theirs, and
        both where effects are told apart: in the test of the primary endpoint.
        """
        own = next(iter(self.content["trainings"]))
        crossed = stage != "development" and budget == PRIMARY
        return training == own or score == SCORE or crossed

    def _bases(self, stage: str) -> Iterator[Cell]:
        for replicate in self.replicates(stage):
            for training, keys in self.content["trainings"].items():
                overrides = (*self._replicate(stage, replicate), "method=none", *keys)
                yield Cell(BASE, training, replicate, overrides, self.epochs)

    def _cut(
        self,
        kind: str,
        stage: str,
        training: str,
        score: str,
        trial: str,
        budget: str,
        replicate: int,
    ) -> Cell:
        rate = self.content["budgets"][budget][kind]
        ranking, own = trial.removesuffix(OWN), trial.endswith(OWN)
        overrides = [
            *self._replicate(stage, replicate),
            *(f"method={score}", f"method.ranking={ranking}"),
            *(f"prune.budget={budget}", f"prune.rate={rate}"),
            *self.content["trainings"][training],
            *(self.content["scores"][score] if own else ()),
        ]
        if kind == LIGHT:
            overrides.append("recipe.retrain_epochs=0")
        epochs = 0 if kind == LIGHT else self.retrain_epochs
        return Cell(kind, training, replicate, tuple(overrides), epochs, score, trial, budget)

    def _replicate(self, stage: str, replicate: int) -> list[str]:
        own = self.content["datasets"][self.dataset]
        keys = (key.replace("$", str(replicate)) for key in own["replicate"])
        return [*keys, *own[stage].get("keys", ())]


def best(values: Mapping[str, Sequence[float]], count: int) -> list[str]:
    """Return the trials with the highest mean, of equal ones the first.

    This is the rule by which every method chooses, LDT and rivals alike.

    Args:
        values: AP by trial, over replicates and trainings.
        count: number of trials.
    """
    means = {trial: sum(own) / len(own) for trial, own in values.items() if own}
    return sorted(means, key=lambda trial: -means[trial])[:count]
