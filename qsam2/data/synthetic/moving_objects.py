"""Generated videos of moving objects (ours): textured shapes that move over photographs, determined by a seed.

No video data ships with the package, so the demo, the tests and the pretraining of nano use these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np

from qsam2.data.synthetic.outlines import draw_outline
from qsam2.data.synthetic.sprites import (
    Sprite,
    add_grain,
    blend,
    brighten,
    draw_bend,
    draw_grain,
    draw_sprite,
)
from qsam2.data.synthetic.textures import PHOTOGRAPHS, smooth_patch, texture_patch
from qsam2.data.synthetic.warps import Wave, draw_wave, interpolate, positions, project, similarity
from qsam2.data.video import Video
from qsam2.errors import UserError

FIRST_SEED = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}
"""First seed of each split; splits have 1e9 seeds each, so that no video of val or test is trained on."""
SEEDS_PER_SPLIT = 1_000_000_000

SMALLEST_AREA, LARGEST_AREA = 0.01, 0.35  # of the frame, visible, in frame 0
_LIMITS = {"num_frames": (1, 100_000), "max_objects": (1, 8), "height": (64, 2048), "width": (64, 2048)}


class MovingObjects(Video):
    """The video of a ``seed``, identical on every machine; the seed also determines its difficulty.

    One to ``max_objects`` objects of irregular outline with the texture of a photograph move, turn, bend, change size
    and light, hide one another, leave and return, before a photograph seen by a moving camera, among distractors that
    are not annotated. In frame 0 each object covers 1 to 35 percent of the frame. The masks are the visible parts
    (disjoint); every object has one in every frame, all False while it is out of view. A longer video continues the
    shorter one of the same seed.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self, seed: int, *, num_frames: int = 40, size: tuple[int, int] = (256, 256), max_objects: int = 3
    ) -> None:
        arguments = {"num_frames": num_frames, "max_objects": max_objects, "height": size[0], "width": size[1]}
        for key, value in arguments.items():
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
        """Visible part of every object in frame ``index``: {1..n: bool (H, W)}, all False if it is out of view."""
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
    num_frames: int = 40,
    size: tuple[int, int] = (256, 256),
    max_objects: int = 3,
) -> list[MovingObjects]:
    """The first ``count`` videos of a split; the splits' seeds are disjoint (``FIRST_SEED``).

    Raises:
        UserError: an unknown split, or ``count`` out of range.
    """
    if split not in FIRST_SEED:
        raise UserError(f"moving_objects: split is {split!r}; allowed are {', '.join(FIRST_SEED)}")
    if not 1 <= count <= SEEDS_PER_SPLIT:
        raise UserError(f"moving_objects: count is {count}; give a whole number from 1 to {SEEDS_PER_SPLIT}")
    first = FIRST_SEED[split]
    return [
        MovingObjects(seed, num_frames=num_frames, size=size, max_objects=max_objects)
        for seed in range(first, first + count)
    ]


@dataclass(frozen=True)
class _Scene:
    background: np.ndarray  # RGB, its middle at the scene's origin
    camera: tuple[Wave, Wave, Wave, Wave]  # x, y, angle, log2 of the zoom
    sprites: Sequence[Sprite]  # from far to near
    light: Wave
    grain: np.ndarray | None
    shutter: float  # share of the frame time with motion blur
    num_objects: int

    def view(self, time: float, size: tuple[int, int]) -> np.ndarray:
        """Matrix (3, 3) from the scene to the frame's pixels."""
        x, y, angle, zoom = (wave(time) for wave in self.camera)
        return similarity(size[1] / 2 + x, size[0] / 2 + y, angle, 2**zoom)


