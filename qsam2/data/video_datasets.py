"""Annotated videos as they are published: the layout of DAVIS, YouTube-VOS, MOSE and LVOS, and that of SA-V."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from typing_extensions import TypedDict

from qsam2.data.index_masks import MaskFiles, split_ids
from qsam2.data.pictures import by_stem, files_below, list_pictures, subfolders
from qsam2.data.regions import decode_rle
from qsam2.data.video import FrameFolder, Masks, Video
from qsam2.data.video_file import open_video
from qsam2.errors import UserError, short
from qsam2.inputs import read_json, read_text

ANNOTATE_EVERY = 4  # frames: SA-V's training videos have 24 per second, and 6 masks


class DavisVideo(FrameFolder):
    """``frames/00000.jpg`` and ``masks/00000.png`` of one sequence; `annotated_frames` lists those that have masks.

    Raises UserError if there are no frames, no masks, or a mask without its frame.
    """

    def __init__(self, frames: Path, masks: Path) -> None:
        super().__init__(frames)
        paths = list_pictures(masks)
        self._masks, self._files = by_stem(paths), MaskFiles(paths, masks.parent)
        if not paths:
            raise UserError(f"{masks}: holds no masks (.png), but its frames are in {frames}")
        stray = sorted(self._masks.keys() - set(self.frame_names))
        if stray:
            raise UserError(f"{self._masks[stray[0]]}: is a mask without its frame in {frames}; add the frame")
        self.annotated_frames = [i for i, stem in enumerate(self.frame_names) if stem in self._masks]
        _ = self.size  # read now: a first frame that is damaged is an error at opening

    def masks(self, index: int) -> Masks | None:
        path = self._masks.get(self.frame_names[index])
        return None if path is None else split_ids(self._files.read(path, self.size))


def davis_videos(root: Path, split: str) -> list[DavisVideo]:
    """The videos of a split, in the order of its list.

    ``ROOT/JPEGImages[/480p]/SEQ``, ``ROOT/Annotations[/480p]/SEQ`` with ``ROOT/ImageSets[/2017|/2016]/SPLIT.txt``
    (DAVIS; ``2016/val`` names a year, ``all`` takes every sequence), or ``ROOT/SPLIT/JPEGImages/SEQ`` (YouTube-VOS,
    MOSE, LVOS), all of whose sequences are taken. Raises UserError naming the file or folder that is missing or wrong.
    """
    if (root / split / "JPEGImages").is_dir():
        root, names = root / split, None
    elif (root / "JPEGImages").is_dir():
        names = None if split == "all" else _split_names(root, split)
    else:
        raise UserError(f"{root}: has neither JPEGImages/ nor {split}/JPEGImages/; give the folder that holds one")
    frames, masks = (
        folder / "480p" if (folder / "480p").is_dir() else folder
        for folder in (root / "JPEGImages", root / "Annotations")
    )
    present = subfolders(frames)
    if names is None:
        names = present
    if not names:
        raise UserError(f"{frames}: holds no sequences; each is a folder of frames")
    unknown = sorted(set(names) - set(present))
    if unknown:
        raise UserError(
            f"{frames}: lacks the sequence {short(unknown[0])!r}, listed in the split {split!r}; add or unlist it"
        )
    return [DavisVideo(frames / name, masks / name) for name in names]


def _split_names(root: Path, split: str) -> list[str]:
    """Sequence names of a split, each once: a line is a name, or (DAVIS-2016) the paths of a frame and its mask."""
    sets = root / "ImageSets"
    candidates = [sets / f"{prefix}{split}.txt" for prefix in ("", "2017/", "2016/", "480p/")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted(p.relative_to(sets).with_suffix("").as_posix() for p in files_below(sets, "*.txt"))
        raise UserError(f"{sets}: has no {split}.txt; the splits are {', '.join([*known, 'all'])}")
    lines = [
        re.split(r"(?i)(?<=\.jpg|\.png)\s", line)[0] for line in _lines(path, "sequences")
    ]  # names may hold blanks
    lines = [line.rstrip("/") for line in lines]  # as `ls` writes folders
    return list(dict.fromkeys(Path(line).parent.name if "/" in line else line for line in lines))


def _lines(path: Path, what: str) -> list[str]:
    """The lines of a split's list, each once, without blank ones."""
    lines = list(dict.fromkeys(line.strip() for line in read_text(path).splitlines() if line.strip()))
    if not lines:
        raise UserError(f"{path}: lists no {what}; write one name per line")
    return lines


class SavVideo(Video):
    """Frames from a folder or an mp4, opened on first access; the masks are read by a subclass."""

    annotated_frames: list[int]  # those that have masks, in order

    def __init__(self, name: str, frames: Path) -> None:
        self.name, self._frames_at = name, frames

    @cached_property
    def _frames(self) -> Video:
        return open_video(self._frames_at)

    @property
    def frame_names(self) -> list[str]:  # type: ignore[override]
        return self._frames.frame_names

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        return self._frames.size

    def frame(self, index: int) -> np.ndarray:
        return self._frames.frame(index)


