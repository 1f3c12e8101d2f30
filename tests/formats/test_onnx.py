"""A whole model in ONNX: each graph against PyTorch, tracking without PyTorch, every message."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_engines import by_pytorch, by_pytorch_in_float64, by_reference, compare_integers, noted
from small_models import seeing

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.cli import main
from qsam2.data.transforms import to_model_input
from qsam2.errors import UserError
from qsam2.formats.onnx import write
from qsam2.formats.onnx.graphs import Graph, build_graphs
from qsam2.formats.onnx.runtime import GRAPHS, OnnxTracker, as_bfloat16
from qsam2.layers.convert import convert, finalize
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe

SIZE_PX, FRAMES, LATER = 64, 10, 4
VIDEO = (48, 64)
QUANTIZE = {
    "weights": {"method": "minmax", "bits": 4},
    "activations": {"method": "minmax", "bits": 8},
    "rules": [{"match": "image_encoder.neck.*", "activation_bits": 4}, {"match": "memory_encoder.*", "bits": 6}],
}


def video() -> list[np.ndarray]:
    """A bright square that moves over a texture, RGB uint8 (H, W, 3) a frame."""
    frames = np.repeat(np.random.default_rng(0).integers(0, 120, (1, *VIDEO, 3), dtype=np.uint8), FRAMES, axis=0)
    for index, frame in enumerate(frames):
        frame[12:36, 8 + 2 * index : 30 + 2 * index] += 120
    return list(frames)


def first_mask() -> np.ndarray:
    mask = np.zeros(VIDEO, bool)
    mask[12:36, 8:30] = True
    return mask


MASK: dict[str, Any] = {"mask": first_mask()}
CLICK: dict[str, Any] = {"points": [[18.0, 24.0]], "labels": [1]}
BOX_AND_CLICK: dict[str, Any] = {"box": [8.0, 12.0, 30.0, 36.0], "points": [[2.0, 2.0]], "labels": [0]}


def track(model: SAM2) -> np.ndarray:
    """Mask logits of sam2's predictor, (FRAMES, 3, H, W): two objects from the first frame, one from a later one."""
    state = model.init_state([to_model_input(frame, SIZE_PX) for frame in video()], video_size=VIDEO)
    masks = np.zeros((FRAMES, 3, *VIDEO), np.float32)
    model.add_new_mask(state, 0, 1, torch.from_numpy(MASK["mask"]))
    model.add_new_points_or_box(state, 0, 2, **CLICK)
    for index, _, logits in model.propagate_in_video(state, 0, LATER):
        masks[index, :2] = logits[:, 0]
    model.add_new_points_or_box(state, LATER, 3, **BOX_AND_CLICK)
    for index, _, logits in model.propagate_in_video(state, LATER):
        first = 2 if index == LATER else 0
        masks[index, first:] = logits[first:, 0]
    return masks


def track_onnx(tracker: OnnxTracker) -> np.ndarray:
    """The same by our tracker."""
    frames, masks = video(), np.zeros((FRAMES, 3, *VIDEO), np.float32)
    tracker.start(frames[0], video_length=FRAMES)
    masks[0, 0] = tracker.add("mask", **MASK)
    masks[0, 1] = tracker.add("click", **CLICK)
    for index in range(1, FRAMES):
        masks[index, : len(tracker.object_ids)] = tracker.track(frames[index])
        if index == LATER:
            masks[index, 2] = tracker.add(7, **BOX_AND_CLICK)
    assert tracker.object_ids == ["mask", "click", 7]
    return masks


def track_one(tracker: OnnxTracker, prompt: dict[str, Any]) -> np.ndarray:
    """Mask logits of one object, (FRAMES, H, W)."""
    first, *others = video()
    tracker.start(first, video_length=FRAMES)
    return np.stack([tracker.add(1, **prompt), *(tracker.track(frame)[0] for frame in others)])


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """IoU of each object over all frames, where it is seen at all."""
    pixels, other = (masks.swapaxes(0, 1).reshape(3, -1) > 0 for masks in (ours, theirs))
    assert pixels.any(axis=1).all() and not pixels.all(axis=1).any()
    return (pixels & other).sum(axis=1) / (pixels | other).sum(axis=1)


def lively_nano(choices: bool = True) -> SAM2:
    """nano with random weights that sees objects, and masks with clear logits.

    choices: the best of three masks while tracking, and in place of an unstable single one, as in the official sizes.
    """
    model = seeing(image_size=SIZE_PX)
    model.multimask_output_for_tracking = choices
    model.sam_mask_decoder.dynamic_multimask_via_stability = choices
    model.memory_attention.layers = model.memory_attention.layers[:1]
    for head in model.sam_mask_decoder.output_hypernetworks_mlps:
        head.layers[2].weight.data *= 30
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SAM2:
    """The same, quantized."""
    model = lively_nano()
    convert(model, QuantizeRecipe.model_validate(QUANTIZE))
    find_ranges(model.eval(), lambda _: track(model), [0])
    finalize(model)
    return model


