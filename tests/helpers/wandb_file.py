"""Reads what an offline run of Weights & Biases wrote: LevelDB's log format, with protocol buffers in it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a `.wandb` file, in order."""
    data = file.read_bytes()
    assert data.startswith(b":W&B")
    offset, record = FILE_HEADER, b""
    while offset + CHUNK_HEADER <= len(data):
        room = BLOCK - offset % BLOCK
        if room < CHUNK_HEADER:  # the rest of a block that holds no chunk header is padding
            offset += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        offset += CHUNK_HEADER
        record += data[offset : offset + length]
        offset += length
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(configuration, one dictionary a logged step) of the one offline run in a folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for record in records(file):
        for item in (*record.run.config.update, *record.config.update):
            config[_key(item)] = json.loads(item.value_json)
        if record.history.item:
            history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
    return config, history


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