class JsonSavVideo(SavVideo):
    """Masklets in SA-V's JSON: per fourth frame one RLE per object; masklet k is object k + 1."""

    def __init__(self, name: str, frames: Path, masklets: Path) -> None:
        super().__init__(name, frames)
        self._path = masklets

    @cached_property
    def annotated_frames(self) -> list[int]:  # type: ignore[override]
        unnumbered = [name for name in self.frame_names if not name.isdecimal()]
        if unnumbered:
            raise UserError(
                f"{self._frames_at}: has the frame {short(unnumbered[0])!r}; SA-V's are named by numbers, as 00000"
            )
        numbers = [int(name) for name in self.frame_names]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise UserError(f"{self._path}: the frames of its video are not numbered without gaps; add those that lack")
        last = (len(_read_masklets(self._path)) - 1) * ANNOTATE_EVERY
        if last >= len(numbers):
            raise UserError(
                f"{self._path}: has masks up to frame {last}, but its video has only {len(numbers)} frames; "
                "use the video that belongs to it, at 24 frames per second"
            )
        return list(range(0, last + 1, ANNOTATE_EVERY))

    def masks(self, index: int) -> Masks | None:
        if index not in self.annotated_frames:
            return None
        regions = enumerate(_read_masklets(self._path)[index // ANNOTATE_EVERY], 1)
        return {k: decode_rle(region, self.size, self._path) for k, region in regions if region is not None}


class FolderSavVideo(SavVideo):
    """Masklets as ``OBJECT/FRAME.png`` (val and test of SA-V): folder ``000`` is object 1."""

    def __init__(self, name: str, frames: Path, folder: Path) -> None:
        super().__init__(name, frames)
        names = subfolders(folder)
        if not names:
            raise UserError(f"{folder}: holds no object folders (000, 001, ...) of masks")
        if others := [name for name in names if not name.isdecimal()]:
            raise UserError(f"{folder / others[0]}: is not an object's folder; they are numbers such as 000")
        if len({int(name) for name in names}) < len(names):
            raise UserError(f"{folder}: has two folders of one number; name each object's folder once, as 000")
        paths = {int(name) + 1: list_pictures(folder / name) for name in names}
        self._masks = {k: by_stem(files) for k, files in paths.items()}
        self._files = {k: MaskFiles(files, folder.parent) for k, files in paths.items()}

    @cached_property
    def annotated_frames(self) -> list[int]:  # type: ignore[override]
        index = {name: i for i, name in enumerate(self.frame_names)}
        stray = [path for files in self._masks.values() for stem, path in files.items() if stem not in index]
        if stray:
            raise UserError(f"{stray[0]}: is a mask without its frame; add the frame {stray[0].stem}")
        return sorted({index[stem] for files in self._masks.values() for stem in files})

    def masks(self, index: int) -> Masks | None:
        if index not in self.annotated_frames:
            return None
        name = self.frame_names[index]
        present = {k: files[name] for k, files in self._masks.items() if name in files}
        return {k: self._files[k].read(path, self.size) > 0 for k, path in present.items()}


def sav_videos(root: Path, split: str) -> Sequence[SavVideo]:
    """The videos of a split of SA-V.

    ``val``, ``test``: ``ROOT[/sav_SPLIT]`` with ``[sav_]SPLIT.txt``, ``JPEGImages_24fps/VIDEO/00000.jpg`` and
    ``Annotations_6fps/VIDEO/000/00000.png``. ``train`` or ``manual``, and ``auto``: every ``VIDEO_manual.json`` (or
    ``_auto``) below ROOT, with ``VIDEO.mp4`` beside it or ``ROOT/JPEGImages_24fps/VIDEO``. Raises UserError naming the
    file or folder that is missing or wrong.
    """
    if split in ("train", "manual", "auto"):
        return _with_json(root, "auto" if split == "auto" else "manual")
    folder = root / f"sav_{split}" if (root / f"sav_{split}").is_dir() else root
    lists = [folder / f"{split}.txt", folder / f"sav_{split}.txt"]
    path = next((path for path in lists if path.is_file()), None)
    if path is None:
        raise UserError(f"{root}: has no {split}.txt or sav_{split}.txt; the splits are train, auto, val and test")
    names = _lines(path, "videos")
    frames, masks = folder / "JPEGImages_24fps", folder / "Annotations_6fps"
    for place in (frames, masks):
        present = set(subfolders(place))
        if missing := [name for name in names if name not in present]:
            raise UserError(
                f"{place / short(missing[0])}: is missing, but {path} lists {short(missing[0])}; add it or take it off"
            )
    return [FolderSavVideo(name, frames / name, masks / name) for name in names]


def _with_json(root: Path, kind: str) -> list[JsonSavVideo]:
    files = files_below(root, f"*_{kind}.json")
    if not files:
        raise UserError(f"{root}: has no VIDEO_{kind}.json in it; give the folder of SA-V's training videos")
    videos = []
    for path in files:
        name = path.name.removesuffix(f"_{kind}.json")
        places = [path.with_name(f"{name}.mp4"), root / "JPEGImages_24fps" / name]
        frames = next((place for place in places if place.exists()), None)
        if frames is None:
            raise UserError(f"{path}: has no frames: neither {places[0]} nor {places[1]} exists; add one of them")
        videos.append(JsonSavVideo(name, frames, path))
    return videos


class _Annotation(TypedDict):
    masklet: Annotated[list[list[dict[str, Any] | None]], MinLen(1)]


@lru_cache(maxsize=8)  # a file is some MB of text, and a clip reads several of its frames
def _read_masklets(path: Path) -> list[list[dict[str, Any] | None]]:
    annotation: _Annotation = read_json(path, _Annotation, what="SA-V's annotation")
    return annotation["masklet"]
