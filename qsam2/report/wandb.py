"""Results of a run in Weights & Biases: scores, per-layer table, overlays, a clip, the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from qsam2.report.read import FOLDER, LAYERS, load_json

SCORES = ("J&F", "J", "F", "fidelity", "box_mIoU", "seconds_per_frame")
COLUMNS = (
    *("name", "kind", "weight_bits", "activation_bits", "reason"),
    *("scale", "weight_snr_db", "weight_clipped", "input_snr_db", "input_clipped"),
)
"""Columns of the per-layer table: `scale` is a mean, signal to noise is in dB, clipped values are shares."""
FILES = ("model.safetensors", "card.md", "card.json", "recipe.yaml")
"""Files of the artifact: the packed model, its card and its recipe."""


@rank_zero_only
def log_results(loggers: Sequence[Logger], metrics: dict[str, Any], pictures: Sequence[Image.Image]) -> None:
    """Log final scores, bytes and seconds, the per-layer table, mask overlays, a clip, and the model as an artifact.

    Table, clip and model are read from the run folder, which is the logger's folder.
    """
    logger = next((logger for logger in loggers if isinstance(logger, WandbLogger)), None)
    if logger is None:
        return
    import wandb  # takes a second: only if it is used

    scores = {
        f"{model}/{key}": metrics[model][key]
        for model in ("float", "ptq", "quantized")
        for key in SCORES
        if key in metrics.get(model, {})
    }
    amounts = {f"{kind}/{name}": value for kind in ("bytes", "seconds") for name, value in metrics[kind].items()}
    logger.log_metrics({**scores, **amounts})
    folder = Path(str(logger.save_dir))
    if layers := load_json(folder, LAYERS):
        rows = [[row.get(column) for column in COLUMNS] for row in layers["layers"]]
        logger.log_table("layers", columns=list(COLUMNS), data=rows)
    if pictures:
        logger.log_image("overlays", list(pictures))
    if clips := sorted(map(str, (folder / FOLDER).glob("*.mp4"))):
        logger.log_video("clips", clips[:1])
    if "quantized" in metrics:
        artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model")
        for name in FILES:
            artifact.add_file(str(folder / name), policy="immutable")  # no second copy on this disk
        logger.experiment.log_artifact(artifact)
    logger.experiment.finish()