@pytest.fixture(scope="module")
def exported(model: SAM2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    write.export_onnx(model, {"name": "test"}, folder, card={"scores": 1}, progress=False)
    return folder


@pytest.fixture(scope="module")
def tracker(exported: Path) -> OnnxTracker:
    return OnnxTracker(exported, optimize=False, threads=1)


@pytest.fixture
def compared(model, exported) -> tuple[dict[str, Graph], dict[str, onnx.ModelProto], list[Any]]:
    """The graphs in PyTorch, in ONNX, and what each got in a tracked video."""
    graphs, calls = build_graphs(model), []
    track_one(OnnxTracker.of_graphs(write.describe(model), noted(by_pytorch(graphs), calls)), MASK)
    models = {name: onnx.load(exported / f"{name}.onnx") for name in graphs}
    return graphs, models, list({name: (name, *call) for name, *call in calls}.values())  # the last one of each


def test_each_graph_computes_the_integers_of_pytorch(compared):
    table = compare_integers(*compared)
    assert table.keys() == set(GRAPHS) and all(row["integers"] > 0 for row in table.values())
    for name, row in table.items():
        # Sums in another order fall on the other side of a rounding border now and then,
        assert row["most steps"] <= 1, name
        assert row["share unequal"] < 1e-4, name
        assert row["largest error of an output"] < 0.1, name  # and later layers follow


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the reference evaluator's sigmoid overflows to 0
def test_in_float64_each_graph_is_the_model(compared):
    graphs, models, calls = compared
    pytorch, reference = by_pytorch_in_float64(graphs), by_reference(models)
    for name, inputs, _ in calls:
        for ours, theirs in zip(pytorch(name, inputs), reference(name, inputs), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6 * np.abs(ours).max(), err_msg=name)


@pytest.mark.parametrize("choices", [True, False])
def test_the_tracker_decides_as_sam2(choices):
    """In float, where nothing rounds differences up, over the graphs in PyTorch."""
    model = lively_nano(choices)
    ours, theirs = (
        track(model),
        track_onnx(OnnxTracker.of_graphs(write.describe(model), by_pytorch(build_graphs(model)))),
    )
    assert overlaps(ours, theirs).min() >= 0.999
    for index in range(3):
        limit = 1e-3 * float(np.abs(ours[:, index]).max())
        np.testing.assert_allclose(theirs[:, index], ours[:, index], atol=limit)
    assert not np.allclose(ours[:, 0], ours[:, 1])


def test_masks_are_those_of_pytorch_as_far_as_rounding_lets_them(model, exported, tracker):
    calls: list[Any] = []
    masks = track_onnx(OnnxTracker.of_graphs(tracker.model, noted(tracker.run_graph, calls)))
    assert overlaps(track(model), masks).min() > 0.9
    assert overlaps(masks, track_onnx(OnnxTracker(exported, threads=1))).min() > 0.9, "optimized sessions"
    assert np.array_equal(track_one(tracker, MASK), masks[:, 0]), "objects do not see each other"
    names = [name for name, *_ in calls]
    assert names.count("image_encoder") == FRAMES, "a picture is encoded once whatever the number of objects"
    assert names.count("memory_attention") == 2 * (FRAMES - 1) + FRAMES - 1 - LATER


def test_a_description_and_five_checked_graphs_are_written(model, exported):
    names = sorted(file.name for file in exported.iterdir())
    assert names == sorted([f"{name}.onnx" for name in GRAPHS] + ["model.json"])
    description = json.loads((exported / "model.json").read_text())
    assert description["image_size"] == SIZE_PX and description["opset"] == write.OPSET
    assert description["recipe"] == {"name": "test"} and description["card"] == {"scores": 1}
    for name in GRAPHS:
        stored = onnx.load(exported / f"{name}.onnx")
        onnx.checker.check_model(stored, full_check=True)
        assert b"site-packages" not in stored.SerializeToString()
        assert description["files"][f"{name}.onnx"]["bytes"] == (exported / f"{name}.onnx").stat().st_size
    encoder = sum(p.numel() for p in model.image_encoder.parameters())
    assert (exported / "image_encoder.onnx").stat().st_size < encoder * 1.2, "weights of 4 bits take half a byte"


def test_a_video_is_tracked_without_pytorch_and_a_tracker_starts_again(exported, tracker):
    code = f"""
import io, sys
sys.modules["torch"] = None
import numpy as np
from qsam2.formats.onnx.runtime import OnnxTracker
tracker = OnnxTracker({str(exported)!r}, optimize=False, threads=1)
frames = np.load(io.BytesIO(sys.stdin.buffer.read()))
tracker.start(frames[0], video_length=len(frames))
masks = [tracker.add(1, points=[[18, 24]])]
masks += [tracker.track(frame)[0] for frame in frames[1:3]]
assert sys.modules["torch"] is None and "sam2" not in sys.modules
np.save(sys.stdout.buffer, np.stack(masks))
"""
    given = io.BytesIO()
    np.save(given, np.stack(video()))
    ran = subprocess.run([sys.executable, "-c", code], input=given.getvalue(), capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    once = track_one(tracker, CLICK)
    assert np.array_equal(np.load(io.BytesIO(ran.stdout)), once[:3])
    tracker.start(video()[3])
    tracker.add(1, **MASK)
    assert np.array_equal(once, track_one(tracker, CLICK))


def test_memory_is_rounded_as_by_pytorch():
    x = torch.randn(10000) * torch.logspace(-20, 20, 10000)
    x[:2] = torch.tensor([1.00390625, 1.01171875])  # ties
    assert np.array_equal(as_bfloat16(x.numpy()), x.bfloat16().float().numpy())


FRAME = video()[0]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "add needs points, a box .or both., or a mask alone"),
    "two prompts": ({"box": [1, 2, 3, 4], "mask": first_mask()}, "or a mask alone"),
    "labels alone": ({"labels": [1]}, "labels were given without points"),
    "labels": ({"points": [[1, 2]], "labels": [1, 0]}, "1 points were given with 2 labels"),
    "box": ({"box": [1, 2, 3]}, r"box has the shape \(3,\): give \(left, top"),
    "empty mask": ({"mask": np.zeros(VIDEO)}, "mask has 0 pixels"),
    "small mask": ({"mask": np.ones((3, 4))}, r"in \(3, 4\): give the frame's size \(48, 64\)"),
}


