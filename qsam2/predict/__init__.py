"""`qsam2 predict`: masks and overlays of prompted objects in a picture or a video."""
