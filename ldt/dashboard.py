"""`python -m ldt.dashboard` is `ldt dashboard`."""

import sys

from ldt.cli import main

if __name__ == "__main__":
    main(["dashboard", *sys.argv[1:]])
