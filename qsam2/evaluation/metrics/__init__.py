"""J&F, mask IoU, bootstrap intervals, and scores of masks on disk."""
