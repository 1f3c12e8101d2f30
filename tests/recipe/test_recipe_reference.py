"""The reference of recipe keys holds every key of the schema, with a meaning."""

from __future__ import annotations

import re

from qsam2.recipe import Recipe
from qsam2.recipe.quantizer_specs import methods
from qsam2.recipe.reference import reference


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    text = reference()
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|(.+?)\| (.+) \|$", text, re.M)
    schema = Recipe.model_json_schema()
    keys = {key for section in [schema, *schema["$defs"].values()] for key in section["properties"]}
    assert keys == {key for key, *_ in rows}
    for key, kind, default, meaning in rows:
        assert kind.strip() and default.strip() and len(meaning) > 5, key
        assert meaning[0] != "(" and meaning.rstrip(")").endswith("."), f"{key}: {meaning!r} is no sentence"


def test_links_lead_to_sections() -> None:
    text = reference()
    headings = {re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in re.findall(r"^#+ (.+)$", text, re.M)}
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert links > {"train", "trainprompts", "quantizerules"}
    assert links <= headings
    assert {f"method{method}" for method in methods()} <= headings


def test_numbers_are_those_of_the_schema() -> None:
    text = reference()
    assert "| `lr` | number > 0 | `5.0e-06` | Initial learning rate outside the image encoder. |" in text
    assert "| `symmetric` | true or false or null | `null` |" in text
    assert "For weights. Fixed: `symmetric=true, grid=mid_rise`." in text
