"""The wording of error messages, kept in one file: `tests/snapshots/messages.json`.

The fixture `message` takes a `pytest.raises` context, an exception or a string, checks that it is one line, compares
it with the snapshot of this test and returns it, so that the test asserts the facts in it. Several calls are compared
in order; `tmp_path`, the session's folder and the repository are replaced by TMP, SESSION and REPO.

After a change of wording: `pytest --refresh-messages PATHS`, then read the difference in git. To drop the messages of
tests that are gone, delete the file first and refresh all tests.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

TESTS = Path(__file__).parents[1]
SNAPSHOT = TESTS / "snapshots" / "messages.json"


class Message:
    """Messages of one test, compared with the snapshot or, on a refresh, written to it."""

    def __init__(self, test: str, folders: dict[Path, str], refresh: bool) -> None:
        self.test, self.folders, self.refresh = test, folders, refresh
        self.texts: list[str] = []

    def __call__(self, error: Any) -> str:
        text = str(getattr(error, "value", error)).strip()
        assert text and "\n" not in text, text
        self.texts.append(self._portable(text))
        if not self.refresh:
            kept = json.loads(SNAPSHOT.read_text()).get(self.test, [])
            expected = kept[len(self.texts) - 1] if len(kept) >= len(self.texts) else None
            assert self.texts[-1] == expected, "the wording changed: run `pytest --refresh-messages` if that is wanted"
        return text

    def _portable(self, text: str) -> str:
        for folder, name in self.folders.items():
            text = text.replace(str(folder), name)
        return re.sub(r"(SESSION/(?:\w*[a-z_])?)\d+", r"\1", text)  # pytest numbers its folders

    def write(self) -> None:
        """Replace this test's messages in the snapshot; other processes may write theirs at the same time."""
        SNAPSHOT.parent.mkdir(exist_ok=True)
        with FileLock(SNAPSHOT.with_suffix(".lock.tmp")):
            kept = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.is_file() else {}
            kept.pop(self.test, None)
            if self.texts:
                kept[self.test] = self.texts
            SNAPSHOT.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def key_of(item: pytest.Item) -> str:
    """Key of a test in the snapshot: its node id below `tests/`."""
    return f"{item.path.relative_to(TESTS).as_posix()}::{item.name}"
