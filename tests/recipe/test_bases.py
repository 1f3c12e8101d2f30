"""Recipe files over their base, for their sizes, and found by the name they are shipped under."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsam2.errors import UserError
from qsam2.recipe import load_recipe, save_recipe
from qsam2.recipe.shipped import Kind, find, shipped


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes that lie over each other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    files = {
        "low.yaml": "name: low\ntrain: {lr: 1, lr_end: 0.5}\n"
        "sizes: {nano*: {train: {lr: 2}}, tiny: {train: {lr: 3}}}\n",
        "more/middle.yaml": "base: ../low.yaml\nname: middle\ntrain: {weight_decay: 0.25}\n",
        "high.yaml": "base: more/middle.yaml\ntrain: {lr: 4}\nsizes: {large: {train: {lr: 5}}}\n",
        "named.yaml": "base: qat_w2a4\nname: named\nmodel: {size: tiny}\n",
        "loop.yaml": "base: more/loop.yaml\n",
        "more/loop.yaml": "base: ../loop.yaml\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "size", "lr"),
    [
        ("low.yaml", None, 2),
        ("low.yaml", "nano_heavy", 2),
        ("low.yaml", "tiny", 3),
        ("low.yaml", "large", 1),
        ("more/middle.yaml", "tiny", 3),
        ("high.yaml", "tiny", 4),  # a file goes before the sizes of its base
        ("high.yaml", "large", 5),
    ],
)
def test_a_file_lies_over_its_base_and_sizes_over_their_file(
    folder: Path, file: str, size: str | None, lr: int
) -> None:
    recipe = load_recipe(file, [f"model.size={size}"] if size else [])
    assert (recipe.train.lr, recipe.train.lr_end) == (lr, 0.5)
    assert recipe.train.weight_decay == (0.1 if file == "low.yaml" else 0.25)
    assert load_recipe(file, ["train.lr=9"]).train.lr == 9
    assert "base" not in save_recipe(recipe) and "sizes" not in save_recipe(recipe)


def test_a_base_is_a_shipped_name_too(folder: Path) -> None:
    recipe = load_recipe("named.yaml")
    assert (recipe.name, recipe.model.size, recipe.quantize.weights.bits) == ("named", "tiny", 2)
    assert recipe.train.image_encoder_lr == pytest.approx(9e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: loop.yaml", "recipe r.yaml: base leads back to itself (r.yaml -> loop.yaml -> more/loop.yaml -> "),
        ("base: qat_w4a5", "recipe r.yaml: base: recipe qat_w4a5 does not exist: give a file, or a name"),
        ("sizes: {nnao: {}}", "recipe r.yaml: sizes.nnao matches no size: there are nano, nano_heavy, tiny, small, "),
        ("sizes: {nano: 3}", "recipe r.yaml: sizes.nano=3: give a mapping of recipe keys other than model.size"),
        ("sizes: {nano: {model: {size: tiny}}}", "recipe r.yaml: sizes.nano={'model': {'size': 'tiny'}}: give"),
        ("sizes: 3", "recipe r.yaml: sizes=3: give a mapping from sizes to values"),
        ("sizes: {nano: {trainr: 3}}", "unknown recipe key 'trainr'"),
    ],
)
def test_bases_and_sizes_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    (folder / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "kind", "name"),
    [
        ("qat_w4a4", "recipe", "qat_w4a4"),
        ("qat_w4a4.yaml", "recipe", "qat_w4a4"),
        ("recipes/qat_w4a4.yaml", "recipe", "qat_w4a4"),
        ("recipes/nano/pretrain_nano.yaml", "recipe", "nano/pretrain_nano"),
        ("bits", "sweep", "bits"),
        ("recipes/sweeps/bits.yaml", "sweep", "bits"),
        ("qat", "table", "qat"),
    ],
)
def test_shipped_files_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, kind: Kind, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(file, kind) == shipped(kind)[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("name: mine")
    assert find(file, kind) == Path(file)  # an existing file goes first


@pytest.mark.parametrize(("file", "kind", "near"), [("qat_w4a5", "recipe", "qat_w4a4"), ("bit", "sweep", "bits")])
def test_a_missing_file_names_the_nearest(file: str, kind: Kind, near: str) -> None:
    with pytest.raises(UserError, match=f"{kind} {file} does not exist: .*; did you mean {near!r}"):
        find(file, kind)
