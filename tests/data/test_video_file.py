"""Video files: each frame, upright and in order, as decoding from the start gives it; one line for what is damaged."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from small_datasets import check, film, save

from qsam2.data.video import FrameFolder
from qsam2.data.video_file import MAX_PIXELS, VideoFile, open_video

SIZE = (48, 64)
KEYED = {"g": "8", "bf": "2", "sc_threshold": "0"}  # key frames, and B-frames between them
MUTE_X265 = {"x265-params": "log-level=none:keyint=8"}


def picture(index: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth picture, distinct for each index, whose corners differ."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([rows * 4, columns * 3, np.full(size, 7 * index)], -1).astype(np.uint8)


def encoded(
    path: Path,
    codec: str = "libx264",
    count: int = 30,
    *,
    stamps: Callable[[int], int] | None = None,
    base: Fraction = Fraction(1, 25),
    cover: str = "",
    size: tuple[int, int] = SIZE,
    matrix: list[int] | None = None,
    **options: str,
) -> Path:
    """A film of `picture`; `cover`: a picture as the stream before it, "marked" as such or not."""
    with av.open(str(path), "w") as container:
        if cover:
            art = container.add_stream("mjpeg")
            art.width, art.height, art.pix_fmt = 32, 32, "yuvj420p"
            art.disposition = 1024 if cover == "marked" else 0  # attached picture
        stream = container.add_stream(codec, rate=25, options={"preset": "veryfast", **(options or KEYED)})
        (stream.height, stream.width), stream.pix_fmt = size, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if matrix:
            stream.set_display_matrix(matrix)
        if cover:
            black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux([*art.encode(black), *art.encode()])
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps(index), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def without_first_packets(source: Path, target: Path, count: int) -> Path:
    with av.open(str(source)) as whole, av.open(str(target), "w") as rest:
        stream = rest.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(whole.streams.video[0])):
            if packet.size and number >= count:
                packet.stream = stream
                rest.mux(packet)
    return target


def joined(tmp_path: Path) -> Path:
    return save(tmp_path / "joined.ts", encoded(tmp_path / "a.ts").read_bytes() * 2)


def gaps(index: int) -> int:
    return index if index < 10 else 2 * index


KINDS: dict[str, Callable[[Path], Path]] = {
    "mp4": lambda folder: encoded(folder / "a.mp4"),
    "one frame": lambda folder: encoded(folder / "a.mp4", count=1),
    "MKV with B-frames": lambda folder: encoded(folder / "a.mkv"),
    "HEVC in MKV": lambda folder: encoded(folder / "a.mkv", "libx265", **MUTE_X265),
    "open GOP": lambda folder: encoded(
        folder / "a.mkv", **{"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3"}
    ),
    "intra refresh": lambda folder: encoded(folder / "a.ts", **{"x264-params": "intra-refresh=1:keyint=24"}),
    "programme stream": lambda folder: encoded(folder / "a.mpg", "mpeg2video"),  # several packets have one position
    "AVI with B-frames": lambda folder: encoded(folder / "a.avi"),
    "AVI with dropped frames": lambda folder: encoded(folder / "a.avi", "mpeg4", stamps=gaps),
    "AVI of pictures": lambda folder: encoded(folder / "a.avi", "mjpeg", q="5"),
    "AVI that calls every packet a key": lambda folder: encoded(folder / "a.avi", "h263p", g="30"),
    "ASF with times of decoding": lambda folder: encoded(folder / "a.asf", bf="2"),
    "MXF with times of decoding": lambda folder: encoded(folder / "a.mxf", bf="2"),
    "no times": lambda folder: encoded(folder / "a.h264"),
    "joined transport streams": joined,
    "equal times": lambda folder: encoded(folder / "a.mkv", stamps=lambda index: 2 * index, base=Fraction(1, 9000)),
    "begins late": lambda folder: encoded(folder / "a.ts", stamps=lambda index: 9000 + index),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_any_frame_equals_decoding_from_the_start(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(expected) in (1, 30, 60)
    video = VideoFile(path)
    assert len(video) == len(expected) and video.size == SIZE and video.masks(0) is None
    last = len(expected) - 1
    for index in [last, 0, *range(last, -1, -3), *range(len(expected))]:
        np.testing.assert_array_equal(video.frame(index), expected[index], err_msg=str(index))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(video)).frame(last), expected[last])


@pytest.mark.parametrize("cover", ["marked", "unmarked"])
def test_cover_art_is_not_the_film(cover: str, tmp_path: Path) -> None:
    video = VideoFile(encoded(tmp_path / "a.mkv", cover=cover))
    assert len(video) == 30 and video.size == SIZE


ONE = 1 << 16
TURNS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "as it is": ((1, 0, 0, 1), lambda frame: frame),
    "clockwise": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "on its head": ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
    "counter-clockwise": ((0, -1, 1, 0), np.rot90),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
    "anti-transposed": ((0, -1, -1, 0), lambda frame: np.rot90(frame, 2).swapaxes(0, 1)),
    "nothing": ((0, 0, 0, 0), lambda frame: frame),
}


@pytest.mark.parametrize(("turn", "expected"), TURNS.values(), ids=TURNS.keys())
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_frames_are_upright(
    turn: tuple[int, ...], expected: Callable[[np.ndarray], np.ndarray], suffix: str, tmp_path: Path
) -> None:
    """(a, b, c, d): a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = (value * ONE for value in turn)
    lying = VideoFile(encoded(tmp_path / f"lying.{suffix}", count=12))
    video = VideoFile(encoded(tmp_path / f"turned.{suffix}", count=12, matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30]))
    assert video.size == expected(lying.frame(0)).shape[:2]
    for index in (0, 11, 5):
        np.testing.assert_array_equal(video.frame(index), expected(lying.frame(index)))


