"""What a round scored and removed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


class RoundRecord:
    """The scores of a round and the channels that it removed, for inspection."""

    def __init__(self) -> None:
        self.scores: dict[str, np.ndarray] = {}  # as the round began
        self.excluded: dict[str, str] = {}  # layers that cannot be pruned, with the reason
        self.left: dict[str, np.ndarray] = {}  # channels, numbered as the round began

    def add(self, scores: Mapping[str, Tensor], channels: Mapping[str, Sequence[int]]) -> None:
        """Note what an inner round scored and removed, in its own numbering."""
        if not self.scores:
            self.scores = {name: values.numpy() for name, values in scores.items()}
            self.left = {name: np.arange(len(values)) for name, values in scores.items()}
        for name, gone in channels.items():
            self.left[name] = np.delete(self.left[name], gone)

    def save(self, file: Path) -> None:
        """Write ``score/<group>`` and ``removed/<group>`` arrays."""
        arrays: dict[str, Any] = {f"score/{name}": values for name, values in self.scores.items()}
        for name, left in self.left.items():
            whole = np.arange(len(self.scores[name]))
            arrays[f"removed/{name}"] = np.setdiff1d(whole, left, assume_unique=True)
        np.savez_compressed(file, **arrays)
