"""The model as the last finished stage of a run left it, so that a resumed run need not carry out that stage again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from qsam2.errors import UserError
from qsam2.layers.convert import latent_weights
from qsam2.run import Run, is_first_rank
from qsam2.train.trainer import SafeCheckpointIO

log = logging.getLogger("qsam2")


class StoredModel:
    """One file in the run folder, replaced after each stage that changes the model: {"stages", "model", "latent"}.

    "stages" are the names of the finished stages; "latent" is `Run.latent` where it cannot be computed from "model".

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.file = run.folder.stages / "model.ckpt"
        self.stored: dict[str, Any] = {"stages": []}
        self.finished: list[str] = []
        if self.file.is_file():
            try:
                found = SafeCheckpointIO().load_checkpoint(self.file)
                self.stored = {key: found[key] for key in ("stages", "model", "latent")}
            except Exception as error:  # whatever torch makes of such a file
                problem = f"{self.file} is damaged ({type(error).__name__})"
                raise UserError(f"{problem}: remove it, and the run is calibrated anew") from error

    def carry_out(self, stage: Callable[[Run], None]) -> None:
        """Carry out a stage and store its model, unless the model of this or a later stage is stored."""
        if stage.__name__ in self.stored["stages"]:
            if stage.__name__ == self.stored["stages"][-1]:
                self._load()
            return
        before, latent = len(self.run.folder.carried_out), self.run.latent
        stage(self.run)
        if len(self.run.folder.carried_out) > before:  # the recipe has this stage
            self.finished.append(stage.__name__)
            self._save(latent if self.run.latent is latent else {})

    def _load(self) -> None:
        run, stages = self.run, self.stored["stages"]
        run.model.load_state_dict(self.stored["model"])
        run.latent = self.stored["latent"] or latent_weights(run.model)
        run.prepare_inference()
        log.info("resumed behind %s", ", ".join(name.replace("_", " ") for name in stages))
        self.finished = stages
        self.stored = {"stages": stages}  # frees the memory

    def _save(self, latent: dict[str, Tensor]) -> None:
        if not is_first_rank():
            return
        values = {"stages": self.finished, "model": self.run.model.state_dict(), "latent": latent}
        try:
            SafeCheckpointIO().save_checkpoint(values, self.file)
        except UserError as error:  # a run that finishes needs no such file
            log.warning("%s; if this run is stopped now, it is calibrated anew", error)
