"""Nothing piles up over the rounds of a run."""

import gc
from pathlib import Path

import pytest
import torch
from short_runs import rows, tiny

from ldt import experiment
from ldt.loop.prune_retrain import PruneRetrain

ROUNDS = 6
STATUS = Path("/proc/self/status")


def resident():
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024  # MiB


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
@pytest.mark.filterwarnings("ignore")
def test_memory_does_not_grow_over_six_rounds(tmp_path, monkeypatch):
    held = []
    plain = PruneRetrain._finish_round

    def finish(self, trainer, module):
        plain(self, trainer, module)
        gc.collect()
        tensors = [item for item in gc.get_objects() if torch.is_tensor(item)]
        held.append((len(tensors), sum(t.numel() for t in tensors), resident()))

    monkeypatch.setattr(PruneRetrain, "_finish_round", finish)
    more = ["detector=yolox_nano", "ldt.memory=2", "ldt.warmup_epochs=0", "recipe.ema=0.01"]
    experiment.run(tiny(tmp_path, f"prune.rounds={ROUNDS}", *more), tmp_path / "run")
    assert len(rows(tmp_path / "run")) == ROUNDS + 1
    counts, sizes, memory = zip(*held[1:], strict=True)
    assert max(counts) <= counts[0] + 20  # a leak of a round's tensors would be hundreds
    assert list(sizes) == sorted(sizes, reverse=True)  # the detector shrinks, and so does all else
    assert memory[-1] - memory[1] < 60
