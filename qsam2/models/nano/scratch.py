"""Initialization for training from scratch (ours): attention starts by matching positions and appearance.

sam2's own initialization assumes that weights are loaded. Trained from scratch with it, nano spends hundreds of steps
on learning that objects exist (until then sam2 replaces mask logits by a constant without gradient) and many more on
attending to similar features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsam2.models.sam2 import SAM2

PRESENT_LOGIT = 4.0
"""Initial bias of the object score: every object counts as visible."""
SHARPNESS = 1.5
"""Scale of the shared query and key projections, each of orthonormal rows."""
APPEARANCE = 3 / 4, 5 / 8
"""Share of the memory encoder's channels, and of the memory's, for appearance; the rest are for the mask."""


@torch.no_grad()
def initialise(model: SAM2, seed: int = 0) -> None:
    """Change a model's random weights in place; the seed determines them.

    The object score starts positive. Queries and keys of the mask decoder's cross-attention share one projection, so
    that a prompt attends to its position. Those of memory attention share one, too: a memory stores appearance in some
    channels and the mask in others, and a pixel attends to similar appearance near its position.
    """
    generator = torch.Generator().manual_seed(seed)
    score = model.sam_mask_decoder.pred_obj_score_head.layers[-1]
    score.weight.mul_(0.1)
    nn.init.constant_(score.bias, PRESENT_LOGIT)
    transformer = model.sam_mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        rows, columns = attention.q_proj.weight.shape
        shared = SHARPNESS * _orthonormal(rows, columns, generator)
        for projection in (attention.q_proj, attention.k_proj):
            _set(projection, shared)
    _match_by_appearance(model, generator)


def _match_by_appearance(model: SAM2, generator: torch.Generator) -> None:
    encoder, width, memory = model.memory_encoder, model.hidden_dim, model.mem_dim
    features, stored = int(APPEARANCE[0] * width), int(APPEARANCE[1] * memory)
    look = torch.zeros(width, width)
    look[:features] = _orthonormal(features, width, generator)
    _set(encoder.pix_feat_proj, look)
    mask = encoder.mask_downsampler.encoder[-1]  # writes the other channels
    mask.weight[:features] = 0
    mask.bias[:features] = 0
    summary = torch.zeros(memory, width)
    summary[:stored, :features] = _orthonormal(stored, features, generator)
    summary[stored:, features:] = _orthonormal(memory - stored, width - features, generator)
    _set(encoder.out_proj, summary)
    remembered = (summary @ look)[:stored]  # from a frame's features to its memory
    for layer in model.memory_attention.layers:
        spread = SHARPNESS * _orthonormal(stored, width, generator).T
        keys = torch.zeros(width, memory)
        keys[:, :stored] = spread
        _set(layer.cross_attn_image.k_proj, keys)
        _set(layer.cross_attn_image.q_proj, spread @ remembered)


def _set(layer: nn.Linear | nn.Conv2d, matrix: Tensor) -> None:
    layer.weight.copy_(matrix.view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.zero_()


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with rows <= columns orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T
