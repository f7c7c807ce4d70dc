"""Before any test is collected: mmcv's operators; `tests/` and `experiments/` to import from.

Tests run in several processes, one thread each, files as a whole; `-n 0` keeps them in one.
"""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import ldt  # noqa: F401  (mmdet imports only once mmcv's operators are in place)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "experiments")]
