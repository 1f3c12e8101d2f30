"""What people look at: overlays of masks, the page of a run, Weights & Biases."""
