"""Pictures as people have them: depth, orientation, size, format and names; right pixels or one line."""

from __future__ import annotations

import ast
import io
import logging
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from messages import Message
from PIL import Image
from small_datasets import box, save

from qsam2.data.index_masks import read_ids
from qsam2.data.pictures import MAX_PIXELS, list_pictures, picture_size, read_frame
from qsam2.data.sources import open_videos, source_of
from qsam2.data.stills import coco_stills, instance_png_stills, sa1b_stills, yolo_stills
from qsam2.data.unlabelled import picture_source
from qsam2.data.video import FrameFolder
from qsam2.data.video_datasets import davis_videos, sav_videos
from qsam2.errors import UserError

ROOT = Path(__file__).parents[2]
SIZE = (40, 60)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
GREY = (ROWS * 2 + COLUMNS * 2 + 30).astype(np.uint8)
COLOUR = np.stack([ROWS * 5, COLUMNS * 4, GREY], -1).astype(np.uint8)
OBJECT = box(SIZE, 5, 30, 12, 20)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_pictures_keep_their_brightness(tmp_path: Path, bits: int, suffix: str, caplog) -> None:
    scale = (2**bits - 1) / 255
    for index, brightness in enumerate((1, 0.8)):  # the second frame is darker: it must not be scaled by itself
        values = np.rint((GREY + 46) * brightness * scale).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{index}.{suffix}")
    video = FrameFolder(tmp_path)
    for index, brightness in enumerate((1, 0.8)):
        expected = np.repeat((GREY + 46)[..., None] * brightness, 3, axis=2)
        assert np.abs(video.frame(index) - expected).max() <= 1
    assert ("are read as" in caplog.text) == (bits < 16)


def test_16_bit_colours_keep_their_brightness(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), COLOUR[..., ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_frame(tmp_path / "a.png", SIZE), COLOUR)


def _refused_depths() -> dict[str, np.ndarray]:
    return {
        "float": GREY.astype(np.float32) / 255,
        "negative": GREY.astype(np.int32) - 100,
        "32 bits": GREY.astype(np.int32) << 20,
        "12 bits among 16": GREY.astype(np.uint16) << 4,
    }


@pytest.mark.parametrize("kind", _refused_depths())
def test_pictures_of_unknown_range_are_refused(tmp_path: Path, kind: str, message: Message) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(_refused_depths()[kind]).save(tmp_path / "b.tif")
    with pytest.raises(UserError) as caught:
        read_frame(tmp_path / "b.tif", SIZE)
    assert "b.tif" in message(caught) and "mode" in str(caught.value)


def test_12_bit_colours_are_refused(tmp_path: Path, message: Message) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), COLOUR.astype(np.uint16) * 16)
    with pytest.raises(UserError) as caught:
        read_frame(tmp_path / "a.png", SIZE)
    assert "mode RGB" in message(caught)


