"""Runs the configuration of an earlier run again, in a folder of its own.

python -m ldt.repeat runs/default/<run> runs/again/<run>
"""

import argparse
from pathlib import Path

from ldt.experiment import run
from ldt.runs import load_config


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of the run to repeat")
    parser.add_argument("folder", type=Path, help="directory for the repetition")
    given = parser.parse_args()
    run(load_config(given.run), given.folder)


if __name__ == "__main__":
    main()