@lru_cache(maxsize=2)
def _render(seed: int, size: tuple[int, int], max_objects: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    scene = _scene(seed, size, max_objects)
    frame, labels = _compose(scene, size, index)
    frame = brighten(frame, scene.light(index))
    return (frame if scene.grain is None else add_grain(frame, scene.grain, index)), labels


def _compose(scene: _Scene, size: tuple[int, int], time: float) -> tuple[np.ndarray, np.ndarray]:
    view = scene.view(time, size)
    middle = similarity(scene.background.shape[1] / 2, scene.background.shape[0] / 2)
    background = positions(middle @ np.linalg.inv(view), size)
    frame = interpolate(scene.background, *background, cv2.BORDER_REFLECT_101)
    labels = np.zeros(size, np.uint8)
    for sprite in scene.sprites:
        blur = _motion(scene, sprite, size, time) if scene.shutter else None
        draw_sprite(frame, labels, sprite, view, time, blur)
    return frame, labels


def _motion(scene: _Scene, sprite: Sprite, size: tuple[int, int], time: float) -> np.ndarray | None:
    """Motion of the sprite's middle while the shutter is open, in (x, y) pixels; None if below two."""
    middle = np.array([[sprite.picture.shape[0] / 2] * 2])
    ends = (time - scene.shutter / 2, time + scene.shutter / 2)
    start, end = (project(scene.view(end, size) @ sprite.placement(end), middle)[0] for end in ends)
    return end - start if np.abs(end - start).max() >= 2 else None


@lru_cache(maxsize=8)
def _scene(seed: int, size: tuple[int, int], max_objects: int) -> _Scene:
    """Draw scenes from the seed until every object has an allowed size in frame 0."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    while True:
        scene = _draw_scene(rng, size, max_objects)
        labels = _compose(scene, size, 0)[1]
        areas = np.bincount(labels.ravel(), minlength=scene.num_objects + 1)[1:] / labels.size
        if areas.min() >= SMALLEST_AREA and areas.max() <= LARGEST_AREA:
            return scene


def _draw_scene(rng: np.random.Generator, size: tuple[int, int], max_objects: int) -> _Scene:
    height, width = size
    hard = rng.uniform()  # 0 easy, 1 hard
    photo = int(rng.integers(len(PHOTOGRAPHS)))
    num_objects = int(rng.integers(1, max_objects + 1))
    objects = []
    for object_id in range(1, num_objects + 1):
        same = photo if rng.random() < 0.35 * hard else None
        objects.append(_draw_object(rng, size, hard, object_id, _draw_picture(rng, min(size), same, num_objects)))
    others = [
        _draw_distractor(rng, size, hard, objects[int(rng.integers(num_objects))])
        for _ in range(int(rng.binomial(3, 0.15 + 0.5 * hard)))
    ]
    movers = [*objects, *others]
    sprites = [part for index in rng.permutation(len(movers)) for part in _with_parts(rng, hard, movers[index])]
    if rng.random() < 0.1 + 0.25 * hard:
        sprites.append(_draw_screen(rng, size, photo))
    strength = int(rng.integers(0, 4 + round(14 * hard)))
    return _Scene(
        background=texture_patch(rng, int(1.5 * height), int(1.5 * width), photo),
        camera=_draw_camera(rng, min(size), hard),
        sprites=sprites,
        light=draw_wave(rng, rng.uniform(-0.3, 0.2), rng.uniform(0, 0.5) * hard, (16, 50)),
        grain=draw_grain(rng, size, strength) if strength > 3 else None,
        shutter=rng.uniform(0.2, 0.7) if rng.random() < 0.3 else 0.0,
        num_objects=num_objects,
    )


def _draw_camera(rng: np.random.Generator, unit: int, hard: float) -> tuple[Wave, Wave, Wave, Wave]:
    """Static, or a slow pan, turn and zoom; sometimes with hand shake."""
    pan = unit * 0.2 * hard * (rng.random() < 0.7)
    shake = unit * 0.004 * rng.uniform(0, 1) * (rng.random() < 0.4)
    x, y = (draw_wave(rng, 0, reach, (24, 60)) + draw_wave(rng, 0, shake, (4, 10)) for reach in (pan, 0.6 * pan))
    angle = draw_wave(rng, 0, 0.25 * hard * (rng.random() < 0.4), (24, 60))
    return x, y, angle, draw_wave(rng, 0, 0.4 * hard * (rng.random() < 0.5), (24, 60))


def _draw_picture(rng: np.random.Generator, unit: int, photo: int | None, num_objects: int) -> np.ndarray:
    """A shape textured from one or two photographs, RGBA uint8 (S, S, 4)."""
    largest = 0.85 if num_objects == 1 else 0.65
    side = max(int(unit * 2 ** rng.uniform(np.log2(0.24), np.log2(largest))) // 8 * 8, 16)
    colours = texture_patch(rng, side, side, photo) if rng.random() < 0.85 else smooth_patch(rng, side, side)
    if rng.random() < 0.35:  # a part of another colour
        part = np.roll(draw_outline(rng, side), rng.integers(0, side, 2), (0, 1))
        blend(colours, texture_patch(rng, side, side), part)
    if rng.random() < 0.4:  # lit from one side
        shade = draw_wave(rng, 0, rng.uniform(0, 0.6), (2, 3))
        columns = np.array([shade(x / side) for x in range(side)])
        gain = np.rint(256 * 2**columns).astype(np.int32)[:, None]
        colours = np.clip(colours * gain >> 8, 0, 255).astype(np.uint8)
    return np.dstack([colours, draw_outline(rng, side)])


def _draw_object(
    rng: np.random.Generator, size: tuple[int, int], hard: float, object_id: int, picture: np.ndarray
) -> Sprite:
    """A ``picture`` that oscillates around a place within the frame, so that it may leave and return."""
    height, width = size
    leaves = rng.random() < 0.15 + 0.3 * hard
    reach = (0.25 + 0.75 * hard) * rng.uniform(0.3, 1.0) * (0.75 if leaves else 0.25)
    period = (24, 72)
    bend = draw_bend(rng, rng.uniform(0.01, 0.02 + 0.06 * hard))
    return Sprite(
        picture,
        object_id,
        x=draw_wave(rng, rng.uniform(-0.42, 0.42) * width, reach * width, period),
        y=draw_wave(rng, rng.uniform(-0.42, 0.42) * height, reach * height, period),
        angle=draw_wave(
            rng, rng.uniform(-np.pi, np.pi), rng.uniform(0, 0.8) * hard, period, rng.normal(0, 0.04) * hard
        ),
        size=draw_wave(rng, 0, rng.uniform(0, 0.6) * hard, period),
        aspect=draw_wave(rng, rng.uniform(-0.4, 0.4), rng.uniform(0, 0.6) * hard, period),
        light=draw_wave(rng, rng.uniform(-0.2, 0.2), rng.uniform(0, 0.5) * hard, period),
        bend=bend if rng.random() < 0.7 else None,
    )


def _draw_distractor(rng: np.random.Generator, size: tuple[int, int], hard: float, like: Sprite) -> Sprite:
    """An object without annotation that shares the texture, the outline or both with an annotated one."""
    side = like.picture.shape[0]
    picture = like.picture.copy()
    kind = rng.random()
    if kind < 0.4:
        picture[..., 3] = draw_outline(rng, side)
    elif kind < 0.7:
        picture[..., :3] = texture_patch(rng, side, side)
    return _draw_object(rng, size, hard, 0, picture)


def _with_parts(rng: np.random.Generator, hard: float, body: Sprite) -> list[Sprite]:
    """The body, sometimes with swinging limbs and a shadow; from far to near."""
    side = body.picture.shape[0]
    parts = [body]
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.3 else 0):
        direction = rng.uniform(-np.pi, np.pi)
        joint = side * (0.5 + 0.22 * np.array([np.cos(direction), np.sin(direction)]))
        limb = replace(
            body,
            picture=np.dstack([np.roll(body.picture[..., :3], side // 3, 0), _limb_outline(rng, side)]),
            x=Wave(joint[0]),
            y=Wave(joint[1]),
            angle=draw_wave(rng, direction, rng.uniform(0.1, 0.7), (8, 30)),
            size=Wave(0.0),
            aspect=Wave(rng.uniform(-0.6, 0.0)),
            bend=None,
            pivot=(0.12, 0.5),
            parent=body,
        )
        parts.insert(int(rng.integers(len(parts) + 1)), limb)
    if rng.random() < 0.2:
        opacity = (body.picture[..., 3] * int(rng.integers(60, 115)) / 255).astype(np.uint8)
        shadow = np.dstack([np.zeros((side, side, 3), np.uint8), opacity])
        aside = side * rng.uniform(-0.2, 0.2, 2)
        x, y = replace(body.x, start=body.x.start + aside[0]), replace(body.y, start=body.y.start + aside[1])
        parts.insert(0, replace(body, picture=shadow, object_id=0, x=x, y=y))
    return parts


def _limb_outline(rng: np.random.Generator, side: int) -> np.ndarray:
    """An ellipse along x, opacity uint8 (side, side)."""
    grid = np.arange(side) - side // 2
    long, short = side // 2 - 3, max(int(side * rng.uniform(0.06, 0.16)), 2)
    inside = (grid[None] * short) ** 2 + (grid[:, None] * long) ** 2 < (long * short) ** 2
    return np.where(inside, 255, 0).astype(np.uint8)


def _draw_screen(rng: np.random.Generator, size: tuple[int, int], photo: int) -> Sprite:
    """A long object without annotation, in front of all others, that occludes them."""
    side = int(1.2 * max(size)) // 8 * 8
    texture = photo if rng.random() < 0.5 else None
    width = max(int(side * rng.uniform(0.05, 0.14)), 4)
    opacity = np.zeros((side, side), np.uint8)
    edge = (rng.integers(-1, 2, side).cumsum() // 3).clip(-width // 2, width // 2)
    columns = np.arange(side)[None] - side // 2 - edge[:, None]
    opacity[np.abs(columns) < width // 2] = 255
    opacity[[0, -1]] = 0
    return Sprite(
        np.dstack([texture_patch(rng, side, side, texture), opacity]),
        0,
        x=Wave(rng.uniform(-0.4, 0.4) * size[1]),
        y=Wave(rng.uniform(-0.4, 0.4) * size[0]),
        angle=Wave(rng.normal(0, 0.3) + np.pi / 2 * rng.integers(2)),
    )
