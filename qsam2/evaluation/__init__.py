"""Scoring of tracking and of stills."""
