"""J&F, fidelity, and intervals of differences."""
