"""`qsam2 predict`: from a model, a source and prompts to mask files and an overlay, through `sam2`'s predictors."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor
from tqdm import tqdm

from qsam2.data.index_masks import read_ids
from qsam2.data.pictures import PICTURE_SUFFIXES
from qsam2.data.transforms import FrameSequence
from qsam2.data.video import Picture, Video
from qsam2.data.video_file import VideoFile, open_video
from qsam2.errors import UserError
from qsam2.loading import image_predictor, video_predictor
from qsam2.models import SAM2
from qsam2.models.sam2 import EMBEDDED
from qsam2.output import writing
from qsam2.predict.parse import Prompts, Word, read_prompts
from qsam2.report.overlays import COLOURS, overlay, write_video

log = logging.getLogger("qsam2")

FRAMES_PER_SECOND = Fraction(24)
"""Frame rate of the overlay if the source is a folder of frames."""
MASK_LOGIT = 10.0
"""Logit of a pixel of a mask prompt, as in sam2's video predictor."""
UNFINISHED = ".unfinished"
BACKGROUND = (0, 0, 0)


def predict(
    model: str,
    source: Path,
    words: Sequence[Word],
    *,
    out: Path,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    fast: bool = False,
    force: bool = False,
) -> list[Path]:
    """Segment a picture (`mask.png`, `overlay.png`) or track through a video (`masks/`, `overlay.mp4`) into `out`.

    Args:
        model: run folder, file or size.
        source: a picture, a folder of frames or a video file.
        words: see `qsam2.predict.parse`.
        overrides: `key=value` on top of the model's own recipe.
        fast: see `qsam2.loading.load`.
        force: replace existing files.

    Returns:
        The written files and folders.

    Raises:
        UserError: an argument cannot be used; nothing is written.
    """
    if source.is_file() and source.suffix.lower() in PICTURE_SUFFIXES:
        picture = Picture(source)
        prompts = read_prompts(words, picture)
        with outputs(out, ("mask.png", "overlay.png"), replace=force) as folder:
            predictor = image_predictor(model, overrides, device=device, fast=fast)
            _say_what_nano_is(predictor.model)
            ids = segment_picture(predictor, picture, prompts)
            write_ids(folder / "mask.png", ids, prompts)
            drawn = _overlay(picture.frame(0), ids, prompts)
            Image.fromarray(drawn).save(folder / "overlay.png", format="PNG")
        return [out / "mask.png", out / "overlay.png"]
    video = open_video(source)
    prompts = read_prompts(words, video)
    with outputs(out, ("masks", "overlay.mp4"), replace=force) as folder:
        predictor = video_predictor(model, overrides, device=device, fast=fast)
        _say_what_nano_is(predictor)
        _track(predictor, video, prompts, folder)
    return [out / "masks", out / "overlay.mp4"]


def _track(predictor: SAM2, video: Video, prompts: Prompts, folder: Path) -> None:
    (folder / "masks").mkdir()
    paths = [folder / "masks" / f"{name}.png" for name in video.frame_names]
    for index, ids in track_objects(predictor, video, prompts):
        if paths[index].exists():  # objects prompted on an earlier frame keep their pixels
            earlier = read_ids(paths[index])
            ids[earlier > 0] = earlier[earlier > 0]
        write_ids(paths[index], ids, prompts)
    frames = (
        _overlay(video.frame(index), read_ids(path), prompts) for index, path in enumerate(tqdm(paths, desc="overlay"))
    )
    rate = video.frames_per_second if isinstance(video, VideoFile) else None
    write_video(str(folder / "overlay.mp4"), frames, frames_per_second=rate or FRAMES_PER_SECOND)


def _overlay(frame: np.ndarray, ids: np.ndarray, object_ids: Collection[int]) -> np.ndarray:
    return overlay(frame, [ids == object_id for object_id in sorted(object_ids)])


def _say_what_nano_is(model: SAM2) -> None:
    if model.size in EMBEDDED:
        log.info(
            "%s is for trying things out, on photographs it gives fragments; for an official size give tiny instead, "
            "whose weights are fetched once, or its file, see docs/checkpoint.md",
            model.size,
        )


