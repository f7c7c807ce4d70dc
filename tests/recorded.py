"""A run of `experiment.run` in a process of its own, each step of which is written down.

    python tests/recorded.py <folder> <override>...

Every process writes <folder>/steps-<rank>.json: [optimizer step, learning rate, images] of each
batch.
"""

import json
import sys
from pathlib import Path

from short_runs import tiny

from ldt import experiment
from ldt.module import DetectorModule


def main() -> None:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    steps = []
    plain = DetectorModule.training_step

    def step(self, batch, index):
        images = [sample.img_id for sample in batch["data_samples"]]
        rate = self.optimizers().param_groups[0]["lr"]
        steps.append([self.global_step, rate, images])
        file = folder / f"steps-{self.global_rank}.json"
        file.write_text(json.dumps(steps))
        return plain(self, batch, index)

    DetectorModule.training_step = step
    experiment.run(tiny(folder, *overrides), folder)


if __name__ == "__main__":
    main()
