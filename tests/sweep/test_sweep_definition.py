"""Sweep files: W&B's format, the runs that follow, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from small_sweep import ACTIVATIONS, COMMAND, GRID, RANGES, RECIPES, WEIGHTS, small_sweep, write

from qsam2.cli import main
from qsam2.recipe.load import parse_overrides
from qsam2.sweep.definition import LOCAL, NEEDS, Parameter, as_text, combinations, edges, load_sweep

SHIPPED = sorted((RECIPES / "sweeps").glob("*.yaml"))
RANDOM = {"method": "random", "parameters": RANGES}
LOSS = {"command": [COMMAND[3].replace("ptq_", "qat_"), COMMAND[-1]], "metric": {"name": "loss", "goal": "minimize"}}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_run_of_the_shipped_sweeps_is_a_recipe_and_an_agent_of_wandb_would_run_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys are those of W&B's schema, which knows no others; yaml.safe_load is how wandb reads them."""
    monkeypatch.chdir(RECIPES.parent)
    sweep = load_sweep(file)
    assert sweep.name == file.stem and sweep.run_seconds
    runs = list(combinations(sweep) if sweep.definition.method == "grid" else edges(sweep))
    recipes = [sweep.recipe_of(values) for values in runs]
    assert len({recipe.model_dump_json() for recipe in recipes}) == len(runs) > 2
    assert sweep.definition.method == "grid" or sweep.definition.run_cap

    values = yaml.safe_load(file.read_text())
    assert values.keys() <= {"name", "description", "program", "command", "method", "metric", "parameters", "run_cap"}
    assert values["program"] == "train.py" and "${args_no_hyphens}" in values["command"]
    assert all(isinstance(word, str) for word in values["command"])
    for parameter in values["parameters"].values():
        for value in parameter.get("values", ()):
            assert parse_overrides([f"k={value}"]) == {"k": value}  # as the agent writes it


def test_the_shipped_sweeps_are_those_that_the_issue_names() -> None:
    assert {file.stem for file in SHIPPED} >= {"bits", "methods", "calibration", "mutual_kv"}
    bits = yaml.safe_load((RECIPES / "sweeps" / "bits.yaml").read_text())["parameters"]
    assert bits == {key: {"values": [2, 3, 4, 5, 6, 7, 8]} for key in (WEIGHTS, ACTIVATIONS)}


def test_a_grid_in_the_files_order_with_constants_and_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, parameters={**GRID["parameters"], "calibrate.stills": {"value": 3}})
    sweep = load_sweep(file, ["seed=7", "calibrate.clips=5"])
    runs = list(combinations(sweep))
    assert runs[:4] == [{WEIGHTS: w, ACTIVATIONS: a} for w, a in ((2, 4), (2, 6), (2, 8), (4, 4))]
    recipe = sweep.recipe_of(runs[3])
    assert (recipe.quantize.weights.bits, recipe.quantize.activations.bits) == (4, 4)
    assert (recipe.seed, recipe.calibrate.clips, recipe.calibrate.stills) == (7, 5, 3)  # the user's goes before
    assert sweep.command_of(runs[0]).split()[:2] == ["qsam2", "train"]
    assert sweep.command_of(runs[0]).endswith(f"calibrate.stills=3 {WEIGHTS}=2 {ACTIVATIONS}=4")


def test_edges_are_all_choices_and_both_ends(tmp_path: Path) -> None:
    parameters = {**RANGES, "calibrate.rounding": {"values": [None, "gptq", {"method": "gptq", "damping": 0.1}]}}
    sweep = small_sweep(tmp_path, method="random", parameters=parameters)
    found = list(edges(sweep))
    for key, values in ((WEIGHTS, [2, 8]), ("calibrate.smooth", [0.0, 1.0])):
        assert sorted({run[key] for run in found}) == values
    assert [run["calibrate.rounding"] for run in found[-3:]] == [None, "gptq", {"method": "gptq", "damping": 0.1}]


@pytest.mark.parametrize(
    ("values", "kind", "ends"),
    [
        ({"value": 3}, "constant", (3,)),
        ({"value": None}, "constant", (None,)),
        ({"values": [1, "a"]}, "categorical", (1, "a")),
        ({"min": 1, "max": 4}, "int_uniform", (1, 4)),
        ({"min": 1, "max": 4.0}, "uniform", (1, 4.0)),
        ({"distribution": "log_uniform", "min": 0, "max": 1}, "log_uniform", (1.0, pytest.approx(2.718281828))),
        ({"distribution": "log_uniform_values", "min": 1e-3, "max": 1}, "log_uniform_values", (1e-3, 1.0)),
        ({"distribution": "q_uniform", "min": 0, "max": 4, "q": 2}, "q_uniform", (0, 4)),
        ({"values": [1, 2], "probabilities": [0.1, 0.9]}, "categorical_w_probabilities", (1, 2)),
        ({"distribution": "normal"}, "normal", ()),
    ],
)
def test_distributions_are_wandbs(values: dict[str, Any], kind: str, ends: tuple[Any, ...]) -> None:
    parameter = Parameter.model_validate(values)
    assert parameter.kind == kind
    if kind != "constant":
        assert parameter.ends == ends and str(parameter)
    assert set(LOCAL) < set(NEEDS)


@given(st.integers(-50, 50), st.integers(1, 30))
def test_a_grid_walks_whole_numbers_from_end_to_end(low: int, width: int) -> None:
    parameter = Parameter.model_validate({"min": low, "max": low + width})
    assert parameter.choices == tuple(range(low, low + width + 1))
    with pytest.raises(ValidationError, match="is not below"):
        Parameter.model_validate({"min": low + width, "max": low})


