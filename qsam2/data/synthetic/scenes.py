"""Scenes that generated videos are rendered from: sprites in motion, drawn into a frame and its label map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from qsam2.data.synthetic.warps import Bend, Wave, corners, interpolate, positions, project, similarity
from qsam2.data.video import Masks, Video
from qsam2.errors import UserError

LONGEST_PX = 2048
"""Longest side of a generated video."""
_STILL = Wave(0.0)


@dataclass(frozen=True)
class Sprite:
    """A picture with opacity and its motion, in the pixels of the scene, whose origin is the middle of the frame."""

    picture: np.ndarray  # RGBA, uint8 (S, S, 4), without opacity along its edges
    object_id: int  # of the object it shows, 0 if it is not annotated
    x: Wave  # position of its pivot; in the picture of its parent, if it has one
    y: Wave
    angle: Wave  # turn in radians
    size: Wave = _STILL  # log2 of its scale
    aspect: Wave = _STILL  # log2 of its stretch in x, as if a flat object turned away
    light: Wave = _STILL  # log2 of its brightness
    bend: Bend | None = None  # wave of its outline
    pivot: tuple[float, float] = (0.5, 0.5)  # centre of rotation in the picture, as shares of S
    parent: Sprite | None = None  # sprite it is attached to, as a limb to a body

    def placement(self, time: float) -> np.ndarray:
        """Matrix (3, 3) from the picture's pixels to the scene's at ``time`` in frames."""
        side = self.picture.shape[0]
        scale, aspect = 2 ** self.size(time), 2 ** self.aspect(time)
        moved = similarity(self.x(time), self.y(time), self.angle(time), scale, aspect)
        own = moved @ similarity(-self.pivot[0] * side, -self.pivot[1] * side)
        return self.parent.placement(time) @ own if self.parent else own


def draw_sprite(
    frame: np.ndarray, labels: np.ndarray, sprite: Sprite, view: np.ndarray, time: float, blur: np.ndarray | None = None
) -> None:
    """Draw ``sprite`` over ``frame`` (uint8 (H, W, 3)) and its object id over ``labels`` (uint8 (H, W)), in place.

    A pixel belongs to the sprite where its opacity is at least one half. ``view`` (3, 3) goes from the scene to the
    frame; ``blur`` is its motion in (x, y) pixels while the shutter is open, which does not widen its label.
    """
    side = sprite.picture.shape[0]
    matrix = view @ sprite.placement(time)
    sway = sprite.bend.reach * side if sprite.bend else 0.0
    outline = project(matrix, corners(side, side, sway))
    spread = np.zeros(2) if blur is None else np.abs(blur) / 2
    left, top = np.maximum(np.floor(outline.min(0) - spread).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(outline.max(0) + spread).astype(int) + 2, (frame.shape[1], frame.shape[0]))
    if right <= left or bottom <= top:
        return
    inverse = np.linalg.inv(matrix)
    x, y = positions(inverse, (bottom - top, right - left), (left, top))
    if sprite.bend:
        sprite.bend.displace(x, y, (side, side), time)
    layer = interpolate(sprite.picture, x, y)
    inside = layer[..., 3] >= 128
    if blur is not None:
        layer = _smear(sprite.picture, x, y, inverse[:2, :2] @ blur)
    colours = brighten(layer[..., :3], sprite.light(time))
    blend(frame[top:bottom, left:right], colours, layer[..., 3])
    labels[top:bottom, left:right][inside] = sprite.object_id


def blend(below: np.ndarray, above: np.ndarray, opacity: np.ndarray) -> None:
    """Blend ``above`` over ``below`` (both uint8 (H, W, 3)) with ``opacity`` (uint8 (H, W)), in place."""
    weight = cv2.cvtColor(opacity, cv2.COLOR_GRAY2RGB).astype(np.uint16)  # faster than broadcasting
    weight += weight >> 7  # 0 to 256
    total = below * (256 - weight) + above * weight + 128  # at most 65408: fits uint16
    below[:] = np.right_shift(total, 8)


def brighten(image: np.ndarray, light: float) -> np.ndarray:
    """``image`` (uint8) times 2 ** ``light``, saturated."""
    gain = int(np.rint(256 * 2**light))
    return cv2.LUT(image, np.minimum(np.arange(256) * gain >> 8, 255).astype(np.uint8))


def draw_grain(rng: np.random.Generator, size: tuple[int, int], strength: int) -> np.ndarray:
    """Noise to add (three channels) and to subtract (three), below ``strength``; uint8, larger than (height, width)."""
    return rng.integers(0, strength, (size[0] + 64, size[1] + 64, 6), dtype=np.uint8)


def add_grain(frame: np.ndarray, grain: np.ndarray, index: int) -> np.ndarray:
    """``frame`` (uint8 (H, W, 3)) with a piece of ``grain`` that depends on ``index``."""
    top, left = index * 29 % 64, index * 47 % 63
    window = grain[top : top + frame.shape[0], left : left + frame.shape[1]]
    return cv2.subtract(cv2.add(frame, window[..., :3]), window[..., 3:])


def _smear(picture: np.ndarray, x: np.ndarray, y: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Mean of ``picture`` at five positions along ``motion`` (in its pixels)."""
    steps = np.rint(motion[:, None] * (np.arange(-2, 3) / 5 * 65536)).astype(np.int32)  # (2, 5)
    taps = np.stack([interpolate(picture, x + dx, y + dy) for dx, dy in steps.T])
    return (taps.sum(0, dtype=np.uint16) // 5).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """Content of a generated video at any time: objects, light, grain."""

    sprites: Sequence[Sprite]  # from far to near
    light: Wave  # log2 of the brightness
    grain: np.ndarray | None
    object_ids: Sequence[int]  # of labels 1, 2, ...

    @abstractmethod
    def compose(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Frame, uint8 (H, W, 3), and label map, uint8 (H, W), before light and grain."""


class GeneratedVideo(Video):
    """A video that is rendered from the scene of a ``seed``, identical on every machine.

    The masks are the visible parts (disjoint); every object has one in every frame, all False while it is out of view.
    Raises UserError if an argument is out of range; ``limits`` are further ones, {key: (value, lowest, highest)}.
    """

    def __init__(
        self, name: str, seed: int, num_frames: int, size: tuple[int, int], **limits: tuple[int, int, int]
    ) -> None:
        limits |= {"seed": (seed, 0, 2**63 - 1), "num_frames": (num_frames, 1, 100_000)}
        limits |= {"height": (size[0], 64, LONGEST_PX), "width": (size[1], 64, LONGEST_PX)}
        for key, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UserError(f"{type(self).__name__}: {key} is {value}; give a whole number from {low} to {high}")
        self.name = name
        self.seed = int(seed)
        self.frame_names = _frame_names(num_frames)
        self.size = (int(size[0]), int(size[1]))

    @abstractmethod
    def scene(self) -> Scene:
        """The scene, drawn once."""

    def frame(self, index: int) -> np.ndarray:
        return self._rendered(index)[0].copy()

    def masks(self, index: int) -> Masks:
        labels = self._rendered(index)[1]
        return {object_id: labels == label for label, object_id in enumerate(self.scene().object_ids, start=1)}

    def _rendered(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: frame {index} of {len(self)}")
        return _render(self, index)


@lru_cache(maxsize=16)
def _frame_names(count: int) -> list[str]:
    """Names that all videos of a length share: there may be a million."""
    return [f"{index:05d}" for index in range(count)]


@lru_cache(maxsize=2)
def _render(video: GeneratedVideo, index: int) -> tuple[np.ndarray, np.ndarray]:
    scene = video.scene()
    frame, labels = scene.compose(index)
    frame = brighten(frame, scene.light(index))
    return (frame if scene.grain is None else add_grain(frame, scene.grain, index)), labels
