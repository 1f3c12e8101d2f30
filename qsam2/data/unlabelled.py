"""Pictures and videos without masks, as sources: `images:FOLDER` and `video:FILE_OR_FOLDER`.

Their masks are a float model's own (`qsam2.evaluation.own_masks`): they serve calibration and fidelity, never J&F.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from qsam2.data.pictures import OTHER_SUFFIXES, PICTURE_SUFFIXES, list_files, list_pictures, subfolders
from qsam2.data.video import FrameFolder, Masks, Picture, Video
from qsam2.data.video_file import VideoFile
from qsam2.errors import UserError

_log = logging.getLogger(__name__)
UNLABELLED = ("images", "video")
"""Kinds of sources without masks."""
GRID = 8
"""Clicks per side of a picture that are tried."""
OWN_MASKS = f"the float model's own masks from a grid of {GRID}x{GRID} clicks"
"""Source of the prompts, as scores and cards state it."""
SPLITS = ("train", "val", "all")
VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".m2ts", ".3gp", ".flv",
    ".ogv",
)  # fmt: skip
PIECE_FRAMES = 64
"""Longest piece of a video: each piece is prompted anew."""
UNCUT_FRAMES = 16
"""Videos of fewer frames are not cut, longer ones into two pieces or more."""
HELD_OUT = 5
"""Every fifth picture or piece is in the val split, beginning with the first; the others are in the train split."""


class Labeller(Protocol):
    """Makes masks of footage that has none."""

    def first(self, video: Video) -> Masks:
        """Masks of the first frame."""

    def tracked(self, video: Video) -> list[Masks]:
        """Masks of the first frame, tracked through all frames."""


class Unlabelled(Video):
    """Frames of footage without masks. Once it has a `labeller`, its first frame is annotated, the others are not."""

    def __init__(self, footage: Video, frames: Sequence[int] | None = None, *, name: str | None = None) -> None:
        self._footage = footage
        self._frames = range(len(footage)) if frames is None else frames
        self._masks: dict[int, Masks] = {}
        self.name = name or footage.name
        self.frame_names = [footage.frame_names[index] for index in self._frames]
        self.labeller: Labeller | None = None

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self._footage.size

    def frame(self, index: int) -> np.ndarray:
        return self._footage.frame(self._frames[index])

    def masks(self, index: int) -> Masks | None:
        """The labeller's masks. Raises UserError if there is no labeller."""
        if index == 0 and 0 not in self._masks:
            self._masks[0] = self._required_labeller().first(self)
        return self._masks.get(index)

    def clip(self, frames: Sequence[int]) -> Unlabelled:
        """These frames, in this order, all annotated: with masks made on the first and tracked through the others."""
        clip = Unlabelled(self._footage, [self._frames[index] for index in frames], name=self.name)
        clip._masks = dict(enumerate(self._required_labeller().tracked(clip)))
        return clip

    def _required_labeller(self) -> Labeller:
        if self.labeller is None:
            raise UserError(
                f"{self.name} has no masks: sources images: and video: are for calibration and for fidelity to a "
                "float model; give one with masks here, such as davis:FOLDER"
            )
        return self.labeller


def is_unlabelled(spec: str) -> bool:
    """True if `KIND[:ROOT[:SPLIT]]` names data without masks."""
    return spec.split(":")[0] in UNLABELLED


def has_masks(videos: Iterable[Video]) -> bool:
    """True if videos come with masks of their own."""
    return not any(isinstance(video, Unlabelled) for video in videos)


def picture_source(root: Path, split: str) -> list[Unlabelled]:
    """The pictures of a folder, or one picture. Raises UserError if there are none, or there is no such split."""
    paths = list_pictures(root) if root.is_dir() else [root]
    if root.is_dir() and (unread := list_files(root, OTHER_SUFFIXES)):
        _log.warning("%s: %d pictures are of formats that are not read (%s, ...)", root, len(unread), unread[0].name)
    if not paths:
        below = next((name for name in subfolders(root) if list_pictures(root / name)), None)
        hint = f"; {root / below} does: give images:{root / below}" if below else ""
        raise UserError(f"{root}: holds no pictures ({', '.join(PICTURE_SUFFIXES)}){hint}")
    return _of_split([Unlabelled(Picture(path), name=path.name) for path in paths], split)


def video_source(root: Path, split: str) -> list[Unlabelled]:
    """A video file, a folder of video files, a folder of frames, or a folder of such folders; cut into pieces.

    Raises UserError if there is no video, one cannot be read, or there is no such split.
    """
    return _of_split([piece for video in _videos(root) for piece in _pieces(video)], split)


def _videos(root: Path) -> list[Video]:
    files = [root] if root.is_file() else list_files(root, VIDEO_SUFFIXES)
    if files:
        films = [VideoFile(path) for path in files]
        count = Counter(film.name for film in films)
        for film in films:
            if count[film.name] > 1:
                film.name = film.path.name  # a.mp4 beside a.mov
        return [*films]
    if list_pictures(root):
        return [FrameFolder(root)]
    folders = [root / name for name in subfolders(root) if list_pictures(root / name)]
    if not folders:
        raise UserError(f"{root}: holds no video ({', '.join(VIDEO_SUFFIXES)}), no frames and no folders of frames")
    return [FrameFolder(folder) for folder in folders]


def _pieces(video: Video) -> list[Unlabelled]:
    """Equal pieces of a video, which are named by their first frames."""
    length = len(video)
    if length < UNCUT_FRAMES:
        return [Unlabelled(video)]
    count = max(2, -(-length // PIECE_FRAMES))
    edges = [length * piece // count for piece in range(count + 1)]
    return [
        Unlabelled(video, range(start, stop), name=f"{video.name}-{video.frame_names[start]}")
        for start, stop in pairwise(edges)
    ]


def _of_split(items: list[Unlabelled], split: str) -> list[Unlabelled]:
    """A split of pictures or pieces; of a single one all splits are the same."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} of data without masks is unknown: give {', '.join(SPLITS[:-1])} or all")
    if split == "all" or len(items) == 1:
        return items
    return [item for index, item in enumerate(items) if (index % HELD_OUT == 0) == (split == "val")]
