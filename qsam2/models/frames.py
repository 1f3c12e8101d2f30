"""Frames as the predictor asks for them: checked, from a sequence, a folder of JPEG files or a stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from sam2.utils.misc import _load_img_as_tensor
from torch import Tensor

from qsam2.errors import UserError

UNKNOWN_LENGTH = 2**31
"""Number of frames of a stream: more than any has."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EndOfStream(UserError):
    """A frame past the last one of a stream was asked for; tracking ends there."""


class CheckedFrames:
    """A sequence of normalised frames, each float (3, image_size, image_size), read when they are asked for."""

    def __init__(self, frames: Sequence[Tensor] | JpegFolder, image_size: int) -> None:
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


class JpegFolder:
    """`sam2`'s folder of JPEG files named by their numbers, read when they are asked for.

    Attributes:
        size: (height, width) in pixels of the first frame.
    """

    def __init__(self, folder: str | Path, image_size: int) -> None:
        files = [file for file in Path(folder).iterdir() if file.suffix.lower() in (".jpg", ".jpeg")]
        if not files:
            raise UserError(f"{folder}: no JPEG files, give a folder with frames called 00000.jpg, 00001.jpg, ...")
        self.files, self.image_size = sorted(files, key=lambda file: int(file.stem)), image_size
        self.size = self._read(0)[1]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        frame, size = self._read(index)
        if size != self.size:
            raise UserError(f"{self.files[index]} is {size} pixels, the first frame {self.size}: make them the same")
        return (frame - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def _read(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        frame, height, width = _load_img_as_tensor(str(self.files[index]), self.image_size)
        return frame.float(), (height, width)


def checked(frame: Tensor, index: int, image_size: int) -> Tensor:
    """The frame; raises UserError where its shape is not the model's."""
    if tuple(frame.shape) != (3, image_size, image_size):
        raise UserError(
            f"frame {index} of the video is {tuple(frame.shape)}, but this model's frames are "
            f"{(3, image_size, image_size)}: resize all frames alike"
        )
    return frame
