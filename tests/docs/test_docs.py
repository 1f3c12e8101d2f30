"""The documents say what the program says."""

from pathlib import Path

import pytest

from qsam2.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["evaluate"],
        ["predict"],
        ["export"],
        ["sweep"],
        ["table"],
        ["benchmark"],
        ["benchmark", "quantizers"],
        ["benchmark", "memory"],
        ["benchmark", "tracking"],
    ],
)
def test_help_stands_in_the_command_line_page(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "cli.md").read_text()


def test_readme_names_every_recipe():
    readme = (ROOT / "README.md").read_text()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{recipe.name}" in readme, recipe.name
