"""Text in any usual encoding, JSON of the shape that is expected; anything else is one line that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from messages import Message
from small_datasets import check, save
from typing_extensions import NotRequired, TypedDict

from qsam2.errors import SHOWN, UserError, short
from qsam2.inputs import read_json, read_text

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_any_usual_encoding(encoding: str, tmp_path: Path) -> None:
    assert read_text(save(tmp_path / "list.txt", "bär\r\ncafé\n".encode(encoding))).split() == ["bär", "café"]
    assert read_text(save(tmp_path / "list.txt", "".encode(encoding))) == ""
    assert read_json(save(tmp_path / "a.json", '{"ü": [1]}'.encode(encoding))) == {"ü": [1]}


@pytest.mark.parametrize("data", [b"\xff\xfea", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"a\0b", b"\0" * 64])
def test_what_is_no_text_is_one_line(data: bytes, tmp_path: Path) -> None:
    file = save(tmp_path / "list.txt", data)
    check("list.txt is no text.*: fetch or write it again", lambda: read_text(file))
    check("list.txt is no text.*: unpack it", lambda: read_json(file, advice="unpack it"))


class Item(TypedDict):
    id: int
    size: NotRequired[float]


class Shape(TypedDict):
    items: list[Item]


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("", "not valid JSON"),
        ('{"items": [', "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"items":' * 100_000, "nested too deeply"),
        ("[]", "dictionary"),
        ("{}", "items: Field required"),
        ('{"items": {}}', "items: "),
        ('{"items": [{"id": true}]}', "items.0.id: "),
        ('{"items": [{"id": "1"}]}', "items.0.id: "),
        ('{"items": [{"id": 1}, {"id": 1, "size": "1"}]}', "items.1.size: "),
        ("<!DOCTYPE html>\n<html>Sign in</html>", "not valid JSON"),
    ],
)
def test_json_of_another_shape_is_one_line(content: str, fact: str, tmp_path: Path, message: Message) -> None:
    file = save(tmp_path / "a.json", content)
    with pytest.raises(UserError) as caught:
        read_json(file, Shape, what="a list of items", advice="write it again")
    assert fact in message(caught) and "a.json is not a list of items (" in str(caught.value)
    if "Field" not in fact and "." not in fact and fact not in ("items: ", "dictionary"):
        check("a.json is damaged", lambda: read_json(file))


def test_json_of_the_shape_is_as_it_is_written(tmp_path: Path) -> None:
    content: dict[str, Any] = {"items": [{"id": 1, "size": 2, "name": "kept"}], "more": None}
    assert read_json(save(tmp_path / "a.json", content), Shape) == content


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, message: Message) -> None:
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(UserError) as caught:
            read_json(path)
        assert "cannot be read" in message(caught)


def test_values_in_messages_are_short() -> None:
    assert short("a\n b") == "a b" and short(ValueError()) == "ValueError"
    assert len(short("x" * 5000)) == SHOWN
    assert str(UserError(short("\ud800"))).isascii()