TURNED = {
    2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1], 5: COLOUR.transpose(1, 0, 2), 6: np.rot90(COLOUR),
    7: np.rot90(COLOUR[::-1, ::-1].transpose(1, 0, 2), 0), 8: np.rot90(COLOUR, -1),
}  # fmt: skip
"""As a camera stores an upright picture with each orientation."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(Image.fromarray(TURNED[orientation].copy()), kind, exif=exif, **options))
    assert picture_size(path) == SIZE
    assert np.abs(read_frame(path, SIZE).astype(int) - COLOUR).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P"])
def test_tiffs_of_every_mode_are_upright(tmp_path: Path, mode: str) -> None:
    """PIL maps those without compression into memory."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = {"L": GREY, "I;16": GREY.astype(np.uint16) * 257, "RGBA": np.dstack([COLOUR, GREY])}.get(mode, OBJECT)
    turned = Image.fromarray(np.rot90(pixels).astype(pixels.dtype).copy())
    if mode == "P":
        turned = turned.convert("L").convert("P")
    (tmp_path / "a.tif").write_bytes(encoded(turned, "TIFF", exif=exif))
    assert picture_size(tmp_path / "a.tif") == SIZE
    if mode == "P":
        assert (read_ids(tmp_path / "a.tif", SIZE).astype(bool) == OBJECT).all()
    else:
        shown = COLOUR if mode == "RGBA" else np.repeat(GREY[..., None], 3, axis=2)
        np.testing.assert_array_equal(read_frame(tmp_path / "a.tif", SIZE), shown)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_several_pictures_in_one_are_refused(tmp_path: Path, kind: str, message: Message) -> None:
    path, first = tmp_path / f"a.{kind.lower()}", Image.fromarray(COLOUR)
    others = [Image.fromarray(255 - COLOUR), Image.fromarray(COLOUR // 2)]
    path.write_bytes(encoded(first, kind, save_all=True, append_images=others))
    for read in (lambda: read_frame(path, SIZE), lambda: picture_size(path), lambda: read_ids(path)):
        with pytest.raises(UserError) as caught:
            read()
    assert "holds 3 pictures of one size" in message(caught)


def test_previews_beside_a_picture_are_let_be(tmp_path: Path) -> None:
    preview, colour = Image.fromarray(COLOUR[::4, ::4].copy()), Image.fromarray(COLOUR)
    for kind, options in (("TIFF", {}), ("MPO", {"quality": 98, "subsampling": 0})):
        path = tmp_path / ("a.tif" if kind == "TIFF" else "a.jpg")
        path.write_bytes(encoded(colour, kind, save_all=True, append_images=[preview], **options))
        assert picture_size(path) == SIZE
        assert np.abs(read_frame(path, SIZE).astype(int) - COLOUR).max() <= (0 if kind == "TIFF" else 8)


@pytest.mark.parametrize("value", [0, 9, 300])
def test_unknown_orientations_and_damaged_exif_turn_nothing(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    for data in (exif.tobytes(), b"Exif\0\0" + b"\xff" * 40):
        (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOUR), "PNG", exif=data))
        np.testing.assert_array_equal(read_frame(tmp_path / "a.png", SIZE), COLOUR)


def test_labels_land_on_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.where(OBJECT[..., None], np.uint8(250), np.uint8(20)).repeat(3, axis=2)
    data = encoded(Image.fromarray(np.rot90(shown).copy()), "JPEG", exif=exif, quality=98)
    left, top, right, bottom = 30, 5, 50, 17
    corners = [left, top, right, top, right, bottom, left, bottom]
    annotation = {"image_id": 1, "segmentation": [corners]}
    save(tmp_path / "coco/images/a.jpg", data)
    save(tmp_path / "coco/instances.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation]})
    save(tmp_path / "yolo/images/val/a.jpg", data)
    shares = " ".join(str(x / side) for x, side in zip(corners, (60, 40) * 4, strict=True))
    save(tmp_path / "yolo/labels/val/a.txt", f"0 {shares}\n")
    save(tmp_path / "png/images/a.jpg", data)
    save(tmp_path / "png/instance_png/a.png", OBJECT.astype(np.uint8))
    save(tmp_path / "davis/JPEGImages/v/0.jpg", data)
    save(tmp_path / "davis/Annotations/v/0.png", OBJECT.astype(np.uint8))
    for spec in ("coco", "yolo", "instance_png", "davis"):
        folder = tmp_path / {"instance_png": "png"}.get(spec, spec)
        (video,) = open_videos(f"{spec}:{folder}:{'all' if spec == 'davis' else 'val'}")
        bright, (mask,) = video.frame(0)[..., 0] > 128, video.masks(0).values()
        assert (bright & mask).sum() / (bright | mask).sum() > 0.98, spec


@pytest.mark.parametrize(
    ("mode", "difference"), [("CMYK", 0), ("RGBA", 0), ("YCbCr", 4), ("L", None), ("LA", None), ("P", None)]
)
def test_colours_of_other_modes(tmp_path: Path, mode: str, difference: int | None) -> None:
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read this kind of TIFF, also its own")
    picture = Image.fromarray(COLOUR).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(np.where(OBJECT, 255, 0).astype(np.uint8)))  # colours under alpha are kept
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    picture.save(tmp_path / f"a.{suffix}")
    frame = read_frame(tmp_path / f"a.{suffix}", SIZE).astype(int)
    expected = np.array(picture.convert("RGB")).astype(int) if difference is None else COLOUR
    assert np.abs(frame - expected).max() <= (difference or 0)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 13_300, 60_000])
