"""`qsam2.load`, `image_predictor`, `video_predictor`: the masks of sam2's own classes, from files read bit by bit."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sam2 import sam2_video_predictor
from sam2.sam2_image_predictor import SAM2ImagePredictor
from small_predictors import (
    HEIGHT,
    SIZE_PX,
    WIDTH,
    pictures,
    random_nano,
    square,
    stock_predictor,
    write_folder,
    write_video,
)
from torch import Tensor

import qsam2
from qsam2.data.transforms import FrameSequence, to_model_input
from qsam2.errors import UserError
from qsam2.formats.packed import save_weights
from qsam2.loading import load_model
from qsam2.models import SAM2
from qsam2.recipe import build_recipe

LENGTH = 10
Masks = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("video") / "frames", pictures(LENGTH))


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sam2_video_predictor, "tqdm", lambda frames, **_: frames)


def clicks(model: Any, state: Any) -> Masks:
    return [
        model.add_new_points_or_box(state, 0, 1, points=[[20.0, 20.0]], labels=[1]),
        model.add_new_points_or_box(state, 0, 1, points=[[60.0, 5.0]], labels=[0], clear_old_points=False),
        *model.propagate_in_video(state),
    ]


def boxes(model: Any, state: Any) -> Masks:
    box = np.array([8.0, 12.0, 30.0, 30.0])
    return [model.add_new_points_or_box(state, 0, 7, box=box), *model.propagate_in_video(state)]


def masks(model: Any, state: Any) -> Masks:
    return [model.add_new_mask(state, 0, 1, square()), *model.propagate_in_video(state)]


def several_objects(model: Any, state: Any) -> Masks:
    """One by a mask, one by a click, one by a box; a correction, tracked again and backwards, one removed."""
    found = [
        model.add_new_mask(state, 3, 1, square()),
        model.add_new_points_or_box(state, 3, 2, points=[[60.0, 30.0]], labels=[1]),
        model.add_new_points_or_box(state, 3, 4, box=[40.0, 5.0, 70.0, 40.0]),
        *model.propagate_in_video(state, max_frame_num_to_track=5),
        model.add_new_points_or_box(state, 8, 1, points=[[25.0, 20.0]], labels=[1]),
        *model.propagate_in_video(state, start_frame_idx=8),
        *model.propagate_in_video(state, reverse=True),
    ]
    ids, updated = model.remove_object(state, 2)
    return [*found, (-1, list(ids), torch.cat([m for _, m in updated])), *model.propagate_in_video(state)]


def reset(model: Any, state: Any) -> Masks:
    before = clicks(model, state)
    model.reset_state(state)
    return [*before, *boxes(model, state)]


USES = [*(("float", use) for use in (clicks, boxes, masks, reset, several_objects)), ("packed", several_objects)]


def objects_added_later(model: Any, state: Any) -> Masks:
    """After tracking to the end: on a forgotten frame, tracked anew; then on a late one, tracked from there on."""
    found = [model.add_new_mask(state, 0, 1, square()), *model.propagate_in_video(state)]
    model.add_new_points_or_box(state, 8, 2, points=[[60.0, 30.0]], labels=[1])
    found += model.propagate_in_video(state)
    found.append(model.add_new_points_or_box(state, 22, 3, box=[40.0, 5.0, 70.0, 40.0]))
    return [*found, *model.propagate_in_video(state, start_frame_idx=22)]


def corrections(model: Any, state: Any) -> Masks:
    """A few frames back after the end of the video was reached, and again after tracking it twice from there."""
    found = [model.add_new_points_or_box(state, 0, 1, points=[[20.0, 20.0]], labels=[1])]
    found += model.propagate_in_video(state)
    found.append(model.add_new_points_or_box(state, 20, 1, points=[[30.0, 28.0]], labels=[0]))
    found += model.propagate_in_video(state, start_frame_idx=21)
    found.append(model.add_new_mask(state, 22, 1, square(20)))
    return [*found, *model.propagate_in_video(state, start_frame_idx=23), *model.propagate_in_video(state, 19)]


def back_and_forth(model: Any, state: Any) -> Masks:
    """From the prompt to the end and to the start; the last frame corrected, and back from there."""
    found = [model.add_new_mask(state, 6, 1, square()), *model.propagate_in_video(state)]
    found += model.propagate_in_video(state, start_frame_idx=6, max_frame_num_to_track=5, reverse=True)
    found.append(model.add_new_points_or_box(state, 23, 1, points=[[60.0, 5.0]], labels=[0]))
    return [*found, *model.propagate_in_video(state, start_frame_idx=23, reverse=True)]


def removed_and_added(model: Any, state: Any) -> Masks:
    """An object that is removed after the end and added anew, one whose second prompt is cleared."""
    model.add_new_mask(state, 0, 1, square())
    model.add_new_mask(state, 0, 2, square(40))
    model.add_new_mask(state, 20, 2, square(44))
    found = [*model.propagate_in_video(state), model.clear_all_prompts_in_frame(state, 20, 2)]
    model.remove_object(state, 1)
    found.append(model.add_new_points_or_box(state, 21, 1, points=[[20.0, 20.0]], labels=[1]))
    return [*found, *model.propagate_in_video(state, start_frame_idx=21)]


@pytest.mark.parametrize("use", [objects_added_later, corrections, back_and_forth, removed_and_added])
def test_orders_in_which_frames_are_forgotten(
    use: Callable[[Any, Any], Masks], models: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "frames", pictures(24))
    stock = stock_predictor("float", models["float"])
    ours = qsam2.video_predictor(models["float"], ["memory.correctable=8"])
    with torch.autocast("cpu", torch.bfloat16):  # sam2 cannot track before a prompt in float32
        states = [model.init_state(str(folder)) for model in (stock, ours)]
        expected, found = (use(model, state) for model, state in zip((stock, ours), states, strict=True))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for (_, _, mine), (frame, _, theirs) in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs), f"frame {frame} differs"
    outputs = states[1]["output_dict_per_obj"][0]
    assert outputs["forgotten"].spans


@pytest.mark.parametrize("memory", [[], ["memory.cache=true"]])
def test_a_model_built_under_inference_mode(memory: list[str], models: dict[str, Path], folder: Path) -> None:
    with torch.inference_mode():
        model = qsam2.video_predictor(models["packed"], memory)
        found = clicks(model, model.init_state(folder))
        moved = clicks(
            model.double().float(), model.init_state(folder)
        )  # its weights are inference tensors from now on
    other = qsam2.video_predictor(models["packed"], memory)
    for rows in zip(found, moved, clicks(other, other.init_state(folder)), strict=True):
        assert torch.equal(rows[0][2], rows[2][2]) and torch.equal(rows[1][2], rows[2][2])
    with torch.inference_mode():
        float_model = qsam2.load(models["float"])
    float_model.image_encoder(torch.zeros(1, 3, SIZE_PX, SIZE_PX))["vision_features"].sum().backward()


@pytest.mark.parametrize(("kind", "use"), USES)
def test_videos_get_the_masks_of_sam2s_own_class(
    kind: str, use: Callable[[Any, Any], Masks], models: dict[str, Path], folder: Path
) -> None:
    stock, ours = stock_predictor(kind, models[kind]), qsam2.video_predictor(models[kind])
    expected, found = (use(model, model.init_state(str(folder))) for model in (stock, ours))
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(found) > LENGTH
    for (_, _, mine), (frame, _, theirs) in zip(found, expected, strict=True):
        assert mine.shape[-2:] == (HEIGHT, WIDTH) and torch.equal(mine, theirs), f"frame {frame} differs"
    assert any(0.02 < float((logits > 0).float().mean()) < 0.98 for _, _, logits in expected)


def test_an_object_is_tracked_before_its_prompt(models: dict[str, Path], folder: Path) -> None:
    """Which sam2's own class cannot do in float32: it has no object pointer to read then, and memory in bfloat16."""
    stock, ours = stock_predictor("float", models["float"]), qsam2.video_predictor(models["float"])
    results = []
    for model, autocast in ((stock, True), (ours, True), (ours, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            state = model.init_state(str(folder))
            model.add_new_mask(state, 0, 1, square())
            model.add_new_points_or_box(state, 2, 2, points=[[60.0, 30.0]], labels=[1])
            results.append([logits for _, _, logits in model.propagate_in_video(state, max_frame_num_to_track=2)])
    for theirs, mine, precise in zip(*results, strict=True):
        assert torch.equal(mine, theirs) and float((precise - mine).abs().mean()) < 0.1 * float(mine.abs().mean())


@pytest.mark.parametrize("kind", ["float", "packed"])
def test_pictures_get_the_masks_of_sam2s_own_class(kind: str, models: dict[str, Path]) -> None:
    stock = SAM2ImagePredictor(stock_predictor(kind, models[kind]))
    stock._bb_feat_sizes = [(SIZE_PX // stride,) * 2 for stride in (4, 8, 16)]  # fixed to 1024 px in sam2
    ours = qsam2.image_predictor(models[kind])
    assert type(ours) is SAM2ImagePredictor
    points = {"point_coords": np.array([[20.0, 20.0], [60.0, 5.0]]), "point_labels": np.array([1, 0])}
    prompts: list[dict[str, Any]] = [
        points,
        {"box": np.array([8.0, 12.0, 30.0, 30.0]), "multimask_output": False},
        {**points, "mask_input": np.full((1, SIZE_PX // 4, SIZE_PX // 4), 3.0), "return_logits": True},
    ]
    for frame in pictures(2):
        ours.set_image(frame)
        stock.set_image(frame)
        for prompt in prompts:
            for mine, theirs in zip(ours.predict(**prompt), stock.predict(**prompt), strict=True):
                assert np.array_equal(mine, theirs)
    ours.reset_predictor()
    with pytest.raises(RuntimeError, match="An image must be set"):
        ours.predict(**points)


def test_load_gives_the_model(models: dict[str, Path]) -> None:
    loaded = qsam2.load(models["float"])
    pairs = zip(loaded.parameters(), random_nano().parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert not loaded.training and loaded.memory_bound is None
    assert qsam2.load(models["float"], ["memory.bounded=true"]).memory_bound is not None
    assert qsam2.load("nano", ["model.image_size=128"]).image_size == 128
    assert qsam2.video_predictor(models["packed"], ["memory.bounded=false"]).memory_bound is None


def test_a_video_file_is_tracked_as_its_frames(models: dict[str, Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", pictures(20, 46, 80))
    model = qsam2.video_predictor(models["float"])
    with av.open(str(path)) as container:  # one after another, by PyAV alone
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    inputs = [to_model_input(frame, SIZE_PX) for frame in decoded]
    mask = np.zeros((46, 80), dtype=bool)
    mask[12:30, 12:34] = True
    results = []
    for video in (path, str(path), inputs):
        state = model.init_state(video, video_size=(46, 80) if video is inputs else None)
        model.add_new_mask(state, 9, 1, mask)
        results.append([*model.propagate_in_video(state), *model.propagate_in_video(state, reverse=True)])
    for result in results[:2]:
        assert [row[:2] for row in result] == [row[:2] for row in results[2]]
        assert all(torch.equal(mine[2], theirs[2]) for mine, theirs in zip(result, results[2], strict=True))


def test_a_long_video_is_not_kept(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[weakref.ref[Tensor]] = []
    original = FrameSequence.__getitem__

    def recorded(self: FrameSequence, index: int) -> Tensor:
        frame = original(self, index)
        read.append(weakref.ref(frame))
        return frame

    monkeypatch.setattr(FrameSequence, "__getitem__", recorded)
    model = qsam2.video_predictor(models["float"], ["memory.correctable=1"])
    state = model.init_state(write_video(tmp_path / "clip.mp4", pictures(28, 46, 80)))
    assert not read  # nothing is decoded before it is needed
    model.add_new_points_or_box(state, 0, 1, points=[[20.0, 20.0]], labels=[1])
    assert len(list(model.propagate_in_video(state))) == 28
    assert len(read) == 28 and sum(frame() is not None for frame in read) <= 1
    kept = [output for output in state["output_dict_per_obj"][0]["non_cond_frame_outputs"].values()]
    assert sum(output["maskmem_features"] is not None for output in kept) <= 2 * model.num_maskmem


@pytest.mark.parametrize(
    "names",
    [["1.jpeg", "2.png", "007.jpg", "10.png"], ["shot_2.png", "shot_9.png", "shot_10.png"]],
    ids=["numbers", "names"],
)
def test_frames_are_in_the_order_of_their_numbers_or_names(
    models: dict[str, Path], tmp_path: Path, names: list[str]
) -> None:
    for index, name in enumerate(names):
        Image.new("RGB", (16, 16), (20 + 40 * index,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    images = qsam2.video_predictor(models["float"]).init_state(tmp_path)["images"]
    means = [float(images[index].mean()) for index in range(len(images))]
    assert len(means) == len(names) and means == sorted(means)


def test_what_is_no_video_is_refused_in_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    damaged, empty = write_video(tmp_path / "clip.mp4", pictures(20, 46, 80)), tmp_path / "empty"
    damaged.write_bytes(damaged.read_bytes()[:900])
    empty.mkdir()
    twice, odd = (write_folder(tmp_path / name, pictures(3)) for name in ("twice", "odd"))
    Image.new("RGB", (WIDTH, HEIGHT)).save(twice / "1.png")
    Image.new("RGB", (50, 50)).save(odd / "2.jpg")
    messages = {
        tmp_path / "nowhere.mp4": "nowhere.mp4 does not exist: give a picture, a folder",
        damaged: "clip.mp4: cannot be read as a video",
        empty: "empty: holds no frames",
        twice: "twice: holds two pictures named 1; a folder of frames has one file a frame",
        odd: "2.jpg: is 50x50 .* expected 45x79",
    }
    model = qsam2.video_predictor(models["float"])
    for path, message in messages.items():
        with pytest.raises(UserError, match=message) as error:
            state = model.init_state(path)
            model.add_new_mask(state, 0, 1, square())
            list(model.propagate_in_video(state))
        assert "\n" not in str(error.value)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="^device cuda: PyTorch finds 0 CUDA devices here; give cpu$"):
        qsam2.load("nano", device="cuda")
    with pytest.raises(UserError, match="device 'gpu' is none that PyTorch knows: give cpu or cuda"):
        qsam2.image_predictor("nano", device="gpu")


def test_models_that_are_none_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(
        UserError, match="nanno is no run folder, no model file and no size .nano, nano_heavy, nano_tails, t"
    ):
        qsam2.video_predictor("nanno")
    with pytest.raises(UserError, match=f"{tmp_path} holds no model.safetensors: the run is not finished"):
        qsam2.load(tmp_path)
    with pytest.raises(UserError, match=r"does not fit model.size=tiny: it holds .*; it fits model.size=nano"):
        qsam2.load(checkpoint, ["model.size=tiny"])
    odd, broken = tmp_path / "odd.pt", tmp_path / "broken.safetensors"
    torch.save({"model": {"weight": torch.zeros(3)}}, odd)
    broken.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="odd.pt is no SAM2 checkpoint that qsam2 knows"):
        qsam2.load(odd)
    with pytest.raises(UserError, match="broken.safetensors cannot be read .* bytes.: truncated or not a checkpoint"):
        qsam2.load(broken)


def test_inference_does_not_import_the_training_stack(models: dict[str, Path]) -> None:
    """Nor does the package import torch before a model is asked for."""
    heavy = ["lightning", "wandb", "albumentations", "tensordict", "torchmetrics", "matplotlib", "optuna", "pandas"]
    code = f"""
import sys, qsam2
print("torch" in sys.modules, callable(qsam2.video_predictor), "torch" in sys.modules)
qsam2.load("nano", ["model.checkpoint=null", "model.image_size=64"])
qsam2.video_predictor({str(models["packed"])!r})
print([name for name in {[*heavy, "onnx", "skimage"]} if name in sys.modules], "torchvision" in sys.modules)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False True True\n[] False\n"
    with pytest.raises(AttributeError, match="has no attribute 'predictor'"):
        _ = qsam2.predictor


def test_a_mistyped_name_is_refused_before_torch_is_imported() -> None:
    code = """
import sys
from qsam2.cli import main
prompt = ["--point", "1,1", "--out", "out"]
print(main(["predict", "nanno", "x.jpg", *prompt]), main(["predict", "nano", "x.jpg", *prompt]), "torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "2", "False"]
    first, second = ran.stderr.splitlines()
    assert first.startswith("error: nanno is no run folder") and second.startswith("error: x.jpg does not exist")


# MODEL


def test_model_files(models: dict[str, Path], checkpoint: Path, pristine: SAM2, tmp_path: Path) -> None:
    """Checkpoints of any size, float runs and packed files; each knows its recipe or is guessed from its shapes."""
    save_file(pristine.state_dict(), tmp_path / "bare.safetensors")
    recipe = build_recipe({"name": "float", "model": {"image_size": 64}, "evaluate": {"frames": 5}})
    save_weights(tmp_path / "model.safetensors", pristine, recipe.model_dump(mode="json"))
    for target in (checkpoint, tmp_path / "bare.safetensors", tmp_path):
        loaded, found = load_model(target, ["model.image_size=64"])
        assert not loaded.training and loaded.image_size == 64
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in pristine.state_dict().items())
    assert (found.name, found.evaluate.frames) == ("float", 5)
    quantized, found = load_model(models["packed"], ["evaluate.frames=7", "model.image_size=64"])
    assert found.quantize is not None and found.evaluate.frames == 7
    assert all(len(row.unique()) <= 16 for row in quantized.obj_ptr_tpos_proj.weight)


def test_model_of_a_size(tmp_path: Path) -> None:
    loaded, recipe = load_model("tiny", ["model.checkpoint=null", "model.image_size=64", "model.version=2"])
    torch.save({"model": loaded.state_dict()}, tmp_path / "tiny.pt")
    _, guessed = load_model(tmp_path / "tiny.pt", ["model.image_size=64"])
    for found in (recipe, guessed):
        assert (found.model.size, found.model.version) == ("tiny", "2")
