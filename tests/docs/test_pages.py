"""The README's size, links, table and Python; the pages that are generated for the site, recipe keys among them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

from qsam2.cli import build_parser, main
from qsam2.recipe import Recipe
from qsam2.recipe.quantizer_specs import methods

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FRAMES = 16


def site_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return site_module("hooks").generated_pages()


def test_the_citation_names_the_version_of_the_package() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None and yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project[1]


def test_the_workflow_carries_out_the_script_of_ci_on_every_python_that_the_package_supports() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert {"run": ".ci/run"} in jobs["suite"]["steps"]
    assert 'requires-python = ">=3.10,<3.13"' in (ROOT / "pyproject.toml").read_text()
    assert jobs["suite"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12"]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 12_000


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README))))
def test_a_link_of_the_readme_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_readme_has_the_table_that_was_measured() -> None:
    results = json.loads((ROOT / "docs/tables/nano.json").read_text())
    assert site_module("nano_table").markdown(results) in README
    assert len(results["rows"]) <= 8


def run_readme(word: str) -> None:
    """Carry out the first Python of the README that holds a word."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if word in block)
    exec(compile(code, "README.md", "exec"), {})


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the clip where the README has it."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "clip.mp4", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_python_tracks_and_saves(elsewhere: Path) -> None:
    run_readme("predictor")
    masks = [np.array(Image.open(path)) for path in sorted(elsewhere.glob("mask-*.png"))]
    assert len(masks) == FRAMES and all(mask.shape == (256, 256) and mask.dtype == bool for mask in masks)
    assert any(mask.any() for mask in masks)


@pytest.mark.prove
def test_the_readmes_python_quantizes(elsewhere: Path) -> None:
    run_readme("quantize(")
    assert (elsewhere / "runs/w4a8/model.safetensors").is_file()


def test_the_readmes_prediction_writes_masks_and_a_film(elsewhere: Path) -> None:
    (line,) = re.findall(r"^qsam2 (predict .*)$", README, flags=re.MULTILINE)
    assert main(line.replace("runs/mine", "nano").split()) == 0
    assert len(list((elsewhere / "out/clip/masks").iterdir())) == FRAMES
    assert (elsewhere / "out/clip/overlay.mp4").stat().st_size > 1000


def test_the_site_has_the_help_of_every_command(pages: dict[str, str]) -> None:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert all(f"## qsam2 {name}\n" in pages["cli.md"] for name in commands.choices)
    assert all(f"### qsam2 benchmark {name}\n" in pages["cli.md"] for name in ("quantizers", "memory", "tracking"))
    assert "--reference MODEL" in pages["cli.md"]


def test_the_site_has_a_page_for_every_table_and_dataset(pages: dict[str, str]) -> None:
    tables, cards = (ROOT / "docs/tables").glob("*.json"), (ROOT / "data").glob("[!R]*.md")
    assert {f"results/{path.stem}.md" for path in tables} <= pages.keys()
    assert {f"datasets/{path.name}" for path in cards} <= pages.keys()
    assert "| mse | frobenius | 70.3 (+0.0 to +0.1) 99 |" in pages["results/ptq.md"]


def test_links_of_cards_point_into_the_site(pages: dict[str, str]) -> None:
    assert "](nano_training.png)" in pages["nano.md"] and "](datasets/nano.md)" in pages["nano.md"]
    assert "](../nano.md)" in pages["datasets/nano.md"]
    assert not re.search(r"\]\(\.\./\.\./", "".join(pages.values()))


def test_every_recipe_key_has_a_type_a_default_and_a_meaning(pages: dict[str, str]) -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|(.+?)\| (.+) \|$", pages["recipe_keys.md"], re.M)
    schema = Recipe.model_json_schema()
    keys = {key for section in [schema, *schema["$defs"].values()] for key in section["properties"]}
    assert keys == {key for key, *_ in rows}
    for key, kind, default, meaning in rows:
        assert kind.strip() and default.strip() and len(meaning) > 5, key
        assert meaning[0] != "(" and meaning.rstrip(")").endswith("."), f"{key}: {meaning!r} is no sentence"


def test_recipe_keys_link_to_their_sections_and_say_the_numbers_of_the_schema(pages: dict[str, str]) -> None:
    text = pages["recipe_keys.md"]
    headings = {re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in re.findall(r"^#+ (.+)$", text, re.M)}
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert {"train", "trainprompts", "quantizerules"} < links <= headings
    assert {f"method{method}" for method in methods()} <= headings
    assert "| `lr` | number > 0, ≤ 1000 | `5.0e-06` | Initial learning rate outside the image encoder. |" in text
    assert "| `symmetric` | true or false or null | `null` |" in text
    assert "For weights. Fixed: `symmetric=true, grid=mid_rise`." in text
