"""The one type that every data source gives, and footage without masks: a picture, a folder of frames."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np

from qsam2.data.pictures import OTHER_SUFFIXES, list_files, list_pictures, picture_size, read_frame
from qsam2.errors import UserError

_log = logging.getLogger(__name__)
Masks: TypeAlias = dict[int, np.ndarray]
"""{object id > 0: bool (H, W)}"""
Predictions = dict[tuple[str, int], np.ndarray]
"""Tracked masks by (video, object id), packed eight pixels a byte: a few MB for a video instead of a hundred."""


class Video(ABC):
    """A video with object masks; a still is a video of one frame. Frames and masks are read when asked for.

    A file that is damaged, or of another size than the first frame, is a UserError when it is read.
    """

    name: str  # unique within its dataset, used as the folder name of its predictions
    frame_names: list[str]  # one stem a frame, in order ("00000"): the name of the frame's mask file
    size: tuple[int, int]  # (height, width) in pixels, the same for all frames

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frame_names)

    @abstractmethod
    def frame(self, index: int) -> np.ndarray:
        """Frame ``index`` as RGB, uint8 (H, W, 3)."""

    def masks(self, index: int) -> Masks | None:
        """Masks of frame ``index``; objects out of view may be absent or all False.

        None where the frame is not annotated (SA-V annotates every fourth frame, YouTube-VOS every fifth).
        """
        return None


class Picture(Video):
    """A picture file as a video of one frame; ``read`` gives its masks for its (height, width)."""

    def __init__(self, path: Path, read: Callable[[tuple[int, int]], Masks] | None = None) -> None:
        self._path, self._read = path, read
        self.name, self.frame_names = path.stem, [path.stem]

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return picture_size(self._path)

    def frame(self, index: int) -> np.ndarray:
        return read_frame(self._path, self.size)

    def masks(self, index: int) -> Masks | None:
        return self._read(self.size) if self._read else None


class FrameFolder(Video):
    """The pictures of a folder, in the order of their numbers.

    Of frames with numbers and others, those with numbers are taken. Raises UserError if there are none, two of one name
    or some of a format that is not read.
    """

    def __init__(self, folder: Path) -> None:
        if unread := list_files(folder, OTHER_SUFFIXES):
            raise UserError(f"{unread[0]}: is of a format that is not read; write all frames as .jpg or .png")
        self._paths = list_pictures(folder)
        if not self._paths:
            raise UserError(f"{folder}: holds no frames (.jpg, .png, ...); each video needs a folder of them")
        if numbered := [path for path in self._paths if path.stem.isdecimal()]:
            if others := sorted(set(self._paths) - set(numbered)):
                _log.warning("%s: is no frame and left out, as others are numbered (%d such)", others[0], len(others))
            self._paths = numbered
        self.name = Path(os.path.abspath(folder)).name  # of `..`, too
        self.frame_names = [path.stem for path in self._paths]
        if twice := [name for name, count in Counter(self.frame_names).items() if count > 1]:
            raise UserError(f"{folder}: holds two pictures named {twice[0]}; a folder of frames has one file a frame")

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return picture_size(self._paths[0])

    def frame(self, index: int) -> np.ndarray:
        return read_frame(self._paths[index], self.size)
