"""`python -m ldt.predict` is `ldt predict`; imported, this name is :func:`ldt.predict`."""

import sys
from typing import Any

if __name__ == "__main__":
    from ldt.cli import main

    main(["predict", *sys.argv[1:]])
else:
    from ldt.deployment.prediction import predict

    function: Any = predict
    sys.modules[__name__] = function
