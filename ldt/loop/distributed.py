"""DDP helper: check that all ranks pruned the same channels."""

import hashlib
import json
from typing import cast

import lightning as L
import torch

from ldt.loop.round_record import RoundRecord


def check_same_channels(trainer: L.Trainer, record: RoundRecord) -> None:
    """Raise RuntimeError unless all ranks have removed the same channels."""
    text = json.dumps({name: kept.tolist() for name, kept in sorted(record.kept.items())})
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    own = torch.tensor(digest, device=trainer.strategy.root_device)
    digests = cast(torch.Tensor, trainer.strategy.all_gather(own))
    if bool((digests != digest).any()):
        raise RuntimeError(
            f"rank {trainer.global_rank} removed other channels than the other ranks: their "
            "detectors differ, so training cannot continue"
        )
