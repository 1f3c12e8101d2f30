"""SAM2 as five graphs, cut where a tracker stores or decides something; one object and one image per call.

Shapes: S image_size, h = S / 16, C channels of the model, M channels of the memory, P points.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.sam.transformer import RoPEAttention
from sam2.modeling.sam2_base import NO_OBJ_SCORE
from sam2.modeling.sam2_utils import get_1d_sine_pe
from torch import Tensor, nn

from qsam2.formats.onnx.grids import use_onnx_grids
from qsam2.layers.attention import QuantRoPEAttention, join_heads, quantize_part, split_heads
from qsam2.models import SAM2

HIDDEN_KEY = -1e9
"""Added to the attention score of an empty slot: its exp is 0 in float32."""


class ImageEncoder(nn.Module):
    """image (1, 3, S, S), normalized -> features without memory, and the same plus the token for "no memory", both
    (1, C, h, h); inputs of the mask decoder at strides 4 (1, C/8, 4h, 4h) and 8 (1, C/4, 2h, 2h).
    """

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.encoder = model.image_encoder
        self.conv_s0, self.conv_s1 = model.sam_mask_decoder.conv_s0, model.sam_mask_decoder.conv_s1
        self.no_memory = nn.Buffer(model.no_mem_embed.detach().view(1, -1, 1, 1))
        trunk, side = model.image_encoder.trunk, model.image_size // 4
        position = trunk._get_pos_embed((side, side)).detach()
        trunk._get_pos_embed = lambda _: position  # one image size: interpolated once, not per frame

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        stride_4, stride_8, features = self.encoder(image)["backbone_fpn"]
        return features, features + self.no_memory, self.conv_s0(stride_4), self.conv_s1(stride_8)


class MemoryAttention(nn.Module):
    """features (1, C, h, h), memory (1, slots, M, h, h), its mask (1, slots); pointers (1, count, C), their distances
    as a share of the longest (1, count), their mask (1, count) -> features conditioned on memory (1, C, h, h).

    Slot 0 is the prompted frame, the others are the latest frames, oldest first. Masks are True for filled slots; the
    content of empty ones is ignored but must be finite. Temporal positions belong to slots.
    """

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.attention, self.position_projection = model.memory_attention, model.obj_ptr_tpos_proj
        side = model.image_size // 16
        self.side, self.parts = side, model.hidden_dim // model.mem_dim
        self.position_dim = model.hidden_dim if model.proj_tpos_enc_in_obj_ptrs else model.mem_dim
        self.positions_of_pointers = model.add_tpos_enc_to_obj_ptrs
        features = torch.zeros(1, model.hidden_dim, side, side)
        positions = model.image_encoder.neck.position_encoding(features)
        self.positions = nn.Buffer(_tokens(positions).clone())
        memory_positions = model.memory_encoder.position_encoding(torch.zeros(1, model.mem_dim, side, side))
        temporal = model.maskmem_tpos_enc.detach().flatten(1).flip(0)  # (slots, M), the prompted frame's first
        self.memory_positions = nn.Buffer(_tokens(memory_positions)[:, None] + temporal[None, :, None])

    def forward(
        self,
        features: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        pointers: Tensor,
        pointer_distances: Tensor,
        pointer_mask: Tensor,
    ) -> Tensor:
        frames = memory.flatten(3).transpose(2, 3)  # (1, slots, h*h, M)
        slots, tokens, channels = frames.shape[1:]
        keys = (frames + self.memory_positions).reshape(1, slots * tokens, channels)
        values = frames.reshape(1, slots * tokens, channels)

        pointer_tokens = pointers.reshape(1, -1, channels)  # a pointer is several tokens
        pointer_keys = pointer_tokens
        if self.positions_of_pointers:
            encoded = self.position_projection(get_1d_sine_pe(pointer_distances[0], dim=self.position_dim))
            pointer_keys = pointer_tokens + _repeated(encoded, self.parts)[None]
        masks = _repeated(memory_mask[0, :, None], tokens), _repeated(pointer_mask[0, :, None], self.parts)
        filled = torch.cat(masks)
        bias = torch.where(filled.view(1, 1, 1, -1), 0.0, HIDDEN_KEY).to(features.dtype)  # (1, 1, 1, keys)

        keys, values = torch.cat([keys, pointer_keys], dim=1), torch.cat([values, pointer_tokens], dim=1)
        x = _tokens(features) + 0.1 * self.positions
        for layer in self.attention.layers:
            x = layer._forward_sa(x, self.positions)
            x = x + _read(layer.cross_attn_image, layer.norm2(x), keys, values, bias, slots * tokens)
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        return self.attention.norm(x).transpose(1, 2).unflatten(2, (self.side, self.side))


class MemoryEncoder(nn.Module):
    """features without memory (1, C, h, h), mask logits (1, 1, 4h, 4h), object score (1, 1), `binarize` (1,): use the
    mask as 0 and 1, as `sam2` does on prompted frames -> memory of the frame (1, M, h, h).
    """

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.encoder, self.image_size = model.memory_encoder, model.image_size
        self.scale, self.bias = model.sigmoid_scale_for_mem_enc, model.sigmoid_bias_for_mem_enc
        no_object = model.no_obj_embed_spatial
        self.no_object = None if no_object is None else nn.Buffer(no_object.detach().view(1, -1, 1, 1))

    def forward(self, features: Tensor, mask: Tensor, object_score: Tensor, binarize: Tensor) -> Tensor:
        logits = F.interpolate(mask, size=(self.image_size,) * 2, mode="bilinear", align_corners=False)
        mask = torch.where(binarize, (logits > 0).float(), logits.sigmoid()) * self.scale + self.bias
        memory = self.encoder(features, mask, skip_mask_sigmoid=True)["vision_features"]
        if self.no_object is not None:
            memory = memory + (object_score <= 0).float()[..., None, None] * self.no_object
        return memory


class PromptEncoder(nn.Module):
    """points (1, P, 2) as (x, y) in pixels of the model's input, labels (1, P): 1 object, 0 not, 2 and 3 corners of a
    box, -1 none; a mask of 0 and 1 (1, 1, S, S), used if `has_mask` (1,) -> the prompt (1, P + 1, C) and the
    dense prompt (1, C, h, h).
    """

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.encoder, self.mask_downsample = model.sam_prompt_encoder, model.mask_downsample

    def forward(self, points: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor) -> tuple[Tensor, Tensor]:
        sparse = self.encoder._embed_points(points, labels.float(), pad=True)
        without = self.encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        return sparse, torch.where(has_mask, self.encoder._embed_masks(self.mask_downsample(mask)), without)


class MaskDecoder(nn.Module):
    """features with memory or with the token for none (1, C, h, h), those of strides 4 and 8, the prompt's two parts
    -> logits of the single mask and of three choices (1, 4, 4h, 4h), all -1024 if the object is not visible; their
    IoU (1, 4); the object score (1, 1), above 0 if it is visible; the four object pointers (1, 4, C).
    """

    def __init__(self, model: SAM2) -> None:
        super().__init__()
        self.decoder, self.pointer_projection = model.sam_mask_decoder, model.obj_ptr_proj
        self.position = nn.Buffer(model.sam_prompt_encoder.get_dense_pe().detach())
        self.no_object = nn.Buffer(model.no_obj_ptr.detach().view(1, 1, -1))

    def forward(
        self, features: Tensor, stride_4: Tensor, stride_8: Tensor, prompt: Tensor, dense_prompt: Tensor
    ) -> tuple[Tensor, ...]:
        masks, ious, tokens, object_score = self.decoder.predict_masks(
            features, self.position, prompt, dense_prompt, repeat_image=False, high_res_features=[stride_4, stride_8]
        )
        visible = object_score > 0
        masks = torch.where(visible[..., None, None], masks, NO_OBJ_SCORE)
        pointers = torch.where(visible[..., None], self.pointer_projection(tokens), self.no_object)
        return masks, ious, object_score, pointers


@dataclass(frozen=True)
class Graph:
    """A graph to export: module, example inputs by name, names of the outputs."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    """Dynamic dimensions (`torch.export.Dim`) by input."""


def build_graphs(model: SAM2) -> dict[str, Graph]:
    """The five graphs of a float or finalized model, by name; the model is copied."""
    model = copy.deepcopy(model).cpu().float().eval()
    for name, module in list(model.named_modules()):
        if type(module) is RoPEAttention:  # complex numbers, which ONNX lacks
            model.set_submodule(name, QuantRoPEAttention.from_float(module))
    use_onnx_grids(model)
    size, side, channels = model.image_size, model.image_size // 16, model.hidden_dim
    slots, pointers = model.num_maskmem, model.max_obj_ptrs_in_encoder
    zeros, yes = torch.zeros, torch.tensor([True])
    features, dense_prompt = zeros(1, channels, side, side), zeros(1, channels, side, side)
    remembered = {
        "memory": zeros(1, slots, model.mem_dim, side, side),
        "memory_mask": yes.expand(1, slots),
        "pointers": zeros(1, pointers, channels),
        "pointer_distances": zeros(1, pointers),
        "pointer_mask": yes.expand(1, pointers),
    }
    points = {"points": zeros(1, 2, 2), "labels": torch.ones(1, 2, dtype=torch.int32)}
    count = torch.export.Dim("points")
    fine = {
        "stride_4": zeros(1, channels // 8, 4 * side, 4 * side),
        "stride_8": zeros(1, channels // 4, 2 * side, 2 * side),
    }
    logits, score = zeros(1, 1, 4 * side, 4 * side), torch.ones(1, 1)
    return {
        "image_encoder": Graph(
            ImageEncoder(model),
            {"image": zeros(1, 3, size, size)},
            ("features", "features_without_memory", "stride_4", "stride_8"),
        ),
        "memory_attention": Graph(
            MemoryAttention(model), {"features": features, **remembered}, ("features_with_memory",)
        ),
        "memory_encoder": Graph(
            MemoryEncoder(model),
            {"features": features, "mask": logits, "object_score": score, "binarize": yes},
            ("memory",),
        ),
        "prompt_encoder": Graph(
            PromptEncoder(model),
            {**points, "mask": zeros(1, 1, size, size), "has_mask": yes},
            ("prompt", "dense_prompt"),
            {"points": {1: count}, "labels": {1: count}},
        ),
        "mask_decoder": Graph(
            MaskDecoder(model),
            {"features": features, **fine, "prompt": zeros(1, 3, channels), "dense_prompt": dense_prompt},
            ("masks", "ious", "object_score", "pointers"),
            {"prompt": {1: torch.export.Dim("prompt_tokens")}},
        ),
    }


def _tokens(x: Tensor) -> Tensor:
    """(1, C, H, W) to (1, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def _repeated(x: Tensor, times: int) -> Tensor:
    """(N, C) to (N * times, C), each row repeated."""
    return x[:, None].expand(-1, times, -1).flatten(0, 1)


def _read(attention: QuantRoPEAttention, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, rotated: int) -> Tensor:
    """Cross-attention of x (1, tokens, C); the first `rotated` keys have an image position (RoPE)."""
    q = split_heads(attention.q_proj(x), attention.num_heads)
    k = split_heads(attention.k_proj(keys), attention.num_heads)
    v = split_heads(attention.v_proj(values), attention.num_heads)
    q, k = attention.with_positions(q, k, k.shape[2] - rotated)
    q, k, v = (quantize_part(x, attention, part) for x, part in zip((q, k, v), "qkv", strict=True))
    return attention.out_proj(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