def segment_picture(predictor: SAM2ImagePredictor, picture: Video, prompts: Prompts) -> np.ndarray:
    """Object ids, uint8 (H, W), of a picture; a pixel belongs to the object with the highest logit above 0.

    A single click gives the best of three masks by predicted IoU. A mask prompt is refined.
    """
    predictor.set_image(picture.frame(0))
    logits = {}
    for object_id, frames in prompts.items():
        prompt = frames[0]
        masks, confidence, _ = predictor.predict(
            point_coords=np.array(prompt.points) if prompt.points else None,
            point_labels=np.array(prompt.labels) if prompt.points else None,
            box=np.array(prompt.box) if prompt.box else None,
            mask_input=None if prompt.mask is None else _low_logits(prompt.mask, predictor.model.image_size // 4),
            multimask_output=prompt.labels == [1] and prompt.box is None and prompt.mask is None,
            return_logits=True,
        )
        logits[object_id] = torch.from_numpy(masks[confidence.argmax()])
    return _ids(logits)


def track_objects(model: SAM2, video: Video, prompts: Prompts) -> Iterator[tuple[int, np.ndarray]]:
    """(frame, object ids uint8 (H, W)) of a video, from the prompts to its end and back to its start.

    Each object is tracked both ways from its first prompt. Objects whose first prompts share a frame are tracked
    together, and a pixel belongs to the one with the highest logit above 0. Groups are tracked one after another: a
    frame is yielded once per group.

    Raises:
        UserError: an object has a mask and another prompt on one frame.
    """
    for object_id, frames in prompts.items():
        for frame, prompt in frames.items():
            if prompt.mask is not None and (prompt.points or prompt.box):
                raise UserError(
                    f"object {object_id} has a mask and points or a box on frame {frame}: in a video give one of them"
                )
    frames_of_model = FrameSequence(video, model.image_size, len(video))
    for start in sorted({min(frames) for frames in prompts.values()}):
        state = model.init_state(frames_of_model, video_size=video.size)
        for object_id, frames in prompts.items():
            if min(frames) == start:
                for frame, prompt in sorted(frames.items()):
                    if prompt.mask is not None:
                        model.add_new_mask(state, frame, object_id, prompt.mask)
                        continue
                    points = {"points": prompt.points, "labels": prompt.labels} if prompt.points else {}
                    model.add_new_points_or_box(state, frame, object_id, box=prompt.box, **points)
        for reverse in (False, True) if start > 0 else (False,):
            for index, object_ids, logits in model.propagate_in_video(state, start_frame_idx=start, reverse=reverse):
                yield index, _ids(dict(zip(object_ids, logits[:, 0], strict=True)))


def _ids(logits: Mapping[int, Tensor]) -> np.ndarray:
    """{object id: logits (H, W)} to the id of the highest logit above 0, uint8 (H, W); 0 for none."""
    highest, index = torch.stack(list(logits.values())).max(dim=0)
    of_index = torch.tensor(list(logits), dtype=torch.uint8, device=index.device)
    return torch.where(highest > 0, of_index[index], 0).cpu().numpy()


def _low_logits(mask: np.ndarray, side: int) -> np.ndarray:
    """bool (H, W) to (1, side, side), between -MASK_LOGIT and MASK_LOGIT."""
    low = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    return (2 * low[None] - 1) * MASK_LOGIT


@contextlib.contextmanager
def outputs(folder: Path, names: Sequence[str], *, replace: bool) -> Iterator[Path]:
    """Context manager: a temporary folder, whose files or folders `names` move to `folder` if the block succeeds.

    Raises:
        UserError: one of them exists and `replace` is False; the disk is full or the folder is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; give a folder")
    existing = [folder / name for name in names if (folder / name).exists()]
    if existing and not replace:
        raise UserError(f"{existing[0]} is there already: give another --out, or --force to replace it")
    unfinished = folder / UNFINISHED
    is_new = not folder.exists()
    try:
        with writing(folder):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            unfinished.mkdir(parents=True)
            yield unfinished
            for name in names:
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            if is_new:
                folder.rmdir()


def write_ids(path: Path, ids: np.ndarray, object_ids: Collection[int]) -> None:
    """Write object ids, uint8 (H, W), as a palette PNG like DAVIS's; the palette has the colours of the overlay.

    Colours are in the order of the ids, in pictures and videos alike.
    """
    colours = dict(zip(sorted(object_ids), itertools.cycle(COLOURS), strict=False))
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette([channel for value in range(256) for channel in colours.get(value, BACKGROUND)])
    picture.save(path, format="PNG")
