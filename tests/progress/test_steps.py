"""Laws of the steps of a run and of the estimate of the time left."""

import pytest

from ldt.loop.schedule import PruningSchedule
from ldt.progress.display import clock
from ldt.progress.steps import BASE, CUT, DRAW, MASK, MEASURE, RETRAIN, SCORE, Steps

PLANS = [(9, 2, 2), (9, 2, 0), (0, 2, 1), (3, 0, 3), (1, 1, 20)]


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def planned(base=9, retrain=2, rounds=2, masks=False):
    steps = Steps.of_run(base, retrain, rounds, 100, 40, 16, masks)
    steps.clock = Clock()
    return steps


@pytest.mark.parametrize("plan", PLANS)
def test_all_epochs_and_rounds_are_planned(plan):
    base, retrain, rounds = plan
    steps = planned(*plan)
    schedule = PruningSchedule(0.5, rounds=rounds, base_epochs=base, retrain_epochs=retrain)
    assert sum(step.epochs or 0 for step in steps.all) == schedule.total_epochs
    names = [step.name for step in steps.all]
    assert names.count(MEASURE) == rounds + 1  # a row of rounds.csv each
    assert names.count(SCORE) == names.count(CUT) == rounds
    assert names.count(RETRAIN) == (rounds if retrain else 0)
    assert names.count(BASE) == bool(base)
    assert names[-1] == DRAW


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("masks", [False, True])
def test_shares_rise_from_zero_to_one_and_numbers_by_one(plan, masks):
    steps = planned(*plan, masks=masks)
    shares, numbers = [steps.share()], [steps.number]
    for step in list(steps.all):
        steps.begin(step.name, step.round)
        shares.append(steps.share())
        step.done = 2 * (step.images or 1)  # more than planned
        shares.append(steps.share())
        numbers.append(steps.number)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, pytest.approx(1))
    assert numbers == list(range(len(steps.all) + 1))


def test_a_step_that_goes_on_is_the_same_and_an_unplanned_one_comes_next():
    steps = planned()
    base = steps.begin(BASE, 0)
    assert steps.begin(BASE, 0) is base
    extra = steps.begin("probe", 0)
    assert steps.all[:3] == [base, extra, steps.all[2]]
    assert steps.number == 2


def test_the_estimate_is_exact_when_all_images_take_the_same_time():
    steps = planned(base=4, retrain=2, rounds=2)
    steps.begin(BASE, 0)
    assert steps.seconds_left() is None  # nothing is known yet
    whole = sum(step.images or 0 for step in steps.all)
    done = 0.0
    for step in list(steps.all):
        steps.begin(step.name, step.round)
        for _ in range(4):
            images = (step.images or 0) / 4
            step.done += images
            done += images
            steps.clock.now += 0.5 * images
            assert steps.seconds_left() == pytest.approx(0.5 * (whole - done))


def test_what_an_earlier_start_has_done_does_not_count_as_fast():
    steps = planned(base=4)
    base = steps.begin(BASE, 0)
    base.done = base.before = 300
    assert steps.seconds_left() is None
    base.done += 10
    steps.clock.now += 20
    assert steps._estimate(base, 2.0) == pytest.approx(2 * 90)
    assert steps.seconds_left() > 2 * 90


def test_measured_steps_take_as_long_as_the_last_ones():
    steps = planned(base=1, retrain=1, rounds=3)
    steps.begin(BASE, 0).done = 100
    for name, round_, seconds in ((MEASURE, 0, 7), (SCORE, 1, 5), (CUT, 1, 3), (RETRAIN, 1, 0)):
        steps.begin(name, round_)
        steps.clock.now += seconds
    left = steps.seconds_left()
    pace = 0.0  # the clock stood still while training
    assert left == pytest.approx(3 * 7 + 2 * 5 + 2 * 3 + pace)


def test_no_estimate_where_the_length_is_unknown():
    steps = planned(masks=True)
    steps.begin(BASE, 0).done = 100
    assert steps.seconds_left() is None
    assert steps.begin(MASK, 1).images is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (130, "2:10"), (3600, "1:00:00"), (97_205, "27:00:05")],
)
def test_durations_are_short(seconds, text):
    assert clock(seconds) == text
