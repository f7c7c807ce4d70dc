"""Figures from plain data: numpy and matplotlib only, and never a window."""
