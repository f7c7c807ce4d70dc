"""Runs: their directories, files, identity and studies."""

DONE = "finished"  # `status` in summary.json of a run with a result
DAMAGED = "damaged"  # state of a run whose results cannot be read
STATES = (DONE, "failed", DAMAGED, "unfinished")