WORDS = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]))  # beyond, JSON writes two for one


@given(st.dictionaries(st.sampled_from("abc"), st.none() | st.booleans() | st.floats(-1, 1) | WORDS))
def test_values_survive_the_command_line(values: dict[str, Any]) -> None:
    assert parse_overrides(as_text(values)) == values


def one(values: dict[str, Any], key: str = WEIGHTS) -> dict[str, Any]:
    """The changes to a sweep of one parameter."""
    return {"parameters": {key: values}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "grit"}, "method='grit': should be 'grid', 'random' or 'bayes'"),
    (
        {"earlyterminate": 1},
        "unknown sweep key 'earlyterminate': a sweep has name, description, project, entity, program, command, method, "
        "metric, parameters, early_terminate, run_cap; did you mean 'early_terminate'?",
    ),
    (
        one({"values": [4]}, "quantize.weights.bitz"),
        "quantize.weights.bitz=4: unknown recipe key 'quantize.weights.bitz': quantize.weights has method, bits, "
        "symmetric, granularity, grid, clipped_gradient, range, percentile, momentum; did you mean 'bits'?",
    ),
    (
        one({"values": [4, 9]}),
        "quantize.weights.bits=9: quantize.weights.bits=9: bits=9 is not supported: give 2 to 8, or null in place of "
        "the quantizer for float",
    ),
    ({**RANDOM, **one({"min": 2, "max": 9})}, "bits=9 is not supported"),
    ({"metric": {"name": "quantised/J&F"}}, "did you mean 'quantized/J&F'?"),
    ({"metric": {"name": "loss"}}, "metric.name='loss' is logged by no run of"),
    (
        one({"distribution": "uniforn", "min": 2, "max": 4}),
        "parameters.quantize.weights.bits: distribution='uniforn' is unknown: there are constant, categorical,",
    ),
    (
        one({"distribution": "uniform", "min": 2}),
        "parameters.quantize.weights.bits: distribution=uniform lacks max",
    ),
    (one({}), "give one of value, values, or min and max"),
    (one({"value": 1, "values": [1]}), "give one of value, values, or min"),
    (one({"distribution": "log_uniform_values", "min": 0, "max": 1}), "min=0 has no logarithm: give one above 0"),
    (one({"distribution": "int_uniform", "min": 0, "max": 1.5}), "max=1.5 of int_uniform have to be whole numbers"),
    (one({"parameters": {}}), "write dotted recipe keys"),
    (one({"vales": [1]}), "did you mean 'values'?"),
    (
        one({"min": 0.0, "max": 1.0}, "calibrate.smooth"),
        "parameters.calibrate.smooth has the distribution uniform, which a grid cannot",
    ),
    (one({"min": 0, "max": 999_999_999}, "seed"), "its grid has 1,000,000,000 runs, at most 10,000 are carried out"),
    (
        {
            "parameters": {
                key: {"values": list(range(1, 1001))} for key in ("seed", "data.num_frames", "data.max_stride")
            }
        },
        "its grid has 1,000,000,000 runs, at most 10,000 are carried out: give fewer values, or method random or bayes",
    ),
    (one({"min": 0, "max": 1e300}), "parameters.quantize.weights.bits.max=1e+300: should be a number from"),
    ({"command": ["x", "${args_no_hyphens}"]}, "command names no recipe; write [..., RECIPE.yaml,"),
    ({"command": ["a.yaml", "b.yaml", "${args_no_hyphens}"]}, "command names more than one recipe;"),
    ({"command": COMMAND[:-1]}, "command lacks ${args_no_hyphens}, the values of a run;"),
    (
        {"early_terminate": {"type": "hyperband", "min_iter": 3}},
        "early_terminate needs a metric that is logged during training, and 'quantized/J&F' is known at the end of a "
        "run; these do not train: remove early_terminate",
    ),
    (
        {**LOSS, "early_terminate": {"type": "hyperband", "max_iter": 9}},
        "early_terminate lacks its first rung: give min_iter, or max_iter and s",
    ),
    *(({key: None}, f"lacks the key '{key}'") for key in ("command", "method", "metric", "parameters")),
    ({"program": None}, "lacks the key 'program', which its command uses; give program: train.py"),
]


@pytest.mark.parametrize(("changes", "expected"), BAD)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    changes: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, **changes)
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    assert main(["sweep", str(file), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith(f"error: sweep {file}") and said.count("\n") == 1 and expected in said


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("method: [grid", [], "error: sweep FILE is not valid YAML"),
        ("- grid", [], "error: sweep FILE holds no `key: value` pairs"),
        (None, [], "error: sweep FILE does not exist"),
        ("", [f"{WEIGHTS}=4"], f"error: {WEIGHTS}=4: {WEIGHTS} is a parameter of the sweep FILE; change it there"),
        ("", ["--jobs", "0"], "error: --jobs 0: give at least 1"),
        ("", ["--count", "-1"], "error: --count -1: give at least 1"),
        ("", ["sede=1"], "unknown recipe key 'sede'"),
    ],
)
def test_unreadable_files_and_wrong_arguments(
    text: str | None, arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path)
    if text is None:
        file.unlink()
    elif text:
        file.write_text(text)
    assert main(["sweep", str(file), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and expected in said.replace(str(file), "FILE")


def test_hyperband_has_its_rungs_as_wandb_counts_them(tmp_path: Path) -> None:
    for rule, first in (({"min_iter": 4}, 4), ({"max_iter": 27, "s": 2}, 3), ({"max_iter": 4, "s": 3, "eta": 2}, 1)):
        sweep = small_sweep(tmp_path, **LOSS, early_terminate={"type": "hyperband", **rule})
        assert sweep.definition.early_terminate.first == first
