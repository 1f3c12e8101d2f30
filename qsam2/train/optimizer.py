"""Parameter groups and schedule of Meta's fine-tuning recipe (sam2.1_hiera_b+_MOSE_finetune.yaml).

Learned step sizes and clips of quantizers have a group of their own (ours).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from qsam2.models import SAM2
from qsam2.recipe.train import TrainRecipe

QUANTIZER_EPS = 1e-15
"""Adam's epsilon for learned step sizes: LSQ's factor 1/sqrt(N Qp) takes some gradients below the usual 1e-8."""
ENCODER, TRUNK = "image_encoder.", "image_encoder.trunk"


@contextlib.contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager: those of the parameters that have gradients have none."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def parameter_groups(
    model: SAM2, recipe: TrainRecipe, quantizer_parameters: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups for AdamW, one per pair of rate and decay, with `params`, `names`, `lr`, `weight_decay`, `role`.

    Rates: `image_encoder_lr` in the image encoder, in its trunk times layer_decay^(depth from the top), position
    embeddings without that decay; `lr` elsewhere. No weight decay on names that contain "bias" and on LayerNorm.
    Learned step sizes and clips, named in `quantizer_parameters`: `quantizer_lr`, no weight decay, `QUANTIZER_EPS`.
    """
    undecayed = {
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in quantizer_parameters:
            lr, decay, role = recipe.quantizer_lr, 0.0, "quantizers"
        else:
            lr = _float_lr(name, model, recipe)
            decay = 0.0 if "bias" in name or name in undecayed else recipe.weight_decay
            role = "weights"
        group = groups.setdefault(
            (lr, decay, role), {"params": [], "names": [], "lr": lr, "weight_decay": decay, "role": role}
        )
        if role == "quantizers":
            group["eps"] = QUANTIZER_EPS
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _float_lr(name: str, model: SAM2, recipe: TrainRecipe) -> float:
    if not name.startswith(ENCODER):
        return recipe.lr
    if not name.startswith(TRUNK) or "pos_embed" in name:
        return recipe.image_encoder_lr
    trunk = model.image_encoder.trunk
    depth = trunk.get_num_layers() + 1 - trunk.get_layer_id(name)
    return recipe.image_encoder_lr * recipe.layer_decay**depth


def rates(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Present learning rates: of "image_encoder", the largest of its layers, all other "weights", and other roles."""
    found: dict[str, float] = {}
    for group in groups:
        parts = {group["role"]}
        if group["role"] == "weights":
            parts = {"image_encoder" if name.startswith(ENCODER) else "weights" for name in group["names"]}
        for part in parts:
            found[part] = max(group["lr"], found.get(part, 0.0))
    return found


def cosine_share(step: int, *, max_steps: int, end: float, warmup_steps: int = 0) -> float:
    """Factor of a group's rate at a step: linear warm-up, then a cosine from 1 to `end` over `max_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return end + (1 - end) * (1 + math.cos(math.pi * min(step / max_steps, 1.0))) / 2
