"""Generated videos of moving objects (ours): textured shapes that move over photographs, determined by a seed.

No video data ships with the package, so the demo, the tests and the pretraining of nano use these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np

from qsam2.data.synthetic.appearance import PHOTOGRAPHS, draw_outline, smooth_patch, texture_patch
from qsam2.data.synthetic.scenes import GeneratedVideo, Scene, Sprite, blend, draw_grain, draw_sprite
from qsam2.data.synthetic.warps import Bend, Wave, interpolate, positions, project, similarity
from qsam2.errors import UserError

FIRST_SEED = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}
"""First seed of each split; splits have 1e9 seeds each, so that no video of val or test is trained on."""
MOST_VIDEOS = 1_000_000
"""They are listed in memory."""

SMALLEST_AREA, LARGEST_AREA = 0.01, 0.35  # of the frame, visible, in frame 0


class MovingObjects(GeneratedVideo):
    """The video of a ``seed``, which also determines its difficulty.

    One to ``max_objects`` objects of irregular outline with the texture of a photograph move, turn, bend, change size
    and light, hide one another, leave and return, before a photograph seen by a moving camera, among distractors that
    are not annotated. In frame 0 each object covers 1 to 35 percent of the frame. A longer video continues the shorter
    one of the same seed.
    """

    def __init__(
        self, seed: int, *, num_frames: int = 40, size: tuple[int, int] = (256, 256), max_objects: int = 3
    ) -> None:
        super().__init__(f"moving-{seed:010d}", seed, num_frames, size, max_objects=(max_objects, 1, 8))
        self.max_objects = int(max_objects)

    def scene(self) -> Scene:
        return _scene(self.seed, self.size, self.max_objects)


def moving_objects(split: Literal["train", "val", "test"], count: int, **options: Any) -> list[MovingObjects]:
    """The first ``count`` videos of a split, with ``options`` of `MovingObjects`; the splits' seeds are disjoint."""
    if split not in FIRST_SEED:
        raise UserError(f"moving_objects: split is {split!r}; allowed are {', '.join(FIRST_SEED)}")
    if not 1 <= count <= MOST_VIDEOS:
        raise UserError(f"moving_objects: count is {count}; give a whole number from 1 to {MOST_VIDEOS}")
    first = FIRST_SEED[split]
    return [MovingObjects(seed, **options) for seed in range(first, first + count)]


