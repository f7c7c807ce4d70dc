"""The steps of a run, what of them is done, and an estimate of the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

BASE, MASK, RETRAIN = "base", "mask", "retrain"
MEASURE, SCORE, CUT, DRAW = "measure", "score", "cut", "draw"
TRAINING = (BASE, MASK, RETRAIN)


@dataclass
class Step:
    """A step of a run.

    Attributes:
        name: what is done, one of the constants of this module.
        round: 0 for the base and what belongs to it.
        images: number of images that it processes; None if that is not known beforehand.
        epochs: number of epochs of training; None if that is not known beforehand.
        epoch: the current one, from 1.
        done: images processed.
        before: of these, those of an earlier start of the run.
        started: time of its beginning in this start of the run, in seconds.
        ended: time of its end.
    """

    name: str
    round: int = 0
    images: float | None = 0.0
    epochs: int | None = 0
    epoch: int = 0
    done: float = 0.0
    before: float = 0.0
    started: float | None = None
    ended: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took; None unless it has begun and ended in this start of the run."""
        done = self.started is not None and self.ended is not None
        return self.ended - self.started if done else None  # type: ignore[operator]

    @property
    def is_training(self) -> bool:
        """Whether images are trained on."""
        return self.name in TRAINING


class Steps:
    """The steps of a run in their order.

    Args:
        steps: all that are planned.
        rounds: number of pruning rounds.
        clock: returns the time in seconds.
    """

    def __init__(
        self, steps: Iterable[Step], rounds: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.all, self.rounds, self.clock = list(steps), rounds, clock
        self.current: Step | None = None
        self.begun = clock()

    @classmethod
    def of_run(
        cls,
        base_epochs: int,
        retrain_epochs: int,
        rounds: int,
        train_images: float,
        val_images: float,
        score_images: float,
        masks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> Steps:
        """Return the steps of a run of the prune-retrain loop.

        Args:
            base_epochs: before the first round.
            retrain_epochs: after each cut.
            rounds: of pruning.
            train_images: in an epoch.
            val_images: in a validation.
            score_images: that a round's criterion sees.
            masks: whether channels are masked while training, instead of being scored and cut.
            clock: returns the time in seconds.
        """
        found = [Step(BASE, 0, base_epochs * train_images, base_epochs)] if base_epochs else []
        found.append(Step(MEASURE, 0, val_images))
        for round_ in range(1, rounds + 1):
            first = Step(MASK, round_, None, None) if masks else Step(SCORE, round_, score_images)
            found += [first, Step(CUT, round_)]
            if retrain_epochs:
                images = retrain_epochs * train_images
                found.append(Step(RETRAIN, round_, images, retrain_epochs))
            found.append(Step(MEASURE, round_, val_images))
        return cls([*found, Step(DRAW)], rounds, clock)

    def begin(self, name: str, round_: int) -> Step:
        """End the current step and begin another; one that is not planned is put after it."""
        now, last = self.clock(), self.current
        at = next((i for i, s in enumerate(self.all) if (s.name, s.round) == (name, round_)), None)
        if at is None:
            at = 0 if last is None else self.all.index(last) + 1
            self.all.insert(at, Step(name, round_))
        step = self.all[at]
        if step is last:
            return step
        if last is not None:
            last.ended = now
        self.current, step.started, step.ended = step, now, None
        return step

    @property
    def number(self) -> int:
        """The number of the current step, from 1; 0 before the first one."""
        return 0 if self.current is None else self.all.index(self.current) + 1

    def label(self, step: Step | None = None) -> str:
        """Return what a step is called: ``retrain 1/2``."""
        step = step or self.current
        if step is None:
            return ""
        return f"{step.name} {step.round}/{self.rounds}" if step.round else step.name

    def share(self) -> float:
        """Return the share of all images that is processed; a step of the past counts as a whole.

        Steps without images count as one image.
        """
        at = self.number - 1
        done = sum(_size(step) for step in self.all[: max(at, 0)])
        if self.current is not None:
            done += min(self.current.done, _size(self.current))
        return done / max(1.0, sum(_size(step) for step in self.all))

    def seconds(self) -> float:
        """Return the time since the start."""
        return self.clock() - self.begun

    def seconds_left(self) -> float | None:
        """Estimate the time that the current step and those after it will take.

        Training takes the time per image of the last training; other steps take that of the last
        one of their name, or else the time per image of training. A step without images that has
        not been timed counts as none. None until an image has been trained on, or if a step of
        unknown length is ahead.
        """
        if self.current is None:
            return None
        at, now = self.number - 1, self.clock()
        pace = _pace(self.all, now)
        left = 0.0
        for step in self.all[at:]:
            seconds = self._estimate(step, pace)
            if seconds is None:
                return None
            if step is self.current and not step.is_training:
                seconds = max(0.0, seconds - (now - (step.started or now)))
            left += seconds
        return left

    def _estimate(self, step: Step, pace: float | None) -> float | None:
        if step.images is None:
            return None
        if step.is_training:
            return None if pace is None else max(0.0, step.images - step.done) * pace
        known = [s.seconds for s in self.all if s.name == step.name and s.seconds is not None]
        if known:
            return known[-1]
        if not step.images:
            return 0.0
        return None if pace is None else step.images * pace


def _size(step: Step) -> float:
    return max(1.0, step.images or 0.0)


def _pace(steps: Sequence[Step], now: float) -> float | None:
    """Return the seconds per image of the last training."""
    for step in reversed(steps):
        images = step.done - step.before
        if step.is_training and step.started is not None and images > 0:
            return ((step.ended or now) - step.started) / images
    return None
