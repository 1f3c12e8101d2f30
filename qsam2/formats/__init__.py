"""Models that leave the lab: packed weights, float weights, the quantization card."""
