"""Synthetic videos: generated moving objects, and clips made from annotated stills."""
