"""Before any test is collected: mmcv's operators; `tests/` and `experiments/` to import from."""

import sys
from pathlib import Path

import ldt  # noqa: F401  (mmdet imports only once mmcv's operators are in place)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "experiments")]
