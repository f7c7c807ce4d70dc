"""Time of a training step with LDT over one without: full-size GFL, 416x1344, batch 2.

    python benchmarks/ldt_overhead.py [--steps 5]

Steps with and without LDT alternate, so that a noisy machine slows both alike; the ratio is that of
the medians. The paper states an overhead of about 10 %. The parts are timed in the steps with LDT.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from ldt.callbacks.ldt_loss import LDTLoss
from ldt.detectors import model_config, quiet
from ldt.discriminant import discriminants_of, object_vectors
from ldt.module import DetectorModule, PreparedBatch

HEIGHT, WIDTH, BATCH, OBJECTS = 416, 1344, 2, 12


def batch(module: DetectorModule) -> PreparedBatch:
    """Random images with a dozen objects of three classes each."""
    corner = torch.rand(OBJECTS, 2) * torch.tensor([WIDTH - 200.0, HEIGHT - 150.0])
    boxes = torch.cat([corner, corner + 20 + torch.rand(OBJECTS, 2) * 120], 1)
    samples = []
    for _ in range(BATCH):
        shape = (HEIGHT, WIDTH)
        sample = DetDataSample(metainfo={"img_shape": shape, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(OBJECTS) % 3)
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        samples.append(sample)
    images = [torch.randint(0, 255, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(BATCH)]
    return module.prepare({"inputs": images, "data_samples": samples}, training=True)


def timed(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - start)
    return result


def step(module: DetectorModule, ready: PreparedBatch, options: dict[str, Any] | None) -> dict:
    """One training step without the optimizer; ``options`` turns LDT on. Seconds per part."""
    times: dict[str, list[float]] = {}
    module.zero_grad(set_to_none=True)
    with module.tapped_neck() as maps:
        losses = timed(
            times,
            "forward and detection loss",
            lambda: module.detector(ready.images, ready.samples, mode="loss"),
        )
    if options is not None:
        vectors = timed(
            times, "object vectors", lambda: [object_vectors(m, ready.objects) for m in maps]
        )
        found = timed(
            times,
            "scatter and eigenvalues",
            lambda: discriminants_of(vectors, ready.objects.labels, **options),
        )
        losses.update(loss_ld=5e-4 * found.loss_ld, loss_cov=7.5 * found.loss_cov)
    total: Tensor = module.detector.parse_losses(losses)[0]  # type: ignore[operator]
    timed(times, "backward", total.backward)
    return {name: sum(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    quiet()
    torch.manual_seed(0)
    model = model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {}, 3, pretrained=False)
    module = DetectorModule(
        model, ["a", "b", "c"], {"epochs": 1, "schedule": "constant"}, (HEIGHT, WIDTH)
    )
    module.train()
    ready = batch(module)
    options = LDTLoss().options
    plain, with_ldt = [], []
    step(module, ready, options)  # warm-up
    for _ in range(steps):
        plain.append(step(module, ready, None))
        with_ldt.append(step(module, ready, options))
    without = statistics.median(sum(s.values()) for s in plain)
    with_ = statistics.median(sum(s.values()) for s in with_ldt)
    print(f"step without LDT {without:.2f} s, with LDT {with_:.2f} s: ratio {with_ / without:.3f}")
    for name in with_ldt[0]:
        share = statistics.median(s[name] for s in with_ldt) / with_
        print(f"  {name:28s} {share:6.1%}")


if __name__ == "__main__":
    main()
