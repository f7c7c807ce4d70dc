"""`python -m ldt.predict` is `ldt predict`; imported, this name is :func:`ldt.predict`."""

import sys
from types import ModuleType
from typing import cast

if __name__ == "__main__":
    from ldt.cli import main

    main(["predict", *sys.argv[1:]])
else:
    from ldt.deployment.prediction import predict

    sys.modules[__name__] = cast(ModuleType, predict)
