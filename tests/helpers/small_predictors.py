"""Small models with random weights that see objects, sam2's own class around the same weights, and small videos."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from hydra.utils import instantiate
from PIL import Image
from sam2.sam2_video_predictor import SAM2VideoPredictor
from small_models import seeing

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.formats.packed import load_packed, save_packed, save_weights
from qsam2.layers.convert import convert, finalize
from qsam2.models import SAM2, build_sam2
from qsam2.models.sam2 import model_config
from qsam2.recipe import Recipe, build_recipe

SIZE_PX = 64
HEIGHT, WIDTH = 45, 79
"""Size of the pictures in pixels: odd, which H.264 cannot encode."""
QUANTIZE = {"weights": {"method": "minmax", "bits": 4}}


def random_nano() -> SAM2:
    """nano with random weights whose masks are neither empty nor everything."""
    model = seeing(image_size=SIZE_PX)
    for head in model.sam_mask_decoder.output_hypernetworks_mlps:
        head.layers[2].weight.data *= 3
    return model


def small_recipe(quantize: bool) -> Recipe:
    values = {"name": "small", "model": {"size": "nano", "image_size": SIZE_PX}}
    return build_recipe({**values, "quantize": QUANTIZE} if quantize else values)


def write_models(folder: Path) -> dict[str, Path]:
    """The same weights as a float file and, with weights of 4 bits, as the packed file of a run folder."""
    model = random_nano()
    paths = {"float": folder / "float.safetensors", "packed": folder / "run"}
    save_weights(paths["float"], model, small_recipe(False).model_dump(mode="json"))
    paths["packed"].mkdir()
    recipe = small_recipe(True)
    assert recipe.quantize is not None
    convert(model, recipe.quantize)
    find_ranges(model, lambda batch: None, [])
    finalize(model)
    save_packed(paths["packed"] / "model.safetensors", model, recipe.model_dump(mode="json"))
    return paths


def stock_predictor(kind: str, path: Path) -> SAM2VideoPredictor:
    """sam2's own class with the weights of one of `write_models`."""
    config = model_config("nano", image_size=SIZE_PX)
    del config["decoder_mlp_dim"]
    config._target_ = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    stock = instantiate(config).eval()
    stock.sam_mask_decoder.transformer = build_sam2("nano").sam_mask_decoder.transformer
    if kind == "packed":
        load_packed(path / "model.safetensors", stock)
    else:
        stock.load_state_dict(random_nano().state_dict())
    return stock


def square(left: int = 12) -> np.ndarray:
    """A mask of the square that `pictures` show, bool (H, W)."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[12:30, left : left + 22] = True
    return mask


def pictures(length: int, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """A bright square that moves over noise, uint8 (H, W, 3)."""
    noise = np.random.default_rng(0)
    frames = []
    for index in range(length):
        frame = noise.integers(0, 120, (height, width, 3), dtype=np.uint8)
        frame[12:30, 8 + index : 30 + index] += 120
        frames.append(frame)
    return frames


def write_folder(folder: Path, frames: list[np.ndarray]) -> Path:
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index}.jpg")
    return folder


def write_video(path: Path, frames: list[np.ndarray], rate: int = 12, degrees: int = 0) -> Path:
    """Frames of even size as H.264, with frames that are decoded out of their order; shown turned counter-clockwise."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "2", "g": "8"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if degrees:
            stream.set_display_rotation(degrees)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path
