"""Figures of plain data, drawn by matplotlib without a window.

The command `ldt figures` makes that data from the directories of runs.
"""

NAMES = (  # of the figures that the command draws
    "curves", "discriminants", "attention", "detections", "stability", "channels", "shrinking",
    "results", "precision_recall", "class_ap", "confusion",
)  # fmt: skip
