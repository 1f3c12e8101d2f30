"""Video files, decoded by PyAV: any frame can be asked for, upright, the one that decoding from the start gives.

A frame is known by the number of the packet that holds it, since not every file has sound times: AVI has none for
B-frames, a raw stream has none at all, and those of joined transport streams begin anew.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import PictureType

from qsam2.data.pictures import MAX_PIXELS
from qsam2.data.video import FrameFolder, Video
from qsam2.errors import UserError, short

MAX_RATE = 1000
"""Frames per second; slowest, as many seconds per frame."""
_READ_ON = 48  # frames; for a target further on, seeking beats decoding what lies between
_COVER_ART = Disposition.attached_pic | Disposition.timed_thumbnails
_PICTURES = {"bmp", "mjpeg", "png", "tiff", "webp"}  # codecs of cover art that is not marked as such
_PLAYLISTS = {"concat", "dash", "hls", "imf", "rtsp", "sdp"}  # formats that name other files
_DEPENDENT = (PictureType.P, PictureType.B)
_FAILURES = (av.FFmpegError, OSError, ValueError)
_log = logging.getLogger(__name__)


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    position: int | None  # in the file, in bytes
    is_key: bool
    is_shown: bool


class _Key(NamedTuple):
    frame: int  # the first frame that can be decoded from here
    packet: int  # number of the key frame's packet
    time: int | None  # to seek


class _Index(NamedTuple):
    frames: list[int]  # numbers of the packets of the frames, in the order in which they are shown
    keys: list[_Key]
    numbers: dict[int | None, int]  # {position in the file: number of the packet}; empty if positions are not unique
    size: tuple[int, int]  # (height, width)
    rate: Fraction | None


class VideoFile(Video):
    """The first video stream of a file that PyAV can decode, cover art aside; it has no masks.

    Frames are turned as the file says (phones film sideways). Those before the first key frame, which cannot be
    decoded, are left out with a warning. A file without sound times is decoded as a whole when it is opened.

    Raises UserError on reading if the file cannot be opened or decoded, holds fewer frames than it says, or no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = self.path.stem
        self._decoder: Iterator[av.VideoFrame] = iter(())
        self._process = 0  # whose decoder it is: a forked worker must not share the file position
        self._next = -1

    @cached_property
    def _index(self) -> _Index:
        try:
            with self._opened() as (container, stream):
                packets = [
                    _Packet(p.pts, p.dts, p.pos, p.is_keyframe, not p.is_discard)
                    for p in container.demux(stream)
                    if p.size
                ]
                rate = stream.average_rate
                self._check_whole(container, stream, packets)
                reorders = stream.codec_context.has_b_frames
                sound = _are_sound(packets, is_avi=container.format.name == "avi", reorders=reorders)
            if not any(packet.is_key for packet in packets):
                raise UserError(f"{self.path}: holds no key frame to begin from; give the film from its beginning")
            shown = next(self._decoded(_Key(0, _key_at(packets), None), skips=True), None)
            if shown is None:
                raise UserError(f"{self.path}: none of its frames can be decoded; fetch it again or re-encode it")
            first = _key_at(packets, shown.pts)
            decoded = () if sound else self._decoded(_Key(0, first, None))
            frames = _by_time(packets, first) if sound else [cast(int, frame.pts) for frame in decoded]
            size = self._upright(shown).shape[:2]
        except _FAILURES as error:
            raise self._damaged(error) from error
        left_out = sum(packet.is_shown for packet in packets) - len(frames) if sound else first
        if left_out:
            _log.warning("%s: begins between key frames; its first %d frames are left out", self.path, left_out)
        numbers = {packet.position: number for number, packet in enumerate(packets)}
        return _Index(
            frames, _keys(packets, frames, first), numbers if len(numbers) == len(packets) else {}, size, rate
        )

    def _check_whole(self, container: Any, stream: Any, packets: Sequence[_Packet]) -> None:
        if container.format.name == "avi":  # a frame that the camera dropped has a time, but no packet
            held, declared = max((packet.dts or 0) + 1 for packet in packets) if packets else 0, stream.frames
        else:
            held, declared = len(packets), len(stream.index_entries)
        if held < max(declared, 1):
            raise UserError(f"{self.path}: holds {held} of {declared} frames, it was cut short; fetch it again")
        if stream.time_base == 1 and not all(packet.is_shown for packet in packets):
            raise UserError(f"{self.path}: has no time scale, so its frames cannot be told apart; re-encode it as mp4")

    @cached_property
    def frame_names(self) -> list[str]:  # type: ignore[override]
        return [f"{i:05d}" for i in range(len(self._index.frames))]

    @cached_property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self._index.size

    @property
    def frames_per_second(self) -> Fraction | None:
        """The average; None where the file does not say, or nothing sensible."""
        rate = self._index.rate
        return rate if rate and 1 / MAX_RATE <= rate <= MAX_RATE else None

    def frame(self, index: int) -> np.ndarray:
        number, keys = self._index.frames[index], self._index.keys
        nearest = keys[bisect_right(keys, index, key=lambda key: key.frame) - 1]
        reason = "it is damaged"
        # from the nearest key frame, or else from the first: after a few (intra refresh) not all is whole at once
        starts = list(dict.fromkeys([nearest, keys[0]]))
        for start in [None, *starts] if self._is_ahead(index) else starts:
            try:
                if start is not None:
                    self._decoder, self._process = self._decoded(start), os.getpid()
                self._next = -1  # until the frame is found
                frame = next((frame for frame in self._decoder if frame.pts == number), None)
                if frame is not None and not frame.is_corrupt:
                    self._next = index + 1
                    picture = self._upright(frame)
                    break
            except _FAILURES as error:
                reason = short(error)
        else:
            raise UserError(f"{self.path}: frame {index} cannot be decoded ({reason}); fetch it again or re-encode it")
        if picture.shape[:2] != self.size:
            raise UserError(f"{self.path}: frame {index} is {picture.shape[:2]}, but the video is {self.size}")
        return picture

    def _is_ahead(self, index: int) -> bool:
        return self._process == os.getpid() and 0 <= self._next <= index <= self._next + _READ_ON

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Container and stream. The file may name no others, and what its tags hold is of no matter."""
        if not self.path.is_file():
            raise UserError(f"{self.path}: cannot be read as a video, it is no file; give a video file such as an mp4")
        options = {"protocol_whitelist": "file"}
        with av.open(os.path.abspath(self.path), options=options, metadata_errors="replace") as container:
            if container.format.name in _PLAYLISTS:
                raise UserError(f"{self.path}: is a list of files, not a video; give the video file itself")
            streams = [stream for stream in container.streams.video if not stream.disposition & _COVER_ART]
            if not streams:
                raise UserError(f"{self.path}: holds no video stream; give a video file such as an mp4")
            films = [stream for stream in streams if stream.codec_context is not None]
            if not films:
                raise UserError(f"{self.path}: its video is of a kind that PyAV cannot decode; re-encode it as mp4")
            stream = next((film for film in films if film.codec_context.name not in _PICTURES), films[0])
            if stream.height * stream.width > MAX_PIXELS:
                size = f"{stream.height}x{stream.width}"
                raise UserError(f"{self.path}: has frames of {size} pixels, at most {MAX_PIXELS} are read; scale it")
            stream.codec_context.thread_count = 1  # a decoder's threads do not survive the fork of a loader worker
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream

    def _decoded(self, start: _Key, *, skips: bool = False) -> Iterator[av.VideoFrame]:
        """The frames from a key frame on; `pts` of each is the number of its packet.

        `skips`: go on behind packets that cannot be decoded, as those whose headers came before a cut.
        """
        for seek in (True, False) if start.time is not None else (False,):
            with self._opened() as (container, stream):
                number, packets = 0, container.demux(stream)
                if seek:
                    with contextlib.suppress(*_FAILURES):
                        container.seek(start.time, stream=stream)
                    packet = next(packets)
                    number = self._index.numbers.get(packet.pos, start.packet + 1)
                    packets = itertools.chain([packet], packets)
                if number > start.packet:  # it led elsewhere: read from the beginning
                    continue
                for packet in packets:
                    if packet.size:
                        if number >= start.packet:
                            packet.pts = number
                            with contextlib.suppress(*_FAILURES) if skips else contextlib.nullcontext():
                                for frame in packet.decode():
                                    _check_key(frame, start)
                                    yield frame
                        number += 1
                for frame in stream.codec_context.decode(None):
                    _check_key(frame, start)
                    yield frame
                return

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame as RGB, uint8 (H, W, 3), turned and mirrored as its display matrix says."""
        picture = frame.to_ndarray(format="rgb24")
        a, b, c, d = _display_matrix(frame)  # a pixel (x, y) is shown at (a x + c y, b x + d y)
        turned = abs(b) + abs(c) > abs(a) + abs(d)
        main, rest = ((b, c), (a, d)) if turned else ((d, a), (b, c))
        if max(map(abs, rest)) > 0.02 * min(map(abs, main)):
            raise UserError(
                f"{self.path}: is turned by {frame.rotation} degrees, not by a quarter; re-encode it as mp4"
            )
        down, right = (-1 if value < 0 else 1 for value in main)
        return np.ascontiguousarray((picture.swapaxes(0, 1) if turned else picture)[::down, ::right])

    def _damaged(self, error: Exception) -> UserError:
        reason = short(error)
        return UserError(f"{self.path}: cannot be read as a video ({reason}); fetch it again or re-encode it as mp4")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoder": iter(()), "_process": 0}


