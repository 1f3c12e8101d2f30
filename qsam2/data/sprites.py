"""Layers that move over a background: how a frame and its label map are composed."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from qsam2.data.warps import Wave, interpolate, positions, ripple, sample, similarity


@dataclass(frozen=True)
class Sprite:
    """A picture with opacity and its motion; positions are in frame pixels from the middle of the frame.

    Attributes:
        picture: RGBA, uint8 (S, S, 4).
        object_id: the object it belongs to, 0 for what is not annotated.
        x, y: where its middle is.
        angle: turn in radians.
        size: log2 of its scale.
        aspect: log2 of its stretch in x, as when a flat thing turns away.
        light: log2 of its brightness.
        bend: how far its outline sways, in parts of S; ``bend_phase`` in radians, ``bend_waves`` periods in S.
    """

    picture: np.ndarray
    object_id: int
    x: Wave
    y: Wave
    angle: Wave
    size: Wave
    aspect: Wave
    light: Wave
    bend: float
    bend_phase: tuple[Wave, Wave]
    bend_waves: tuple[float, float]

    def placement(self, time: float) -> np.ndarray:
        """Matrix (3, 3) from the picture's pixels to the scene's at ``time`` in frames."""
        half = self.picture.shape[0] / 2
        scale, aspect = 2 ** self.size(time), 2 ** self.aspect(time)
        return similarity(self.x(time), self.y(time), self.angle(time), scale, aspect) @ similarity(-half, -half)


@dataclass(frozen=True)
class Camera:
    """What the camera does: it moves by (x, y) pixels, turns by ``angle`` radians and zooms by 2 ** ``zoom``."""

    x: Wave
    y: Wave
    angle: Wave
    zoom: Wave

    def view(self, time: float, size: tuple[int, int]) -> np.ndarray:
        """Matrix (3, 3) from the scene, whose origin is the middle, to the pixels of a (height, width) frame."""
        height, width = size
        moved = similarity(self.x(time), self.y(time), self.angle(time), 2 ** self.zoom(time))
        return similarity(width / 2, height / 2) @ moved


def draw_background(picture: np.ndarray, view: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``picture`` (RGB, uint8), its middle at the scene's origin, as the camera's ``view`` sees it; uint8 (height, width, 3)."""
    centred = similarity(picture.shape[1] / 2, picture.shape[0] / 2)
    return sample(picture, centred @ np.linalg.inv(view), size, cv2.BORDER_REFLECT_101)


def draw_sprite(frame: np.ndarray, labels: np.ndarray, sprite: Sprite, view: np.ndarray, time: float) -> None:
    """Lays ``sprite`` over ``frame`` (uint8 (H, W, 3)) and its object id over ``labels`` (uint8 (H, W)), in place.

    A pixel belongs to the sprite where its opacity is at least one half.
    """
    side = sprite.picture.shape[0]
    matrix = view @ sprite.placement(time)
    sway = sprite.bend * side
    corners = matrix[:2] @ np.array(
        [[-sway, side + sway, -sway, side + sway], [-sway, -sway, side + sway, side + sway], [1, 1, 1, 1]]
    )
    left, top = np.maximum(np.floor(corners.min(1)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(corners.max(1)).astype(int) + 2, (frame.shape[1], frame.shape[0]))
    if right <= left or bottom <= top:
        return
    x, y = positions(np.linalg.inv(matrix), (bottom - top, right - left), (left, top))
    if sprite.bend:
        phase = sprite.bend_phase[0](time), sprite.bend_phase[1](time)
        ripple(x, y, side, (sway, sway), phase, sprite.bend_waves)
    layer = interpolate(sprite.picture, x, y)
    opacity = layer[..., 3]
    window = frame[top:bottom, left:right]
    blend(window, brighten(layer[..., :3], sprite.light(time)), opacity)
    labels[top:bottom, left:right][opacity >= 128] = sprite.object_id


def blend(below: np.ndarray, above: np.ndarray, opacity: np.ndarray) -> None:
    """Lays ``above`` over ``below`` (both uint8 (H, W, 3)) with ``opacity`` uint8 (H, W), in place."""
    weight = opacity.astype(np.int16)[..., None] + (opacity >> 7)[..., None]  # 0 to 256
    difference = above.astype(np.int16) - below
    below += ((difference.astype(np.int32) * weight + 128) >> 8).astype(
        np.uint8
    )  # adds modulo 256: exact for negatives


def brighten(image: np.ndarray, light: float) -> np.ndarray:
    """``image`` (uint8) times 2 ** ``light``, saturated."""
    gain = int(np.rint(256 * 2**light))
    return cv2.LUT(image, np.minimum(np.arange(256) * gain >> 8, 255).astype(np.uint8))
