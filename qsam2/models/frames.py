"""Frames for the video predictor, from a sequence or a stream, their shapes checked on access."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from torch import Tensor

from qsam2.errors import UserError

UNKNOWN_LENGTH = 2**31
"""Reported length of a stream, longer than any video."""


class EndOfStream(UserError):
    """Raised on access past the last frame of a stream; tracking ends there."""


class CheckedFrames:
    """A sequence of normalized frames, each float (3, image_size, image_size), read on access."""

    def __init__(self, frames: Sequence[Tensor], image_size: int) -> None:
        self.frames, self.image_size = frames, image_size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        return checked(self.frames[index], index, self.image_size)


class FrameStream:
    """An iterator of normalized frames, of unknown length; the last `window` frames stay accessible."""

    def __init__(self, frames: Iterable[Tensor], image_size: int, window: int) -> None:
        self.frames, self.image_size, self.window = iter(frames), image_size, window
        self.recent: dict[int, Tensor] = {}
        self.count = 0

    def __len__(self) -> int:
        return UNKNOWN_LENGTH

    def __getitem__(self, index: int) -> Tensor:
        while index >= self.count:
            try:
                frame = next(self.frames)
            except StopIteration:
                raise EndOfStream(f"frame {index} is past the end: the stream has {self.count} frames") from None
            self.recent[self.count] = checked(frame, self.count, self.image_size)
            self.recent.pop(self.count - self.window, None)
            self.count += 1
        if index not in self.recent:
            raise UserError(
                f"frame {index} of the stream has passed, {min(self.recent)} to {max(self.recent)} are kept: "
                "prompt and track frames in their order, or give the video as a sequence"
            )
        return self.recent[index]


def checked_number(number: int, length: int) -> int:
    """Return the number of a frame as an int; raises UserError if a video of this length has none of that number."""
    try:
        index = operator.index(number)
    except TypeError:
        index = -1
    if not 0 <= index < length:
        last = "on, as it is a stream" if length == UNKNOWN_LENGTH else f"to {length - 1}"
        raise UserError(f"frame {number!r}: the video has frames 0 {last}")
    return index


def checked(frame: Tensor, index: int, image_size: int) -> Tensor:
    """Return the frame; raises UserError if it is not (3, image_size, image_size)."""
    if tuple(frame.shape) != (3, image_size, image_size):
        raise UserError(
            f"frame {index} of the video is {tuple(frame.shape)}, but this model's frames are "
            f"{(3, image_size, image_size)}: resize all frames alike"
        )
    return frame
