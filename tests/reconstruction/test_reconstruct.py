"""Blocks are fitted, kept only where that helps, stored, and the model that comes out is hard and passes the audit."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from small_calibration import quantize
from small_runs import RUNS, small
from torch import nn

from qsam2 import pipeline
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.calibration.forward import ImageFeatures
from qsam2.errors import UserError
from qsam2.layers.convert import convert, quantized_weights, quantizers
from qsam2.loading import load_model
from qsam2.pipeline import run_recipe
from qsam2.quantizers import QuantizerState
from qsam2.recipe import Recipe, build_recipe
from qsam2.recipe.calibrate import ReconstructRecipe
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.reconstruction import block_by_block
from qsam2.reconstruction.blocks import Call
from qsam2.reconstruction.fit_block import fit_block, target_variances
from qsam2.reconstruction.rounding import LearnedStep, SoftRounding, learned_steps, soft_roundings

CPU = TrainerRecipe(accelerator="cpu", devices=1)


def correlated(count: int) -> list[torch.Tensor]:
    """Inputs that vary in few directions: there, nearest rounding is far from best."""
    mixing = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    return [torch.randn(32, 4) @ mixing + 0.05 * torch.randn(32, 16) for _ in range(count)]


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A quantized block and its float twin."""
    twin = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    block = copy.deepcopy(twin)
    convert(block, quantize(3, activations={"method": "minmax", "bits": 6}))
    find_ranges(block, block, correlated(4))
    return block, twin


def calls(twin: nn.Module, inputs: list[torch.Tensor]) -> list[Call]:
    with torch.no_grad():
        return [Call((x,), {}, (twin(x),)) for x in inputs]


def fit(block: nn.Module, given: list[Call], folder: Path, stopped: Any = lambda: False, **values: Any):
    recipe = ReconstructRecipe(**{"iterations": 100, "lr": 0.05, "regularization": 0.1, **values})
    return fit_block("it", block, given, recipe, CPU, folder=folder, image_size=64, seed=0, stopped=stopped)


def error(block: nn.Module, given: list[Call]) -> float:
    with torch.no_grad():
        return sum(float((block(*call.args) - call.targets[0]).square().mean()) for call in given)


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_a_fit_is_better_on_data_it_has_not_seen(pair: Any, method: str, tmp_path: Path) -> None:
    block, twin = pair
    held_out = calls(twin, correlated(8))
    before = error(block, held_out)
    ranges = [float(q.scale) for _, q in quantizers(block) if q.role == "activation"]
    row = fit(block, calls(twin, correlated(8)), tmp_path, method=method)
    assert row.kept and row.calls == 8 and 0 < row.flipped < 0.5
    assert row.error[1] < 0.8 * row.error[0]
    assert error(block, held_out) < 0.9 * before
    assert not soft_roundings(block) and not learned_steps(block)
    for _, layer, quantizer in quantized_weights(block):
        assert quantizer.state is QuantizerState.FROZEN
        assert torch.equal(quantizer(layer.weight), layer.weight)
    learned = [float(q.scale) for _, q in quantizers(block) if q.role == "activation"]
    assert (learned == ranges) == (method == "adaround")
    assert all(parameter.requires_grad for parameter in (block[0].weight, block[0].bias))


def test_block_ap_trains_weights_and_clips_and_leaves_them_trainable(pair: Any, tmp_path: Path) -> None:
    _, twin = pair
    block = copy.deepcopy(twin)
    convert(block, quantize(weights={"method": "lsc", "bits": 3}, activations={"method": "lsc", "bits": 6}))
    find_ranges(block, block, correlated(4))
    held_out = calls(twin, correlated(8))
    first, before = error(block, held_out), copy.deepcopy(block.state_dict())
    row = fit(block, calls(twin, correlated(8)), tmp_path, method="block_ap", lr=3e-3, step_lr=1e-2)
    assert row.kept and 0 < row.flipped < 0.9
    assert row.error[1] < 0.5 * row.error[0] and error(block, held_out) < 0.6 * first
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"0.weight", "0.bias", "2.weight", "0.weight_quantizer.log_alpha", "2.input_quantizer.log_alpha"} <= moved
    assert {q.state for _, q in quantizers(block)} == {QuantizerState.QUANTIZE}
    assert all(parameter.requires_grad for parameter in block.parameters())
    for _, layer, quantizer in quantized_weights(block):
        assert not torch.equal(quantizer(layer.weight), layer.weight)


