"""`KIND[:ROOT[:SPLIT]]`, the form in which recipes and the command line name data."""

from __future__ import annotations

import os


def parts_of(spec: str) -> tuple[str, str, str]:
    """Kind, root and split of a source, "" for what it leaves out. The name of a root that exists may hold colons."""
    kind, _, rest = spec.partition(":")
    if os.path.exists(rest):
        return kind, rest, ""
    root, colon, split = rest.rpartition(":")
    return (kind, root, split) if colon else (kind, rest, "")
