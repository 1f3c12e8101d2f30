"""J&F, fidelity, and bootstrap intervals of differences."""