@pytest.mark.parametrize("reader", ["frame", "size", "mask"])
def test_pictures_beyond_the_limit_are_refused_by_their_header(
    tmp_path: Path, side: int, reader: str, message: Message
) -> None:
    path = save(tmp_path / "a.png", png_of_size(side, side))
    read = {"frame": lambda: read_frame(path, (1, 1)), "size": lambda: picture_size(path)}
    with pytest.raises(UserError) as caught:
        read.get(reader, lambda: source_masks(path))()
    assert f"{side**2:,}" in message(caught) and f"{MAX_PIXELS:,}" in str(caught.value)


def source_masks(path: Path) -> None:
    from qsam2.data.index_masks import read_ids

    read_ids(path)


DISGUISED = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\nshowpage\n%%EOF\n",
    encoded(Image.fromarray(COLOUR), "GIF"),
    encoded(Image.fromarray(COLOUR), "PPM"),
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
]


@pytest.mark.parametrize("data", DISGUISED)
def test_other_formats_named_jpg_are_refused(tmp_path: Path, data: bytes) -> None:
    """PIL would give an EPS to Ghostscript."""
    path = save(tmp_path / "a.jpg", data)
    with pytest.raises(UserError, match=r"a.jpg: cannot be read as a picture \("):
        read_frame(path, SIZE)


