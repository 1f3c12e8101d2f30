"""What a run leaves in Weights & Biases beside its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from qsam2.layers.convert import ConvertedLayer

SCORES = ("J&F", "J", "F", "fidelity", "seconds_per_frame")


@rank_zero_only
def log_results(
    loggers: Sequence[Logger],
    metrics: dict[str, Any],
    layers: Sequence[ConvertedLayer],
    pictures: Sequence[Image.Image],
) -> None:
    """Log final scores and bytes, the per-layer table and mask overlays."""
    logger = next((each for each in loggers if isinstance(each, WandbLogger)), None)
    if logger is None:
        return
    scores = {
        f"{model}/{key}": metrics[model][key]
        for model in ("float", "ptq", "quantized")
        for key in SCORES
        if key in metrics.get(model, {})
    }
    logger.log_metrics({**scores, **{f"bytes/{name}": value for name, value in metrics["bytes"].items()}})
    if layers:
        columns = ["layer", "kind", "weight_bits", "activation_bits", "reason"]
        rows = [[row.name, row.kind, row.weight_bits, row.activation_bits, row.reason] for row in layers]
        logger.log_table("layers", columns=columns, data=rows)
    if pictures:
        logger.log_image("overlays", list(pictures))
    logger.experiment.finish()
