"""Two thousand files that are almost right: read or refused in one line, in 10 s and 2 GB, and never nonsense."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from fuzzing import SCALARS, Case, damage, encode_json, faults, mutate, nasty
from kept_run import write_run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import seeing
from small_runs import TRAIN, W4A4

from qsam2.data.sources import open_videos
from qsam2.formats import packed
from qsam2.loading import load_model
from qsam2.models import SAM2
from qsam2.recipe import build_recipe, load_recipe, save_recipe
from qsam2.report.page import render
from qsam2.report.read import as_runs_write, read_run
from qsam2.run import flat
from qsam2.sweep.definition import load_sweep

pytestmark = pytest.mark.prove
SIZE = (24, 32)
PASSWD = base64.b64encode(b"root:x:0:").decode()
"""How /etc/passwd begins if it is taken into a page."""
RECIPE = {
    "name": "fuzz",
    "model": {"size": "nano", "image_size": 64},
    "data": {"train": ["moving_objects:8:train", "coco:x"], "weights": [1, 2.5], "val": "davis:y", "num_workers": 0},
    "quantize": {**W4A4, "rules": [{"match": "*.norm", "keep_float": True}, {"match": "a.b", "bits": 8}]},
    "train": TRAIN,
    "trainer": {"max_steps": 20},
    "memory": {"sharing": "adaptive", "frames": 3},
    "log": {"wandb": "off", "group": "g"},
}
SWEEP = {
    "program": "train.py",
    "method": "grid",
    "metric": {"name": "quantized.J&F", "goal": "maximize"},
    "parameters": {"train.lr": {"values": [1e-4, 3e-4]}, "trainer.max_steps": {"value": 3}},
    "command": ["${program}", "recipes/qat_w4a4.yaml", "${args}"],
}


def picture(rng: random.Random, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(*size, 3)


def ids(size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[4:12, 4:12], mask[12:20, 16:28] = 1, 2
    return mask


def assert_videos(spec: str) -> None:
    """All frames and masks of a source are what readers promise."""
    for video in open_videos(spec):
        height, width = video.size
        for index in range(len(video)):
            frame, masks = video.frame(index), video.masks(index)
            assert frame.shape == (height, width, 3) and frame.dtype == np.uint8
            for object_id, mask in (masks or {}).items():
                assert isinstance(object_id, int) and object_id > 0
                assert mask.shape == (height, width) and mask.dtype == bool


def encode_yaml(tree: Any) -> bytes:
    """YAML of a tree, also of integers and trees beyond what PyYAML writes."""
    try:
        return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return str(tree).encode(errors="surrogatepass")


def recipe_file(rng: random.Random, folder: Path) -> None:
    text = encode_yaml(mutate(rng, RECIPE))
    if rng.random() < 0.3:
        text = damage(rng, text)
    if rng.random() < 0.1:
        text += b"\n" + rng.choice(text.splitlines() or [b"name: x"])
    (folder / "recipe.yaml").write_bytes(text)
    recipe = load_recipe(folder / "recipe.yaml")
    values = flat(recipe.model_dump(mode="json"))
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float)), values
    assert "/" not in recipe.name and recipe.name not in ("", ".", "..")
    (folder / "again.yaml").write_text(save_recipe(recipe))
    assert load_recipe(folder / "again.yaml") == recipe


def overrides(rng: random.Random, folder: Path) -> None:
    key = rng.choice([*flat(RECIPE), "lr", "train", "memory.frames", "trainer.seed", "model.image_size", "", "a.b.c"])
    value = rng.choice(
        [
            "3",
            "true",
            "1e300",
            "nan",
            "[",
            "{}",
            "null",
            "9" * 5000,
            "..",
            "a: b",
            "[1,2",
            "é",
            "-1",
            "!!python/name:os.system",
        ]
    )
    recipe = build_recipe(RECIPE, [f"{key}={value}" if rng.random() < 0.9 else key + value])
    values = flat(recipe.model_dump(mode="json"))
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float)), values


def sweep_file(rng: random.Random, folder: Path) -> None:
    data = encode_yaml(mutate(rng, SWEEP) if rng.random() < 0.8 else SWEEP)
    (folder / "sweep.yaml").write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
    load_sweep(folder / "sweep.yaml")


def coco_file(rng: random.Random, folder: Path) -> None:
    (folder / "images").mkdir()
    Image.fromarray(picture(rng)).save(folder / "images/a.png")
    square = [4.0, 4.0, 20.0, 4.0, 20.0, 16.0, 4.0, 16.0]
    code = {"size": list(SIZE), "counts": [100, 50, 618]}
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [
            {"id": 1, "image_id": 1, "segmentation": [square], "iscrowd": 0, "category_id": 1},
            {"id": 2, "image_id": 1, "segmentation": code, "iscrowd": 0, "category_id": 1},
            {"id": 3, "image_id": 1, "segmentation": {"size": list(SIZE), "counts": "R5`0h5"}, "iscrowd": 0},
        ],
    }
    if rng.random() < 0.4:  # numbers where numbers are
        tree["annotations"][0]["segmentation"] = [
            [rng.choice([nasty(rng), 1e9, 4.5e8, -1e18]) if rng.random() < 0.3 else x for x in square]
        ]
        tree["annotations"][1]["segmentation"]["counts"] = [
            rng.choice([2**63 - 1, 2**62, -1, 0, 768, 1.5]) if rng.random() < 0.4 else x for x in (100, 50, 618)
        ]
    else:
        tree = mutate(rng, tree)
    data = encode_json(rng, tree)
    (folder / "instances.json").write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
    assert_videos(f"coco:{folder}")


def yolo_file(rng: random.Random, folder: Path) -> None:
    (folder / "images/val").mkdir(parents=True)
    (folder / "labels/val").mkdir(parents=True)
    Image.fromarray(picture(rng)).save(folder / "images/val/a.jpg")
    words = [
        str(rng.choice([0, 1, 0.5, 0.25, 1.000001, -0.01, "nan", "inf", "1e400", "", "x", 2, "0,5"]))
        if rng.random() < 0.15
        else f"{rng.random():.3f}"
        for _ in range(rng.randrange(1, 14))
    ]
    text = f"0 {' '.join(words)}\n0 0.1 0.1 0.9 0.1 0.9 0.9\n" + rng.choice(["", "\n", "  \n\n", "# c\n"])
    data = text.encode(rng.choice(["utf-8"] * 4 + ["utf-16", "utf-8-sig"]))
    (folder / "labels/val/a.txt").write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
    assert_videos(f"yolo:{folder}:val")


def sav_file(rng: random.Random, folder: Path) -> None:
    frames = folder / "JPEGImages_24fps/v"
    frames.mkdir(parents=True)
    names = rng.choice(
        [["00000", "00001", "00002", "00003", "00004"]] * 4 + [["a", "b", "c", "d", "e"], ["0", "1", "3", "4", "5"]]
    )
    for name in names:
        Image.fromarray(picture(rng)).save(frames / f"{name}.jpg")
    code = {"size": list(SIZE), "counts": "R5`0h5"}
    tree = {"video_id": "v", "masklet": [[dict(code), None], [dict(code), dict(code)]], "masklet_num": 2}
    data = encode_json(rng, mutate(rng, tree))
    (folder / "v_manual.json").write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
    assert_videos(f"sav:{folder}:train")


FILMS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.webm", "libvpx")]
FILMS += [("a.mov", "mjpeg"), ("a.mpg", "mpeg2video"), ("a.h264", "libx264"), ("a.gif", "gif")]


@lru_cache
def film_bytes(name: str, codec: str) -> bytes:
    """A film of twelve frames, key frames among them."""
    stream = io.BytesIO()
    stream.name = name
    with av.open(
        stream, "w", format={"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg"}.get(name[2:], name[2:])
    ) as film:
        video = film.add_stream(codec, rate=25, options={"g": "5", "threads": "1"})
        (video.height, video.width), rng = SIZE, random.Random(0)
        video.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        for _ in range(12):
            film.mux(video.encode(av.VideoFrame.from_ndarray(picture(rng), format="rgb24")))
        film.mux(video.encode())
    return stream.getvalue()


def video_file(rng: random.Random, folder: Path) -> None:
    name, codec = rng.choice(FILMS)
    data = film_bytes(name, codec)
    for _ in range(rng.choice([1, 1, 3])):
        if rng.random() < 0.5:  # among the headers, at either end
            at = rng.randrange(min(700, len(data)))
            at = at if rng.random() < 0.5 else len(data) - 1 - at
            value = rng.choice([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4)])
            data = data[:at] + value + data[at + 4 :]
        else:
            data = damage(rng, data) or b"\0"
    (folder / name).write_bytes(data)
    assert_videos(f"video:{folder / name}:all")


def davis_pictures(rng: random.Random, folder: Path) -> None:
    frames, masks = folder / "JPEGImages/480p/s", folder / "Annotations/480p/s"
    (folder / "ImageSets/2017").mkdir(parents=True)
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    listing = b"s\n" if rng.random() < 0.9 else damage(rng, b"s\n")
    (folder / "ImageSets/2017/val.txt").write_bytes(listing)
    is_whole = True
    grey = picture(rng)[..., :1].repeat(3, axis=2)
    for name in ("00000", "00001"):
        frame, mask = Image.fromarray(grey), Image.fromarray(ids())
        size = rng.choice([None] * 20 + [(1, 1), (0, 7), (31, 24)])
        for image, file in ((frame, frames / f"{name}.jpg"), (mask, masks / f"{name}.png")):
            if size and all(size) and rng.random() < 0.5:
                image, is_whole = image.resize(size), False
            mode = rng.choice([image.mode] * 12 + ["1", "L", "P", "RGBA", "CMYK", "I;16", "F", "I", "LA"])
            is_whole &= mode in ((image.mode, "RGBA", "L", "LA", "I", "I;16") if image is frame else (image.mode, "I"))
            kind = rng.choice(
                [file.suffix[1:].replace("jpg", "jpeg")] * 12 + ["png", "bmp", "tiff", "webp", "gif", "ppm"]
            )
            buffer = io.BytesIO()
            try:
                image.convert(mode if mode != "I;16" else "I").save(buffer, kind)
            except (OSError, ValueError, KeyError):
                image.save(buffer, "png")
            data = buffer.getvalue()
            if kind == "png" and rng.random() < 0.05:  # another size in the header, with a right checksum
                head = (
                    data[12:16] + rng.choice([b"\x00\x00\xff\xff" * 2, b"\x7f\xff\xff\xff" * 2, bytes(8)]) + data[24:29]
                )
                data = data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]
                is_whole = False
            is_whole &= kind in ("jpeg", "png", "bmp", "tiff")
            if rng.random() < 0.1:
                data, is_whole = damage(rng, data), False
            file.write_bytes(data)
    assert_videos(f"davis:{folder}:val")
    for video in open_videos(f"davis:{folder}:val") if is_whole else ():
        for index in range(len(video)):
            assert abs(video.frame(index).mean() - grey.mean()) < 6
            assert {k: mask.tolist() for k, mask in video.masks(index).items()} == {
                k: (ids() == k).tolist() for k in (1, 2)
            }


def run_folder(rng: random.Random, folder: Path) -> None:
    run = write_run(folder / "run")
    files = sorted([*run.rglob("*.json"), *run.rglob("*.csv"), run / "recipe.yaml"])
    file = rng.choice(files)
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.75:
        file.write_bytes(encode_json(rng, mutate(rng, json.loads(data))))
    else:
        file.write_bytes(damage(rng, data))
    read = read_run(run)
    with as_runs_write([read]):
        page = render(read)
    assert "root:x:" not in page and PASSWD not in page and str(folder) not in page


def changed_tensor(rng: random.Random, tensor: torch.Tensor) -> Any:
    """A tensor as no SAM2 checkpoint holds it."""
    deed = rng.randrange(11)
    if deed < 4:
        dtypes = [torch.int8, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
        return tensor.to(rng.choice([*dtypes, torch.complex64]))
    if deed == 4:
        return tensor.double() * 1e300
    if deed == 5:
        return tensor * float("nan")
    if deed == 6:
        return tensor.to_sparse()
    if deed == 7:
        return rng.choice([tensor[None], tensor.new_zeros(1).expand(tensor.shape), torch.nn.Parameter(tensor)])
    if deed == 8:
        return torch.quantize_per_tensor(tensor.flatten(), 0.1, 0, torch.qint8)
    return tensor.to("meta") if deed == 9 else rng.choice(SCALARS[:12])


def state_file(state: dict[str, torch.Tensor]) -> Case:
    def case(rng: random.Random, folder: Path) -> None:
        changed: Any = dict(state)
        for _ in range(rng.choice([0, 1, 1, 2])):
            name = rng.choice(list(state))
            changed[name] = changed_tensor(rng, state[name])
        if rng.random() < 0.2:
            changed.pop(rng.choice(list(changed)))
        if rng.random() < 0.2:
            prefix = rng.choice(["module.", "_orig_mod.", "model.", "model.module.", "x."])
            changed = {f"{prefix}{name}": tensor for name, tensor in changed.items()}
        wrap = rng.choice(["model", "model", "state_dict", "", "list", "ema"])
        changed = [changed] if wrap == "list" else {wrap: changed} if wrap else changed
        buffer = io.BytesIO()
        torch.save(changed, buffer)
        data = buffer.getvalue()
        file = folder / f"m{rng.choice(['.pt', '.pt', '.pth', '.safetensors', '.ckpt'])}"
        file.write_bytes(damage(rng, data) if rng.random() < 0.4 else data)
        model, _ = load_model(file, ["model.image_size=64"])
        assert_sound(model)

    return case


def packed_file(file: Path) -> Case:
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    whole = file.read_bytes()

    def case(rng: random.Random, folder: Path) -> None:
        target = folder / "model.safetensors"
        if rng.random() < 0.3:
            target.write_bytes(damage(rng, whole))
        else:
            header, own = dict(metadata), dict(tensors)
            if rng.random() < 0.7:
                key = rng.choice(["recipe", "extra", "weights"])
                header[key] = encode_json(rng, mutate(rng, json.loads(header[key]))).decode(errors="replace")
            else:
                name = rng.choice(list(own))
                own[name] = rng.choice(
                    [own[name][..., :1].clone(), torch.full_like(own[name], 255), own[name].double()]
                )
            if rng.random() < 0.7:  # forged: the checksums are right
                named = {key: header[key] for key in packed.HEADER}
                header["header_crc32"] = packed._checksum(named)
                header["crc32"] = packed._checksum(own)
            save_file(own, target, header)
        model, _ = load_model(target)
        assert_sound(model)

    return case


def assert_sound(model: SAM2) -> None:
    assert all(bool(tensor.float().isfinite().all()) for tensor in model.state_dict().values())


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return seeing().state_dict()


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (recipe_file, 450), (overrides, 150), (sweep_file, 150), (coco_file, 300), (yolo_file, 200), (sav_file, 200),
        (video_file, 200), (davis_pictures, 300), (run_folder, 20),
    ],
)  # fmt: skip
def test_files(case: Case, count: int, tmp_path: Path) -> None:
    assert not (found := faults(case, count, tmp_path)), "\n".join(found)


def test_checkpoints(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert not (found := faults(state_file(state), 40, tmp_path)), "\n".join(found)


def test_packed_files(runs: dict[str, Path], tmp_path: Path) -> None:
    assert not (found := faults(packed_file(runs["ptq"] / "model.safetensors"), 40, tmp_path)), "\n".join(found)
