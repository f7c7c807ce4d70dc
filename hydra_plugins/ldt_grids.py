"""Hydra sweeper over a union of grids; Hydra discovers sweepers in this folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from ldt.config.sweeps import jobs


class GridSweeper(BasicSweeper):
    """Sweeper over `hydra.sweeper.grids`, each combined with `hydra.sweeper.params`."""

    def __init__(
        self,
        max_batch_size: int | None,
        params: Mapping[str, Any] | None = None,
        grids: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(max_batch_size)
        self.common, self.grids = params or {}, grids
        self.jobs: list[list[str]] = []

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs; Hydra calls it with the overrides of the command line."""
        self.jobs = jobs(self.common, self.grids, arguments)
        return super().sweep(arguments)

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> Any:  # pyright: ignore
        """Return all jobs in batches; called by the basic sweeper."""
        return list(self.split_overrides_to_chunks(self.jobs, max_batch_size))
