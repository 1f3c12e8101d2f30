"""`qsam2 predict`: from a model, a source and prompts to mask files and an overlay."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from qsam2.data.pictures import IMAGE_SUFFIXES
from qsam2.data.video import Picture, Video, VideoFile, open_video
from qsam2.loading import image_predictor, video_predictor
from qsam2.models import SAM2
from qsam2.predict.masks import segment_picture, track_objects
from qsam2.predict.outputs import outputs, read_ids, write_ids, write_overlay, write_overlay_video
from qsam2.predict.parse import Prompts, Word, read_prompts

FRAMES_PER_SECOND = Fraction(24)
"""Frame rate of the overlay if the source is a folder of frames."""


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
    if source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
        picture = Picture(source)
        prompts = read_prompts(words, picture)
        with outputs(out, ("mask.png", "overlay.png"), replace=force) as folder:
            ids = segment_picture(image_predictor(model, overrides, device=device, fast=fast), picture, prompts)
            write_ids(folder / "mask.png", ids, list(prompts))
            write_overlay(folder / "overlay.png", picture.frame(0), ids, list(prompts))
        return [out / "mask.png", out / "overlay.png"]
    video = open_video(source)
    prompts = read_prompts(words, video)
    with outputs(out, ("masks", "overlay.mp4"), replace=force) as folder:
        predictor = video_predictor(model, overrides, device=device, fast=fast)
        _track(predictor, video, prompts, folder)
    return [out / "masks", out / "overlay.mp4"]


def _track(predictor: SAM2, video: Video, prompts: Prompts, folder: Path) -> None:
    object_ids = sorted(prompts)
    masks = folder / "masks"
    masks.mkdir()
    for index, ids in track_objects(predictor, video, prompts):
        path = masks / f"{video.frame_names[index]}.png"
        if path.exists():  # objects prompted on an earlier frame keep their pixels
            earlier = read_ids(path)
            ids[earlier > 0] = earlier[earlier > 0]
        write_ids(path, ids, object_ids)
    rate = video.frames_per_second if isinstance(video, VideoFile) else None
    write_overlay_video(folder / "overlay.mp4", video, masks, object_ids, rate or FRAMES_PER_SECOND)
