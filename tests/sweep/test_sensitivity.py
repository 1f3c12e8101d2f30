"""`qsam2 sensitivity` and what is done with its result, end to end on a small nano."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import RUNS, small

from qsam2.calibration.allocation import allocate_bits
from qsam2.cli import main
from qsam2.errors import UserError
from qsam2.evaluation.scoring import weights_digest
from qsam2.formats.packed import read_header
from qsam2.loading import load_model
from qsam2.pipeline import begin, run_recipe
from qsam2.recipe import Recipe, build_recipe
from qsam2.run import RunFolder
from qsam2.sweep import sensitivity

SMALL = ("model.image_size=64", "data.train=moving_objects:4:train", "trainer={accelerator: cpu, devices: 1}")
THREE_BITS = "quantize.activations.bits=3"


@pytest.fixture(scope="module")
def measured(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sensitivity of a finished run's float model, to 2-bit weights and 3-bit activations."""
    file = tmp_path_factory.mktemp("sensitivity") / "sensitivity.json"
    flags = ["--bits", "2", "--videos", "1", "--frames", "3", "--json", str(file)]
    assert main(["sensitivity", str(runs["ptq"]), *flags, THREE_BITS]) == 0
    return file


def test_every_group_is_measured_alone_and_the_ranking_begins_with_the_worst(measured: Path, checkpoint: Path) -> None:
    result = json.loads(measured.read_text())
    rows = result["groups"]
    assert {(row["part"], row["bits"]) for row in rows} == {("weights", 2), ("activations", 3)}
    weights = {row["group"]: row["loss"] for row in rows if row["part"] == "weights"}
    assert len(weights) == 18 and all(0 <= loss <= 100 for loss in weights.values())
    assert len(set(weights.values())) > 5  # not the same model again and again
    assert max(weights.values()) > 1
    assert result["weights"] == weights_digest(load_model(str(checkpoint), SMALL[:1])[0])

    lines = sensitivity.ranking(result).splitlines()
    assert lines[0].split("  ")[0] == "group" and "2-bit weights" in lines[0] and "3-bit activations" in lines[0]
    worst = max(rows, key=lambda row: row["loss"])
    assert lines[1].startswith(worst["group"]) and f"{worst['loss']:.2f}" in lines[1]
    assert len(lines) == 1 + len({row["group"] for row in rows})


def test_it_goes_on_where_it_was(
    measured: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(measured.read_text())
    kept = [row for row in result["groups"] if row["part"] == "weights"]
    groups = [row["group"] for row in kept]
    file = tmp_path / "half.json"
    file.write_text(json.dumps({**result, "groups": kept[:-2]}))
    measured_again: list[str] = []
    real = sensitivity._quantized

    def spy(model: Any, recipe: Any, todo: list[tuple[str, str, int]]) -> Any:
        measured_again.extend(group for group, _, _ in todo)
        return real(model, recipe, todo)

    monkeypatch.setattr(sensitivity, "_quantized", spy)
    monkeypatch.setattr(sensitivity, "groups", lambda model, quantize, part: groups if part == "weights" else [])
    target, given = str(runs["ptq"]), {"bits": (2,), "videos": 1, "output": file}
    again = sensitivity.measure_sensitivity(target, [THREE_BITS], frames=3, **given)
    assert measured_again == groups[-2:]
    assert [row["loss"] for row in again["groups"]] == [row["loss"] for row in kept]
    with pytest.raises(UserError, match=r"half\.json holds a measurement of another model, quantizer or data"):
        sensitivity.measure_sensitivity(target, [THREE_BITS], frames=4, **given)
    file.write_text("{}")
    with pytest.raises(
        UserError, match=r"half\.json is not the result of a sensitivity measurement .*: give another --json"
    ):
        sensitivity.measure_sensitivity(target, [THREE_BITS], frames=3, **given)
    assert file.read_text() == "{}"


def mixed(checkpoint: Path, folder: Path, *overrides: str) -> Recipe:
    """The recipe of the finished run `ptq`, with 4 bits on average."""
    values = small(checkpoint, folder, **RUNS["ptq"])
    return build_recipe(values, ["quantize.allocate.average_bits=4", *overrides])


@pytest.mark.parametrize("by", ["importance", "measured sensitivity"])
def test_bits_are_shared_out(by: str, measured: Path, runs: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    more = [f"quantize.allocate.sensitivity={measured}"] if by == "measured sensitivity" else []
    recipe = mixed(checkpoint, tmp_path, *more)
    metrics = run_recipe(recipe)
    shared = metrics["allocated_bits"]
    assert shared["by"] == by and 3.5 < shared["average"] <= 4 + 1e-9 and len(set(shared["layers"].values())) > 1
    assert metrics["bytes"]["packed"] <= json.loads((runs["ptq"] / "metrics.json").read_text())["bytes"]["packed"]
    model, loaded = load_model(tmp_path)  # audits it
    assert loaded.quantize is not None and loaded.quantize.allocate is None
    name, bits = next(iter(shared["layers"].items()))
    assert read_header(tmp_path / "model.safetensors")["weights"][name]["bits"] == bits
    assert model.get_submodule(name).weight_quantizer.bits == bits
    assert run_recipe(recipe) == metrics  # it is complete


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


def test_a_run_goes_on_with_the_bits_that_it_began_with(checkpoint: Path, tmp_path: Path) -> None:
    given = mixed(checkpoint, tmp_path, "quantize.allocate.sensitivity=gone.json")
    folder = RunFolder(given)
    folder.record("allocated_bits", {"by": "measured sensitivity", "average": 3.0, "layers": {"a": 3}})
    run = begin(given, folder)
    allocate_bits(run)
    quantize = run.recipe.quantize
    assert quantize is not None and quantize.allocate is None
    assert [(rule.match, rule.weight_bits) for rule in quantize.rules] == [("a", 3)]


def test_a_budget_for_no_layer(checkpoint: Path, tmp_path: Path) -> None:
    given = mixed(checkpoint, tmp_path, "quantize.rules=[{match: '*', bits: 4}]")
    with pytest.raises(UserError, match="quantize.allocate: rules decide on all layers"):
        allocate_bits(begin(given, RunFolder(given)))
