"""Masks behind the scores of a run, kept until it is finished, so that a resumed run need not track again."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qsam2.data.video import Predictions
from qsam2.errors import UserError
from qsam2.output import write_bytes
from qsam2.run import Run
from qsam2.train.trainer import build_trainer


@dataclass(frozen=True)
class MasksFile:
    """File of the masks of one model; in a distributed run each rank has its own."""

    path: Path

    @classmethod
    def of(cls, run: Run, name: str) -> MasksFile:
        """The file of the model that `metrics.json` calls `name`."""
        trainer = build_trainer(run.recipe.trainer, folder=run.folder.path)
        return cls(run.folder.stages / f"{name}-{trainer.global_rank}-of-{trainer.world_size}.npz")

    def write(self, masks: Predictions) -> None:
        """Write the masks of this rank."""
        arrays = {str(index): packed for index, packed in enumerate(masks.values())}
        stream = io.BytesIO()
        np.savez_compressed(stream, names=json.dumps(list(masks)), **arrays)
        write_bytes(self.path, stream.getvalue())

    def read(self) -> Predictions | None:
        """The masks; None if there is no file. UserError if it is damaged."""
        if not self.path.is_file():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as found:
                names = json.loads(str(found["names"]))
                return {(video, item): found[str(index)] for index, (video, item) in enumerate(names)}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            problem = f"{self.path} is damaged ({type(error).__name__})"
            raise UserError(f"{problem}: remove it, and the model is scored again") from error
