"""Clips from annotated stills: a moving camera, a bending picture, objects that move over an inpainted background.

Ours, similar to the static-image pretraining of STM (Oh et al., ICCV 2019, section 3.4).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from qsam2.data.synthetic.scenes import LONGEST_PX, GeneratedVideo, Scene, Sprite, draw_grain, draw_sprite
from qsam2.data.synthetic.warps import Bend, Wave, corners, halve, interpolate, nearest, positions, project, similarity
from qsam2.data.video import Masks, Video
from qsam2.errors import UserError

SMALLEST_AREA = 0.003
"""Share of the frame: smaller objects are not annotated unless all are (half of COCO's are below it)."""
CUT_OUTS, CUT_OUT_FRAMES, MOST_OBJECTS, SIDE_PX = 24, 24, 3, 240
"""Clips that `moving_cut_outs` gives, their frames, objects and size."""
_PERIOD = (24, 72)  # of the motion, in frames
_ATTEMPTS = 8


class WarpedStill(GeneratedVideo):
    """A clip of ``num_frames`` from a still, an annotated video of one frame, and a ``seed``.

    The camera pans, turns, zooms and tilts within the picture, which is resized to ``size`` (height, width) regardless
    of its proportions and bends slowly. Objects that are fully visible may be cut out and move over the picture,
    inpainted behind them; objects that its edge cuts, or that cover more than a quarter of it, move with the picture.
    In frame 0 every object has at least half as many pixels as in the still. The smaller of overlapping objects is in
    front. Objects that vanish at ``size`` are left out, and those below ``SMALLEST_AREA`` if the still has a larger
    one. Raises UserError on reading a still without objects or with more than 255.
    """

    def __init__(self, still: Video, *, num_frames: int, seed: int, size: tuple[int, int] = (256, 256)) -> None:
        if len(still) != 1:
            raise UserError(f"WarpedStill: {still.name} has {len(still)} frames; give a video of one frame")
        super().__init__(f"{still.name}-warped-{seed}", seed, num_frames, size)
        self.still = still

    def scene(self) -> Scene:
        return _scene(self)


class LargestObjects(Video):
    """A still with the ``count`` largest of its objects."""

    def __init__(self, still: Video, count: int) -> None:
        self.name, self.size, self.frame_names = still.name, still.size, still.frame_names
        self._still, self._count = still, count

    def frame(self, index: int) -> np.ndarray:
        return self._still.frame(index)

    def masks(self, index: int) -> Masks:
        masks = self._still.masks(index) or {}
        largest = sorted(masks, key=lambda key: (-np.count_nonzero(masks[key]), key))[: self._count]
        return {key: masks[key] for key in sorted(largest)}


def moving_cut_outs(stills: Sequence[Video]) -> list[WarpedStill]:
    """One clip of each of the first ``CUT_OUTS`` stills with an object that can move, for scoring.

    They have the stills' proportions, are ``SIDE_PX`` on their short side (a panorama is squeezed to the longest side
    that a clip can have), and show up to ``MOST_OBJECTS`` objects.
    """
    videos: list[WarpedStill] = []
    for still in stills:
        if len(videos) == CUT_OUTS:
            break
        largest = LargestObjects(still, MOST_OBJECTS)
        if any(_can_move(mask) for mask in largest.masks(0).values()):
            height, width = (min(round(side * SIDE_PX / min(still.size)), LONGEST_PX) for side in still.size)
            videos.append(WarpedStill(largest, num_frames=CUT_OUT_FRAMES, seed=len(videos), size=(height, width)))
    return videos


def _can_move(mask: np.ndarray) -> bool:
    """True for an object that the still's edge does not cut, of 1 to 25 % of its area."""
    edges = mask[[0, -1]].any() or mask[:, [0, -1]].any()
    return bool(not edges and 0.01 <= mask.mean() <= 0.25)


@dataclass(frozen=True)
class _Scene(Scene):
    picture: np.ndarray  # RGB, without the objects that move
    labels: np.ndarray  # of the objects that do not move
    camera: tuple[Wave, ...]  # x, y, angle, log2 of the zoom, log2 of the stretch in x, tilt in x, tilt in y
    bend: Bend

    def frame_to_scene(self, time: float) -> np.ndarray:
        """Matrix (3, 3) from the frame to the scene, whose origin is the middle of the picture."""
        height, width = self.labels.shape
        x, y, angle, zoom, aspect, *tilt = (wave(time) for wave in self.camera)
        tilted = np.array([[1, 0, 0], [0, 1, 0], [tilt[0] / width, tilt[1] / height, 1]])
        matrix = np.linalg.inv(similarity(x, y, angle, 2**zoom, 2**aspect)) @ tilted
        matrix = matrix @ similarity(-width / 2, -height / 2)
        room = np.array([width, height]) * (0.5 - self.bend.reach)
        reach = np.abs(project(matrix, corners(height, width))).max(0)
        closer = min(1.0, *(room / reach))  # zoom in until the frame lies within the picture
        return np.diag([closer, closer, 1.0]) @ matrix

    def compose(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        height, width = size = self.labels.shape
        to_scene = self.frame_to_scene(time)
        x, y = positions(similarity(width / 2, height / 2) @ to_scene, size)
        if self.bend.reach:
            self.bend.displace(x, y, size, time)
        frame, labels = interpolate(self.picture, x, y), nearest(self.labels, x, y)
        view = np.linalg.inv(to_scene)
        for sprite in self.sprites:
            draw_sprite(frame, labels, sprite, view, time)
        return frame, labels


@lru_cache(maxsize=8)
def _scene(video: WarpedStill) -> _Scene:
    """Draw motions, each with a calmer start, until frame 0 shows enough of every object."""
    picture = _resize(video.still.frame(0), video.size)
    masks = _visible_objects(video)
    areas = _areas(_paint(masks, video.size), len(masks))
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((video.seed, zlib.crc32(video.name.encode())))))
    for attempt in range(_ATTEMPTS + 1):
        scene = _draw_scene(rng, picture, masks, 1 - attempt / _ATTEMPTS)
        if (2 * _areas(scene.compose(0)[1], len(masks)) >= areas).all():
            break
    return scene


