"""Recipes, sweeps and tables that ship with qsam2, found by name from any folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qsam2.errors import UserError
from qsam2.recipe.section import did_you_mean

Kind = Literal["recipe", "sweep", "table"]

FOLDER = Path(__file__).parents[1] / "recipes"
"""Folder of the shipped files; in a checkout a link to its `recipes/`."""
PATTERNS: dict[Kind, tuple[str, ...]] = {
    "recipe": ("*.yaml", "nano/*.yaml"),
    "sweep": ("sweeps/*.yaml",),
    "table": ("tables/*.yaml",),
}
PREFIXES: dict[Kind, str] = {"recipe": "recipes/", "sweep": "recipes/sweeps/", "table": "recipes/tables/"}


def shipped(kind: Kind) -> dict[str, Path]:
    """{name: file} of all shipped files of a kind, sorted; nano's own recipes are named nano/NAME."""
    files = [file for pattern in PATTERNS[kind] for file in sorted(FOLDER.glob(pattern))]
    prefix = PREFIXES[kind].removeprefix("recipes/")
    return {file.relative_to(FOLDER / prefix).with_suffix("").as_posix(): file for file in files}


def find(file: str | Path, kind: Kind) -> Path:
    """An existing file, else the shipped one of this name (`qat_w4a4`) or path (`recipes/qat_w4a4.yaml`).

    Raises:
        UserError: there is neither; the message names the nearest.
    """
    path = Path(file)
    if path.is_file():
        return path
    kinds: tuple[Kind, ...] = ("recipe",) if kind == "recipe" else ("sweep", "table")  # one command takes both
    names = {name: file for kind in kinds for name, file in shipped(kind).items()}
    name = path.as_posix().removesuffix(".yaml")
    for prefix in (PREFIXES[kind] for kind in kinds):
        name = name.removeprefix(prefix)
    if name not in names:
        hint = did_you_mean(path.stem, names, cutoff=0.6)
        raise UserError(f"{kind} {file} does not exist: give a file, or a name that `qsam2 recipes` lists{hint}")
    return names[name]
