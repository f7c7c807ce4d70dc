"""Overhead of LDT in a training step: full-size GFL, 416x1344, batch size 2.

    python benchmarks/ldt_overhead.py [--steps 5]

Steps with and without LDT alternate, so that a noisy machine slows both alike; the ratio is that of
the medians. The paper states an overhead of about 10 %. A step is ``training_step`` with the
``LDTLoss`` callback registered or not, backward, clipping and update. What LDT adds to the
backward shows in the backward's share.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning as L
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from omegaconf import OmegaConf
from torch import Tensor

from ldt.callbacks.ldt_loss import LDTLoss
from ldt.config import RecipeConfig
from ldt.detectors.models import model_config, quiet
from ldt.module import DetectorModule
from ldt.objects import Objects

HEIGHT, WIDTH, BATCH, OBJECTS = 416, 1344, 2, 12


def batch(images: int = BATCH, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    """Random images of a (height, width) with a dozen objects of three classes each."""
    height, width = size
    sides = torch.tensor([width, height], dtype=torch.float32)
    corner = torch.rand(OBJECTS, 2) * sides * torch.tensor([0.85, 0.65])
    boxes = torch.cat([corner, corner + sides * (0.05 + 0.1 * torch.rand(OBJECTS, 2))], 1)
    samples = []
    for _ in range(images):
        sample = DetDataSample(metainfo={"img_shape": size, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(OBJECTS) % 3)
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    inputs = [torch.randint(0, 255, (3, height, width), dtype=torch.uint8) for _ in range(images)]
    return {"inputs": inputs, "data_samples": samples}


class Step:
    """A training step as Lightning runs it, with the seconds of its parts."""

    def __init__(self, module: DetectorModule, term: LDTLoss) -> None:
        self.module, self.term = module, term
        module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    def __call__(self, data: dict[str, Any], with_ldt: bool) -> dict[str, float]:
        """Seconds of the forward, of LDT's part of it, of the backward, and of the update."""
        self.seconds = {}
        self.module.loss_terms = {"ldt": self._ldt} if with_ldt else {}
        loss = self.timed("forward", lambda: self.module.training_step(data, 0))
        self.timed("backward", loss.backward)
        self.timed("clipping and update", self._update)
        if with_ldt:
            self.seconds["forward"] -= self.seconds["LDT in the forward"]
        return self.seconds

    def _ldt(
        self, features: Sequence[Tensor], objects: Objects, detection: Tensor
    ) -> dict[str, Tensor]:
        return self.timed("LDT in the forward", lambda: self.term(features, objects, detection))

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 35)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    quiet()
    torch.manual_seed(0)
    model = model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {}, 3, pretrained=False)
    recipe = OmegaConf.to_container(OmegaConf.structured(RecipeConfig(epochs=1, retrain_epochs=1)))
    module = DetectorModule(model, ["a", "b", "c"], cast(dict, recipe), (HEIGHT, WIDTH))
    module.train()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    term = LDTLoss(alpha=5e-4, beta=7.5, warmup_epochs=0)
    module.trainer = trainer
    term.setup(trainer, module, "fit")
    term.weights.steps_left = 0  # the shares are measured in few steps of an epoch
    step, data = Step(module, term), batch()
    step(data, with_ldt=True)  # warm-up
    plain, ldt = [], []
    for _ in range(steps):
        plain.append(step(data, with_ldt=False))
        ldt.append(step(data, with_ldt=True))
    without, with_ = (statistics.median(sum(s.values()) for s in found) for found in (plain, ldt))
    print(f"step without LDT {without:.2f} s, with LDT {with_:.2f} s: ratio {with_ / without:.3f}")
    for name in ldt[0]:
        share = statistics.median(s[name] for s in ldt) / with_
        before = statistics.median(s.get(name, 0.0) for s in plain) / without
        print(f"  {name:22s} {share:6.1%} of the step with LDT, {before:6.1%} of the one without")


if __name__ == "__main__":
    main()
