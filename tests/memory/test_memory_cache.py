"""Keys and values that are computed once: the same masks as sam2, integers where the model is quantized."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sam2.build_sam import build_sam2_video_predictor
from small_videos import SIZE_PX, bfloat16, box, distance, follow, lively, start, track, track_with, video

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.layers.attention import rotary_table, rotate
from qsam2.layers.convert import convert, finalize
from qsam2.memory import cache
from qsam2.memory.cache import CODES_A_BYTE, Stored, TemporalKeys, mixed
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2, build_sam2
from qsam2.quantizers import build_quantizer
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import MinMaxSpec
from qsam2.recipe.recipe import MemoryRecipe

LENGTH = 12
CLOSE = 1e-5


def quantized(model: SAM2, bits: int) -> SAM2:
    """Finalized at W8, activations with so many bits, calibrated on a short video."""
    convert(model, QuantizeRecipe(weights=MinMaxSpec(bits=8), activations=MinMaxSpec(bits=bits)))
    find_ranges(model, lambda _: track(model, 8), (0,))
    finalize(model)
    return model


def stock_tiny(model: SAM2) -> Any:
    """`sam2`'s own predictor with the same weights."""
    side, layer = SIZE_PX // 16, "++model.memory_attention.layer"
    sizes = [f"{layer}.{kind}_attention.feat_sizes=[{side},{side}]" for kind in ("self", "cross")]
    more = {"hydra_overrides_extra": [f"++model.image_size={SIZE_PX}", *sizes], "apply_postprocessing": False}
    predictor = build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml", None, device="cpu", **more)
    predictor.load_state_dict(model.state_dict())
    return predictor


# Exactness


def test_nano_agrees_with_sam2(model: SAM2) -> None:
    expected = track(model, LENGTH)
    assert max(float(masks.std()) for masks in expected.values()) > 0.01
    assert distance(track_with(model, LENGTH, cache=True), expected) < CLOSE
    assert distance(track_with(model, LENGTH, sharing="oldest", frames=9), expected) < CLOSE  # without a cache
    assert distance(track_with(model, LENGTH, sharing="adaptive", frames=9), expected) < CLOSE  # of the whole bank
    assert distance(track_with(model, LENGTH, sharing="oldest", frames=2), expected) > 100 * CLOSE


def test_tiny_agrees_with_the_stock_predictor() -> None:
    torch.manual_seed(0)
    model = lively(build_sam2("tiny", image_size=SIZE_PX), gain=1)
    model.binarize_mask_from_pts_for_mem_enc = False  # which sam2's builder sets with its post-processing
    model.sam_mask_decoder.dynamic_multimask_via_stability = False
    stock = stock_tiny(model)
    use_memory(model, MemoryRecipe(cache=True))
    state = model.init_state(video(LENGTH), video_size=(SIZE_PX, SIZE_PX))  # sam2's own reads frames from files only
    assert distance(track(model, LENGTH), track(stock, LENGTH, state=state)) < CLOSE


def test_bfloat16_differs_by_its_rounding(model: SAM2) -> None:
    """Kept and temporal keys are rounded before they are added: about as far as bfloat16 itself is from float32."""
    exact = track(model, LENGTH)
    with bfloat16():
        rounded = track(model, LENGTH)
        cached = track_with(model, LENGTH, cache=True)
    assert 0 < distance(cached, rounded) < 2 * distance(rounded, exact)


def test_a_correction_replaces_what_was_kept(model: SAM2) -> None:
    """Frame 3 is remembered by the first pass; the second one remembers it as it was corrected."""
    passes = []
    for cached in (False, True):
        state = start(model, video(6), cache=cached)
        passes.append({key: masks for key, masks in follow(model, state).items() if key[1] > 3})
        model.add_new_mask(state, 3, 1, box(30))
        passes.append(follow(model, state, start_frame_idx=4))
    first, second, cached_first, cached_second = passes
    assert distance(first, second) > 100 * CLOSE
    assert distance(first, cached_first) < CLOSE and distance(second, cached_second) < CLOSE


# Once


