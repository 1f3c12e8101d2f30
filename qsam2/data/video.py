"""The one type that every data source gives, and footage without masks: a picture, a folder of frames, a video file."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import av
import numpy as np

from qsam2.data.pictures import list_pictures, picture_size, read_frame
from qsam2.errors import UserError

Masks: TypeAlias = dict[int, np.ndarray]
"""{object id > 0: bool (H, W)}"""
Predictions = dict[tuple[str, int], np.ndarray]
"""Tracked masks by (video, object id), packed eight pixels a byte: a few MB for a video instead of a hundred."""
_READ_ON = 48  # frames; for a target further on, seeking beats decoding what lies between


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
    """The pictures of a folder, in the order of their numbers; a UserError if there are none or two of one name."""

    def __init__(self, folder: Path) -> None:
        self._paths = list_pictures(folder)
        if not self._paths:
            raise UserError(f"{folder}: holds no frames (.jpg, .png, ...); each video needs a folder of them")
        self.name = folder.name
        self.frame_names = [path.stem for path in self._paths]
        if twice := [name for name, count in Counter(self.frame_names).items() if count > 1]:
            raise UserError(f"{folder}: holds two pictures named {twice[0]}; a folder of frames has one file a frame")

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return picture_size(self._paths[0])

    def frame(self, index: int) -> np.ndarray:
        return read_frame(self._paths[index], self.size)


class _Index(NamedTuple):
    stamps: list[int]  # times of the frames
    keys: list[tuple[int, int]]  # times at which the key frames are shown and decoded
    size: tuple[int, int]  # (height, width)
    rate: Fraction | None  # frames per second on average; None where the file does not say


class VideoFile(Video):
    """The first video stream of a file that PyAV can decode, without masks; any frame can be asked for.

    Raises UserError on reading if the file cannot be opened or decoded, ends early, or holds no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = self.path.stem
        self._decoder: Iterator[av.VideoFrame] | None = None
        self._process = 0  # whose decoder it is: a forked worker must not share the file position
        self._next = 0

    @cached_property
    def _index(self) -> _Index:
        """From the packets, without decoding them."""
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise UserError(f"{self.path}: holds no video stream; give a video file such as an mp4")
                stream = container.streams.video[0]
                declared, size, rate = stream.frames, (stream.height, stream.width), stream.average_rate
                packets = [packet for packet in container.demux(stream) if packet.size]
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(error) from error
        if len(packets) < max(declared, 1):
            raise UserError(f"{self.path}: holds {len(packets)} of {declared} frames, it was cut short; fetch it again")
        times = [(p.pts, p.dts, p) for p in packets if p.pts is not None and p.dts is not None]
        if len(times) < len(packets):
            raise UserError(f"{self.path}: has frames without a time stamp; re-encode it as mp4")
        stamps = sorted(pts for pts, _, packet in times if not packet.is_discard)
        return _Index(stamps, sorted((pts, dts) for pts, dts, packet in times if packet.is_keyframe), size, rate)

    @cached_property
    def frame_names(self) -> list[str]:  # type: ignore[override]
        return [f"{i:05d}" for i in range(len(self._index.stamps))]

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self._index.size

    @property
    def frames_per_second(self) -> Fraction | None:
        """The average; None where the file does not say."""
        return self._index.rate

    def frame(self, index: int) -> np.ndarray:
        target = self._index.stamps[index]
        try:
            if self._process != os.getpid() or not self._next <= index <= self._next + _READ_ON:
                self._decoder = self._decode_from(target)
            self._process = os.getpid()
            frame = next((frame for frame in self._decoder if frame.pts == target), None)  # type: ignore[union-attr]
            if frame is None:
                raise UserError(f"{self.path}: frame {index} cannot be decoded; fetch the file again or re-encode it")
            self._next = index + 1
            if frame.is_corrupt:
                raise UserError(f"{self.path}: frame {index} is damaged; fetch the file again")
            picture = frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(error) from error
        if picture.shape[:2] != self.size:
            raise UserError(f"{self.path}: frame {index} is {picture.shape[:2]}, but the video is {self.size}")
        return picture

    def _decode_from(self, pts: int) -> Iterator[av.VideoFrame]:
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # a decoder's threads do not survive the fork of a loader worker
            # the key frame shown at or before, by its decoding time: a seek to `pts` may land behind it
            container.seek(max(key for key in self._index.keys if key[0] <= pts)[1], stream=stream)
            yield from container.decode(stream)

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: cannot be read as a video ({error}); fetch it again or re-encode it as mp4")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoder": None, "_process": 0}


def open_video(path: str | Path) -> Video:
    """A folder of frames or a video file; frames are read when they are asked for. A UserError if it is neither."""
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a picture, a folder of frames or a video file")
    return VideoFile(path)