def _draw_scene(rng: np.random.Generator, picture: np.ndarray, masks: Masks, start: float) -> _Scene:
    """A random motion; frame 0 is the picture itself for a ``start`` of 0, and may be turned and bent up to 1."""
    lively = rng.uniform()
    height, width = picture.shape[:2]
    labels = _paint(masks, (height, width))
    shown = {label: labels == label for label in range(1, len(masks) + 1)}
    whole = {k for k, mask in shown.items() if not (mask[[0, -1]].any() or mask[:, [0, -1]].any())}
    small = {k for k, mask in shown.items() if 4 * np.count_nonzero(mask) <= mask.size}
    moving = [label for label in shown if label in whole & small and rng.random() < 0.75]
    sprites = [_draw_sprite(rng, picture, shown[label], label, lively, start) for label in moving]
    hole = np.isin(labels, moving).astype(np.uint8)
    ranges = (0.1 * width, 0.1 * height, 0.15, 0.3, 0.15, 0.2, 0.2)
    firsts = start * rng.uniform(-0.5, 0.5, len(ranges)) * ranges
    firsts[3] = abs(firsts[3])
    strength = int(rng.integers(0, 12))
    return _Scene(
        picture=_fill(picture, cv2.dilate(hole, np.ones((7, 7), np.uint8)) > 0),
        labels=_paint(masks, (height, width), leave_out=moving),
        sprites=[sprites[index] for index in rng.permutation(len(sprites))],
        camera=tuple(
            Wave.draw(rng, first, reach * lively * rng.uniform(0, 1), _PERIOD)
            for first, reach in zip(firsts, ranges, strict=True)
        ),
        bend=Bend.draw(rng, start * rng.uniform(0, 0.03)),
        light=Wave.draw(rng, rng.uniform(-0.3, 0.2), rng.uniform(0, 0.5) * lively, _PERIOD),
        grain=draw_grain(rng, labels.shape, strength) if strength > 3 else None,
        object_ids=list(masks),
    )


