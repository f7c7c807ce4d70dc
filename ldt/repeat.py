"""`python -m ldt.repeat` is `ldt repeat`."""

import sys

from ldt.cli import main

if __name__ == "__main__":
    main(["repeat", *sys.argv[1:]])
