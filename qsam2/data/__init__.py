"""Clips and stills: readers of public layouts, generated videos, augmentation, one Lightning data module."""
