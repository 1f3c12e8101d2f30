"""Every command that a page or a help shows is one that the program accepts, those of former pages included."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsam2.cli import build_parser, parse
from qsam2.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(path for folder in ("docs", "data", "qsam2") for path in (ROOT / folder).rglob("*.md"))]
COMMAND = re.compile(r"^\s*((?:[A-Z_0-9]+=\S+ )*(?:qsam2|python train\.py|python -m qsam2) .*)$")
VARIABLE = re.compile(r'^\s*([A-Z]+)="(.*)"$')


def commands(text: str) -> Iterator[str]:
    """Commands of a page's code, with its shell variables put in; a placeholder such as RECIPE is no command."""
    variables: dict[str, str] = {}
    for block in re.findall(r"^```bash\n(.*?)^```|((?:^ {4,}\S.*\n)+)", text, flags=re.MULTILINE | re.DOTALL):
        for line in "".join(block).replace("\\\n", " ").splitlines():
            if assigned := VARIABLE.match(line):
                variables[assigned[1]] = assigned[2]
            elif command := COMMAND.match(line):
                words = re.sub(r"\$([A-Z]+)", lambda name: variables[name[1]], command[1])
                if not re.search(r"\b(RECIPE|TABLE|SWEEP)\b", words):
                    yield words


def helps() -> dict[str, str]:
    """{command: its help}, those of `qsam2 benchmark` included."""
    found, waiting = {}, [build_parser()]
    for parser in waiting:
        found[parser.prog] = parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


HELPS = helps()
SHOWN = [(str(path.relative_to(ROOT)), command) for path in PAGES for command in commands(path.read_text())]
SHOWN += [(name, line) for name, text in HELPS.items() for line in text.splitlines() if line.startswith("  qsam2")]
FORMER = (Path(__file__).parent / "former_commands.txt").read_text().splitlines()


def check(command: str) -> None:
    """Parse a command; a recipe that it names, with its overrides, has to be valid as well."""
    words = shlex.split(command.partition(" > ")[0], comments=True)
    while "=" in words[0]:
        words.pop(0)
    arguments = ["train", *words[2:]] if words[:2] == ["python", "train.py"] else words[words.index("qsam2") + 1 :]
    options = parse(arguments)
    if options.command == "train":
        recipe = ROOT / options.recipe
        load_recipe(recipe if recipe.is_file() else options.recipe, options.overrides)


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page}: {command}" for page, command in SHOWN])
def test_a_command_of_a_page_is_accepted(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize("name", sorted(HELPS.keys() - {"qsam2", "qsam2 benchmark"}))
def test_a_help_shows_examples_within_120_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "122")  # argparse leaves two columns free
    text = helps()[name]
    assert "examples:\n  qsam2 " in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", FORMER)
def test_a_former_command_is_still_accepted(command: str) -> None:
    check(command)


def test_commands_are_found_in_the_pages() -> None:
    assert len(SHOWN) > 40 and {"README.md", "docs/memory.md", "qsam2 train"} <= {page for page, _ in SHOWN}