def test_a_frame_is_projected_once(model: SAM2) -> None:
    tokens: list[int] = []
    projection = model.memory_attention.layers[0].cross_attn_image.k_proj
    projection.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[1]))
    assert len(follow(model, start(model, video(8), cache=True))) == 8
    frame = (SIZE_PX // 16) ** 2
    assert tokens.count(frame) == 7  # what the last frame left behind is read by none
    assert [count for count in tokens if count != frame] == [2, 4, 6, 8, 10, 12, 14]  # pointers: they move in time


def test_only_frames_in_reach_are_kept(model: SAM2) -> None:
    state = start(model, video(20), cache=True, sharing="adaptive", frames=3)
    follow(model, state)
    assert sorted(state["output_dict_per_obj"][0]["remembered"].frames) == [0, 13, 14, 15, 16, 17, 18]


def test_temporal_keys_follow_the_weights(model: SAM2) -> None:
    attention = model.memory_attention.layers[0].cross_attn_image
    kept, table = TemporalKeys(), rotary_table(attention, 16)
    given = attention, model.maskmem_tpos_enc, table, {}
    with torch.no_grad():
        first = kept(0, *given)
        assert kept(0, *given) is first
        attention.k_proj.weight *= 2
        torch.testing.assert_close(kept(0, *given), 2 * first)
    with_graph = kept(0, *given)
    assert with_graph.requires_grad and kept(0, *given) is with_graph  # for this clip
    assert kept(0, *given[:3], {}) is not with_graph


def test_mixtures_are_an_object_each() -> None:
    slots = torch.arange(6.0).view(3, 2)
    assert mixed(slots, [{1: 1.0}, {1: 1.0}]).tolist() == [[2.0, 3.0]]
    assert mixed(slots, [{0: 0.5, 2: 0.5}, {1: 1.0}]).tolist() == [[2.0, 3.0], [2.0, 3.0]]
    assert mixed(slots, [{0: 0.25, 2: 0.75}, {0: 1.0}]).tolist() == [[3.0, 4.0], [0.0, 1.0]]


# Integers


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_is_what_the_quantizer_returns(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 16, 8)
    quantizer = build_quantizer(MinMaxSpec(bits=bits, symmetric=symmetric), "activation").eval()
    quantizer.initialize_from(x)
    with torch.no_grad():
        stored = Stored.of(x, quantizer)
        assert stored.packed and stored.data.dtype == torch.uint8
        assert torch.equal(stored.load(quantizer), quantizer(x))
    assert stored.data.nbytes == math.ceil(x.numel() / CODES_A_BYTE.get(bits, 1))
    assert not Stored.of(x, quantizer).packed  # gradients are asked for


def test_a_quantized_model_keeps_integers(model: SAM2, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(model, 4)
    plain = track(model, LENGTH)
    integers = track_with(model, LENGTH, cache=True)
    state = start(model, video(5), cache=True)
    follow(model, state)
    frames = state["output_dict_per_obj"][0]["remembered"].frames.values()
    kept = [each for frame in frames for each in (*frame.kept_keys.values(), *frame.kept_values.values())]
    assert kept and all(each.data.dtype == torch.uint8 for each in kept)
    values = (SIZE_PX // 16) ** 2 * 128
    assert {each.data.nbytes for each in kept} == {values // 2}  # two a byte

    floats = lambda x, quantizer: Stored(x if quantizer is None else quantizer(x), x.dtype, False)  # noqa: E731
    monkeypatch.setattr(cache.Stored, "of", floats)
    assert distance(track_with(model, LENGTH, cache=True), integers) == 0
    difference = distance(integers, plain)  # the two parts of a key are rounded apart
    scale = max(float(masks.abs().max()) for masks in plain.values())
    assert 0 < difference < scale


def test_temporal_positions_survive_coarse_quantizers(model: SAM2) -> None:
    """Their quantizers have ranges of their own: four bits of them, not of whole keys."""
    quantized(model, 4)
    attention = model.memory_attention.layers[0].cross_attn_image
    table = rotary_table(attention, 16)
    with torch.no_grad():
        coarse = cache.temporal_keys(attention, model.maskmem_tpos_enc.flatten(1), table)
        weight = attention.k_proj.quantized_weight()
        exact = (model.maskmem_tpos_enc.flatten(1) @ weight.T)[:, None, None].expand(-1, -1, 16, -1)
        fine = rotate(exact, *table)
    error = (coarse - fine).square().mean() / fine.square().mean()
    assert 0 < error < 0.05
    assert coarse.unique().numel() <= 16
