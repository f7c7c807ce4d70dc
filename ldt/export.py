"""`python -m ldt.export` is `ldt export`; imported, this name is :func:`ldt.export`."""

import sys
from typing import Any

if __name__ == "__main__":
    from ldt.cli import main

    main(["export", *sys.argv[1:]])
else:
    from ldt.deployment.to_mmdet import export

    function: Any = export
    sys.modules[__name__] = function
