"""Cost of the LDT losses with their backward: C = 256 on five scales, one CPU thread.

    python benchmarks/ldt_loss.py [--repeats 7]

For each number of objects and classes, CPU milliseconds of L_LD and of L_cov, each with its
backward down to the object vectors; the same of L_LD through all eigenvalues, differentiated
(`tests/eigen_reference.py`), and their ratio; and the share of both losses in the forward and
backward of an FPN like GFL's (ResNet-50 widths, 256 channels), which is the neck's part of a
training step with two images of 416x1344. Everything alternates in one process, so that a noisy
machine slows all alike; times are medians of CPU time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ldt  # noqa: F401  (first: mmdet imports only once mmcv's operators are in place)

# isort: split
from mmdet.models.necks import FPN

from ldt.discriminant import (
    PHI,
    RIDGE,
    RIDGE_ABSOLUTE,
    classes_of,
    discriminants_of,
    ld_loss,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import eigen_reference

CHANNELS, SCALES = 256, 5
WIDTHS, STRIDES = (256, 512, 1024, 2048), (4, 8, 16, 32)
HEIGHT, WIDTH, BATCH = 416, 1344, 2


def milliseconds(work: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """CPU time of a forward and its backward down to the inputs, in caches that know them."""
    torch.autograd.grad(work(), inputs)
    start = time.process_time()
    torch.autograd.grad(work(), inputs)
    return 1e3 * (time.process_time() - start)


def losses(n: int, n_classes: int) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """The terms as functions of object vectors [S, N, C] in float32, as a network gives them."""
    labels = torch.arange(n) % n_classes
    means = torch.randn(SCALES, n_classes, CHANNELS)
    x = (torch.randn(SCALES, n, CHANNELS) + means[:, labels]).requires_grad_()
    options = PHI, RIDGE, RIDGE_ABSOLUTE

    def discriminate() -> Tensor:
        return ld_loss(x, classes_of(labels), *options)[0]

    def differentiate_all() -> Tensor:
        S_w, S_b, _ = eigen_reference.scatter(x, labels)
        return eigen_reference.ld_loss(S_w, S_b, n_classes, *options)[0]

    def both() -> Tensor:
        found = discriminants_of(x, labels)
        return found.loss_ld + found.loss_cov

    def both_before() -> Tensor:
        loss_ld, loss_cov, _ = eigen_reference.losses(x, labels, *options)
        return loss_ld + loss_cov

    return [discriminate, differentiate_all, both, both_before], x


def neck() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The neck of a full-size detector, as a function without arguments, and what it trains."""
    module: nn.Module = FPN(list(WIDTHS), CHANNELS, SCALES, 1, add_extra_convs="on_output")
    maps = [
        torch.randn(BATCH, width, HEIGHT // stride, WIDTH // stride, requires_grad=True)
        for width, stride in zip(WIDTHS, STRIDES, strict=True)
    ]
    return lambda: sum((m.mean() for m in module(maps)), torch.tensor(0.0)), [
        *maps[1:],
        *module.parameters(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fpn, trained = neck()
    print(f"{'N':>5} {'G':>3}  {'L_LD':>8} {'old':>8} {'ratio':>6}  {'both':>8} {'old':>8} "
          f"{'ratio':>6}  of the neck's step")  # fmt: skip
    for n_classes in (3, 80):
        for n in (24, 80, 200, 1000):
            if n < 2 * n_classes:
                continue
            work, x = losses(n, n_classes)
            parts = [(one, [x]) for one in work] + [(fpn, trained)]
            runs = [[milliseconds(*part) for part in parts] for _ in range(repeats + 1)]
            ld, old, both, old_both, step = (
                statistics.median(times) for times in zip(*runs[1:], strict=True)
            )
            print(f"{n:5} {n_classes:3}  {ld:8.1f} {old:8.1f} {old / ld:6.1f}  {both:8.1f} "
                  f"{old_both:8.1f} {old_both / both:6.1f}  {both / step:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
