"""`python -m bench.experiments`."""

import sys

from bench.experiments.command import main

if __name__ == "__main__":
    sys.exit(main())
