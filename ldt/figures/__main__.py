"""`python -m ldt.figures` is `ldt figures`."""

import sys

from ldt.cli import main

if __name__ == "__main__":
    main(["figures", *sys.argv[1:]])
