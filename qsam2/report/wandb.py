"""What a run leaves in Weights & Biases beside its curves."""

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
"""Of the per-layer table: mean scale, signal to noise in dB, shares clipped."""
FILES = ("model.safetensors", "card.md", "card.json", "recipe.yaml")
"""What the artifact holds: the packed model and what says how it was made."""


@rank_zero_only
def log_results(loggers: Sequence[Logger], metrics: dict[str, Any], pictures: Sequence[Image.Image]) -> None:
    """Log final scores, bytes and seconds, the per-layer table, mask overlays, a clip, and the model as an artifact.

    The latter three are read from the run folder, in which the logger writes.
    """
    logger = next((each for each in loggers if isinstance(each, WandbLogger)), None)
    if logger is None:
        return
    import wandb  # a second, which a run without it need not wait

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
