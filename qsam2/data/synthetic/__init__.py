"""Generated videos, and clips made from stills."""