def _check_key(frame: av.VideoFrame, start: _Key) -> None:
    """Raise ValueError for the frame of a key that is none: some files call every packet a key."""
    if frame.pts == start.packet and start.time is not None and frame.pict_type in _DEPENDENT:
        raise ValueError("it needs frames before its key")


def _display_matrix(frame: av.VideoFrame) -> tuple[float, ...]:
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside data of a type that PyAV does not know, such as EXIF
        turn = np.deg2rad(-frame.rotation)
        return tuple(np.array([np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)]).round(3))
    return (1, 0, 0, 1) if matrix is None else tuple(np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].astype(float))


def _key_at(packets: Sequence[_Packet], number: int | None = None) -> int:
    """Number of the last key frame's packet up to this one; of the first in the file without one."""
    keys = [place for place, packet in enumerate(packets) if packet.is_key]
    return keys[0] if number is None else keys[bisect_right(keys, number) - 1]


def _are_sound(packets: Sequence[_Packet], *, is_avi: bool, reorders: bool) -> bool:
    """True if the frames are shown in the order of their times, each of which is given once.

    AVI has the times of decoding alone, and so have some files of other kinds, whose decoder `reorders` in vain.
    """
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    decoded = [packet.dts for packet in packets if packet.dts is not None]
    if len(set(stamps)) < len(packets) or decoded != sorted(decoded):
        return False
    return all(packet.is_key for packet in packets) or not (is_avi or (reorders and stamps == sorted(stamps)))


def _by_time(packets: Sequence[_Packet], first: int) -> list[int]:
    """Numbers of the shown packets, in the order of their times; what is shown before the first key frame lacks it."""
    times = cast("list[int]", [packet.pts for packet in packets])  # where they are sound, each has one
    numbers = (number for number, packet in enumerate(packets) if packet.is_shown and number >= first)
    return sorted((number for number in numbers if times[number] >= times[first]), key=times.__getitem__)


def _keys(packets: Sequence[_Packet], frames: Sequence[int], first: int) -> list[_Key]:
    """The key frames in order; what is decoded after one but shown before it needs the one before."""
    keys = [_Key(0, first, None)]
    for place, number in enumerate(frames):
        packet = packets[number]
        if packet.is_key and place:
            keys.append(_Key(place, number, packet.pts if packet.dts is None else packet.dts))
    return keys


def open_video(path: str | Path) -> Video:
    """A folder of frames or a video file; frames are read when they are asked for. A UserError if it is neither."""
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a picture, a folder of frames or a video file")
    return VideoFile(path)
