"""`python -m ldt.export`: see :mod:`ldt.deployment.to_mmdet`."""

from ldt.deployment.to_mmdet import main

if __name__ == "__main__":
    main()
