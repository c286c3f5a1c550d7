"""`python -m kdecore` is the command `kdecore`."""

import sys

from kdecore.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
