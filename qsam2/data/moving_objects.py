"""Videos of moving objects made from a seed: photographs cut to irregular shapes that move over photographs.

Ours: no video data ships with the package, so the demo, the tests and the pretraining of the nano model use these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np

from qsam2.data.outlines import draw_outline
from qsam2.data.sprites import Camera, Sprite, brighten, draw_background, draw_sprite
from qsam2.data.textures import PHOTOGRAPHS, cut
from qsam2.data.video import Video
from qsam2.data.warps import Wave, draw_wave
from qsam2.errors import UserError

FIRST_SEED = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}
"""The splits' seeds: 1e9 each, so that no video of val or test is ever trained on."""
SEEDS_A_SPLIT = 1_000_000_000

SMALLEST_AREA, LARGEST_AREA = 0.01, 0.35  # of the frame, visible, in frame 0
_LIMITS = {"num_frames": (1, 100_000), "max_objects": (1, 8), "height": (64, 2048), "width": (64, 2048)}


class MovingObjects(Video):
    """The video that ``seed`` stands for, the same on every machine; its difficulty is drawn from the seed too.

    One to ``max_objects`` objects of irregular outline with the texture of a photograph move, turn, bend, change size
    and light, hide one another, leave and return, before a photograph seen by a moving camera, among distractors that
    are not annotated. In frame 0 each object shows on 1 to 35 percent of the frame. The masks are the visible parts
    (disjoint); every object has one in every frame, all False while it is out of view. A longer video goes on where a
    shorter one of the same seed ends.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self, seed: int, *, num_frames: int = 24, size: tuple[int, int] = (256, 256), max_objects: int = 3
    ) -> None:
        given = {"num_frames": num_frames, "max_objects": max_objects, "height": size[0], "width": size[1]}
        for key, value in given.items():
            low, high = _LIMITS[key]
            if not low <= value <= high:
                raise UserError(f"MovingObjects: {key} is {value}; give a whole number from {low} to {high}")
        if seed < 0:
            raise UserError(f"MovingObjects: seed is {seed}; give a whole number of 0 or more")
        self.name = f"moving-{seed:010d}"
        self.frame_names = [f"{index:05d}" for index in range(num_frames)]
        self.size = (int(size[0]), int(size[1]))
        self.seed = int(seed)
        self.max_objects = int(max_objects)

    def frame(self, index: int) -> np.ndarray:
        """Frame ``index`` as RGB, uint8 (H, W, 3)."""
        return self._rendered(index)[0].copy()

    def masks(self, index: int) -> dict[int, np.ndarray]:
        """Visible part of every object in frame ``index``: {1..n: bool (H, W)}, all False where it is out of view."""
        labels = self._rendered(index)[1]
        count = _scene(self.seed, self.size, self.max_objects).num_objects
        return {object_id: labels == object_id for object_id in range(1, count + 1)}

    def _rendered(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: frame {index} of {len(self)}")
        return _render(self.seed, self.size, self.max_objects, index)


def moving_objects(
    split: Literal["train", "val", "test"],
    count: int,
    *,
    num_frames: int = 24,
    size: tuple[int, int] = (256, 256),
    max_objects: int = 3,
) -> list[MovingObjects]:
    """The first ``count`` videos of a split; the splits' seeds are disjoint (``FIRST_SEED``).

    Raises:
        UserError: an unknown split, or ``count`` out of range.
    """
    if split not in FIRST_SEED:
        raise UserError(f"moving_objects: split is {split!r}; allowed are {', '.join(FIRST_SEED)}")
    if not 1 <= count <= SEEDS_A_SPLIT:
        raise UserError(f"moving_objects: count is {count}; give a whole number from 1 to {SEEDS_A_SPLIT}")
    first = FIRST_SEED[split]
    return [
        MovingObjects(seed, num_frames=num_frames, size=size, max_objects=max_objects)
        for seed in range(first, first + count)
    ]


@dataclass(frozen=True)
class _Scene:
    background: np.ndarray
    camera: Camera
    sprites: Sequence[Sprite]  # from far to near
    light: Wave
    noise: np.ndarray | None
    num_objects: int


@lru_cache(maxsize=2)
def _render(seed: int, size: tuple[int, int], max_objects: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    scene = _scene(seed, size, max_objects)
    frame, labels = _compose(scene, size, index)
    frame = brighten(frame, scene.light(index))
    if scene.noise is not None:
        height, width = size
        top, left = np.random.default_rng((seed, index)).integers(0, 64, 2)
        grain = scene.noise[top : top + height, left : left + width]
        frame = cv2.subtract(cv2.add(frame, grain[..., :3]), grain[..., 3:])
    return frame, labels


def _compose(scene: _Scene, size: tuple[int, int], time: float) -> tuple[np.ndarray, np.ndarray]:
    view = scene.camera.view(time, size)
    frame = draw_background(scene.background, view, size)
    labels = np.zeros(size, np.uint8)
    for sprite in scene.sprites:
        draw_sprite(frame, labels, sprite, view, time)
    return frame, labels


@lru_cache(maxsize=8)
def _scene(seed: int, size: tuple[int, int], max_objects: int) -> _Scene:
    """Draws scenes from the seed until frame 0 shows every object at a reasonable size."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    while True:
        scene = _draw_scene(rng, size, max_objects)
        labels = _compose(scene, size, 0)[1]
        areas = np.bincount(labels.ravel(), minlength=scene.num_objects + 1)[1:] / labels.size
        if areas.min() >= SMALLEST_AREA and areas.max() <= LARGEST_AREA:
            return scene


