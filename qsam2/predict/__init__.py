"""Prompts and a picture or a video in, masks and an overlay out."""
