"""Validation errors in one line, for any schema: sections within mappings and lists, and the kind of file."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qsam2.recipe.section import Section, describe


class Part(Section):
    size: int
    label: str = ""


class Whole(Section):
    parts: dict[str, Part] = {}
    row: tuple[Part, ...] = ()
    first: Part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the table lacks the key 'first'"),
        ({"first": {}}, "first lacks the key 'size'"),
        ({"frist": 1, "first": {"size": 1}}, "unknown table key 'frist': a table has parts, row, first; did you mean"),
        ({"parts": {"a.b": {"size": 1, "labl": ""}}}, "unknown table key 'parts.a.b.labl': parts.a.b has size, label;"),
        ({"parts": {"a": 3}}, "parts.a=3: set its keys instead, as parts.a.size=...: size, label"),
        ({"parts": {"a": {"size": "x"}}}, "parts.a.size='x': should be a valid integer"),
        ({"row": [{"size": 1}, {"siz": 1, "size": 1}]}, "unknown table key 'row.1.siz': row.1 has size, label; did"),
        ({"row": {}}, "row={}: give a list"),
    ],
)
def test_the_key_is_named_as_the_user_wrote_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(values)
    assert describe(caught.value, Whole, "table").startswith(message)
