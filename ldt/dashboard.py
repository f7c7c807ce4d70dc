"""`python -m ldt.dashboard`: see :mod:`ldt.report.workspaces`."""

from ldt.report.workspaces import main

if __name__ == "__main__":
    main()