def test_the_error_is_that_of_the_block_over_the_variance_of_its_output(pair: Any, tmp_path: Path) -> None:
    block, twin = pair
    given = calls(twin, correlated(3))
    variance = float(torch.cat([call.targets[0] for call in given]).var(unbiased=False))
    assert float(target_variances(given)[0]) == pytest.approx(variance, rel=1e-5)
    expected = error(block, given) / 3 / variance
    assert fit(block, given, tmp_path, iterations=1).error[0] == pytest.approx(expected, rel=1e-5)
    assert target_variances([Call((), {}, (torch.ones(3),))]) == [torch.tensor(1.0)], "constant: no division by zero"


def test_a_block_is_as_before_if_its_fit_does_not_help_or_is_stopped(pair: Any, tmp_path: Path) -> None:
    block, twin = pair
    before, asked = copy.deepcopy(block.state_dict()), iter([False] * 3)
    row = fit(block, calls(twin, correlated(4)), tmp_path, iterations=3, lr=100.0)
    assert not row.kept and row.error[0] == row.error[1] and row.flipped == 0.0
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())
    assert {q.state for _, q in quantizers(block)} == {QuantizerState.QUANTIZE}
    stopped = lambda: next(asked, True)  # noqa: E731
    assert fit(block, calls(twin, correlated(4)), tmp_path, stopped=stopped, iterations=10**6) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())
    assert not soft_roundings(block) and not learned_steps(block)


def test_a_loss_that_is_not_finite_says_what_to_do(pair: Any, tmp_path: Path) -> None:
    block, twin = pair
    given = [Call(call.args, {}, (call.targets[0] * float("inf"),)) for call in calls(twin, correlated(2))]
    with pytest.raises(UserError, match="reconstruct: the loss is inf at step 0; lower reconstruct.lr"):
        fit(block, given, tmp_path)


# Whole runs

BLOCKS = RUNS["reconstructed"]["reconstruct"]["blocks"]


def recipe(folder: Path, *overrides: str) -> Recipe:
    return build_recipe(small(Path(), folder, **RUNS["reconstructed"]), overrides)


@pytest.fixture
def whole(runs: dict[str, Path]) -> Path:
    """A run that nothing disturbed."""
    return runs["reconstructed"]


