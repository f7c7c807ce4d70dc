"""Entry point of `python -m ldt.cli`, the same as `ldt`."""

from ldt.cli import main

if __name__ == "__main__":
    main()
