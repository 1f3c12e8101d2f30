"""Text and JSON that come from elsewhere, in any usual encoding; an error is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsam2.errors import UserError, short

AGAIN = "fetch or write it again"


def read_text(path: Path, *, advice: str = AGAIN) -> str:
    """The content of a text file: UTF-8, UTF-16 or UTF-32, with or without a byte order mark, or else Latin-1.

    Raises UserError, which ends in the advice, if the file cannot be read or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or short(error)}): {advice}") from error
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding.startswith(("utf-16", "utf-32")):
            raise UserError(f"{path} is no text (damaged {encoding.upper()}): {advice}") from error
        text = data.decode("latin-1")
    if "\0" in text:
        raise UserError(f"{path} is no text: {advice}")
    return text


def read_json(path: Path, shape: Any = Any, *, what: str = "", advice: str = AGAIN) -> Any:
    """The content of a JSON file.

    Args:
        shape: a type that Pydantic checks, such as a `TypedDict`, without converting values; it may lack keys.
        what: name of the content for the message "is not ..."; without it the file "is damaged".
        advice: what to do about a file that cannot be used, the end of the message.

    Raises:
        UserError: the file cannot be read, is not valid JSON, is nested too deeply or has another shape.
    """
    from pydantic import TypeAdapter, ValidationError  # takes a while: only if it is needed

    try:
        content = json.loads(read_text(path, advice=advice))
        TypeAdapter(shape).validate_python(content, strict=True)
        return content
    except RecursionError:
        reason = "nested too deeply"
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        reason = f"{short('.'.join(map(str, first['loc'])))}: {first['msg']}" if first["loc"] else first["msg"]
    except ValueError as error:
        reason = f"not valid JSON: {short(error)}"
    raise UserError(f"{path} is {f'not {what}' if what else 'damaged'} ({reason}): {advice}")
