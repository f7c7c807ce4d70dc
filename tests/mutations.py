"""Mutated records of a checkpoint are opened, and what opening them does is watched.

    python tests/mutations.py --number 10000 [--seed 0]

Prints how many were refused, opened, ended otherwise than with one line, or did what is forbidden:
ran code of no installed package, connected, started a process, or wrote a file elsewhere.
"""

import argparse
import contextlib
import copy
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS, TASK_UTILS
from pruned_files import data_of, pruned_checkpoint

import ldt
from ldt.deployment.prediction import Predictor
from ldt.detectors.models import use_mmdet

INSTALLED = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "<")
OURS = str(Path(ldt.__file__).parent)
PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request")
PATIENCE = 10  # seconds of CPU time
CALL = {"type": "subprocess.run", "args": ["touch", "trap"]}
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**40, 1e300, float("nan"), "", "x", "../x", "http://localhost/x.pth"),
    *("subprocess.run", "os.system", "mmdet.ResNet", "mmpretrain.ConvNeXt", "ResNet"),
    *("a\nb", "{{x}}"),
    *([], {}, CALL, [CALL], {"type": "Pretrained", "checkpoint": "http://localhost/x.pth"}),
    *({"imports": ["trap"]}, {"imports": "trap", "allow_failed_imports": True}),
    *("__import__('os').system('touch trap')", "mmdet::gfl/gfl_r50_fpn_1x_coco.py", "x" * 2000),
    *(0.5, 2**16, 10**400, float("inf"), b"x", torch.zeros(1), {1: 2}, {"type": None}),
)
TENSORS = (  # for a weight
    lambda own: own.flatten()[:1],
    lambda own: own[None],
    lambda own: own.int(),
    lambda own: own.to("meta"),
    lambda own: torch.zeros(1).expand(10**6, 10**6),
    lambda own: None,
)
KEYS = (
    *("type", "init_cfg", "pretrained", "teacher_ckpt", "teacher_config", "custom_imports"),
    *("_delete_", "_base_", "_scope_", "plugins", "checkpoint", "norm_cfg"),
    *("a': 1, 'b", "x.y", "{{"),
)


class Watch:
    """Note forbidden events of the interpreter within :meth:`watching`; hooks cannot be removed."""

    def __init__(self, folder: Path) -> None:
        self.on, self.seen, self._folder = False, [], str(folder)
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Collect the events of the block."""
        self.on, self.seen = True, []
        try:
            yield self.seen
        finally:
            self.on = False

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in (*PROCESSES, *CONNECTIONS):
            self.seen.append(f"{event} {given}")
        elif event == "exec" and not given[0].co_filename.startswith((*INSTALLED, OURS)):
            self.seen.append(f"exec {given[0].co_filename}")
        elif event == "open" and isinstance(given[2], int):
            writes = given[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and not str(given[0]).startswith(self._folder):
                self.seen.append(f"write {given[0]}")


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in plain data, with each of its keys or indices."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def mutated(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy of a record in which one to three things are replaced, added, removed or repeated."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        found = list(places(record))
        if not found:
            break
        node, key = rng.choice(found)
        kinds = [{"type": rng.choice([*MODELS.module_dict, *TASK_UTILS.module_dict])}] * 8
        value = copy.deepcopy(rng.choice([*VALUES, *kinds, rng.choice(found)[0]]))
        if rng.random() < 0.4 and isinstance(node, dict):
            node[rng.choice(KEYS)] = value
        elif rng.random() < 0.2:
            del node[key]
        else:
            node[key] = value
    return record


def hostile(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of a record, in each of which one thing that is built by its type is a command."""
    for number, (node, key) in enumerate(places(record)):
        if isinstance(node[key], dict) and "type" in node[key]:
            changed = copy.deepcopy(record)
            node, key = list(places(changed))[number]
            node[key] = copy.deepcopy(CALL)
            yield changed


def opened(file: Path) -> str:
    """Open a checkpoint in the three ways there are; return how that ended."""
    try:
        ldt.load_pruned(file)
        Predictor(file)
        ldt.export(file, file.parent / "exported")
        return "opened"
    except (ValueError, ImportError) as error:
        return "refused" if "\n" not in str(error) else f"lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def outcomes(checkpoint: Path, number: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Open so many mutated checkpoints; count how they ended, and list what was forbidden."""
    rng, content = random.Random(seed), torch.load(checkpoint, weights_only=True)

    def mutations() -> Iterator[dict[str, Any]]:
        for _ in range(number):
            state, record = dict(content["state_dict"]), mutated(content["ldt"], rng)
            if rng.random() < 0.1:
                key, change = rng.choice([*state]), rng.choice(TENSORS)
                state[key] = change(state[key])
            yield {"state_dict": state, "ldt": record}

    return watched(content, mutations())


def watched(
    content: dict[str, Any], changed: Iterable[dict[str, Any]]
) -> tuple[Counter[str], list[str]]:
    """Open a checkpoint and changed ones; count how these ended, and list what was forbidden."""
    use_mmdet()
    counts: Counter[str] = Counter()
    escapes: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        file, watch = Path(name) / "round-1.ckpt", Watch(Path(name))
        torch.save(content, file)
        assert opened(file) == "opened"  # what is imported then is imported
        for other in changed:
            torch.save(other, file)
            with watch.watching() as seen:
                begun = time.process_time()
                counts[opened(file)] += 1
            if time.process_time() - begun > PATIENCE:
                counts[f"slower than {PATIENCE} s"] += 1
            escapes += [f"{event}: {other['ldt']}"[:2000] for event in seen]
    return counts, escapes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        benign = pruned_checkpoint(Path(name) / "a.ckpt", data_of(Path(name)), "detector=gfl_tiny")
        counts, escapes = outcomes(benign, given.number, given.seed)
    for end, count in counts.most_common():
        print(f"{count:7d}  {end}")
    print(f"{len(escapes)} escapes", *escapes[:20], sep="\n")


if __name__ == "__main__":
    main()
