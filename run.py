"""Train, prune and retrain a detector: ``python run.py --help``. The same as ``ldt run``."""

from ldt.cli.hydra_app import main

if __name__ == "__main__":
    main()
