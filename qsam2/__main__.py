"""`python -m qsam2`: the command line."""

import sys

from qsam2.cli import main

if __name__ == "__main__":
    sys.exit(main())
