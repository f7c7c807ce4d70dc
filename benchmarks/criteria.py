"""Cost of scoring per method of conf/method: full-size GFL, 32 images of 416x1344.

    python benchmarks/criteria.py [--images 32] [--batch 1] [--methods ldt chip]

Seconds and peak memory of one scoring, beside one forward and backward of the detection loss over
the same images; then CHIP's channel independence from one eigendecomposition beside one SVD per
channel. Peak memory is the whole process's (the device's on CUDA) and grows with the batch; freed
maps are given back to the system at once, so that none of it is what an earlier method has used.
"""

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from ldt_overhead import HEIGHT, WIDTH, batch

from ldt.config import register
from ldt.criteria.base import score_groups
from ldt.criteria.chip import channel_independence
from ldt.detectors.adapter import PreparedBatch
from ldt.detectors.forward import eval_with_gradients
from ldt.detectors.models import model_config, quiet
from ldt.module import DetectorModule

CONF = Path(__file__).parents[1] / "conf"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Batches:
    """The same random images at every pass."""

    def __init__(self, module: DetectorModule, images: int, size: int) -> None:
        self.module, self.images, self.size = module, images, size

    def __iter__(self) -> Iterator[PreparedBatch]:
        torch.manual_seed(0)
        for _ in range(self.images // self.size):
            yield self.module.adapter.prepare(batch(self.size), training=True)


def give_back() -> None:
    """Let glibc return freed blocks of a MiB and more, which it else keeps for later."""
    if sys.platform == "linux":
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        for threshold in (trim, mmap):
            ctypes.CDLL(None).mallopt(threshold, 2**20)


def peak() -> float:
    """Peak resident memory of the process since the last reset, in GiB."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**20


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and GiB at the peak (nan where that is not known)."""
    gc.collect()
    linux = CLEAR.exists()
    if linux:
        CLEAR.write_text("5")  # resets the peak
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    if torch.cuda.is_available():
        return seconds, torch.cuda.max_memory_allocated() / 2**30
    return seconds, peak() if linux else float("nan")


def methods() -> list[str]:
    """Every method whose criterion scores a detector in one go."""
    known = {file.stem: yaml.safe_load(file.read_text()) for file in CONF.glob("method/*.yaml")}
    return sorted(name for name, own in known.items() if own.get("criterion"))


def forward_backward(module: DetectorModule, batches: Batches) -> None:
    for ready in batches:
        module.adapter.detection_loss(ready).backward()
    module.zero_grad(set_to_none=True)


def singular_values_per_channel(x: torch.Tensor) -> torch.Tensor:
    whole = torch.linalg.svdvals(x).sum()
    found = []
    for c in range(len(x)):
        without = x.clone()
        without[c] = 0
        found.append(whole - torch.linalg.svdvals(without).sum())
    return torch.stack(found)


def chip_against_svd() -> None:
    x = torch.randn(256, 26 * 84, dtype=torch.double).relu()  # GFL's stride 16
    start = time.perf_counter()
    slow = singular_values_per_channel(x)
    middle = time.perf_counter()
    fast, _ = channel_independence(x)
    end = time.perf_counter()
    same = slow.argsort().tolist() == fast.argsort().tolist()
    print(
        f"CHIP at C = 256: {middle - start:.2f} s with an SVD per channel, {end - middle:.3f} s "
        f"with one eigendecomposition: {(middle - start) / (end - middle):.0f} times faster, "
        f"largest relative difference {float(((fast - slow) / slow).abs().max()):.0e}, "
        f"{'the same' if same else 'another'} ranking"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--methods", nargs="*", default=methods())
    options = parser.parse_args()
    if options.batch < 1 or options.images < 1 or options.images % options.batch:
        parser.error(f"--images {options.images} is not a multiple of --batch {options.batch}")
    quiet()
    give_back()
    torch.manual_seed(0)
    model = model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", {}, 3, pretrained=False)
    recipe = {"epochs": 1, "schedule": "constant"}
    module = DetectorModule(model, ["a", "b", "c"], recipe, (HEIGHT, WIDTH))
    batches = Batches(module, options.images, options.batch)
    register()
    with eval_with_gradients(module.detector), initialize_config_dir(str(CONF), version_base="1.3"):
        graph = module.adapter.trace(("backbone", "neck"))
        forward_backward(module, Batches(module, options.batch, options.batch))  # warm-up
        whole, memory = measured(lambda: forward_backward(module, batches))
        print(f"{options.images} images of {HEIGHT}x{WIDTH}, batches of {options.batch}")
        print(f"{'forward and backward':22s} {whole:8.1f} s          {memory:6.2f} GiB")
        for name in options.methods:
            chosen = compose("config", overrides=[f"method={name}"]).method
            criterion = instantiate(chosen.criterion)

            def score(criterion: Any = criterion) -> None:
                score_groups(criterion, module.adapter, graph, batches)

            seconds, memory = measured(score)
            ratio = f"x {seconds / whole:.2f}"
            print(f"{name:22s} {seconds:8.1f} s {ratio:>8s} {memory:6.2f} GiB", flush=True)
    chip_against_svd()


if __name__ == "__main__":
    main()
