"""Hooks of mkdocs that add to the pages of docs/: reference, tables and cards from their sources, and equations.

`generated_pages` needs this package alone, so that the tests can look at what it writes.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import nano_table  # noqa: E402
import recipe_keys  # noqa: E402

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#]+)(#[^)]*)?\)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def generated_pages() -> dict[str, str]:
    """Markdown of the pages that are not files of docs/, by their path in the site."""
    pages = {
        "cli.md": commands(),
        "recipe_keys.md": recipe_keys.reference(),
        "nano.md": card(ROOT / "qsam2/models/nano/nano.md"),
    }
    pages |= {f"datasets/{page_name(path)}": card(path) for path in (ROOT / "data").glob("*.md")}
    return pages | {f"results/{path.stem}.md": results(path) for path in (DOCS / "tables").glob("*.json")}


def commands() -> str:
    """The help of each command, as the command line prints it."""
    os.environ["COLUMNS"] = "100"
    parts = [
        "# Commands\n\n`python train.py RECIPE` is `qsam2 train RECIPE`. Each command prints its help with `--help`."
    ]
    for parser in parsers():
        level = "##" if parser.prog.count(" ") < 2 else "###"
        parts.append(f"{level} {parser.prog}\n\n```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def parsers() -> Iterator[argparse.ArgumentParser]:
    """The command line's parser, and those of its commands in their order, depth first."""
    from qsam2.cli import build_parser

    waiting: list[argparse.ArgumentParser] = [build_parser()]
    while waiting:
        parser = waiting.pop(0)
        yield parser
        actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        waiting = [child for action in actions for child in action.choices.values()] + waiting


def results(path: Path) -> str:
    """A table of docs/tables/ as a page."""
    table = json.loads(path.read_text())
    if "rows" in table:
        return nano_table.page(table)
    from qsam2.sweep.results import render

    text = (DOCS / "tables" / f"{path.stem}.md").read_text()
    return f"# {table['title']}\n\n{text.replace('<!-- table -->', render(table))}"


def card(path: Path) -> str:
    """A Markdown file from outside of docs/, its links pointing into the site or left out."""
    own = "nano.md" if path.parent.name == "nano" else f"datasets/{page_name(path)}"

    def moved(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.groups()
        if "://" in target:
            return link.group()
        source = (path.parent / target).resolve()
        places = {DOCS: "", ROOT / "data": "datasets/", ROOT / "qsam2/models/nano": ""}
        if source.parent not in places or source.suffix not in (".md", ".png", ".jpg"):
            return text
        place = places[source.parent] + (page_name(source) if source.suffix == ".md" else source.name)
        return f"{picture}[{text}]({os.path.relpath(place, Path(own).parent)}{anchor or ''})"

    return LINK.sub(moved, path.read_text())


def page_name(path: Path) -> str:
    """File name in the site: README.md is the index of its folder."""
    return "index.md" if path.name == "README.md" else path.name


def on_files(files: Any, config: Any) -> Any:
    """MkDocs event: add the generated pages and the style sheet."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "site.css", abs_src_path=str(DOCS / "site/site.css")))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs event: equations become MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        tag, latex = found.groups()
        return convert(html.unescape(latex).strip(), display="block" if tag == "div" else "inline")

    return EQUATION.sub(drawn, content)
