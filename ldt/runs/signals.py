"""Signals that stop a run as Ctrl-C does: SIGTERM and, within a SLURM job, SIGUSR1, which requeues.

``sbatch --signal=USR1@120`` sends SIGUSR1 two minutes before the time is over.
"""

import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

log = logging.getLogger(__name__)


@contextlib.contextmanager
def interrupting(requeues: bool = True) -> Iterator[None]:
    """Let the signals raise KeyboardInterrupt in the block; the outermost of several blocks counts.

    Args:
        requeues: put the SLURM job back into the queue after SIGUSR1; True for one of its
            processes.
    """
    stop = _Stop()
    numbers = [signal.SIGTERM, *[signal.SIGUSR1] * ("SLURM_JOB_ID" in os.environ)]
    inner = isinstance(signal.getsignal(signal.SIGTERM), _Stop)
    if inner or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with handling(numbers, stop):
            yield
    finally:
        if stop.received == signal.SIGUSR1 and requeues:
            _requeue()


@contextlib.contextmanager
def handling(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle signals in the block, and as before after it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class _Stop:
    """Handler that raises once, in the process that registered it and not in those it forks."""

    def __init__(self) -> None:
        self.process, self.received = os.getpid(), 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker that loads images
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.received:  # a second one would disturb the shutdown
            self.received = number
            raise KeyboardInterrupt


def _requeue() -> None:
    """Put the SLURM job of this process back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        log.warning("SLURM job %s cannot be requeued (%s); submit it again to go on", job, reason)
    else:
        log.info("SLURM job %s is requeued; it goes on from the last finished epoch", job)
