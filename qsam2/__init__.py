"""qsam2: quantization of Segment Anything Model 2, by training (QAT) and after it (PTQ)."""

__version__ = "0.1.0"
