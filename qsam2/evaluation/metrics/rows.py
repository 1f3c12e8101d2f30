"""Base of metrics whose state is a table of named rows, equal on every rank after synchronization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from qsam2.errors import UserError

NAME_BYTES = 256


class TableMetric(Metric):
    """Base of metrics that keep a few float64 values for each (group, object), e.g. (sequence, object id).

    Ranks may hold any groups, or none. A group that a distributed sampler repeats in its last batch counts once. A row
    is stored as bytes: one lossless dtype for names and values that every device and communication backend supports.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    rows: list[torch.Tensor]

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = columns
        self.add_state("rows", default=[], dist_reduce_fx="cat")  # each uint8 (1, NAME_BYTES + 8 * columns)
        self._names: set[bytes] = set()

    def reset(self) -> None:
        """Forget all objects."""
        super().reset()
        self._names = set()

    def add_row(self, group: str, object_id: int | str, values: tuple[float, ...]) -> None:
        """Add one object's values. Raises UserError if this rank has the object already or its name is too long."""
        name = f"{group}\0{object_id}".encode()
        if len(name) > NAME_BYTES:
            raise UserError(
                f"{group}: the name with object id {object_id} takes {len(name)} bytes; at most {NAME_BYTES} are "
                "allowed, shorten the name"
            )
        if name in self._names:
            raise UserError(
                f"{group}: object {object_id} was given twice; give all frames of an object in one update, "
                "and call reset() before another evaluation"
            )
        self._names.add(name)
        row = bytearray(name.ljust(NAME_BYTES, b"\0") + np.array(values, dtype=np.float64).tobytes())
        self.rows.append(torch.frombuffer(row, dtype=torch.uint8)[None].to(self.device))

    def table(self) -> dict[str, dict[str, np.ndarray]]:
        """{group: {object id: float64 (columns,)}}, sorted, so that results do not depend on the number of ranks."""
        if len(self.rows) == 0:
            return {}
        rows: dict[tuple[str, str], np.ndarray] = {}
        for row in dim_zero_cat(self.rows).cpu().numpy():
            group, object_id = row[:NAME_BYTES].tobytes().rstrip(b"\0").decode().split("\0")
            rows.setdefault((group, object_id), np.frombuffer(row[NAME_BYTES:].tobytes(), dtype=np.float64))
        table: dict[str, dict[str, np.ndarray]] = {}
        for group, object_id in sorted(rows, key=lambda key: (key[0], len(key[1]), key[1])):  # "2" before "10"
            table.setdefault(group, {})[object_id] = rows[group, object_id]
        return table

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all ranks."""
        if len(self.rows) == 0:  # torchmetrics would send an empty float vector
            self.rows = [torch.empty(0, NAME_BYTES + 8 * self.columns, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)


def mean_over_objects(table: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """Mean of the rows over all objects of all groups: float64 (columns,)."""
    return np.mean([row for group in table.values() for row in group.values()], axis=0)
