"""Before any test is collected: mmcv's operators, and `tests/` as a place to import from."""

import sys
from pathlib import Path

import ldt  # noqa: F401  (mmdet imports only once mmcv's operators are in place)

sys.path.insert(0, str(Path(__file__).parent))
