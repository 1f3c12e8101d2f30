"""SAM2: sizes, checkpoints, and nano, whose weights ship in the package."""

from qsam2.models.checkpoints import load_sam2
from qsam2.models.sam2 import SAM2, SIZES, build_sam2

__all__ = ["SAM2", "SIZES", "build_sam2", "load_sam2"]