def _draw_sprite(
    rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, label: int, lively: float, start: float
) -> Sprite:
    """The object cut out of the ``picture``, with its own motion."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    side = (max(np.ptp(rows), np.ptp(columns)) + 6) // 2 * 2
    top, left = (rows[0] + rows[-1] - side) // 2 + 1, (columns[0] + columns[-1] - side) // 2 + 1
    window = np.ix_(
        np.clip(np.arange(top, top + side), 0, height - 1), np.clip(np.arange(left, left + side), 0, width - 1)
    )
    reach = lively * rng.uniform(0.1, 0.5) * (side + 0.1 * min(height, width))
    return Sprite(
        np.dstack([picture[window], mask[window].astype(np.uint8) * 255]),
        label,
        x=Wave.draw(rng, left + side / 2 - width / 2, reach, _PERIOD),
        y=Wave.draw(rng, top + side / 2 - height / 2, reach, _PERIOD),
        angle=Wave.draw(rng, 0, rng.uniform(0, 0.5) * lively, _PERIOD, rng.normal(0, 0.01) * lively),
        size=Wave.draw(rng, 0, rng.uniform(0, 0.4) * lively, _PERIOD),
        aspect=Wave.draw(rng, 0, rng.uniform(0, 0.4) * lively, _PERIOD),
        light=Wave.draw(rng, 0, rng.uniform(0, 0.3) * lively, _PERIOD),
        bend=Bend.draw(rng, start * rng.uniform(0, 0.05)),
    )


def _visible_objects(video: WarpedStill) -> Masks:
    """The masks of the still at the video's size, by ascending id, without invisible ones."""
    masks, (height, width) = video.still.masks(0), video.size
    if masks is None:
        raise UserError(f"WarpedStill: {video.still.name} has no masks; give an annotated still")
    if len(masks) > 255:
        raise UserError(f"WarpedStill: {video.still.name} has {len(masks)} objects; give at most 255")
    resized = {key: nearest(masks[key], *_spread(masks[key].shape, video.size)) for key in sorted(masks)}
    areas = _areas(_paint(resized, video.size), len(resized))
    smallest = max(1, min(SMALLEST_AREA * height * width, areas.max(initial=0)))
    visible = {key: mask for (key, mask), area in zip(resized.items(), areas, strict=True) if area >= smallest}
    if not visible:
        raise UserError(f"WarpedStill: {video.still.name} shows no object at {height}x{width}; leave it out")
    return visible


def _paint(masks: Masks, size: tuple[int, int], leave_out: Sequence[int] = ()) -> np.ndarray:
    """Label map, uint8 (H, W): the k-th of ``masks`` has label k, smaller ones lie in front."""
    labels = np.zeros(size, np.uint8)
    order = sorted(enumerate(masks.values(), start=1), key=lambda item: -np.count_nonzero(item[1]))
    for label, mask in order:
        if label not in leave_out:
            labels[mask] = label
    return labels


def _areas(labels: np.ndarray, count: int) -> np.ndarray:
    """Number of pixels of labels 1..count."""
    return np.bincount(labels.ravel(), minlength=count + 1)[1:]


def _spread(source: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions in a ``source`` (height, width) picture of the pixels of one resized to ``size``."""
    down, across = source[0] / size[0], source[1] / size[1]
    return positions(np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1]]), size)


def _resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``picture`` (uint8) at ``size`` (height, width): halved while it is twice as large, then bilinear."""
    while picture.shape[0] >= 2 * size[0] and picture.shape[1] >= 2 * size[1]:
        picture = halve(picture)
    return interpolate(picture, *_spread(picture.shape[:2], size))


def _fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """``picture`` with its ``hole`` (bool (H, W)) inpainted smoothly, from coarse to fine."""
    if not hole.any() or min(hole.shape) < 2:
        return picture
    even = ((0, hole.shape[0] % 2), (0, hole.shape[1] % 2))
    known = np.pad(~hole, even)[..., None].astype(np.int32)
    values = np.pad(picture, (*even, (0, 0))) * known
    count, total = (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2] for a in (known, values))
    coarse = _fill((total // np.maximum(count, 1)).astype(np.uint8), count[..., 0] == 0)
    smooth = interpolate(coarse, *_spread(coarse.shape[:2], hole.shape))
    return np.where(hole[..., None], smooth, picture)
