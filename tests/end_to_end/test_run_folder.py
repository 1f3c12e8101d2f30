"""Results of a run: files, figures, the packed model, the offline run of Weights & Biases."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from messages import Message
from small_runs import RUNS, W4A4, recipe_of_run, small, without_seconds
from wandb_file import read_run, records

from qsam2 import __version__
from qsam2.errors import UserError
from qsam2.evaluation.scoring import evaluate_model
from qsam2.loading import load_model
from qsam2.pipeline import run_recipe
from qsam2.recipe import build_recipe, load_recipe
from qsam2.recipe.portable import portable
from qsam2.report import read
from qsam2.report.page import render

ALWAYS = {"recipe.yaml", "metrics.json", "model.safetensors", "report.html"}
FILES = {
    "qat": ALWAYS | {"card.md", "card.json", "checkpoints/last.ckpt"},
    "ptq": ALWAYS | {"card.md", "card.json"},
    "float": ALWAYS | {"checkpoints/last.ckpt"},
    "reconstructed": ALWAYS
    | {"card.md", "card.json", *(f"checkpoints/reconstruction/00{index}.ckpt" for index in range(4))},
}
CALIBRATED = {"score float", "convert", "calibrate", "score ptq"}
STAGES = {
    "qat": CALIBRATED | {"train", "score quantized"},
    "ptq": CALIBRATED,
    "float": {"train", "score float"},
    "reconstructed": CALIBRATED | {"reconstruct", "score float on stills", "score ptq on stills"},
}
SCORES = {"protocol", "J&F", "J", "F", "J_recall", "J_decay", "F_recall", "F_decay", "per_object", "seconds_per_frame"}


@pytest.fixture(params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    """Name of a finished run."""
    return request.param


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_files_and_figures(name: str, runs: dict[str, Path]) -> None:
    found = {str(file.relative_to(runs[name])) for file in runs[name].rglob("*") if file.is_file()}
    assert {file for file in found if not file.startswith(("wandb/", "curves/", "report/"))} == FILES[name]
    assert ("curves/version_0/metrics.csv" in found) == (name in ("qat", "float"))
    assert any(file.startswith("wandb/") for file in found) == (name == "qat")

    figures = metrics(runs[name])
    models = {"float"} if name == "float" else {"float", "ptq", "quantized"}
    assert figures.keys() == models | {"bytes", "seconds"} | ({"reconstruction"} if name == "reconstructed" else set())
    assert figures["seconds"].keys() == STAGES[name]
    assert all(seconds > 0 for stage, seconds in figures["seconds"].items() if stage != "convert")
    for model in models:
        compared = set() if model == "float" else {"fidelity", "versus_float"}
        assert SCORES | compared <= figures[model].keys()
        assert 0 <= figures[model]["J&F"] < 100 and (model != "float" or figures[model]["J&F"] > 0)
        assert figures[model]["J&F"] == pytest.approx((figures[model]["J"] + figures[model]["F"]) / 2)
        if compared:
            assert figures[model]["versus_float"]["difference"] == pytest.approx(
                figures[model]["J&F"] - figures["float"]["J&F"]
            )
    sizes = figures["bytes"]
    assert sizes.keys() == {"float32", "bfloat16", "packed"}
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    if name != "float":
        assert sizes["packed"] < 0.16 * sizes["float32"]
        assert sizes["packed"] == pytest.approx((runs[name] / "model.safetensors").stat().st_size, rel=0.1)


def test_ptq_is_the_start_of_qat(runs: dict[str, Path]) -> None:
    qat, ptq = metrics(runs["qat"]), metrics(runs["ptq"])
    for model in ("float", "ptq"):
        assert without_seconds(qat[model]) == without_seconds(ptq[model])
    assert without_seconds(ptq["quantized"]) == without_seconds(ptq["ptq"])  # nothing is trained
    assert qat["quantized"]["per_object"] != qat["ptq"]["per_object"]


def test_the_recipe_can_be_run_again_and_the_file_scores_as_the_run_did(
    name: str, runs: dict[str, Path], checkpoint: Path
) -> None:
    written = yaml.safe_load((runs[name] / "recipe.yaml").read_text())
    assert written["trainer"]["gradient_clip"] == 0.1  # a default that was not given
    assert load_recipe(runs[name] / "recipe.yaml") == recipe_of_run(name, checkpoint, runs[name])

    block, expected = evaluate_model(str(runs[name])), metrics(runs[name])["float" if name == "float" else "quantized"]
    assert block["per_object"] == expected["per_object"]
    assert all(block[key] == expected[key] for key in SCORES - {"seconds_per_frame"})
    assert block["model"] == str(runs[name])


def test_a_reference_gives_the_runs_fidelity(runs: dict[str, Path], checkpoint: Path) -> None:
    block = evaluate_model(str(runs["qat"]), reference=str(checkpoint))
    expected = metrics(runs["qat"])["quantized"]
    assert block["fidelity"] == expected["fidelity"]
    assert block["versus_reference"] == expected["versus_float"]


def test_the_report_is_drawn_again_from_what_the_run_kept(name: str, runs: dict[str, Path]) -> None:
    kept = read.read_run(runs[name])
    assert kept.missing_stages == [] and len(kept.saved(read.CLIPS)["worst"]) == 1
    assert (kept.saved(read.LAYERS) is None) == (name == "float")
    report = runs[name] / "report.html"
    written = report.read_text(encoding="utf-8")
    assert render(kept) == written and "not finished" not in written and "data:video/mp4" in written


def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(
    runs: dict[str, Path], checkpoint: Path, caplog: pytest.LogCaptureFixture, message: Message
) -> None:
    own = recipe_of_run("ptq", checkpoint, runs["ptq"])
    before = {file: file.stat().st_mtime_ns for file in runs["ptq"].rglob("*") if file.name != "recipe.yaml"}
    with caplog.at_level(logging.INFO, logger="qsam2"):
        again = run_recipe(own)
    assert again == metrics(runs["ptq"])
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert f"{runs['ptq']} is complete" in caplog.text

    written = (runs["ptq"] / "recipe.yaml").read_bytes()
    with pytest.raises(UserError) as error:
        run_recipe(build_recipe(own.model_dump(mode="json"), ["seed=1", "evaluate.frames=5"]))
    text = message(error)
    assert str(runs["ptq"]) in text and "evaluate.frames, seed" in text and "output=" in text
    assert (runs["ptq"] / "recipe.yaml").read_bytes() == written


def test_wandb_holds_the_whole_run(runs: dict[str, Path]) -> None:
    config, history = read_run(runs["qat"])
    recipe = yaml.safe_load((runs["qat"] / "recipe.yaml").read_text())
    assert {key: config[key] for key in recipe} == portable(recipe)
    assert config["output"] is None and str(runs["qat"].parent) not in json.dumps(config)
    assert config["qsam2"].startswith(__version__)

    logged = {key: value for step in history for key, value in step.items()}
    curve = [step["loss"] for step in history if "loss" in step]
    assert len(curve) == recipe["trainer"]["max_steps"]
    assert {f"lr/{part}" for part in ("image_encoder", "weights", "quantizers")} <= logged.keys()
    assert {"loss/mask", "loss/dice", "loss/iou", "loss/class", "loss/distill_mask_logits"} <= logged.keys()
    assert {"gradient_norm/weights", "gradient_norm/quantizers"} <= logged.keys()
    assert not [key for key in logged if key.startswith("scale/")]
    quantiles = [key for key in logged if key.startswith("step_size/")]
    assert len(quantiles) == 6
    curves = read.read_run(runs["qat"]).curves
    assert sum(key.startswith("scale/") for key in curves) > 300  # all of them in the CSV file
    last = {key.removeprefix("scale/"): curve[-1][1] / curve[0][1] for key, curve in curves.items() if "scale/" in key}
    weights = [ratio for key, ratio in last.items() if key.endswith("weight_quantizer")]
    assert logged["step_size/weights_p50"] == pytest.approx(np.median(weights), rel=1e-4)

    figures = metrics(runs["qat"])
    for model in ("float", "ptq", "quantized"):
        assert logged[f"{model}/J&F"] == pytest.approx(figures[model]["J&F"])
        if model != "float":
            assert figures[model]["versus_float"]["low"] is None and f"{model}/versus_float/low" not in logged, (
                "one video"
            )
            difference = figures[model]["versus_float"]["difference"]
            assert logged[f"{model}/versus_float/difference"] == pytest.approx(difference)
    assert "quantized/versus_ptq/difference" in logged
    assert logged["bytes/packed"] == figures["bytes"]["packed"]
    assert logged["seconds/train"] == figures["seconds"]["train"]

    files = next(runs["qat"].glob("wandb/offline-run-*/files"))
    moved = json.loads((files / logged["moved_table.path"]).read_text())["data"]
    farthest = sorted(last, key=lambda name: -abs(np.log(last[name])))[:4]
    assert {row[1] for row in moved} == set(farthest)
    table = json.loads((files / logged["layers.path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    by_name = {row["name"]: row for row in rows}
    assert by_name["image_encoder.trunk.patch_embed.proj"]["weight_bits"] == 8
    layer = by_name["obj_ptr_proj.layers.0"]
    assert layer["weight_bits"] == 4 and layer["scale"] > 0
    assert 5 < layer["weight_snr_db"] < 40 and 0 <= layer["weight_clipped"] < 0.5
    pictures, clip = logged["overlays.filenames"], logged["clips.videos"][0]["path"]
    assert len(pictures) == 1
    assert all((files / media).is_file() for media in (*pictures, clip))
    assert clip.endswith(".mp4")


def test_wandb_holds_the_model_and_its_card(runs: dict[str, Path]) -> None:
    (file,) = runs["qat"].glob("wandb/offline-run-*/*.wandb")
    (artifact,) = [r.artifact for r in records(file) if r.artifact.type == "model"]
    kept = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    files = ("model.safetensors", "card.md", "card.json", "report.html", "wandb/recipe.yaml")
    assert kept == {Path(name).name: runs["qat"] / name for name in files}
    assert str(runs["qat"].parent) not in kept["recipe.yaml"].read_text()
    assert artifact.name == "nano-w4a4"
    metadata = json.loads(artifact.metadata)
    assert metadata["run"] == "run" and metadata["quantized/J&F"] == metrics(runs["qat"])["quantized"]["J&F"]
    (own,) = [r.run for r in records(file) if r.run.run_id]
    assert (own.run_group, own.job_type, list(own.tags), own.notes) == (
        "tests",
        "qat",
        ["small", "generated"],
        "a note",
    )
    assert file.stem == f"run-{(runs['qat'] / 'wandb' / 'id').read_text()}"


def test_a_quantized_model_is_audited_when_it_is_loaded(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    audited = []
    monkeypatch.setattr("qsam2.loading.audit", lambda *arguments: audited.append(arguments))
    model, recipe = load_model(runs["qat"])
    ((found, layers, quantize),) = audited
    assert found is model and quantize == recipe.quantize
    assert any(layer.weight_bits == 4 for layer in layers)


def test_stills_are_scored_beside_the_videos(runs: dict[str, Path]) -> None:
    run = runs["reconstructed"]
    figures, spec = metrics(run), f"instance_png:{run.parent / 'stills'}"
    count = figures["float"]["stills"]["instances"]
    for name in ("float", "ptq", "quantized"):
        block = figures[name]
        assert block["stills"]["images"] == 2 and block["stills"]["instances"] == count > 1
        assert block["box_mIoU"] == block["stills"]["box_mIoU"] and 0 <= block["box_mIoU"] <= 100
        assert "J&F" in block
    assert f"float: box-prompt mIoU {figures['float']['box_mIoU']:.1f}" in run.with_suffix(".log").read_text()
    alone = evaluate_model(str(run), [f"data.val={spec}"])
    assert alone["box_mIoU"] == pytest.approx(figures["quantized"]["box_mIoU"])
    page = (run / "report.html").read_text()
    assert '<th scope="col">mIoU</th>' in page and f"{count} instances of\ninstance_png:stills." in page
    assert f'<td data-label="mIoU">{figures["float"]["box_mIoU"]:.1f}</td>' in page
    assert json.loads((run / "card.json").read_text())["scores"]["ptq"]["box_mIoU"] == figures["ptq"]["box_mIoU"]


def test_videos_are_no_stills(checkpoint: Path, tmp_path: Path) -> None:
    own = small(checkpoint, tmp_path / "run", quantize=W4A4, evaluate={"stills": "moving_objects:2:val"})
    with pytest.raises(UserError, match="evaluate.stills=moving_objects:2:val: holds videos; name images"):
        run_recipe(build_recipe(own))
    assert not (tmp_path / "run" / "metrics.json").exists()