def _draw_scene(rng: np.random.Generator, size: tuple[int, int], max_objects: int) -> _Scene:
    height, width = size
    unit = min(size)
    hard = rng.uniform()  # 0 easy, 1 hard
    photo = int(rng.integers(len(PHOTOGRAPHS)))
    background = cut(rng, int(1.5 * height), int(1.5 * width), photo)
    reach = unit * 0.2 * hard * (rng.random() < 0.7)
    camera = Camera(
        draw_wave(rng, 0, reach, (24, 60)),
        draw_wave(rng, 0, reach * 0.7, (24, 60)),
        draw_wave(rng, 0, 0.25 * hard * (rng.random() < 0.4), (24, 60)),
        draw_wave(rng, 0, 0.4 * hard * (rng.random() < 0.5), (24, 60)),
    )
    num_objects = int(rng.integers(1, max_objects + 1))
    sprites = []
    for object_id in range(1, num_objects + 1):
        same = photo if rng.random() < 0.35 * hard else None
        sprites.append(_draw_object(rng, size, hard, object_id, _picture(rng, unit, same, num_objects)))
    for _ in range(int(rng.binomial(3, 0.15 + 0.5 * hard))):
        sprites.append(_distractor(rng, size, hard, sprites[int(rng.integers(num_objects))]))
    sprites = [sprites[index] for index in rng.permutation(len(sprites))]
    grain = int(rng.integers(0, 4 + round(14 * hard)))
    noise = rng.integers(0, grain, (height + 64, width + 64, 6), dtype=np.uint8) if grain > 3 else None
    return _Scene(
        background, camera, sprites, draw_wave(rng, rng.uniform(-0.3, 0.2), 0.4 * hard, (16, 50)), noise, num_objects
    )


def _picture(rng: np.random.Generator, unit: int, photo: int | None, num_objects: int) -> np.ndarray:
    """A shape filled with the patch of a photograph, RGBA uint8 (S, S, 4)."""
    largest = 0.75 if num_objects == 1 else 0.6
    side = int(unit * 2 ** rng.uniform(np.log2(0.2), np.log2(largest))) // 8 * 8
    colours = cut(rng, side, side, photo)
    return np.dstack([colours, draw_outline(rng, side)])


def _draw_object(
    rng: np.random.Generator, size: tuple[int, int], hard: float, object_id: int, picture: np.ndarray
) -> Sprite:
    height, width = size
    speed = (0.25 + 0.75 * hard) * rng.uniform(0.3, 1.0)
    leaves = rng.random() < 0.15 + 0.3 * hard
    reach = speed * (0.9 if leaves else 0.4)
    period = (20, 56)
    bends = rng.random() < 0.7
    return Sprite(
        picture,
        object_id,
        draw_wave(rng, rng.uniform(-0.42, 0.42) * width, reach * width, period),
        draw_wave(rng, rng.uniform(-0.42, 0.42) * height, reach * height, period),
        draw_wave(rng, rng.uniform(-np.pi, np.pi), rng.uniform(0, 0.8) * hard, period, rng.normal(0, 0.04) * hard),
        draw_wave(rng, 0, rng.uniform(0, 0.6) * hard, period),
        draw_wave(rng, rng.uniform(-0.4, 0.4), rng.uniform(0, 0.6) * hard, period),
        draw_wave(rng, rng.uniform(-0.2, 0.2), rng.uniform(0, 0.5) * hard, period),
        rng.uniform(0.01, 0.02 + 0.06 * hard) if bends else 0.0,
        tuple(draw_wave(rng, p, rng.uniform(0.3, 1.5), (12, 40), rng.normal(0, 0.15)) for p in rng.uniform(0, 6.3, 2)),
        tuple(rng.uniform(0.5, 1.6, 2)),
    )


def _distractor(rng: np.random.Generator, size: tuple[int, int], hard: float, like: Sprite) -> Sprite:
    """A thing that is not annotated and shares the texture, the outline or both with an object."""
    side = like.picture.shape[0]
    picture = like.picture.copy()
    kind = rng.random()
    if kind < 0.4:
        picture[..., 3] = draw_outline(rng, side)
    elif kind < 0.7:
        picture[..., :3] = cut(rng, side, side)
    return _draw_object(rng, size, hard, 0, picture)
