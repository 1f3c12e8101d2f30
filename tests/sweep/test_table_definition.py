"""Tables as they are defined: those that come with qsam2, the runs that follow from one, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import qsam2
from qsam2.errors import UserError
from qsam2.recipe.load import merge
from qsam2.sweep.table import float_runs, load_table, table_runs

ROOT = Path(qsam2.__file__).parents[1]
TABLES = sorted((ROOT / "recipes" / "tables").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "title": "A small table",
    "recipe": str(ROOT / "recipes" / "qat_w4a4.yaml"),
    "run_seconds": 10,
    "sets": {"clips": {"data": "moving_objects:2:val", "frames": 4}, "others": {"data": "moving_objects:3:test"}},
    "common": {"trainer.max_steps": 7, "data.batch_size": 3},
    "models": {"nano": {"model.size": "nano"}, "heavy": {"model.size": "nano_heavy", "trainer.max_steps": 8}},
    "methods": {"lsc": {}, "lsq + seq": {"quantize.weights.method": "seq", "quantize.activations.method": "lsq"}},
    "settings": {"W4A4": {}, "W2A4": {"quantize.weights.bits": 2, "data.batch_size": 2}},
    "runs": [{"models": ["nano"]}, {"settings": ["W2A4"], "methods": ["lsc"], "seeds": [0, 1]}],
}


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(merge(SMALL, changes), sort_keys=False))
    return file


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_that_come_with_qsam2_fit_the_recipe(path: Path, tmp_path: Path) -> None:
    table = load_table(path)
    assert table.name == path.stem and path.read_text().startswith("# ")
    runs = table_runs(table, tmp_path)
    assert len({run.recipe.run_folder for run in runs}) == len(runs)
    for axis in ("model", "method", "setting", "start"):
        assert {getattr(run.place, axis) for run in runs} == set(table.axis(axis)), f"a {axis} that no run has"
    assert {run.recipe.model.size for run in runs} >= {"nano", "nano_heavy"}, "every table shows both"
    assert {run.recipe.evaluate.float_cache for run in runs} == {tmp_path / "float"}
    assert all((run.recipe.train is not None) == (path.stem in ("qat", "lsc")) for run in runs)


def test_runs_are_combinations_in_order_each_once_and_overrides_go_before_those_above(tmp_path: Path) -> None:
    table = load_table(written(tmp_path))
    runs = table_runs(table, tmp_path / "out")
    assert [(run.name, run.recipe.trainer.max_steps, run.recipe.data.batch_size, run.recipe.seed) for run in runs] == [
        ("nano_lsc_W4A4_s0", 7, 3, 0),
        ("nano_lsc_W2A4_s0", 7, 2, 0),
        ("nano_lsq-seq_W4A4_s0", 7, 3, 0),
        ("nano_lsq-seq_W2A4_s0", 7, 2, 0),
        ("nano_lsc_W2A4_s1", 7, 2, 1),
        ("heavy_lsc_W2A4_s0", 8, 2, 0),
        ("heavy_lsc_W2A4_s1", 8, 2, 1),
    ]
    assert runs[1].recipe.run_folder == tmp_path / "out" / "nano_lsc_W2A4_s0"
    assert [run.recipe.quantize.weights.method for run in runs[:3]] == ["lsc", "lsc", "seq"]
    assert runs[0].recipe.data.val == "moving_objects:2:val" and runs[0].recipe.evaluate.frames == 4
    given = table_runs(table, tmp_path, ["trainer.max_steps=9", "evaluate.frames=2"])
    assert {(run.recipe.trainer.max_steps, run.recipe.evaluate.frames) for run in given} == {(9, 2)}

    floats = float_runs(runs)
    sizes = [(run.name, run.recipe.model.size) for run in floats]
    assert sizes == [("float_nano", "nano"), ("float_heavy", "nano_heavy")]
    assert all(run.recipe.quantize is None and run.recipe.train is None for run in floats), "they only score"
    assert all(run.recipe.evaluate.float_cache == tmp_path / "out" / "float" for run in floats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "unknown table key 'titel': a table has name, title, .*; did you mean 'title'"),
        (
            {"sets": {"clips": {"frame": 3}}},
            "unknown table key 'sets.clips.frame': sets.clips .* mean 'frames'",
        ),
        ({"run_seconds": 0}, "run_seconds=0: should be greater than 0"),
        ({"sets": None}, "sets=None"),
        ({"runs": [{"methods": ["lcs"]}]}, "names the method 'lcs', which methods lacks; it has 'lsc', .* mean 'lsc'"),
        ({"common": {"trainer.max_stepps": 3}}, "nano, lsc, W4A4: unknown recipe key 'trainer.max_stepps'"),
        ({"methods": {"lsc": {"quantize.weights.bits": 9}}}, "table small, nano, lsc, .*bits=9 is not supported"),
        ({"methods": {"LSQ/SEQ": {}, "LSQ SEQ": {}}}, "two runs would share the folder nano_LSQ-SEQ_W4A4_s0"),
        ({"settings": {"W4A4": {"model.image_size": 64}}}, "runs of 'nano' start from several models; set model"),
        ({"common": {"quantize": None, "calibrate.weights": None, "train": None}}, "quantizes nothing; a table"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if changes.get("common", {}).get("quantize", 0) is None:
        changes = {**changes, "methods": {"lsq + seq": {}}, "settings": {"W2A4": {"quantize": None}}}
    with pytest.raises(UserError, match=message) as error:
        table_runs(load_table(written(tmp_path, **changes)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "table .*table.yaml does not exist: give a file, or a name"),
        ("- 1", "holds no `key: value` pairs"),
        ("name: empty", "lacks the key 'title'"),
    ],
)
def test_a_file_that_is_no_table(text: str | None, message: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_table(tmp_path / "table.yaml")
