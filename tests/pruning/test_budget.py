"""Laws of choosing channels: exact costs, met rates, compounding rounds, limits and rankings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small import REAL, SCOPE, SMALL, Case, case
from torch import Tensor

from ldt.evaluation.profiling import count_macs, count_parameters
from ldt.pruning.budget import (
    RANKINGS,
    TOLERANCE,
    Limits,
    UnreachableRateError,
    select_channels,
    some_of,
)
from ldt.pruning.costs import Budget, CostModel
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import width_of

BUDGETS: tuple[Budget, ...] = ("params", "macs")
WITH_HEAD = (*SCOPE, "head", "bbox_head")
FREE = Limits(max_layer_rate=1.0, min_channels=1)


def count(subject: Case, budget: Budget) -> int:
    if budget == "params":
        return count_parameters(subject.model)
    n, c, h, w = subject.example.shape
    return count_macs(subject.model, lambda x: subject.forward(subject.model, x), (n, c, h, w))


def random_scores(graph: PruningGraph, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(group.size, generator=generator, dtype=torch.float64)
        for name, group in graph.groups.items()
    }


def cut(
    subject: Case,
    save: float,
    tolerance: float,
    budget: Budget = "params",
    ranking: str = "global",
    limits: Limits | None = None,
    original: dict[str, int] | None = None,
    scores: dict[str, Tensor] | None = None,
    scope: Sequence[str] = SCOPE,
) -> dict[str, list[int]]:
    """Choose and remove channels; returns them."""
    graph = subject.graph(scope)
    chosen = select_channels(
        graph,
        scores or random_scores(graph),
        CostModel(graph, budget),
        save=save,
        tolerance=tolerance,
        ranking=ranking,
        limits=limits,
        original=original,
    )
    graph.remove(chosen)
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_the_cost_model_is_exact(name: str) -> None:
    subject = case(name)
    graph, rng = subject.graph(WITH_HEAD), np.random.default_rng(0)
    removed = {
        group: np.sort(rng.permutation(g.size)[: rng.integers(1, g.size)])
        for group, g in graph.groups.items()
        if g.parts == 1 or g.size > g.parts
    }
    for group, g in graph.groups.items():
        if g.parts > 1:
            removed[group] = np.arange(0, g.size, g.size // g.parts)
    costs = {budget: CostModel(graph, budget) for budget in BUDGETS}
    predicted = {budget: costs[budget].saved(removed) for budget in BUDGETS}
    before = {budget: count(subject, budget) for budget in BUDGETS}
    graph.remove({group: indices.tolist() for group, indices in removed.items()})
    assert predicted == {budget: before[budget] - count(subject, budget) for budget in BUDGETS}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_achieved_rate_is_the_asked_one(name: str) -> None:
    cases: tuple[tuple[Budget, str, float], ...] = (
        ("params", "global", 0.2),
        ("params", "uniform", 0.5),
        ("params", "global_normalised", 0.7),
        ("macs", "global_per_cost", 0.2),
        ("macs", "global", 0.5),
        ("macs", "uniform", 0.7),
    )
    for budget, ranking, rate in cases:
        subject = case(name)
        whole = count(subject, budget)
        cut(subject, rate * whole, TOLERANCE * whole, budget, ranking, scope=WITH_HEAD)
        assert 1 - count(subject, budget) / whole == pytest.approx(rate, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_rounds_compound_to_the_rate_of_the_unpruned_model(budget: Budget) -> None:
    subject, rate, rounds = case("gfl_tiny"), 0.6, 3
    whole = count(subject, budget)
    original = {name: group.size for name, group in subject.graph().groups.items()}
    for round_ in range(1, rounds + 1):
        keep = (1 - rate) ** (round_ / rounds)
        save = count(subject, budget) - keep * whole
        cut(subject, save, TOLERANCE * whole, budget, original=original)
        assert count(subject, budget) / whole == pytest.approx(keep, abs=0.005)


@pytest.mark.slow
def test_limits_count_from_the_unpruned_model_in_every_round() -> None:
    subject = case("atss_tiny")
    whole = count(subject, "params")
    limits = Limits(max_layer_rate=0.5, min_channels=4)
    original = {name: group.size for name, group in subject.graph().groups.items()}
    for share in (0.2, 0.4):
        graph = subject.graph()
        scores = {  # some groups have far lower scores than others, and go as far as they may
            name: s * 10.0**place for place, (name, s) in enumerate(random_scores(graph).items())
        }
        save = count(subject, "params") - (1 - share) * whole
        cut(subject, save, TOLERANCE * whole, limits=limits, original=original, scores=scores)
        left = {name: group.size / original[name] for name, group in subject.graph().groups.items()}
        assert min(left.values()) == 0.5


@pytest.mark.parametrize(
    ("size", "original", "limits", "expected"),
    [
        (48, 48, Limits(0.95, 4), 44),
        (20, 20, Limits(0.95, 1), 19),
        (128, 128, Limits(0.95, 4), 121),  # 122 would be 95.3 %
        (64, 128, Limits(0.75, 4), 32),
        (30, 128, Limits(0.75, 4), 0),
        (3, 3, Limits(0.95, 4), 0),
        (48, 48, Limits(0.95, 4, round_to=1), 44),
        (48, 48, Limits(0.95, 4, round_to=8), 40),
        (20, 20, Limits(0.95, 1, round_to=8), 12),
        (128, 128, Limits(0.75, 4, round_to=48), 80),
        (30, 128, Limits(0.95, 4, round_to=16), 14),
        (8, 8, Limits(0.95, 4, round_to=8), 0),
    ],
)
def test_what_a_layer_may_lose(size: int, original: int, limits: Limits, expected: int) -> None:
    group = case("chain").graph().groups["neck.0"]
    resized = type(group)(group.name, size, group.members)
    assert limits.removable(resized, original) == expected


def test_group_norm_loses_as_many_channels_from_each_group() -> None:
    subject = case("groupnorm")
    graph = subject.graph()
    parts = {name: group.parts for name, group in graph.groups.items()}
    sizes = {name: group.size for name, group in graph.groups.items()}
    chosen = cut(subject, 0.45 * count(subject, "params"), 0.1 * count(subject, "params"))
    assert any(chosen.get(name) for name in parts if parts[name] > 1)
    for name, gone in chosen.items():
        of_each = np.bincount(
            np.asarray(gone) // (sizes[name] // parts[name]), minlength=parts[name]
        )
        assert len(set(of_each.tolist())) == 1
    subject.outputs(subject.batches[0].images)


def widths(graph: PruningGraph) -> dict[str, int]:
    """What the layers of every group produce, by layer."""
    return {
        member.name: width_of(member.layer, "out")
        for group in graph.groups.values()
        for member in group.producers
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranking", ["global", "uniform"])
@pytest.mark.parametrize(("name", "multiple"), [("gfl_tiny", 8), ("yolox_nano", 16)])
def test_what_stays_of_a_layer_is_a_multiple(name: str, multiple: int, ranking: str) -> None:
    subject = case(name)
    graph, limits = subject.graph(), Limits(round_to=multiple)
    before, whole, rate = widths(graph), count(subject, "macs"), 0.3
    step = max(
        CostModel(graph, "macs").saved({group: np.arange(min(g.size, limits.multiple(g)))})
        for group, g in graph.groups.items()
    )
    cut(subject, rate * whole, TOLERANCE * whole, "macs", ranking, limits)
    assert abs(whole - count(subject, "macs") - rate * whole) <= max(TOLERANCE * whole, step / 2)
    after = widths(subject.graph())
    assert after != before
    assert all(width in (before[key], width // multiple * multiple) for key, width in after.items())
    subject.outputs(subject.batches[0].images)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_coupled_parts_keep_multiples_too(name: str) -> None:
    subject = case(name)
    graph = subject.graph()
    before = {group: g.size for group, g in graph.groups.items()}
    limits = Limits(max_layer_rate=1.0, min_channels=1, round_to=4)
    most = {group: limits.removable(g, g.size) for group, g in graph.groups.items()}
    scores, costs = random_scores(graph), CostModel(graph, "params")
    save = costs.saved({group: some_of(graph.groups[group], n) for group, n in most.items()})
    chosen = select_channels(graph, scores, costs, save=save, tolerance=0.1, limits=limits)
    graph.remove(chosen)
    layers: dict[str, Any] = dict(subject.model.named_modules())
    after = {group: layers[group].out_channels for group in before}  # of those too narrow to be one
    after |= {group: g.size for group, g in subject.graph().groups.items()}
    assert after == {group: before[group] - most[group] for group in before}
    assert all(size % 4 == 0 or size == before[group] for group, size in after.items())
    subject.outputs(subject.batches[0].images)


def test_a_round_number_changes_nothing_where_a_step_is_one_channel() -> None:
    saves = [cut(case("residual"), 2000, 300, limits=Limits(0.9, 2, r)) for r in (0, 1)]
    assert saves[0] == saves[1]


def test_global_removes_the_smallest_scores_of_all() -> None:
    subject = case("residual")
    graph = subject.graph()
    scores = random_scores(graph, seed=3)
    chosen = cut(subject, 2000, 300, limits=FREE, scores=scores)
    gone = {(name, c) for name, channels in chosen.items() for c in channels}
    values = {(name, c): float(s[c]) for name, s in scores.items() for c in range(len(s))}
    assert 0 < len(gone) < len(values)
    assert max(values[key] for key in gone) < min(values[key] for key in set(values) - gone)


def test_uniform_removes_the_same_share_of_every_group() -> None:
    subject = case("gfl_tiny")
    sizes = {name: group.size for name, group in subject.graph().groups.items()}
    whole = count(subject, "params")
    chosen = cut(subject, 0.5 * whole, 0.005 * whole, ranking="uniform")
    shares = {name: len(chosen.get(name, [])) / size for name, size in sizes.items()}
    highest = max(shares.values())
    assert 0 < highest < 1
    for name, share in shares.items():
        assert highest - share <= 1 / sizes[name]


def test_normalised_ranking_ignores_the_scale_of_a_group() -> None:
    subject = case("residual")
    scores = random_scores(subject.graph())
    first = next(iter(scores))
    rescaled = {**scores, first: scores[first] * 1000}
    kinds = [
        cut(case("residual"), 2000, 300, ranking=ranking, scores=given)
        for ranking in ("global_normalised", "global")
        for given in (scores, rescaled)
    ]
    assert kinds[0] == kinds[1]
    assert kinds[2] != kinds[3]


def test_ranking_per_cost_takes_the_expensive_channels_first() -> None:
    subject = case("pyramid")
    graph = subject.graph()
    equal = {name: torch.ones(group.size) for name, group in graph.groups.items()}
    costs = CostModel(graph, "macs")
    worth = {name: costs.saved({name: np.array([0])}) for name in graph.groups}
    dearest = max(worth, key=worth.__getitem__)
    chosen = cut(subject, worth[dearest], 1, "macs", "global_per_cost", scores=equal)
    assert chosen == {dearest: [0]}
    assert list(cut(case("pyramid"), 1, 1e9, "macs", "global", scores=equal)) != [dearest]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ties_are_broken_alike_every_time(ranking: str) -> None:
    equal = {name: torch.ones(g.size) for name, g in case("concat").graph().groups.items()}
    backwards = dict(reversed(equal.items()))
    runs = [
        cut(case("concat"), 1000, 200, ranking=ranking, scores=scores)
        for scores in (equal, equal, backwards)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0]


def test_an_unreachable_rate_names_the_keys() -> None:
    subject = case("chain")
    whole = count(subject, "params")
    with pytest.raises(UnreachableRateError, match=r"prune\.max_layer_rate.*prune\.scope"):
        cut(subject, 0.99 * whole, TOLERANCE * whole)


def test_a_budget_between_two_steps_says_so() -> None:
    subject = case("chain")
    with pytest.raises(UnreachableRateError, match="single channels exceed"):
        cut(subject, 0.5 * count(subject, "params"), tolerance=0.01)


def test_nothing_to_save_removes_nothing() -> None:
    assert cut(case("chain"), save=0, tolerance=0) == {}


@pytest.mark.parametrize(
    "bad",
    [
        torch.full((10,), torch.nan),
        torch.ones(9),
        torch.ones(10, 1),
        torch.tensor([1e40] * 10).float(),
    ],
)
def test_bad_scores_name_the_layer(bad: Tensor) -> None:
    scores = {**random_scores(case("chain").graph()), "neck.0": bad}
    with pytest.raises(ValueError, match=r"neck\.0.*expected 10 finite scores"):
        cut(case("chain"), 100, 100, scores=scores)


def test_an_unknown_ranking_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"method\.ranking='best'.*global_normalised"):
        cut(case("chain"), 100, 100, ranking="best")
