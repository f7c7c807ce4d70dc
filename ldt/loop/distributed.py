"""DDP helper: check that all ranks pruned the same channels."""

import hashlib
import json
from typing import Any

import lightning as L
import torch

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
