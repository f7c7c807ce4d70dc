"""GroupFisher's schedule: mask channels one by one while the detector trains."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist

from ldt.config.kinds import Cost
from ldt.config.values import Count, Positive, checked
from ldt.criteria.group_fisher import Fisher, channel_costs
from ldt.pruning.budget import Limits, lowest_scoring, select_channels
from ldt.pruning.costs import CostModel
from ldt.pruning.graph import PruningGraph


class RankingArguments(TypedDict):
    """Arguments that ``select_channels`` and ``lowest_scoring`` have in common."""

    ranking: str
    limits: Limits
    original: Mapping[str, int]


class GradualPruning:
    """Mask the channels of least Fisher information every few training steps (ICML 2021).

    Fisher information is summed over the training steps since the last masking event and divided by
    a channel's cost in the current network. Masked channels are zeros for their consumers, until
    the round's budget is saved and :class:`PruneRetrain` removes them.

    Args:
        interval: training steps between two masking events.
        channels: channels masked per event (1 in the paper; larger numbers take less time).
        lr: factor on the learning rate while masking.
        cost: what a channel's Fisher information is divided by, as ``method=group_fisher`` has it.

    Attributes:
        removed: per group, the masked channels.
        events: number of masking events so far.
        done: whether the budget is saved.

    Raises:
        ValueError: a value is not allowed; the message names its key.
    """

    @checked("method.gradual")
    def __init__(
        self, interval: Count = 10, channels: Count = 1, lr: Positive = 0.2, cost: Cost = "memory"
    ) -> None:
        self.interval, self.channels, self.lr = interval, channels, lr
        self.cost: Cost = cost
        self.removed: dict[str, np.ndarray] = {}
        self.scores: dict[str, torch.Tensor] = {}
        self.events = self._steps = 0
        self.done = True
        self._fisher: Fisher | None = None
        self._recording = ExitStack()

    @property
    def active(self) -> bool:
        """Whether channels are being masked and are not removed yet."""
        return self._fisher is not None

    @property
    def graph(self) -> PruningGraph:
        """The graph that was passed to :meth:`begin`."""
        assert self._fisher is not None
        return self._fisher.graph

    def begin(
        self,
        graph: PruningGraph,
        costs: CostModel,
        save: float,
        tolerance: float,
        ranking: str,
        limits: Limits,
        original: Mapping[str, int],
    ) -> None:
        """Start masking; the arguments are those of ``ldt.pruning.budget.select_channels``."""
        self.removed, self.scores, self.events, self._steps, self.done = {}, {}, 0, 0, False
        self._costs, self._save, self._tolerance = costs, save, tolerance
        self._ranking: RankingArguments = {
            "ranking": ranking, "limits": limits, "original": original
        }  # fmt: skip
        self._fisher = Fisher(graph)
        self._device = next(graph.model.parameters()).device  # for communication between ranks
        self._recording.enter_context(self._fisher.record_gradients())

    def after_batch(self, stepped: bool = True) -> None:
        """Accumulate the gradients of a batch; mask after every ``interval``-th training step.

        Args:
            stepped: whether the optimizer has stepped; False within gradient accumulation.
        """
        if self._fisher is None or self.done:
            return
        self._fisher.add()
        self._steps += stepped
        if stepped and self._steps % self.interval == 0:
            self._mask(self._fisher)

    def _mask(self, fisher: Fisher) -> None:
        graph = fisher.graph
        if dist.is_initialized():  # every rank has other images
            for sums in fisher.sums.values():
                reduced = sums.to(self._device)
                dist.all_reduce(reduced)
                sums.copy_(reduced)
        costs = channel_costs(graph, self.cost, self.removed)
        scores = {name: values / costs[name] for name, values in fisher.sums.items()}
        self.scores = self.scores or scores
        for name, channels in self.removed.items():
            scores[name][channels] = -1.0  # Fisher information is not negative: these stay lowest
        self.events += 1
        steps = self.events * self.channels
        self.removed = lowest_scoring(graph, scores, self._costs, steps=steps, **self._ranking)
        if self._costs.saved(self.removed) >= self._save or steps > sum(
            group.size for group in graph.groups.values()
        ):
            exact = select_channels(
                graph,
                scores,
                self._costs,
                save=self._save,
                tolerance=self._tolerance,
                **self._ranking,
            )
            self.removed = {name: np.array(channels, int) for name, channels in exact.items()}
            self.done = True
        fisher.mask(self.removed)
        fisher.clear()

    @property
    def short(self) -> float:
        """What the masked channels save less than was asked for, in the cost model's unit."""
        return self._save - self._costs.saved(self.removed)

    def end(self) -> dict[str, list[int]]:
        """Stop masking and return the channels to remove."""
        self._recording.close()
        self._fisher = None
        return {name: sorted(map(int, channels)) for name, channels in self.removed.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        if self._fisher is None:
            return {}
        return {
            "removed": {name: channels.tolist() for name, channels in self.removed.items()},
            "scores": self.scores,
            "sums": self._fisher.sums,
            "events": self.events,
            "steps": self._steps,
            "done": self.done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state; call after :meth:`begin`."""
        assert self._fisher is not None
        removed = state["removed"].items()
        self.removed = {name: np.array(channels, int) for name, channels in removed}
        self.scores, self._fisher.sums = dict(state["scores"]), dict(state["sums"])
        self.events, self._steps, self.done = state["events"], state["steps"], state["done"]
        self._fisher.mask(self.removed)
