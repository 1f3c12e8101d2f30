"""Carry out a recipe: `python train.py recipes/qat_w4a4.yaml [key=value ...]`. The same as `qsam2 train`."""

import sys

from qsam2.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
