"""The one exception for what a user can put right, and how its messages show a user's value."""

from __future__ import annotations

import re
import reprlib

SHOWN = 200
"""Characters of a user's value that a message shows."""
LONGEST = 2000
"""Characters of a whole message."""

NOT_THIS_JSON = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors of reading JSON that is damaged or of another shape."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 4, 20, 20, 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = SHOWN


class UserError(Exception):
    """A mistake in what the user gave: a recipe, a file, data.

    Its message is one line: what was given, what is allowed, what to do. The command line prints it without a traceback
    and exits with status 2. Long words are shortened and control characters escaped: both come from users' files.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
        line = re.sub(rf"\S{{{SHOWN + 56},}}", lambda word: shortened(word[0]), line)  # longer than a file's name
        super().__init__(shortened(line, LONGEST))


def shortened(text: str, length: int = SHOWN) -> str:
    """A text without its middle if it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[3 - length // 2 :]}"


def short(value: object) -> str:
    """A value's text in one line, shortened; of an error without text the name of its type."""
    return shortened(" ".join(str(value).split()) or (type(value).__name__ if isinstance(value, Exception) else ""))


def shown(value: object) -> str:
    """A value as a message shows it: its repr, shortened."""
    try:
        return shortened(_REPR.repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
