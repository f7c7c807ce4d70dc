"""Figures from plain data: numpy and matplotlib only, and never a window.

The command, ``python -m ldt.figures``, makes that data from the directories of runs.
"""