def test_a_phone_film_has_the_size_of_what_is_seen(tmp_path: Path) -> None:
    """The header of a phone's mp4: 90 degrees clockwise."""
    data = bytearray(encoded(tmp_path / "a.mp4").read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # version 0
    data[at : at + 36] = struct.pack(">9i", 0, ONE, 0, -ONE, 0, 0, SIZE[0] * ONE, 0, 1 << 30)
    video = open_video(save(tmp_path / "phone.mp4", bytes(data)))
    assert video.size == SIZE[::-1] == video.frame(3).shape[:2]
    np.testing.assert_array_equal(video.frame(3), np.rot90(VideoFile(tmp_path / "a.mp4").frame(3), -1))


def test_frames_before_the_first_key_frame_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = VideoFile(encoded(tmp_path / "a.ts", bf="0", g="8", sc_threshold="0"))
    for suffix in ("ts", "mkv", "mp4"):
        video = VideoFile(without_first_packets(whole.path, tmp_path / f"rest.{suffix}", 3))
        assert len(video) == 22 and video.frame_names[0] == "00000"  # key frames are 0, 8, 16, 24
        for index in (0, 21, 9):
            np.testing.assert_array_equal(video.frame(index), whole.frame(index + 8))
        assert f"rest.{suffix}: begins between key frames; its first 5 frames are left out" in caplog.text


def test_frames_that_are_shown_before_the_first_key_frame_are_left_out(tmp_path: Path) -> None:
    """B-frames that follow a key frame in the file and need the one before it, too."""
    whole = encoded(tmp_path / "a.ts", "mpeg2video")
    video = VideoFile(without_first_packets(whole, tmp_path / "rest.ts", 3))
    with av.open(str(video.path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(video) == len(expected) < 30 - 3
    np.testing.assert_array_equal(video.frame(0), expected[0])


def test_of_a_film_whose_first_key_frame_is_damaged_what_follows_is_read(tmp_path: Path) -> None:
    whole = VideoFile(encoded(tmp_path / "a.avi", "mjpeg", q="5"))
    video = VideoFile(save(tmp_path / "hole.avi", without_content(whole.path, 0)))
    assert len(video) == 29
    np.testing.assert_array_equal(video.frame(0), whole.frame(1))


def test_a_process_does_not_read_on_where_its_parent_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = VideoFile(encoded(tmp_path / "a.mp4"))
    video.frame(0)
    decoder = video._decoder
    monkeypatch.setattr("os.getpid", lambda: -1)
    video.frame(1)
    assert video._decoder is not decoder


def test_an_edited_film_begins_where_the_edit_says(tmp_path: Path) -> None:
    """An mp4 cut without encoding: the frames before the cut are there for the others, but not shown."""
    source = encoded(tmp_path / "a.mp4")
    with av.open(str(source)) as whole, av.open(str(tmp_path / "edit.mp4"), "w", options={"use_editlist": "1"}) as cut:
        origin = whole.streams.video[0]
        stream = cut.add_stream_from_template(origin)
        for packet in whole.demux(origin):
            if packet.size:
                packet.pts, packet.dts = (
                    int(stamp - 5 / origin.average_rate / origin.time_base) for stamp in (packet.pts, packet.dts)
                )
                packet.stream = stream
                cut.mux(packet)
    video = VideoFile(tmp_path / "edit.mp4")
    with av.open(str(video.path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(video) == len(expected)
    for index in (0, len(expected) - 1, 4):
        np.testing.assert_array_equal(video.frame(index), expected[index])


@pytest.mark.parametrize("name", ["file:a.mp4", "%d 50%.mp4", "ä 猫.mp4", "-i.mp4"])
def test_any_name_is_that_of_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / name, encoded(tmp_path / "a.mp4", count=3).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert VideoFile(Path(name)).frame(2).shape == (*SIZE, 3)


def test_tags_in_another_encoding_are_no_matter(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        container.metadata["title"] = "cafes"
        stream = container.add_stream("mpeg4", rate=25)
        (stream.height, stream.width), stream.pix_fmt = SIZE, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")), *stream.encode()])
    latin = save(tmp_path / "latin.avi", (tmp_path / "a.avi").read_bytes().replace(b"cafes", b"caf\xe9s"))
    assert VideoFile(latin).frame(0).shape == (*SIZE, 3)


def test_frame_rates(tmp_path: Path) -> None:
    assert VideoFile(encoded(tmp_path / "a.mp4")).frames_per_second == 25
    hours = encoded(tmp_path / "b.mp4", stamps=lambda index: 7200 * index, base=Fraction(1))
    assert VideoFile(hours).frames_per_second is None  # no film could be written at it
    with av.open(str(tmp_path / "fast.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5000)
        (stream.height, stream.width), stream.pix_fmt = SIZE, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")), *stream.encode()])
    assert VideoFile(tmp_path / "fast.mkv").frames_per_second is None


def packets_of(path: Path) -> list[tuple[int, int]]:
    """Place and length of each packet in the file, in bytes."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def without_content(path: Path, packet: int) -> bytes:
    """The bytes of a film with nonsense in a packet."""
    data, (start, size) = path.read_bytes(), packets_of(path)[packet]
    return data[:start] + b"\xff" * size + data[start + size :]


def without_time_scale(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    at = data.find(b"mdhd") + 16
    data[at : at + 4] = bytes(4)
    return bytes(data)


def test_errors(tmp_path: Path) -> None:
    whole = encoded(tmp_path / "whole.mp4")
    broken = save(tmp_path / "broken.mp4", b"no video at all")

    def refused(message: str, path: Path = broken) -> None:
        check(f"{path.name}: {message}", lambda: VideoFile(path).size)

    refused("cannot be read as a video")
    refused("cannot be read as a video, it is no file", tmp_path / "nowhere.mp4")
    save(broken, whole.read_bytes()[: whole.stat().st_size // 2])
    refused("(cannot be read as a video|holds no video stream)")
    noise = np.random.default_rng(0).integers(0, 255, (60, *SIZE, 3), dtype=np.uint8)
    indexed = film(tmp_path / "fast.mp4", noise, movflags="faststart").read_bytes()
    save(broken, indexed[: len(indexed) // 2])  # cut short behind its index
    refused("holds .. of 60 frames, it was cut short")
    save(broken, indexed[: max(packets_of(tmp_path / "fast.mp4"))[0]])
    refused("holds 59 of 60 frames, it was cut short")
    dropped = encoded(tmp_path / "dropped.avi", "mpeg4", stamps=gaps).read_bytes()
    refused("holds .* of 5. frames, it was cut short", save(tmp_path / "cut.avi", dropped[: len(dropped) * 3 // 4]))
    save(broken, without_time_scale(whole))
    refused("has no time scale")
    keyless = without_first_packets(encoded(tmp_path / "long.ts", g="250"), tmp_path / "keyless.ts", 3)
    refused("holds no key frame to begin from", keyless)
    save(broken, f"ffconcat version 1.0\nfile {whole.name}\n")
    refused("is a list of files, not a video")
    tilted = encoded(tmp_path / "tilted.mp4", matrix=[ONE, ONE, 0, -ONE, ONE, 0, 0, 0, 1 << 30])
    refused("is turned by -45.* degrees, not by a quarter", tilted)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    refused("holds no video stream", sound)
    check("empty: holds no frames", lambda: FrameFolder(tmp_path / "empty"))
    with pytest.raises(IndexError):
        VideoFile(whole).frame(30)


def test_a_frame_larger_than_any_film_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encoded(tmp_path / "a.mp4")
    monkeypatch.setattr("qsam2.data.video_file.MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    check("a.mp4: has frames of 48x64 pixels", lambda: VideoFile(path).size)
    assert MAX_PIXELS > 7680 * 4320
    parts = [encoded(tmp_path / f"{size[0]}.ts", count=8, size=size).read_bytes() for size in (SIZE, (96, 128))]
    monkeypatch.setattr("qsam2.data.video_file.MAX_PIXELS", SIZE[0] * SIZE[1])  # what the header says
    joined = VideoFile(save(tmp_path / "joined.ts", b"".join(parts)))
    check("joined.ts: cannot be read as a video", lambda: joined.frame(8))


def test_frames_of_another_size_and_damaged_ones_name_their_number(tmp_path: Path) -> None:
    parts = [encoded(tmp_path / f"{size[0]}.ts", count=8, size=size).read_bytes() for size in (SIZE, (32, 48))]
    video = VideoFile(save(tmp_path / "joined.ts", b"".join(parts)))
    assert video.frame(7).shape == (*SIZE, 3)
    check(r"joined.ts: frame 8 is \(32, 48\), but the video is \(48, 64\)", lambda: video.frame(8))
    holes = without_content(encoded(tmp_path / "a.mp4", g="10", bf="0"), 12)
    video = VideoFile(save(tmp_path / "holes.mp4", holes))
    check("holes.mp4: frame 12 cannot be decoded", lambda: video.frame(12))
    assert video.frame(20).shape == (*SIZE, 3)  # those behind the next key frame can
    noise = np.random.default_rng(0).integers(0, 255, (30, *SIZE, 3), dtype=np.uint8)
    sent = film(tmp_path / "noise.ts", noise, gop=10)
    data, lost = sent.read_bytes(), packets_of(sent)[12][0] + 3 * 188  # one of the stream's packets of 188 bytes
    video = VideoFile(save(tmp_path / "lossy.ts", data[:lost] + data[lost + 188 :]))
    check("lossy.ts: frame 1. cannot be decoded .it is damaged", lambda: list(map(video.frame, range(30))))
