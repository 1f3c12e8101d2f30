"""Videos in the layout of DAVIS, YouTube-VOS, MOSE and LVOS: a folder of frames and one of index masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qsam2.data.footage import FrameFolder
from qsam2.data.pictures import list_pictures, read_index_mask, split_ids, subfolders
from qsam2.data.video import Video
from qsam2.errors import UserError


class DavisVideo(Video):
    """``frames/00000.jpg`` and ``masks/00000.png`` of one sequence; the masks may cover only some frames.

    Attributes:
        annotated_frames: indices of the frames that have a mask file, in order.

    Raises:
        UserError: no frames, no masks, or a mask without its frame; on reading, a damaged picture or another size.
    """

    def __init__(self, name: str, frames: Path, masks: Path) -> None:
        self.name = name
        self._frames = FrameFolder(frames)
        self._masks = {path.stem: path for path in list_pictures(masks, (".png",))}
        if not self._masks:
            raise UserError(f"{masks}: holds no masks (.png), but its frames are in {frames}")
        self.frame_names = self._frames.frame_names
        stray = sorted(self._masks.keys() - set(self.frame_names))
        if stray:
            raise UserError(f"{self._masks[stray[0]]}: is a mask without its frame in {frames}; add the frame")
        self.annotated_frames = [i for i, stem in enumerate(self.frame_names) if stem in self._masks]
        self.size = self._frames.size

    def frame(self, index: int) -> np.ndarray:
        return self._frames.frame(index)

    def masks(self, index: int) -> dict[int, np.ndarray] | None:
        path = self._masks.get(self.frame_names[index])
        return None if path is None else split_ids(read_index_mask(path, self.size))


def davis_videos(root: str | Path, split: str) -> list[DavisVideo]:
    """The videos of a split, in the order of its list.

    ``ROOT/JPEGImages[/480p]/SEQ``, ``ROOT/Annotations[/480p]/SEQ`` with ``ROOT/ImageSets[/2017|/2016]/SPLIT.txt``
    (DAVIS; ``2016/val`` names a year, ``all`` takes every sequence), or ``ROOT/SPLIT/JPEGImages/SEQ`` (YouTube-VOS,
    MOSE, LVOS), all of whose sequences are taken. Raises UserError naming the file or folder that is missing or wrong.
    """
    root = Path(root)
    if (root / split / "JPEGImages").is_dir():
        root, names = root / split, None
    elif (root / "JPEGImages").is_dir():
        names = None if split == "all" else _split_names(root, split)
    else:
        raise UserError(f"{root}: has neither JPEGImages/ nor {split}/JPEGImages/; give the folder that holds one")
    frames, masks = _resolution(root / "JPEGImages"), _resolution(root / "Annotations")
    present = subfolders(frames)
    if names is None:
        names = present
    if not names:
        raise UserError(f"{frames}: holds no sequences; each is a folder of frames")
    unknown = sorted(set(names) - set(present))
    if unknown:
        raise UserError(f"{frames}: lacks the sequence {unknown[0]!r}, listed in the split {split!r}; add or unlist it")
    return [DavisVideo(name, frames / name, masks / name) for name in names]


def _resolution(folder: Path) -> Path:
    return folder / "480p" if (folder / "480p").is_dir() else folder


def _split_names(root: Path, split: str) -> list[str]:
    """Sequence names of a split, each once: a line is a name, or (DAVIS-2016) the paths of a frame and its mask."""
    sets = root / "ImageSets"
    candidates = [sets / f"{prefix}{split}.txt" for prefix in ("", "2017/", "2016/", "480p/")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        known = sorted(p.relative_to(sets).with_suffix("").as_posix() for p in sets.rglob("*.txt"))
        raise UserError(f"{sets}: has no {split}.txt; the splits are {', '.join([*known, 'all'])}")
    lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: lists no sequences; write one name per line")
    return list(dict.fromkeys(Path(line).parent.name if "/" in line else line for line in lines))
