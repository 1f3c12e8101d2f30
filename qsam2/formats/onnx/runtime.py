"""Tracking with ONNX Runtime and NumPy, without PyTorch: runs the files of `qsam2 export --format onnx`."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypedDict

from qsam2.errors import UserError, short
from qsam2.formats.onnx.resize import resize, resize_frame
from qsam2.inputs import read_json

FORMAT, VERSION = "qsam2-onnx", 1
GRAPHS = ("image_encoder", "memory_attention", "memory_encoder", "prompt_encoder", "mask_decoder")
PROMPTED_LOGIT = 10.0
"""Logits of a mask prompt are -10 and 10, as in sam2."""
NO_POINTS = np.zeros((1, 1, 2), np.float32), np.full((1, 1), -1, np.int32)
"""Points and labels where none are given."""
Floats = NDArray[np.float32]
RunGraph = Callable[[str, dict[str, NDArray[Any]]], list[Floats]]
"""(graph name, inputs by name) to outputs."""


@dataclass
class TrackedObject:
    """Memory of one object: its prompted frame and the latest frames."""

    prompted_idx: int
    prompted: Floats  # (M, h, h)
    prompted_pointer: Floats  # (C,)
    recent: deque[Floats]  # the oldest first
    pointers: deque[Floats]  # the latest first


class OnnxTracker:
    """Tracks objects through a video: `start` with its first frame, `add` each object, then `track` frame by frame.

    A frame is encoded once for all objects. Each object has a memory as in sam2: the prompted frame, the latest frames,
    and object pointers of up to 15 more frames. Masks of objects may overlap.

    Args:
        folder: output folder of the export.
        providers: execution providers of ONNX Runtime; the first available one is used.
        optimize: let ONNX Runtime fuse operations, also into integer ones; without it, results equal those of the
            exported model up to the order of sums.
        threads: threads per operation; 0 for one per core.

    Raises:
        UserError: ONNX Runtime is missing, or a file is missing, damaged or of another version.
    """

    model: dict[str, Any]
    run_graph: RunGraph
    objects: dict[Hashable, TrackedObject] = {}  # `start` gives each tracker its own
    _frame_idx: int | None = None
    _no_prompt: list[Floats] | None = None

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        optimize: bool = True,
        threads: int = 0,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("tracking with ONNX needs onnxruntime: pip install 'qsam2[onnx]'") from error
        model = read_description(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        sessions = {
            name: onnxruntime.InferenceSession(_read_graph(folder, name, model), options, list(providers))
            for name in GRAPHS
        }
        self.model, self.run_graph = model, lambda name, inputs: sessions[name].run(None, inputs)

    @classmethod
    def of_graphs(cls, model: dict[str, Any], run: RunGraph) -> OnnxTracker:
        """A tracker with another implementation of the graphs; `model` is the content of `model.json`."""
        tracker = cls.__new__(cls)
        tracker.model, tracker.run_graph = model, run
        return tracker

    @property
    def object_ids(self) -> list[Hashable]:
        """Ids of the tracked objects, in the order of their masks."""
        return list(self.objects)

    def start(self, frame: NDArray[np.uint8], *, video_length: int | None = None) -> None:
        """Start a video with its first frame, RGB uint8 (H, W, 3); previous objects are removed.

        Args:
            video_length: number of frames; below 16 it affects the positions of object pointers, as in sam2.

        Raises:
            UserError: the frame cannot be used.
        """
        self._size = self._checked_frame(frame).shape[:2]
        self._limit = min(video_length or self.model["pointers"], self.model["pointers"])
        self._picture = self._encode(frame)
        self.objects, self._frame_idx = {}, 0

    def add(
        self,
        object_id: Hashable,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> Floats:
        """Prompt a new object on the latest frame; returns its mask logits (H, W) there.

        Args:
            points, labels: (N, 2) as (x, y) in pixels, and (N,): 1 on the object, 0 beside it; labels default to 1.
            box: (left, top, right, bottom) in pixels; may stand with points.
            mask: bool (H, W); stands alone.

        Raises:
            UserError: there is no frame yet, the object is tracked already, or the prompt cannot be used.
        """
        if self._frame_idx is None:
            raise UserError("there is no frame yet: call start with the first frame, then add objects")
        if object_id in self.objects:
            raise UserError(f"object {object_id!r} is tracked already: give a new object another id, or start again")
        prompt = self._points(points, labels, box)
        if (prompt is None) == (mask is None):
            raise UserError("add needs points, a box (or both), or a mask alone; give one kind of prompt")
        picture = self._picture
        if prompt is None:
            logits, pointer, score = self._use_mask(picture, np.asarray(mask))
        else:
            features, choices = picture["features_without_memory"], self._has_choices(prompt[0].shape[1])
            logits, pointer, score = self._decode(features, picture, self._prompt(*prompt), choices=choices)
        self.objects[object_id] = TrackedObject(
            prompted_idx=self._frame_idx,
            prompted=self._remember(picture, logits, score, prompted=True),
            prompted_pointer=pointer,
            recent=deque(maxlen=self.model["memory_slots"] - 1),
            pointers=deque(maxlen=max(self._limit - 1, 0)),
        )
        return resize(logits, *self._size)

    def track(self, frame: NDArray[np.uint8]) -> Floats:
        """Mask logits (objects, H, W) of the next frame, RGB uint8 of the first frame's shape; order of `object_ids`.

        Raises:
            UserError: no object was added, or the frame cannot be used.
        """
        if self._frame_idx is None or not self.objects:
            raise UserError("nothing is tracked yet: call start with the first frame, then add an object with a prompt")
        if self._checked_frame(frame).shape[:2] != self._size:
            raise UserError(f"a frame is {frame.shape[:2]}, the first one was {self._size}: resize all frames alike")
        self._frame_idx += 1
        self._picture = self._encode(frame)
        return np.stack([self._track_object(item) for item in self.objects.values()])

    def _track_object(self, item: TrackedObject) -> Floats:
        """Mask logits (H, W) of the current frame, which is added to the object's memory."""
        picture = self._picture
        (features,) = self.run_graph("memory_attention", {"features": picture["features"], **self._bank(item)})
        if self._no_prompt is None:
            self._no_prompt = self._prompt(*NO_POINTS)
        choices = self.model["choices_while_tracking"] and self._has_choices(0)
        logits, pointer, score = self._decode(features, picture, self._no_prompt, choices=choices)
        item.recent.append(self._remember(picture, logits, score, prompted=False))
        item.pointers.appendleft(pointer)
        return resize(logits, *self._size)

    # The five graphs

    def _encode(self, frame: NDArray[np.uint8]) -> dict[str, Floats]:
        size = self.model["image_size"]
        pixels = resize_frame(frame, size).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(self.model[key], np.float32)[:, None, None] for key in ("mean", "std"))
        names = ("features", "features_without_memory", "stride_4", "stride_8")
        return dict(zip(names, self.run_graph("image_encoder", {"image": ((pixels - mean) / std)[None]}), strict=True))

    def _prompt(self, points: Floats, labels: NDArray[np.int32], mask: Floats | None = None) -> list[Floats]:
        """The prompt and the dense prompt, the mask (S, S) included."""
        size = self.model["image_size"]
        shown, has_mask = np.zeros((size, size), np.float32) if mask is None else mask, np.array([mask is not None])
        inputs = {"points": points, "labels": labels, "mask": shown[None, None], "has_mask": has_mask}
        return self.run_graph("prompt_encoder", inputs)

    def _decode(
        self, features: Floats, picture: dict[str, Floats], prompt: list[Floats], *, choices: bool
    ) -> tuple[Floats, Floats, Floats]:
        """Mask logits (4h, 4h), object pointer (C,), object score (1, 1)."""
        inputs = {"features": features, "stride_4": picture["stride_4"], "stride_8": picture["stride_8"]}
        inputs |= dict(zip(("prompt", "dense_prompt"), prompt, strict=True))
        masks, ious, score, pointers = self.run_graph("mask_decoder", inputs)
        best = 1 + int(ious[0, 1:].argmax())
        if choices:
            return masks[0, best], pointers[0, best], score
        # the single mask, unless it changes much with its threshold
        single, delta = masks[0, 0], self.model["stability_delta"]
        inner, union = np.count_nonzero(single > delta), np.count_nonzero(single > -delta)
        is_stable = union == 0 or inner / union >= self.model["stability_threshold"]
        return single if is_stable else masks[0, best], pointers[0, 0], score

    def _use_mask(self, picture: dict[str, Floats], mask: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
        """The prompted mask itself as logits; the decoder runs only for the object pointer."""
        if mask.shape != self._size or not mask.any():
            size = f"{np.count_nonzero(mask)} pixels in {mask.shape}"
            raise UserError(f"mask has {size}: give the frame's size {self._size}, not empty")
        size = self.model["image_size"]
        shown = (resize(mask.astype(np.float32), size, size, antialias=True) >= 0.5).astype(np.float32)
        prompt = self._prompt(*NO_POINTS, shown)
        _, pointer, _ = self._decode(picture["features"], picture, prompt, choices=False)
        logits = resize((2 * shown - 1) * np.float32(PROMPTED_LOGIT), size // 4, size // 4, antialias=True)
        return logits, pointer, np.full((1, 1), PROMPTED_LOGIT, np.float32)

    def _remember(self, picture: dict[str, Floats], logits: Floats, score: Floats, *, prompted: bool) -> Floats:
        """The frame's memory (M, h, h)."""
        binarize = np.array([prompted and self.model["binarize_prompted_masks"]])
        inputs = {"features": picture["features"], "mask": logits[None, None], "object_score": score}
        (memory,) = self.run_graph("memory_encoder", {**inputs, "binarize": binarize})
        return as_bfloat16(memory[0])

    # Decisions that sam2 takes outside of its networks

    def _bank(self, item: TrackedObject) -> dict[str, NDArray[Any]]:
        """The memory attention's inputs: the prompted frame in slot 0, the latest frame in the last slot."""
        assert self._frame_idx is not None
        slots, count, channels = (self.model[key] for key in ("memory_slots", "pointers", "channels"))
        memory, filled = np.zeros((1, slots, *item.prompted.shape), np.float32), np.zeros((1, slots), bool)
        memory[0, 0], filled[0, 0] = item.prompted, True
        for back, frame in enumerate(reversed(item.recent), start=1):
            memory[0, slots - back], filled[0, slots - back] = frame, True
        pointers, distances = np.zeros((1, count, channels), np.float32), np.zeros((1, count), np.float32)
        all_pointers = [item.prompted_pointer, *item.pointers]
        pointers[0, : len(all_pointers)] = all_pointers
        distances[0, : len(all_pointers)] = [self._frame_idx - item.prompted_idx, *range(1, len(all_pointers))]
        return {
            "memory": memory,
            "memory_mask": filled,
            "pointers": pointers,
            "pointer_distances": distances / np.float32(max(self._limit - 1, 1)),
            "pointer_mask": np.arange(count)[None] < len(all_pointers),
        }

    def _has_choices(self, points: int) -> bool:
        least, most = self.model["choices_from_points"]
        return least <= points <= most

    # Prompts

    def _points(
        self, points: ArrayLike | None, labels: ArrayLike | None, box: ArrayLike | None
    ) -> tuple[Floats, NDArray[np.int32]] | None:
        """Points (1, P, 2) in pixels of the model's input and labels (1, P); a box is two corners before the points."""
        if points is None and box is None:
            if labels is not None:
                raise UserError("labels were given without points: give points (N, 2) with labels (N,)")
            return None
        xy = np.asarray([] if points is None else points, np.float32).reshape(-1, 2)
        kinds = np.ones(len(xy), np.int32) if labels is None else np.asarray(labels, np.int32).reshape(-1)
        if len(kinds) != len(xy):
            raise UserError(f"{len(xy)} points were given with {len(kinds)} labels: give one label per point")
        if box is not None:
            corners = np.asarray(box, np.float32)
            if corners.shape != (4,):
                raise UserError(f"box has the shape {corners.shape}: give (left, top, right, bottom) in pixels")
            xy, kinds = np.concatenate([corners.reshape(2, 2), xy]), np.concatenate([[2, 3], kinds])
        height, width = self._size
        scaled = xy / np.array([width, height], np.float32) * np.float32(self.model["image_size"])
        return scaled[None].astype(np.float32), kinds[None].astype(np.int32)

    @staticmethod
    def _checked_frame(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            given = f"{getattr(frame, 'dtype', type(frame).__name__)} {getattr(frame, 'shape', '')}".strip()
            raise UserError(f"a frame is {given}: give RGB as uint8 (H, W, 3)")
        return frame


class _File(TypedDict):
    sha256: str


class Description(TypedDict):
    """Properties of a model that a tracker needs besides its graphs."""

    image_size: int
    mean: list[float]
    std: list[float]
    memory_slots: int
    channels: int
    pointers: int
    binarize_prompted_masks: bool
    choices_from_points: list[int]
    choices_while_tracking: bool
    stability_delta: float
    stability_threshold: float
    files: dict[str, _File]


def read_description(folder: str | Path) -> dict[str, Any]:
    """Content of an export's `model.json`; raises UserError if it is missing, damaged or of another version."""
    file = Path(folder) / "model.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no complete export (no {file.name}): export again")
    description: dict[str, Any] = read_json(file, dict[str, Any], advice="export again")
    if description.get("format") != FORMAT:
        raise UserError(f"{file} is no description of an ONNX export of qsam2: export again")
    if description.get("version") != VERSION:
        version = short(description.get("version"))
        raise UserError(f"{file} has version {version}, this qsam2 reads {VERSION}: export again")
    return read_json(file, Description, advice="export again")


def as_bfloat16(x: Floats) -> Floats:
    """Round to bfloat16 (half to even), the dtype of sam2's memory."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _read_graph(folder: str | Path, name: str, description: dict[str, Any]) -> bytes:
    file = Path(folder) / f"{name}.onnx"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): export again") from error
    if hashlib.sha256(data).hexdigest() != description["files"].get(file.name, {}).get("sha256"):
        raise UserError(f"{file} is not the file that was exported (another SHA-256): copy or export it again")
    return data
