"""`qsam2 sensitivity` and what is done with its result, end to end on a small nano."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsam2.calibration.allocation import allocate_bits
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.evaluation.scoring import weights_digest
from qsam2.formats.packed import read_header
from qsam2.loading import load_model
from qsam2.models import load_sam2
from qsam2.pipeline import begin, run_recipe
from qsam2.recipe import Recipe, build_recipe
from qsam2.run import RunFolder
from qsam2.sweep import sensitivity

SMALL = (
    "model.image_size=128",
    "data.train=moving_objects:4:train",
    "calibrate={stills: 2, clips: 1, num_frames: 2}",
    "trainer={accelerator: cpu, devices: 1}",
)
MEASURE = ("--videos", "1", "--frames", "3")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sensitivity") / "sensitivity.json"
    activations = "quantize.activations={method: minmax, bits: 3, range: minmax}"
    assert main(["sensitivity", "nano", "--bits", "2", *MEASURE, "--json", str(file), *SMALL, activations]) == 0
    return file


def test_every_group_is_measured_alone(measured: Path) -> None:
    rows = json.loads(measured.read_text())["groups"]
    parts = [(row["part"], row["bits"]) for row in rows]
    assert set(parts) == {("weights", 2), ("activations", 3)}
    weights = {row["group"]: row["loss"] for row in rows if row["part"] == "weights"}
    assert len(weights) == 18 and all(0 <= loss <= 100 for loss in weights.values())
    assert len(set(weights.values())) > 5  # not the same model again and again
    assert max(weights.values()) > 1
    small = load_sam2("nano", image_size=128)  # overrides reach the model
    assert json.loads(measured.read_text())["weights"] == weights_digest(small)


def test_the_ranking_begins_with_the_worst(measured: Path) -> None:
    result = json.loads(measured.read_text())
    lines = sensitivity.ranking(result).splitlines()
    assert lines[0].split("  ")[0] == "group" and "2-bit weights" in lines[0] and "3-bit activations" in lines[0]
    worst = max(result["groups"], key=lambda row: row["loss"])
    assert lines[1].startswith(worst["group"]) and f"{worst['loss']:.2f}" in lines[1]
    assert len(lines) == 1 + len({row["group"] for row in result["groups"]})


def test_it_goes_on_where_it_was(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.loads(measured.read_text())
    kept = [row for row in result["groups"] if row["part"] == "weights"]
    file = tmp_path / "half.json"
    file.write_text(json.dumps({**result, "groups": kept[:-2]}))
    measured_again: list[str] = []
    real = sensitivity._rows

    def spy(model: object, recipe: object, todo: list[tuple[str, str, int]], measure: object) -> object:
        measured_again.extend(group for group, _, _ in todo)
        return real(model, recipe, todo, measure)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "_rows", spy)
    activations = "quantize.activations={method: minmax, bits: 3, range: minmax}"
    given = {"bits": (2,), "videos": 1, "frames": 3, "output": file}
    skipped = {row["group"] for row in kept[-2:]}
    monkeypatch.setattr(
        sensitivity, "groups", lambda model, quantize, part: [row["group"] for row in kept] if part == "weights" else []
    )
    again = sensitivity.measure_sensitivity("nano", [*SMALL, activations], **given)
    assert set(measured_again) == skipped
    assert [row["loss"] for row in again["groups"]] == [row["loss"] for row in kept]
    with pytest.raises(UserError, match=r"half\.json holds a measurement of another model, quantizer or data"):
        sensitivity.measure_sensitivity("nano", [*SMALL, activations], **{**given, "frames": 4})


def mixed(folder: Path, *overrides: str) -> Recipe:
    values = {"quantize": {"weights": {"method": "minmax", "bits": 4}}, "output": str(folder), "debug": "fast"}
    return build_recipe(values, [*SMALL, "data.val=moving_objects:1:val", *overrides])


@pytest.mark.parametrize("by", ["importance", "measured sensitivity"])
def test_bits_are_shared_out(by: str, measured: Path, tmp_path: Path) -> None:
    more = [f"quantize.allocate.sensitivity={measured}"] if by == "measured sensitivity" else []
    metrics = run_recipe(mixed(tmp_path / "mixed", "quantize.allocate.average_bits=4", *more))
    shared = metrics["allocated_bits"]
    assert shared["by"] == by and 3.5 < shared["average"] <= 4 + 1e-9 and len(set(shared["layers"].values())) > 1
    uniform = run_recipe(mixed(tmp_path / "uniform"))
    assert metrics["bytes"]["packed"] <= uniform["bytes"]["packed"]
    model, recipe = load_model(tmp_path / "mixed")  # audits it
    assert recipe.quantize is not None and recipe.quantize.allocate is None
    name, bits = next(iter(shared["layers"].items()))
    assert read_header(tmp_path / "mixed" / "model.safetensors")["weights"][name]["bits"] == bits
    assert model.get_submodule(name).weight_quantizer.bits == bits
    assert run_recipe(mixed(tmp_path / "mixed", "quantize.allocate.average_bits=4", *more)) == metrics  # it is complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano", "--bits", "9"], "--bits 9: give numbers from 2 to 8"),
        (["nano", "--videos", "0"], "--videos 0: give at least 1"),
        (["nano", "--frames", "0"], "--frames 0: give at least 1"),
        (["nowhere"], "nowhere is no run folder, no model file and no size"),
        (["nano", "quantize.weight.bits=3"], "unknown recipe key 'quantize.weight'"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rules_that_leave_nothing() -> None:
    rule = "quantize.rules=[{match: '*', bits: 4}]"
    with pytest.raises(UserError, match="nano: its recipe's rules decide on all layers, none is left to measure"):
        sensitivity.measure_sensitivity("nano", [*SMALL, rule], videos=1, frames=2)


def test_a_run_goes_on_with_the_bits_that_it_began_with(tmp_path: Path) -> None:
    given = mixed(tmp_path, "quantize.allocate.average_bits=4", "quantize.allocate.sensitivity=gone.json")
    folder = RunFolder(given)
    folder.record("allocated_bits", {"by": "measured sensitivity", "average": 3.0, "layers": {"a": 3}})
    run = begin(given, folder)
    allocate_bits(run)
    quantize = run.recipe.quantize
    assert quantize is not None and quantize.allocate is None
    assert [(rule.match, rule.weight_bits) for rule in quantize.rules] == [("a", 3)]


def test_a_budget_for_no_layer(tmp_path: Path) -> None:
    given = mixed(tmp_path, "quantize.allocate.average_bits=4", "quantize.rules=[{match: '*', bits: 4}]")
    with pytest.raises(UserError, match="quantize.allocate: rules decide on all layers"):
        allocate_bits(begin(given, RunFolder(given)))


def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"other\.json is no result of a sensitivity measurement: give another --json"):
        sensitivity.measure_sensitivity("nano", SMALL, videos=1, frames=2, output=file)
    assert file.read_text() == "{}"
