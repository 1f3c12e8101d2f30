"""Footage without masks: a picture, a folder of frames, a video file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np

from qsam2.data.pictures import list_pictures, picture_size, read_frame
from qsam2.data.video import Video
from qsam2.errors import UserError

_READ_ON = 48  # frames; for a target further on, seeking beats decoding what lies between


class Picture(Video):
    """A picture file as a video of one frame.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.name, self.frame_names = path, path.stem, [path.stem]

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return picture_size(self._path)

    def frame(self, index: int) -> np.ndarray:
        return read_frame(self._path, self.size)

    def masks(self, index: int) -> None:
        return None


class FrameFolder(Video):
    """The pictures of a folder, in the order of their numbers.

    Raises:
        UserError: there are none, or two of one name; on reading, one is damaged or of another size than the first.
    """

    def __init__(self, folder: str | Path) -> None:
        self._paths = list_pictures(Path(folder))
        if not self._paths:
            raise UserError(f"{folder}: holds no frames (.jpg or .png); each video needs a folder of them")
        self.name = Path(folder).name
        self.frame_names = [path.stem for path in self._paths]
        if twice := [name for name, count in Counter(self.frame_names).items() if count > 1]:
            raise UserError(f"{folder}: holds two pictures named {twice[0]}; a folder of frames has one file a frame")

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return picture_size(self._paths[0])

    def frame(self, index: int) -> np.ndarray:
        return read_frame(self._paths[index], self.size)

    def masks(self, index: int) -> None:
        return None


@dataclass(frozen=True)
class _Index:
    """Index of a video file: times of the frames, (shown, decoded) times of the key frames, (height, width), rate."""

    stamps: list[int]
    keys: list[tuple[int, int]]
    size: tuple[int, int]
    rate: Fraction | None


class VideoFile(Video):
    """The first video stream of a file that PyAV can decode, without masks; any frame can be asked for.

    Raises:
        UserError: the file cannot be opened or decoded, ends early, or holds no video.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        """On average; None where the file does not say."""
        return self._index.rate

    def frame(self, index: int) -> np.ndarray:
        target = self._index.stamps[index]
        try:
            if self._process != os.getpid() or not self._next <= index <= self._next + _READ_ON:
                self._decoder = self._decode_from(target)
            self._process = os.getpid()
            for frame in self._decoder:  # type: ignore[union-attr]
                if frame.pts == target:
                    self._next = index + 1
                    return self._checked(frame, index)
        except (av.FFmpegError, OSError) as error:
            raise self._damaged(error) from error
        raise UserError(f"{self.path}: frame {index} cannot be decoded; fetch the file again or re-encode it")

    def masks(self, index: int) -> None:
        return None

    def _decode_from(self, pts: int) -> Iterator[av.VideoFrame]:
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # a decoder's threads do not survive the fork of a loader worker
            # the key frame shown at or before, by its decoding time: a seek to `pts` may land behind it
            container.seek(max(key for key in self._index.keys if key[0] <= pts)[1], stream=stream)
            yield from container.decode(stream)

    def _checked(self, frame: av.VideoFrame, index: int) -> np.ndarray:
        if frame.is_corrupt:
            raise UserError(f"{self.path}: frame {index} is damaged; fetch the file again")
        picture = frame.to_ndarray(format="rgb24")
        if picture.shape[:2] != self.size:
            raise UserError(f"{self.path}: frame {index} is {picture.shape[:2]}, but the video is {self.size}")
        return picture

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: cannot be read as a video ({error}); fetch it again or re-encode it as mp4")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoder": None, "_process": 0}


def open_video(path: str | Path) -> Video:
    """A folder of frames, in the order of their numbers, or a video file; frames are read when they are asked for.

    Raises:
        UserError: there is no such path, or no video there.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a picture, a folder of frames or a video file")
    return VideoFile(path)