def test_no_picture_is_opened_without_its_formats() -> None:
    files = [
        ROOT / "train.py",
        *(file for folder in ("qsam2", "recipes", "docs") for file in (ROOT / folder).rglob("*.py")),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{file}:{node.lineno}"


def test_frames_of_mixed_formats_are_all_there(tmp_path: Path) -> None:
    suffixes = ("jpg", "JPEG", "png", "webp", "bmp", "tif", "TIFF")
    for index, suffix in enumerate(suffixes):
        picture = Image.fromarray(np.full((*SIZE, 3), 30 * index, np.uint8))
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(suffix.lower(), suffix)
        save(tmp_path / f"{index + 5}.{suffix}", encoded(picture, kind))
    video = FrameFolder(tmp_path)
    assert video.frame_names == [str(index + 5) for index in range(len(suffixes))]
    assert [round(video.frame(index).mean() / 30) for index in range(len(video))] == list(range(len(suffixes)))
    assert source_of(tmp_path).startswith("images:") and len(picture_source(tmp_path, "all")) == len(suffixes)


def test_frames_that_are_not_read_are_not_left_out_silently(tmp_path: Path, message: Message, caplog) -> None:
    save(tmp_path / "a/00000.jpg", COLOUR)
    save(tmp_path / "a/00001.heic", b"x")
    with pytest.raises(UserError) as caught:
        FrameFolder(tmp_path / "a")
    assert "00001.heic" in message(caught)
    caplog.set_level(logging.WARNING)
    assert len(picture_source(tmp_path / "a", "all")) == 1 and "00001.heic" in caplog.text
    caplog.clear()
    save(tmp_path / "b/00000.jpg", COLOUR)
    save(tmp_path / "b/00000_mask.png", OBJECT.astype(np.uint8))
    assert FrameFolder(tmp_path / "b").frame_names == ["00000"] and "00000_mask.png" in caplog.text


LITTER = (
    "._{}",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "__MACOSX/{}",
    "__MACOSX/._{}",
    ".ipynb_checkpoints/{}",
    "@eaDir/{}",
)


def test_no_reader_takes_what_systems_leave_behind(tmp_path: Path) -> None:
    code = {"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}
    annotation = {"image_id": 1, "segmentation": code}
    ids = OBJECT.astype(np.uint8)
    files = {
        "davis/JPEGImages/v/0.jpg": COLOUR,
        "davis/Annotations/v/0.png": ids,
        "davis/ImageSets/val.txt": "v\n",
        "sav/sav_val/JPEGImages_24fps/v/00000.jpg": COLOUR,
        "sav/sav_val/Annotations_6fps/v/000/00000.png": ids,
        "sav/sav_val/sav_val.txt": "v\n",
        "train/JPEGImages_24fps/v/00000.jpg": COLOUR,
        "train/v_manual.json": {"masklet": [[code]]},
        "coco/images/v.jpg": COLOUR,
        "coco/instances.json": {"images": [{"id": 1, "file_name": "v.jpg"}], "annotations": [annotation]},
        "sa1b/v.jpg": COLOUR,
        "sa1b/v.json": {"annotations": [annotation]},
        "yolo/images/val/v.jpg": COLOUR,
        "yolo/labels/val/v.txt": "0 0 0 1 0 1 1\n",
        "png/images/v.jpg": COLOUR,
        "png/instance_png/v.png": ids,
        "images/v.jpg": COLOUR,
        "video/v/0.jpg": COLOUR,
    }
    for path, content in files.items():
        save(tmp_path / path, content)
        for place in (tmp_path / path, (tmp_path / path).parent):  # beside the file, and beside its folder
            for form in LITTER:
                save(place.parent / form.format(place.name), b"\0\x05\x16\x07litter")
    videos = {
        "davis": davis_videos(tmp_path / "davis", "val"),
        "all": davis_videos(tmp_path / "davis", "all"),
        "sav": sav_videos(tmp_path / "sav", "val"),
        "train": sav_videos(tmp_path / "train", "train"),
        "coco": coco_stills(tmp_path / "coco", "val"),
        "sa1b": sa1b_stills(tmp_path / "sa1b"),
        "yolo": yolo_stills(tmp_path / "yolo", "val"),
        "png": instance_png_stills(tmp_path / "png"),
        "images": open_videos(f"images:{tmp_path}/images:all"),
        "video": open_videos(f"video:{tmp_path}/video:all"),
    }
    for kind, found in videos.items():
        assert [video.name.removesuffix(".jpg") for video in found] == ["v"], kind
        assert len(found[0]) == 1 and found[0].frame(0).shape == COLOUR.shape, kind
        assert kind in ("images", "video") or len(found[0].masks(0)) == 1, kind


def test_names_with_blanks(tmp_path: Path) -> None:
    for name in ("sé q 1", "b"):
        save(tmp_path / f"JPEGImages/480p/{name}/a 1.jpg", COLOUR)
        save(tmp_path / f"Annotations/480p/{name}/a 1.png", OBJECT.astype(np.uint8))
    save(tmp_path / "ImageSets/val.txt", "sé q 1\nb \n")
    pairs = [f"/JPEGImages/480p/{name}/a 1.jpg /Annotations/480p/{name}/a 1.png" for name in ("sé q 1", "b")]
    save(tmp_path / "ImageSets/2016/val.txt", "\n".join(pairs))
    for split in ("val", "2016/val"):
        videos = davis_videos(tmp_path, split)
        assert [video.name for video in videos] == ["sé q 1", "b"] and videos[0].frame_names == ["a 1"]


def test_a_broken_link_is_an_error_and_a_folder_no_picture(tmp_path: Path) -> None:
    save(tmp_path / "1.jpg", COLOUR)
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "3.jpg").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["1.jpg", "2.jpg"]
    with pytest.raises(UserError, match="2.jpg: cannot be read"):
        FrameFolder(tmp_path).frame(1)
