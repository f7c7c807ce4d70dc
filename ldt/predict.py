"""`python -m ldt.predict`: see :mod:`ldt.deployment.prediction`."""

from ldt.deployment.prediction import main

if __name__ == "__main__":
    main()
