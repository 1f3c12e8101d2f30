"""SA-V: videos at 24 frames per second with masklets on every fourth frame."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qsam2.data.footage import FrameFolder, VideoFile
from qsam2.data.pictures import decode_rle, list_pictures, read_index_mask, read_json, subfolders
from qsam2.data.video import Video
from qsam2.errors import UserError

ANNOTATE_EVERY = 4  # frames: 24 per second, masks: 6 per second


class MaskletFile:
    """Masklets of one video in SA-V's JSON: per fourth frame one RLE per object; masklet k is object k + 1."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def annotated(self, frame_names: list[str]) -> list[int]:
        numbers = [int(name) for name in frame_names]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise UserError(f"{self.path}: the frames of its video are not numbered without gaps; add those that lack")
        count = len(_read_masklets(self.path))
        last = (count - 1) * ANNOTATE_EVERY
        if last >= len(frame_names):
            raise UserError(
                f"{self.path}: has masks up to frame {last}, but its video has only {len(frame_names)} frames; "
                "use the video that belongs to it, at 24 frames per second"
            )
        return list(range(0, last + 1, ANNOTATE_EVERY))

    def masks(self, index: int, frame_name: str, size: tuple[int, int]) -> dict[int, np.ndarray]:
        regions = _read_masklets(self.path)[index // ANNOTATE_EVERY]
        present = {k + 1: region for k, region in enumerate(regions) if region is not None}
        return {k: decode_rle(region, size, self.path) for k, region in present.items()}


class ObjectFolders:
    """Masklets of one video as ``OBJECT/FRAME.png`` (val and test of SA-V): folder ``000`` is object 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = subfolders(folder)
        if not names:
            raise UserError(f"{folder}: holds no object folders (000, 001, ...) of masks")
        numbers = [name for name in names if not name.isdigit()]
        if numbers:
            raise UserError(f"{folder / numbers[0]}: is not an object's folder; they are numbers such as 000")
        self._masks = {int(name) + 1: {path.stem: path for path in list_pictures(folder / name)} for name in names}

    def annotated(self, frame_names: list[str]) -> list[int]:
        index = {name: i for i, name in enumerate(frame_names)}
        stray = [path for files in self._masks.values() for stem, path in files.items() if stem not in index]
        if stray:
            raise UserError(f"{stray[0]}: is a mask without its frame; add the frame {stray[0].stem}")
        return sorted({index[stem] for files in self._masks.values() for stem in files})

    def masks(self, index: int, frame_name: str, size: tuple[int, int]) -> dict[int, np.ndarray]:
        present = {k: files[frame_name] for k, files in self._masks.items() if frame_name in files}
        return {k: read_index_mask(path, size) > 0 for k, path in present.items()}


class SavVideo(Video):
    """Frames from a folder or an mp4, masks from JSON or object folders; both are opened on first access.

    Attributes:
        annotated_frames: indices of the frames that have masks, in order.
    """

    def __init__(self, name: str, frames: Path, masklets: MaskletFile | ObjectFolders) -> None:
        self.name = name
        self._frames_at = frames
        self._masklets = masklets

    @cached_property
    def _frames(self) -> FrameFolder | VideoFile:
        place = self._frames_at
        return FrameFolder(place) if place.is_dir() else VideoFile(place)

    @cached_property
    def annotated_frames(self) -> list[int]:
        return self._masklets.annotated(self.frame_names)

    @property
    def frame_names(self) -> list[str]:  # type: ignore[override]
        return self._frames.frame_names

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self._frames.size

    def frame(self, index: int) -> np.ndarray:
        return self._frames.frame(index)

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        if index not in self.annotated_frames:
            return None
        return self._masklets.masks(index, self.frame_names[index], self.size)


def sav_videos(root: str | Path, split: str) -> list[SavVideo]:
    """The videos of a split of SA-V.

    ``val``, ``test``: ``ROOT[/sav_SPLIT]`` with ``[sav_]SPLIT.txt``, ``JPEGImages_24fps/VIDEO/00000.jpg`` and
    ``Annotations_6fps/VIDEO/000/00000.png``. ``train`` or ``manual``, and ``auto``: every ``VIDEO_manual.json`` (or
    ``_auto``) below ROOT, with ``VIDEO.mp4`` beside it or ``ROOT/JPEGImages_24fps/VIDEO``. Raises UserError naming the
    file or folder that is missing or wrong.
    """
    root = Path(root)
    if split in ("train", "manual", "auto"):
        return _with_json(root, "auto" if split == "auto" else "manual")
    folder = root / f"sav_{split}" if (root / f"sav_{split}").is_dir() else root
    lists = [folder / f"{split}.txt", folder / f"sav_{split}.txt"]
    path = next((path for path in lists if path.is_file()), None)
    if path is None:
        raise UserError(f"{root}: has no {split}.txt or sav_{split}.txt; the splits are train, auto, val and test")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: lists no videos; write one name per line")
    frames, masks = folder / "JPEGImages_24fps", folder / "Annotations_6fps"
    for name in names:
        for place in (frames / name, masks / name):
            if not place.is_dir():
                raise UserError(f"{place}: is missing, but {path} lists {name}; add it or take it from the list")
    return [SavVideo(name, frames / name, ObjectFolders(masks / name)) for name in names]


def _with_json(root: Path, kind: str) -> list[SavVideo]:
    files = sorted(root.rglob(f"*_{kind}.json"))
    if not files:
        raise UserError(f"{root}: has no VIDEO_{kind}.json in it; give the folder of SA-V's training videos")
    videos = []
    for path in files:
        name = path.name.removesuffix(f"_{kind}.json")
        places = [path.with_name(f"{name}.mp4"), root / "JPEGImages_24fps" / name]
        frames = next((place for place in places if place.exists()), None)
        if frames is None:
            raise UserError(f"{path}: has no frames: neither {places[0]} nor {places[1]} exists; add one of them")
        videos.append(SavVideo(name, frames, MaskletFile(path)))
    return videos


@lru_cache(maxsize=8)  # a file is some MB of text, and a clip reads several of its frames
def _read_masklets(path: Path) -> list[list[dict[str, Any] | None]]:
    data = read_json(path)
    masklets = data.get("masklet") if isinstance(data, dict) else None
    if not isinstance(masklets, list) or not masklets or not all(isinstance(regions, list) for regions in masklets):
        raise UserError(f"{path}: has no list 'masklet' of one list of masks per frame; it is not SA-V's annotation")
    return masklets