def results(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return load_file(folder / "model.safetensors"), metrics["reconstruction"]


def test_a_run_reconstructs_its_blocks_and_packs_the_fitted_integers(whole: Path) -> None:
    _, figures = results(whole)
    rows = {row["name"]: row for row in figures["blocks"]}
    assert list(rows) == BLOCKS
    assert figures["complete"] and figures["total"] == 4 and figures["video"] is None
    for row in rows.values():
        assert row["error"][1] <= row["error"][0] and row["kept"] == (row["error"][1] < row["error"][0])
    assert any(row["kept"] for row in rows.values())
    assert "reconstruct" in json.loads((whole / "metrics.json").read_text())["seconds"]

    model, _ = load_model(whole)
    assert not [m for m in model.modules() if isinstance(m, (SoftRounding, LearnedStep))]
    assert {q.state for _, q in quantizers(model)} == {QuantizerState.FROZEN}
    stored = sorted((whole / "checkpoints" / "reconstruction").iterdir())
    assert [file.name for file in stored] == [f"00{index}.ckpt" for index in range(4)]
    for file in stored:
        for name, state in torch.load(file, weights_only=True)["state"].items():
            if rows[name]["kept"]:
                for key, layer, _ in quantized_weights(model.get_submodule(name)):
                    assert torch.equal(layer.weight, state[f"{key}.weight".lstrip(".")]), name


def test_a_run_that_was_killed_goes_on_behind_its_last_block(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    fitted: list[str] = []

    def fit_and_count(name: str, *args: Any, **more: Any) -> Any:
        if len(fitted) == 2:
            raise Killed
        fitted.append(name)
        return fit_block(name, *args, **more)

    caches: list[ImageFeatures] = []
    monkeypatch.setattr(block_by_block, "fit_block", fit_and_count)
    monkeypatch.setattr(
        block_by_block, "ImageFeatures", lambda *given: caches.append(ImageFeatures(*given)) or caches[-1]
    )
    with pytest.raises(Killed):
        run_recipe(recipe(tmp_path))
    frames, clips = caches[:2], caches[2:]  # of the quantized and the float model: the groups share those of clips
    assert len(clips) == 2 and not any(features._cache for features in frames)
    assert all(len(features._cache) > 1 and features.left_bytes < 2e9 for features in clips)
    assert all(features.left_bytes == 2e9 for features in frames), "half of reconstruct.cache_gb"
    assert not (tmp_path / "model.safetensors").exists()
    fitted[:] = []
    monkeypatch.setattr(block_by_block, "ImageFeatures", lambda model, _: ImageFeatures(model, 0.0))
    run_recipe(recipe(tmp_path))
    assert fitted == BLOCKS[2:]
    (ours, figures), (theirs, expected) = results(tmp_path), results(whole)
    assert figures == expected, "features that are encoded anew change nothing"
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_ctrl_c_leaves_a_usable_model_that_says_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def fit_then_interrupt(name: str, *args: Any, **more: Any) -> Any:
        row = fit_block(name, *args, **more)
        os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(block_by_block, "fit_block", fit_then_interrupt)
    metrics = run_recipe(recipe(tmp_path))
    assert signal.getsignal(signal.SIGINT) == before
    figures = results(tmp_path)[1]
    assert not figures["complete"] and figures["total"] == 4
    assert figures["blocks"] == results(whole)[1]["blocks"][:1]
    assert "1 of 4 blocks reconstructed" in caplog.text and "STOPPED EARLY" in caplog.text
    assert "quantized" in metrics and (tmp_path / "model.safetensors").is_file()


def test_video_fits_steps_to_all_scales_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["reconstruct.video.iterations=2", "reconstruct.video.step_lr=0.02", "reconstruct.blocks=obj_ptr_proj"]
    seen: list[Any] = []
    fit_video = block_by_block.fit_video

    def fit_once(model: Any, teacher: Any, samples: Any, *args: Any, **more: Any) -> Any:
        seen.append(list(samples))
        losses = fit_video(model, teacher, samples, *args, **more)
        assert not learned_steps(model)
        return losses

    monkeypatch.setattr(block_by_block, "fit_video", fit_once)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "score_calibrated", Mock(side_effect=KeyboardInterrupt))
        run_recipe(recipe(tmp_path, *overrides))
    figures = run_recipe(recipe(tmp_path, *overrides))["reconstruction"]
    assert seen == [["frame", "short", "long"]]
    assert figures["complete"] and figures["video"][1] <= figures["video"][0] < float("inf")


def test_a_scale_of_weight_zero_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["reconstruct.video.short=0", "reconstruct.video.long=0", "reconstruct.video.iterations=1"]
    monkeypatch.setattr(block_by_block, "fit_video", lambda m, t, samples, *_, **__: (float(len(samples)), 0.0))
    figures = run_recipe(recipe(tmp_path, *overrides))["reconstruction"]
    assert [row["name"] for row in figures["blocks"]] == BLOCKS[:1]
    assert figures["video"][0] == 1.0
