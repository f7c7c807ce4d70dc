"""Train, prune and retrain a detector: ``python run.py --help``."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ldt.config import register

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | tuple[float, ...]:
    """Run one experiment; gives the headline metric of the last round, or the `objectives`."""
    from ldt.experiment import run

    job = HydraConfig.get()
    return run(config, Path(job.runtime.output_dir), in_sweep=job.mode == RunMode.MULTIRUN)


if __name__ == "__main__":
    main()
