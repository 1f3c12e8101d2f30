"""One run as an object: recipe, folder, data and models. The stages of `qsam2.pipeline` take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsam2.data.video import Predictions, Video
from qsam2.models import SAM2
from qsam2.recipe import Recipe
from qsam2.recipe.quantize import ConvertedLayer
from qsam2.run_folder import RunFolder, is_first_rank

if TYPE_CHECKING:  # inference needs no Lightning and no training data
    from lightning.pytorch.loggers import Logger

    from qsam2.data.calibration_data import CalibrationData
    from qsam2.data.clips import Source


@dataclass
class Run:
    """A recipe being carried out.

    A stage reads and changes the run, and records its figures in `folder`; without a section in the recipe it returns.
    """

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    loggers: Sequence[Logger]
    videos: list[Video]
    """Videos to score."""
    stills: list[Video]
    """Images to score with box prompts, in addition to the videos."""
    sources: list[Source]
    """Data for calibration and training."""
    model: SAM2
    teacher: SAM2 | None
    """The float model that a quantized one is compared with; None if the recipe quantizes nothing."""
    layers: list[ConvertedLayer] = field(default_factory=list)
    """Rows of the conversion table."""
    latent: dict[str, Tensor] = field(default_factory=dict)
    """Weights by layer, before rounding."""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    """Masks tracked by each scored model: "float", "ptq", "quantized"."""

    @cached_property
    def calibration(self) -> CalibrationData:
        """Stills and clips to calibrate on, drawn once."""
        from qsam2.data.calibration_data import CalibrationData

        return CalibrationData.of(self.recipe, self.sources, self.model.image_size)

    @property
    def silent(self) -> bool:
        """True if this process shows no progress bars: in a distributed run only the first rank does."""
        return not is_first_rank()

    def prepare_inference(self) -> None:
        """Put model and teacher on the run's device, in eval mode."""
        for network in (self.model, self.teacher):
            if network is not None:
                network.to(self.device).eval()