@dataclass(frozen=True)
class _Scene(Scene):
    size: tuple[int, int]  # (height, width) of the frame
    background: np.ndarray  # RGB, its middle at the scene's origin
    camera: tuple[Wave, Wave, Wave, Wave]  # x, y, angle, log2 of the zoom
    shutter: float  # share of the frame time with motion blur

    def view(self, time: float) -> np.ndarray:
        """Matrix (3, 3) from the scene to the frame's pixels."""
        x, y, angle, zoom = (wave(time) for wave in self.camera)
        return similarity(self.size[1] / 2 + x, self.size[0] / 2 + y, angle, 2**zoom)

    def compose(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        view = self.view(time)
        middle = similarity(self.background.shape[1] / 2, self.background.shape[0] / 2)
        background = positions(middle @ np.linalg.inv(view), self.size)
        frame = interpolate(self.background, *background, cv2.BORDER_REFLECT_101)
        labels = np.zeros(self.size, np.uint8)
        for sprite in self.sprites:
            draw_sprite(frame, labels, sprite, view, time, self._motion(sprite, time) if self.shutter else None)
        return frame, labels

    def _motion(self, sprite: Sprite, time: float) -> np.ndarray | None:
        """Motion of the sprite's middle while the shutter is open, in (x, y) pixels; None if below two."""
        middle = np.array([[sprite.picture.shape[0] / 2] * 2])
        ends = (time - self.shutter / 2, time + self.shutter / 2)
        start, end = (project(self.view(end) @ sprite.placement(end), middle)[0] for end in ends)
        return end - start if np.abs(end - start).max() >= 2 else None


@lru_cache(maxsize=8)
def _scene(seed: int, size: tuple[int, int], max_objects: int) -> _Scene:
    """Draw scenes from the seed until every object has an allowed size in frame 0."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    while True:
        scene = _draw_scene(rng, size, max_objects)
        labels = scene.compose(0)[1]
        areas = np.bincount(labels.ravel(), minlength=len(scene.object_ids) + 1)[1:] / labels.size
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
        size=size,
        background=texture_patch(rng, int(1.5 * height), int(1.5 * width), photo),
        camera=_draw_camera(rng, min(size), hard),
        sprites=sprites,
        light=Wave.draw(rng, rng.uniform(-0.3, 0.2), rng.uniform(0, 0.5) * hard, (16, 50)),
        grain=draw_grain(rng, size, strength) if strength > 3 else None,
        shutter=rng.uniform(0.2, 0.7) if rng.random() < 0.3 else 0.0,
        object_ids=range(1, num_objects + 1),
    )


def _draw_camera(rng: np.random.Generator, unit: int, hard: float) -> tuple[Wave, Wave, Wave, Wave]:
    """Static, or a slow pan, turn and zoom; sometimes with hand shake."""
    pan = unit * 0.2 * hard * (rng.random() < 0.7)
    shake = unit * 0.004 * rng.uniform(0, 1) * (rng.random() < 0.4)
    x, y = (Wave.draw(rng, 0, reach, (24, 60)) + Wave.draw(rng, 0, shake, (4, 10)) for reach in (pan, 0.6 * pan))
    angle = Wave.draw(rng, 0, 0.25 * hard * (rng.random() < 0.4), (24, 60))
    return x, y, angle, Wave.draw(rng, 0, 0.4 * hard * (rng.random() < 0.5), (24, 60))


def _draw_picture(rng: np.random.Generator, unit: int, photo: int | None, num_objects: int) -> np.ndarray:
    """A shape textured from one or two photographs, RGBA uint8 (S, S, 4)."""
    largest = 0.85 if num_objects == 1 else 0.65
    side = max(int(unit * 2 ** rng.uniform(np.log2(0.24), np.log2(largest))) // 8 * 8, 16)
    colours = texture_patch(rng, side, side, photo) if rng.random() < 0.85 else smooth_patch(rng, side, side)
    if rng.random() < 0.35:  # a part of another colour
        part = np.roll(draw_outline(rng, side), rng.integers(0, side, 2), (0, 1))
        blend(colours, texture_patch(rng, side, side), part)
    if rng.random() < 0.4:  # lit from one side
        shade = Wave.draw(rng, 0, rng.uniform(0, 0.6), (2, 3))
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
    bend = Bend.draw(rng, rng.uniform(0.01, 0.02 + 0.06 * hard))
    return Sprite(
        picture,
        object_id,
        x=Wave.draw(rng, rng.uniform(-0.42, 0.42) * width, reach * width, period),
        y=Wave.draw(rng, rng.uniform(-0.42, 0.42) * height, reach * height, period),
        angle=Wave.draw(
            rng, rng.uniform(-np.pi, np.pi), rng.uniform(0, 0.8) * hard, period, rng.normal(0, 0.04) * hard
        ),
        size=Wave.draw(rng, 0, rng.uniform(0, 0.6) * hard, period),
        aspect=Wave.draw(rng, rng.uniform(-0.4, 0.4), rng.uniform(0, 0.6) * hard, period),
        light=Wave.draw(rng, rng.uniform(-0.2, 0.2), rng.uniform(0, 0.5) * hard, period),
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
    grid = np.arange(side) - side // 2
    parts = [body]
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.3 else 0):
        direction = rng.uniform(-np.pi, np.pi)
        joint = side * (0.5 + 0.22 * np.array([np.cos(direction), np.sin(direction)]))
        long, short = side // 2 - 3, max(int(side * rng.uniform(0.06, 0.16)), 2)
        inside = (grid[None] * short) ** 2 + (grid[:, None] * long) ** 2 < (long * short) ** 2
        limb = replace(
            body,
            picture=np.dstack([np.roll(body.picture[..., :3], side // 3, 0), inside * np.uint8(255)]),
            x=Wave(joint[0]),
            y=Wave(joint[1]),
            angle=Wave.draw(rng, direction, rng.uniform(0.1, 0.7), (8, 30)),
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
