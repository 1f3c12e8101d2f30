"""Training clips: a few frames and objects of a video, drawn at random from (seed, index), and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.utils.data import Dataset
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from qsam2.data.synthetic.warped_stills import WarpedStill
from qsam2.data.transforms import ClipAugmentation, resize_masks, to_model_input
from qsam2.data.unlabelled import Unlabelled
from qsam2.data.video import Masks, Video
from qsam2.errors import UserError

MAX_DRAWS = 100


@dataclass(frozen=True)
class Source:
    """Videos drawn with equal probability; `weight` is relative to other sources.

    A dataset with augmentation augments clips of sources with `augment` only.
    """

    videos: Sequence[Video]
    weight: float = 1.0
    augment: bool = True


@dataclass(frozen=True)
class Clip:
    """A training sample: T frames, O >= 1 objects, all visible in the first frame."""

    images: torch.Tensor  # float32 (T, 3, S, S), normalized
    masks: torch.Tensor  # bool (T, O, S, S)
    name: str
    index: int  # of the sample in its dataset
    frame_indices: tuple[int, ...]  # of the video, T of them
    object_ids: tuple[int, ...]
    size: tuple[int, int]  # (height, width) of the video


class ClipDataset(Dataset[Clip]):
    """`length` clips; item `index` is a pure function of (`seed`, `index`), whatever the process or worker.

    A source is drawn by weight, then a video, then `num_frames` successive annotated frames at a stride of
    1..`max_stride`, played backwards half of the time with `reverse`, then up to `max_objects` of the objects that are
    visible in the first of them. A video that is too short is played forth and back; a still becomes a `WarpedStill`.
    Raises UserError if no drawn clip shows an object. Errors in reading are raised, never resampled.
    """

    def __init__(
        self,
        videos: Sequence[Video] | Sequence[Source],
        *,
        num_frames: int,
        max_objects: int,
        image_size: int,
        length: int,
        augment: bool = True,
        seed: int = 0,
        max_stride: int = 1,
        reverse: bool = False,
    ) -> None:
        if len(videos) and isinstance(videos[0], Source):
            sources = cast("list[Source]", list(videos))
        else:
            sources = [Source(cast("Sequence[Video]", videos))]
        if not all(len(source.videos) for source in sources):
            raise UserError("data.train: a source holds no videos; give one that does, or leave it out")
        if min(source.weight for source in sources) <= 0:
            raise UserError("data.train: a source's weight must be positive; leave out a source that is not wanted")
        self._sources = sources
        weights = np.array([source.weight for source in sources])
        self._shares = weights / weights.sum()
        self.num_frames, self.max_objects, self.image_size = num_frames, max_objects, image_size
        self.length, self.seed = length, seed
        self.max_stride, self.reverse = max_stride, reverse
        self._augmentation = ClipAugmentation(image_size) if augment else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        for _ in range(MAX_DRAWS):
            clip = self._draw(rng, index)
            if clip is not None:
                return clip
        names = sorted({video.name for source in self._sources for video in source.videos})
        raise UserError(
            f"no object is visible in the first frame of {MAX_DRAWS} clips drawn from {len(names)} videos "
            f"({', '.join(names[:3])}, ...); training needs videos whose masks show an object"
        )

    def _draw(self, rng: np.random.Generator, index: int) -> Clip | None:
        """One attempt; None if no object is visible in its first frame at the model's resolution."""
        source = self._sources[rng.choice(len(self._sources), p=self._shares)]
        videos = source.videos
        video = videos[int(rng.integers(len(videos)))]
        if len(video) == 1 and self.num_frames > 1:
            if not any(mask.any() for mask in _annotation(video, 0).values()):
                return None
            square = (self.image_size, self.image_size)
            video = WarpedStill(video, num_frames=self.num_frames, seed=int(rng.integers(2**31)), size=square)
        frames = self._draw_frames(video, rng)
        if isinstance(video, Unlabelled):
            video, frames = video.clip(frames), list(range(len(frames)))
        first = _annotation(video, frames[0])
        visible = [i for i, mask in first.items() if mask.any()]
        if not visible:
            return None
        count = min(len(visible), self.max_objects)
        ids = sorted(int(i) for i in rng.choice(visible, size=count, replace=False))
        read: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by frame: generated videos render both at once
        for i in sorted(set(frames)):
            annotation = first if i == frames[0] else _annotation(video, i)
            masks_of_ids = [annotation.get(k, np.zeros(video.size, dtype=bool)) for k in ids]
            read[i] = video.frame(i), np.stack(masks_of_ids)  # (H, W, 3), (O, H, W)
        pictures = np.stack([read[i][0] for i in frames])  # (T, H, W, 3)
        masks = np.stack([read[i][1] for i in frames])  # (T, O, H, W)
        if self._augmentation is None or not source.augment:
            images = torch.stack([to_model_input(picture, self.image_size) for picture in pictures])
            resized = torch.stack([resize_masks(frame_masks, self.image_size) for frame_masks in masks])
        else:
            images, resized = self._augmentation(pictures, masks, rng)
        kept = resized[0].any((1, 2))  # a tiny object may vanish at the model's resolution
        if not kept.any():
            return None
        ids = [i for i, keep in zip(ids, kept.tolist(), strict=True) if keep]
        return Clip(images, resized[:, kept], video.name, index, tuple(frames), tuple(ids), video.size)

    def _draw_frames(self, video: Video, rng: np.random.Generator) -> list[int]:
        annotated = annotated_frames(video)
        count, steps = len(annotated), self.num_frames - 1
        longest = min(self.max_stride, (count - 1) // steps) if steps else 1
        stride = int(rng.integers(1, max(longest, 1) + 1))
        start = int(rng.integers(max(count - steps * stride, 1)))
        turn = max(2 * (count - 1), 1)  # forth and back: 0 1 2 1 0 1 ...
        walk = [(start + step * stride) % turn for step in range(self.num_frames)]
        frames = [annotated[min(position, turn - position)] if count > 1 else annotated[0] for position in walk]
        return frames[::-1] if self.reverse and rng.random() < 0.5 else frames


def annotated_frames(video: Video) -> Sequence[int]:
    """Indices of the frames with masks: the video's `annotated_frames` if it has them, else all."""
    return getattr(video, "annotated_frames", range(len(video)))


def collate_clips(clips: Sequence[Clip]) -> BatchedVideoDatapoint:
    """Clips of equal T and S -> Meta's batch of B videos, whose O objects are those of all clips, concatenated.

    img_batch float32 (T, B, 3, S, S); masks bool (T, O, S, S); obj_to_frame_idx int (T, O, 2): (frame, video);
    metadata: unique_objects_identifier (T, O, 3): (sample, object id, frame), frame_orig_size (T, O, 2).
    """
    owner = [(b, i) for b, clip in enumerate(clips) for i in clip.object_ids]
    num_frames = len(clips[0].frame_indices)
    frames = range(num_frames)
    return BatchedVideoDatapoint(
        img_batch=torch.stack([clip.images for clip in clips], dim=1),
        obj_to_frame_idx=torch.tensor([[(t, b) for b, _ in owner] for t in frames], dtype=torch.int),
        masks=torch.cat([clip.masks for clip in clips], dim=1),
        metadata=BatchedVideoMetaData(
            unique_objects_identifier=torch.tensor(
                [[(clips[b].index, i, clips[b].frame_indices[t]) for b, i in owner] for t in frames]
            ),
            frame_orig_size=torch.tensor([[clips[b].size for b, _ in owner] for _ in frames]),
        ),
        dict_key="all",
        batch_size=[num_frames],
    )


def _annotation(video: Video, index: int) -> Masks:
    masks = video.masks(index)
    if masks is None:
        raise UserError(
            f"{video.name}: frame {video.frame_names[index]} has no masks; "
            "a video that is annotated in part must list its annotated_frames"
        )
    return masks
