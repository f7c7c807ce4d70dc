"""What several processes owe each other when a network changes its shape."""

import gc
import hashlib
import json
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from ldt.loop.round_record import RoundRecord


def check_same_channels(trainer: L.Trainer, removed: RoundRecord) -> None:
    """RuntimeError unless every process has removed the same channels."""
    text = json.dumps({name: left.tolist() for name, left in sorted(removed.left.items())})
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    device = trainer.strategy.root_device
    found: Any = trainer.strategy.all_gather(torch.tensor(digest, device=device))
    if bool((found != digest).any()):
        raise RuntimeError(
            f"process {trainer.global_rank} removed other channels than the others: the processes' "
            "detectors had drifted apart, and training on would be meaningless"
        )


def rewrap_ddp(trainer: L.Trainer) -> None:
    """Let DDP forget the parameters it was made with: its buckets hold on to their shapes."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
        gc.collect()  # the old wrapper's hooks fire until it is gone, and it is part of cycles
        strategy.configure_ddp()