@pytest.mark.parametrize("prompt, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_prompts_are_refused(tracker, prompt, message):
    tracker.start(FRAME)
    with pytest.raises(UserError, match=message):
        tracker.add(1, **prompt)
    assert tracker.object_ids == []


def test_frames_and_objects_follow_a_start_and_frames_keep_their_kind_and_size(exported, tracker):
    unused = OnnxTracker(exported)
    with pytest.raises(UserError, match="there is no frame yet: call start with the first frame"):
        unused.add(1, points=[[1, 2]])
    for prepare in (lambda: None, lambda: unused.start(FRAME)):
        prepare()
        with pytest.raises(UserError, match="nothing is tracked yet: call start"):
            unused.track(FRAME)
    tracker.start(FRAME)
    tracker.add(1, box=[1, 2, 30, 40])
    with pytest.raises(UserError, match="object 1 is tracked already: give a new object another id"):
        tracker.add(1, points=[[1, 2]])
    with pytest.raises(UserError, match=r"a frame is \(40, 64\), the first one was \(48, 64\)"):
        tracker.track(FRAME[:40])
    for frame, message in (
        (FRAME / 255, "a frame is float64 .*: give RGB as uint8"),
        ([1], "a frame is list: give RGB"),
    ):
        with pytest.raises(UserError, match=message):
            tracker.start(frame)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _change(folder: Path, **values: Any) -> None:
    file = folder / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda folder: (folder / "model.json").unlink(), "holds no complete export"),
    "cut description": (lambda folder: (folder / "model.json").write_text("{"), "model.json is damaged"),
    "another format": (lambda folder: _change(folder, format="x"), "is no description of an ONNX export"),
    "another version": (lambda folder: _change(folder, version=2), "has version 2, this qsam2 reads 1"),
    "no graph": (lambda folder: (folder / "mask_decoder.onnx").unlink(), "mask_decoder.onnx cannot be read"),
    "cut graph": (lambda folder: (folder / "mask_decoder.onnx").write_bytes(b"1"), "is not the file that was exported"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_exports_are_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=message):
        OnnxTracker(copied)


def test_missing_packages_are_named_with_what_to_install(monkeypatch, exported, model, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'qsam2\[onnx\]'"):
        OnnxTracker(exported)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "nano", "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert "ONNX export needs onnx, onnxscript: pip install 'qsam2[onnx]'" in capsys.readouterr().err


def test_a_failed_write_leaves_no_part(monkeypatch, tmp_path):
    monkeypatch.setattr(write, "build_graphs", lambda model: {"a": None})
    monkeypatch.setattr(write, "graph_bytes", lambda graph: b"x")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="a.onnx could not be written: No space left on device"):
        write.export_onnx(None, {}, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
