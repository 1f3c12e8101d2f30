"""Frames as the predictor asks for them: checked, from a sequence or a stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from qsam2.errors import UserError

UNKNOWN_LENGTH = 2**31
"""Number of frames of a stream: more than any has."""


class EndOfStream(UserError):
    """A frame past the last one of a stream was asked for; tracking ends there."""


class CheckedFrames:
    """A sequence of normalised frames, each float (3, image_size, image_size), read when they are asked for."""

    def __init__(self, frames: Sequence[Tensor], image_size: int) -> None:
        self.frames, self.image_size = frames, image_size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        return checked(self.frames[index], index, self.image_size)


class FrameStream:
    """An iterator of such frames, of unknown length; the last `window` frames can be asked for again."""

    def __init__(self, frames: Iterable[Tensor], image_size: int, window: int) -> None:
        self.frames, self.image_size, self.window = iter(frames), image_size, window
        self.kept: dict[int, Tensor] = {}
        self.count = 0

    def __len__(self) -> int:
        return UNKNOWN_LENGTH

    def __getitem__(self, index: int) -> Tensor:
        while index >= self.count:
            try:
                frame = next(self.frames)
            except StopIteration:
                raise EndOfStream(f"frame {index} is past the end: the stream has {self.count} frames") from None
            self.kept[self.count] = checked(frame, self.count, self.image_size)
            self.kept.pop(self.count - self.window, None)
            self.count += 1
        if index not in self.kept:
            raise UserError(
                f"frame {index} of the stream has passed, {min(self.kept)} to {max(self.kept)} are kept: "
                "prompt and track frames in their order, or give the video as a sequence"
            )
        return self.kept[index]


def checked(frame: Tensor, index: int, image_size: int) -> Tensor:
    """The frame; raises UserError where its shape is not the model's."""
    if tuple(frame.shape) != (3, image_size, image_size):
        raise UserError(
            f"frame {index} of the video is {tuple(frame.shape)}, but this model's frames are "
            f"{(3, image_size, image_size)}: resize all frames alike"
        )
    return frame
