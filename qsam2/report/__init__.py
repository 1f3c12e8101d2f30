"""Results for people: the page of a run, overlays of masks, Weights & Biases."""
