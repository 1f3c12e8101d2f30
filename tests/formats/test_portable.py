"""Recipes and files that leave a machine name no place on it; those from elsewhere choose none here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from kept_run import kept_run, write_run
from safetensors import safe_open
from safetensors.torch import save_file

from qsam2.errors import UserError
from qsam2.formats.card import build_card
from qsam2.formats.packed import HEADER, _checksum
from qsam2.loading import load_model
from qsam2.output import write_text
from qsam2.recipe import build_recipe, save_recipe
from qsam2.recipe.portable import portable, without_places
from qsam2.recipe.recipe import TrainerRecipe
from qsam2.report.page import render
from qsam2.report.read import CLIPS, FOLDER, read_run

W4 = {"weights": {"method": "minmax", "bits": 4}}
PLACES = {
    "output": "/home/ann/runs/x",
    "data": {"root": "/data/all", "train": ["davis:/data/DAVIS:train", "coco:~/coco", "moving_objects:8:train"],
             "val": "sav:/data/sav:val"},
    "evaluate": {"float_cache": "/tmp/cache", "stills": "coco:/data/coco:val"},
    "model": {"checkpoint": "/models/my.pt", "image_size": 64},
}  # fmt: skip


def test_a_portable_recipe_names_data_and_files_without_their_folders() -> None:
    values = portable(build_recipe({**PLACES, "quantize": W4}).model_dump(mode="json"))
    assert values["data"]["train"] == ["davis:DAVIS:train", "coco:coco", "moving_objects:8:train"]
    assert (values["data"]["val"], values["evaluate"]["stills"]) == ("sav:sav:val", "coco:coco:val")
    assert values["output"] is values["data"]["root"] is values["evaluate"]["float_cache"] is None
    assert values["model"]["checkpoint"] == "my.pt" and build_recipe(values).quantize is not None
    assert portable({"data": {"val": "davis:sets/davis16:val"}}) == {"data": {"val": "davis:sets/davis16:val"}}


def test_a_recipe_from_elsewhere_keeps_no_place_at_all() -> None:
    values = {**PLACES, "quantize": {**W4, "allocate": {"sensitivity": "../../etc/s.json"}}}
    values["trainer"] = {"accelerator": "cuda", "devices": 8, "num_nodes": 2, "strategy": "fsdp", "max_steps": 7}
    left = without_places(values)
    assert build_recipe(left).trainer == TrainerRecipe(max_steps=7)  # 8 processes are started by nobody's file
    assert left["data"] == {
        "root": None, "train": ["davis::train", "coco", "moving_objects:8:train"], "val": "sav::val",
    }  # fmt: skip
    assert (left["output"], left["evaluate"]) == (None, {"float_cache": None, "stills": "coco::val"})
    assert (left["model"]["checkpoint"], left["quantize"]["allocate"]["sensitivity"]) == ("my.pt", "s.json")
    assert without_places({"data": 3, "output": [], "evaluate": {"stills": 7}})["data"] == 3  # refused by the recipe


def forged(file: Path, values: dict) -> None:
    """A packed file whose recipe has other values, with right checksums."""
    with safe_open(file, "pt") as opened:
        header, names = dict(opened.metadata()), list(opened.keys())
        tensors = {name: opened.get_tensor(name) for name in names}
    recipe = json.loads(header["recipe"])
    for section, value in values.items():
        recipe[section] = {**recipe[section], **value} if isinstance(value, dict) else value
    header["recipe"] = json.dumps(recipe)
    header["header_crc32"] = _checksum({key: header[key] for key in HEADER})
    save_file(tensors, file, header)


@pytest.fixture
def packed(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(models["packed"] / "model.safetensors", tmp_path))


def test_a_packed_file_chooses_no_paths(packed: Path, tmp_path: Path) -> None:
    forged(packed, {**PLACES, "model": {"checkpoint": "/models/my.pt"}})
    _, recipe = load_model(packed)
    text = save_recipe(recipe)
    assert not any(place in text for place in ("/home", "/data", "/tmp/cache", "~", "/models"))
    _, recipe = load_model(packed, [f"evaluate.float_cache={tmp_path}", "data.root=/mine"])  # the user's own are kept
    assert (recipe.evaluate.float_cache, recipe.data.root) == (tmp_path, Path("/mine"))


def test_a_run_folder_knows_its_data_from_its_recipe_and_nowhere_to_write(packed: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "recipe.yaml", save_recipe(build_recipe({**PLACES, "quantize": W4})))
    recipe = load_model(tmp_path)[1]
    assert (recipe.data.val, recipe.data.root) == ("sav:/data/sav:val", Path("/data/all"))
    assert recipe.output is recipe.evaluate.float_cache is None


def test_a_small_file_that_claims_a_large_model_is_refused_before_it_is_built(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(packed, {"model": {"size": "large", "checkpoint": None, "image_size": 64}})
    monkeypatch.setattr("qsam2.loading.load_sam2", None)
    with pytest.raises(UserError, match=r"does not fit model.size=large: it holds .* values, the size has about 224,"):
        load_model(packed)


def test_card_and_page_hold_no_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save({}, tmp_path / "model/my.pt")
    values = {**PLACES, "quantize": W4, "output": str(tmp_path), "model": {"checkpoint": str(tmp_path / "model/my.pt")}}
    card = json.dumps(build_card({"bytes": {}}, build_recipe(values), []))
    page = render(kept_run(tmp_path / "run", values))
    for text in (card, page):
        assert "davis:DAVIS:train" in text and not any(place in text for place in ("/data", "/tmp", "~/", "/home"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "../secret", "link", "secret\0", "x" * 5000, "..", ""])
def test_a_page_takes_in_no_file_from_elsewhere(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    for secret in (tmp_path / "secret.jpg", run / "secret.jpg", run / "secret.mp4"):
        secret.write_bytes(b"SECRET" * 3)
    os.symlink(run / "secret.jpg", run / FOLDER / "link.jpg")
    clips = json.loads((run / FOLDER / CLIPS).read_text())
    clips["clips"][0]["file"] = name
    clips["worst"] = [{**row, "picture": f"{name}.jpg"} for row in clips["worst"]]
    (run / FOLDER / CLIPS).write_text(json.dumps(clips))
    read = read_run(run)
    assert read.media(f"{name}.jpg") is read.media(f"{name}.mp4") is read.media(name) is None
    assert "U0VDUkVU" not in render(read), "base64 of the secret"
    assert read.media("clip0.jpg") is not None
