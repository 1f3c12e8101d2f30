"""Sweeps: many runs of one recipe, drawn from a file in Weights & Biases' own format."""
