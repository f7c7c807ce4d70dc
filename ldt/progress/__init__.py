"""Progress of a run: its steps, and how a terminal or a log shows them while it goes on.

The code of a run says where it is (:func:`begin`, :func:`advance`); without a display in progress
this does nothing.
"""

from ldt.progress.display import (
    advance,
    begin,
    current_steps,
    epoch_of,
    held,
    left,
    note,
    pause,
    running,
    say,
    show,
    status,
    track,
)

__all__ = [
    "advance",
    "begin",
    "current_steps",
    "epoch_of",
    "held",
    "left",
    "note",
    "pause",
    "running",
    "say",
    "show",
    "status",
    "track",
]
