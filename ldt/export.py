"""`python -m ldt.export` is `ldt export`; imported, this name is :func:`ldt.export`."""

import sys
from types import ModuleType
from typing import cast

if __name__ == "__main__":
    from ldt.cli import main

    main(["export", *sys.argv[1:]])
else:
    from ldt.deployment.to_mmdet import export

    sys.modules[__name__] = cast(ModuleType, export)
