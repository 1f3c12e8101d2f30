"""A loaded SAM2, float or quantized, made fast for inference on the CPU or on CUDA."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.position_encoding import PositionEmbeddingSine
from torch import Tensor, nn

from qsam2.fast.integers import multiplies_bytes, use_integers
from qsam2.layers.attention import (
    QuantAttention,
    QuantizedAttention,
    QuantMultiScaleAttention,
    QuantRoPEAttention,
    attend,
)
from qsam2.layers.convert import QUANT_ATTENTIONS, QUANT_LAYERS
from qsam2.layers.weight import QuantizedLayer, recast
from qsam2.models import SAM2

log = logging.getLogger("qsam2")

FAST_MEMORY = ("memory.cache=true",)
"""Overrides of a fast model's recipe: keys and values of a frame are computed once."""
LOW_PRECISION = ("image_encoder", "memory_attention", "memory_encoder")
"""The parts whose products are in bfloat16; the mask decoder stays in float32: it decides the mask's edge."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies in it, else float32, as emulating it is slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if multiplies else torch.float32


class FastHiera(Hiera):
    """Hiera that interpolates its position embedding once a size, not once a picture."""

    def _get_pos_embed(self, hw: tuple[int, int]) -> Tensor:
        wanted = (*hw, self.pos_embed.device)
        if wanted not in self.known_positions:
            self.known_positions[wanted] = super()._get_pos_embed(hw).to(self.patch_embed.proj.weight.dtype)
        return self.known_positions[wanted]


class FastPositions(PositionEmbeddingSine):
    """Sine positions of the neck's levels, which are as large as its features, computed once a size."""

    def forward(self, x: Tensor) -> Tensor:
        wanted = (len(x), *x.shape[-2:], x.dtype, x.device)
        if wanted not in self.known_positions:
            self.known_positions[wanted] = super().forward(x).to(x.dtype)
        return self.known_positions[wanted]


class FastSAM2(SAM2):
    """A SAM2 for inference alone; see `make_fast`."""

    fast_dtype: torch.dtype

    def forward_image(self, img_batch: Tensor) -> dict[str, Any]:
        """Features in float32, as the mask decoder reads them."""
        with self._products():
            out = super().forward_image(img_batch)
        return {
            "vision_features": out["backbone_fpn"][-1].float(),
            "vision_pos_enc": [*out["vision_pos_enc"][:-1], out["vision_pos_enc"][-1].float()],
            "backbone_fpn": [level.float() for level in out["backbone_fpn"]],
        }

    def _prepare_memory_conditioned_features(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._products():
            return super()._prepare_memory_conditioned_features(*args, **kwargs).float()

    def _encode_new_memory(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        with self._products():
            return super()._encode_new_memory(*args, **kwargs)

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        low = self.fast_dtype != torch.float32
        return torch.autocast(self.device.type, self.fast_dtype if low else None, enabled=low)


class FusedAttend(QuantizedAttention):
    """Base of attentions that compute with `attend`, without quantizers."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        return attend(q, k, v)


class FastMultiScaleAttention(FusedAttend, QuantMultiScaleAttention):
    """Hiera's attention."""


class FastAttention(FusedAttend, QuantAttention):
    """The mask decoder's attention."""


class FastRoPEAttention(FusedAttend, QuantRoPEAttention):
    """The memory attention's; rotary encoding in real numbers, which takes fewer copies."""


PLAIN_TYPES = {twin: plain for plain, twin in QUANT_LAYERS.items()}
FAST_ATTENTIONS: dict[type[nn.Module], type[QuantizedAttention]] = {
    QuantMultiScaleAttention: FastMultiScaleAttention,
    QuantAttention: FastAttention,
    QuantRoPEAttention: FastRoPEAttention,
}


@torch.no_grad()
def make_fast(model: SAM2, dtype: torch.dtype | None = None) -> FastSAM2:
    """The model for fast inference; it takes the given model's layers, which is not to be used any more.

    Of a quantized model the linear layers in image encoder and memory compute with its integers, where the processor
    does (`multiplies_bytes`). For all else weights are dequantized once and activations not quantized; products of
    image encoder, memory attention and memory encoder are in `dtype` (default: `fast_dtype` of its device), what is
    left is in float32; the log says what became of it. What it remembers is up to `use_memory`.

    Raises:
        UserError: a quantizer has no range yet.
    """
    fast: Any = recast(FastSAM2, model.eval().requires_grad_(False))
    fast.fast_dtype = dtype or fast_dtype(model.device)
    able = multiplies_bytes(fast.device)
    in_integers = use_integers(fast, fast.fast_dtype) if able else 0
    why = "no layer has weights and activations to do so" if able else f"this {fast.device.type} would not gain"
    log.info(
        "fast: %s; other products of image encoder and memory in %s",
        f"{in_integers} linear layers compute with integers" if in_integers else f"no integers, as {why}",
        str(fast.fast_dtype).removeprefix("torch."),
    )
    for name, module in list(fast.named_modules()):
        if isinstance(module, QuantizedLayer):
            fast.set_submodule(name, _plain(module))
        elif isinstance(module, QuantizedAttention) or type(module) in QUANT_ATTENTIONS:
            fast.set_submodule(name, _fast_attention(module))
    trunk: Any = recast(FastHiera, fast.image_encoder.trunk)
    trunk.known_positions = {}
    fast.image_encoder.trunk = trunk
    positions: Any = recast(FastPositions, fast.image_encoder.neck.position_encoding)
    positions.known_positions = {}
    fast.image_encoder.neck.position_encoding = positions
    for part in LOW_PRECISION:
        for module in fast.get_submodule(part).modules():
            if type(module) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
                module.to(fast.fast_dtype)
    return fast


def _plain(layer: QuantizedLayer) -> nn.Module:
    """A plain layer with the dequantized weight; its input is not quantized any more (ours)."""
    plain: Any = recast(PLAIN_TYPES[type(layer)], layer)
    quantizer = layer.weight_quantizer
    if quantizer is not None:
        values = quantizer.dequantize(quantizer.to_int(layer.weight), layer.weight.dtype)
        plain._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    for name in ("weight_quantizer", "input_quantizer"):
        plain._modules.pop(name, None)
        plain.__dict__.pop(name, None)
    del plain.__dict__["_cached"]
    return plain


def _fast_attention(attention: nn.Module) -> nn.Module:
    if not isinstance(attention, QuantizedAttention):
        attention = QUANT_ATTENTIONS[type(attention)].from_float(attention)
    fast = recast(FAST_ATTENTIONS[type(attention)], attention)
    for part in "qkv":
        fast._modules.pop(f"{part}_quantizer", None)
        setattr(fast, f"{part}_quantizer", None)
    return fast
