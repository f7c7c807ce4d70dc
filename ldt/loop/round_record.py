"""Record of the scores and the removed channels of a round."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldt.runs.files import writing


class RoundRecord:
    """The scores of a round and the channels that it removed, for inspection.

    Attributes:
        scores: per group, at the start of the round.
        kept: per group, the channels that are kept, numbered as at the start of the round.
        excluded: layers that cannot be pruned, with the reason.
        left: the budget that is left by the cost model's count.
        latency: with a latency budget what was asked for, predicted by the table, and measured.
    """

    def __init__(self) -> None:
        self.scores: dict[str, np.ndarray] = {}
        self.kept: dict[str, np.ndarray] = {}
        self.excluded: dict[str, str] = {}
        self.left = 0.0
        self.latency: dict[str, float] = {}

    def add(self, scores: Mapping[str, Tensor], channels: Mapping[str, Sequence[int]]) -> None:
        """Add the scores and removed channels of an inner round, in its own numbering."""
        for name in [name for name in scores if name not in self.kept]:  # all, in the first one
            self.scores[name] = scores[name].numpy()
            self.kept[name] = np.arange(len(scores[name]))
        for name, removed in channels.items():
            self.kept[name] = np.delete(self.kept[name], removed)

    def save(self, file: Path) -> None:
        """Write the arrays ``score/<group>`` and ``removed/<group>`` to an ``.npz`` file."""
        arrays: dict[str, Any] = {f"score/{name}": values for name, values in self.scores.items()}
        for name, kept in self.kept.items():
            channels = np.arange(len(self.scores[name]))
            arrays[f"removed/{name}"] = np.setdiff1d(channels, kept, assume_unique=True)
        with writing(file) as draft:
            np.savez_compressed(draft, **arrays)
