"""Entry point of `python -m ldt.report`, the same as `ldt report`."""

import sys

from ldt.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
