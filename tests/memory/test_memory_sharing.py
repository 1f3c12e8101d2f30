"""Which keys each way of sharing leaves, and what full attention makes of the same frames."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_videos import SIZE_PX, follow, start, video
from torch import Tensor

from qsam2.memory.bank import HISTORY, Bank, Remembered
from qsam2.memory.cache import FrameMemory
from qsam2.memory.reader import _most_attended, use_memory
from qsam2.memory.sharing import KeySet, adaptive, key_sets, sparse, synthesis
from qsam2.models import SAM2
from qsam2.recipe.recipe import MemoryRecipe

CLOSE = 1e-5
SIDE = SIZE_PX // 16
RECENT = 6


def frame(time: int, slot: int, features: Tensor) -> FrameMemory:
    return FrameMemory(time, slot, features, torch.zeros(1, *features.shape[1:]))


def bank(features: Tensor, prompted: tuple[int, ...] = (0,), first: int = 1) -> Bank:
    """Of features (frames, B, C, H, W): one conditioning frame, the others recent, from time `first` on."""
    length = len(features)
    recent = [frame(first + index, length - 1 - index, each) for index, each in enumerate(features)]
    conditioning = [frame(time, RECENT, features[0]) for time in prompted]
    return Bank(conditioning, recent, None, None, frozenset(prompted), Remembered())


def angles(*degrees: float) -> Tensor:
    """One object's features (frames, 1, 2, 1, 1) that point this way."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)[:, None, :, None, None]


def runs(sets: list[KeySet], item: int = 0) -> list[tuple[int, int]]:
    """(time of the frame whose keys are read, how many it stands for)."""
    return [(each.frames[-1].time, each.counts[item]) for each in sets]


# Adaptive sharing


def test_the_most_similar_neighbours_share() -> None:
    similar = bank(angles(0, 1, 40, 42, 90, 91.5))
    sets = adaptive(similar, 4, None)
    assert runs(sets) == [(2, 2), (3, 1), (4, 1), (6, 2)]
    assert sets[0].positions[0] == {5: 0.5, 4: 0.5}  # the mean of its slots
    assert sets[0].weights.tolist() == [[0.5], [0.5]] and [frame.time for frame in sets[0].frames] == [1, 2]
    assert sets[1].positions[0] == {3: 1.0} and sets[1].weights is None
    assert runs(adaptive(similar, 2, None)) == [(4, 4), (6, 2)]
    assert runs(adaptive(similar, 1, None)) == [(6, 6)]


def test_a_quantile_joins_more_where_the_video_stands_still() -> None:
    moving, still = angles(0, 20, 50, 90, 140, 200), angles(200, 201, 202, 203, 204, 205)
    both = bank(moving)
    assert runs(adaptive(both, RECENT, 0.9)) == [(2, 2), (3, 1), (4, 1), (5, 1), (6, 1)]
    later = bank(still)
    later.remembered.similarities.extend(both.remembered.similarities)
    assert runs(adaptive(later, RECENT, 0.5)) == [(6, 6)]
    assert len(adaptive(later, 3, 0.9)) <= 3  # the budget holds as well
    assert later.remembered.similarities[0].maxlen == HISTORY


def test_each_object_has_its_own_runs() -> None:
    features = torch.cat([angles(0, 1, 40, 80), angles(0, 40, 80, 81)], dim=1)
    sets = adaptive(bank(features), 3, None)
    assert [run for run in runs(sets, 0) if run[1]] == [(2, 2), (3, 1), (4, 1)]
    assert [run for run in runs(sets, 1) if run[1]] == [(1, 1), (2, 1), (4, 2)]
    by_time = {each.frames[-1].time: each for each in sets}
    assert by_time[2].weights.tolist() == [[0.5, 0.0], [0.5, 1.0]]  # an average for one, a frame for the other


@pytest.mark.parametrize("prompted", [(3,), (2, 3)])
def test_frames_around_a_prompted_one_are_never_joined(prompted: tuple[int, ...]) -> None:
    """Frames 1, 2, 4, 5 with 3 prompted; and 2 prompted but so far away that it is read like the others."""
    given_bank = bank(angles(0, 0, 0, 0), prompted)
    for memory, time in zip(given_bank.recent, (1, 2, 4, 5), strict=True):
        memory.time = time
    assert runs(adaptive(given_bank, 1, None)) == ([(2, 2), (5, 2)] if prompted == (3,) else [(1, 1), (2, 1), (5, 2)])


@given(st.integers(1, 6), st.integers(1, 6), st.none() | st.floats(0, 1), st.integers(0, 9))
def test_every_frame_is_stood_for_once(frames: int, budget: int, quantile: float | None, seed: int) -> None:
    features = torch.randn(frames, 2, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    sets = adaptive(bank(features), min(budget, frames), quantile)
    for item in range(2):
        stood = [count for _, count in runs(sets, item) if count]
        assert sum(stood) == frames and len(stood) <= budget
        slots = [slot for each in sets if each.counts[item] for slot in each.positions[item]]
        assert sorted(slots) == list(range(frames))
        for each in sets:
            assert sum(each.positions[item].values()) == pytest.approx(1)


def identical(model: SAM2, length: int = 8) -> dict[str, Any]:
    """A tracked object whose remembered frames after the first are all the same."""
    state = start(model, video(length))
    follow(model, state, max_frame_num_to_track=length - 2)
    frames = state["output_dict_per_obj"][0]["non_cond_frame_outputs"]
    for each in frames.values():
        each["maskmem_features"] = frames[3]["maskmem_features"].clone()
    return state


def logits(model: SAM2, state: dict[str, Any], **memory: Any) -> Tensor:
    """Of the frame after those that were tracked."""
    use_memory(model, MemoryRecipe(**memory))
    outputs = state["output_dict_per_obj"][0]
    outputs.pop("remembered", None)
    with torch.inference_mode():
        _, _, *image = model._get_image_feature(state, 7, 1)
        return model.track_step(7, False, *image, None, None, outputs, 8)["pred_masks"]


@pytest.mark.parametrize("cache", [True, False])
def test_identical_frames_give_the_result_of_full_attention(cache: bool, model: SAM2) -> None:
    with torch.no_grad():
        model.maskmem_tpos_enc[:RECENT] = model.maskmem_tpos_enc[:1]  # identical in this, too
    state = identical(model)
    full = logits(model, state)
    for frames in (2, 3, 4):
        shared = logits(model, state, sharing="adaptive", frames=frames, cache=cache)
        assert (shared - full).abs().max() < CLOSE, frames
    assert (logits(model, state, sharing="oldest", frames=2) - full).abs().max() > 100 * CLOSE


def test_temporal_positions_are_matched_to_first_order(model: SAM2) -> None:
    """Identical frames at different positions: half the spread of positions, a quarter of the error."""
    positions = model.maskmem_tpos_enc.detach().clone()
    errors = []
    for spread in (0.2, 0.1):
        with torch.no_grad():
            model.maskmem_tpos_enc.copy_(positions.mean(0) + spread * (positions - positions.mean(0)))
        state = identical(model)
        errors.append((logits(model, state, sharing="adaptive", frames=2) - logits(model, state)).abs().max())
    assert 2.5 < errors[0] / errors[1] < 6


# All ways of sharing


def keys(model: SAM2, **memory: Any) -> int:
    """How many keys the eighth frame of a video reads."""
    follow(model, start(model, video(9), **memory))
    return model.memory_reader.keys  # type: ignore[union-attr]


def test_keys_are_those_of_the_budget(model: SAM2) -> None:
    pointers = 2 * 8  # two tokens each, of frames 0 to 7
    frame_keys = SIDE * SIDE
    assert keys(model, cache=True) == 7 * frame_keys + pointers
    for sharing in ("adaptive", "oldest", "stride", "synthesis"):
        assert keys(model, sharing=sharing, frames=3) == 3 * frame_keys + pointers, sharing
    assert keys(model, sharing="pool", frames=3) == frame_keys + 6 * frame_keys // 4 + pointers  # by fours
    # two in three whole tokens of the older five, which is a fifth of each
    assert keys(model, sharing="sparse", frames=3) == 2 * frame_keys + 5 * round(frame_keys / 5) + pointers
    assert keys(model, sharing="oldest", frames=1) == frame_keys + pointers  # the prompted frame alone
    assert keys(model, sharing="adaptive", quantile=0.0) == 2 * frame_keys + pointers


def test_a_budget_leaves_the_latest_frame_however_many_were_prompted() -> None:
    crowded = bank(angles(0, 10, 20, 30, 40, 50), prompted=(0, 20, 30, 40))
    for sharing in ("adaptive", "oldest", "stride"):
        sets = key_sets(crowded, MemoryRecipe(sharing=sharing, frames=3))
        assert [each.frames[-1].time for each in sets] == [0, 20, 30, 40, 6]
    assert len(key_sets(crowded, MemoryRecipe(sharing="oldest", frames=1))) == 4


def test_frames_that_are_read() -> None:
    every = [1, 2, 3, 4, 5, 6]
    read = {
        "oldest": {3: [5, 6], 9: every},
        "stride": {2: [6], 3: [1, 6], 4: [1, 4, 6]},
        "pool": {3: every},
        "sparse": {3: every},
        "synthesis": {3: [5, 6]},
    }
    for sharing, frames, times in ((key, *item) for key, budgets in read.items() for item in budgets.items()):
        sets = key_sets(bank(angles(0, 10, 20, 30, 40, 50)), MemoryRecipe(sharing=sharing, frames=frames))
        assert [each.frames[-1].time for each in sets] == [0, *times], (sharing, frames)


def test_windows_divide_the_feature_map() -> None:
    for height, width in itertools.product((4, 6, 16), repeat=2):
        features = torch.randn(6, 1, 2, height, width)
        for frames in (2, 3, 4, 5):
            rows, columns = key_sets(bank(features), MemoryRecipe(sharing="pool", frames=frames))[1].window
            assert height % rows == width % columns == 0 and 6 / (rows * columns) <= frames - 1


def test_pooling_identical_tokens_changes_nothing(model: SAM2) -> None:
    """Where all tokens have one key, a mean of them stands for them, raised by the log of their number."""
    for layer in model.memory_attention.layers:
        layer.cross_attn_image.k_proj.weight.data.zero_()
        layer.cross_attn_image.k_proj.bias.data.zero_()
    state = identical(model)
    assert (logits(model, state, sharing="pool", frames=3) - logits(model, state)).abs().max() < CLOSE


def test_sparse_retrieval_reads_what_was_most_attended() -> None:
    torch.manual_seed(0)
    memory = frame(1, 0, torch.zeros(2, 3, 4, 4))
    q, k = torch.randn(2, 1, 16, 8), torch.randn(2, 1, 16, 8)
    v = torch.arange(16.0).view(1, 1, 16, 1).expand(2, 1, 16, 8)
    assert _most_attended(0, memory, 0.25, q, k, v)[0] is k  # whole when it is first read
    attended = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1).sum(dim=(1, 2))
    _, chosen = _most_attended(0, memory, 0.25, torch.randn(2, 1, 16, 8), k, v)  # by other queries
    for item in range(2):
        assert set(chosen[item, 0, :, 0].long().tolist()) == set(attended[item].topk(4).indices.tolist())


def test_sparse_shares_have_a_floor() -> None:
    frames = bank(angles(0, 10, 20, 30, 40, 50)).recent
    assert [each.share for each in sparse(frames, 1)] == [0.05] * 5 + [1.0]
    assert [each.share for each in sparse(frames, 3)] == [0.4] * 5 + [1.0]


def test_synthesis_weighs_the_most_similar() -> None:
    average, latest = synthesis(bank(angles(0, 60, 70, 80, 85, 90)).recent, 2)
    assert latest.frames[-1].time == 6
    assert set(average.positions[0]) == {1, 2, 3}  # slots of 85, 80 and 70 degrees
    weights = torch.tensor([20.0, 10.0, 5.0]).deg2rad().cos().softmax(0)
    assert [frame.time for frame in average.frames] == [3, 4, 5]
    torch.testing.assert_close(average.weights, weights[:, None])
    assert [average.positions[0][slot] for slot in (3, 2, 1)] == pytest.approx(weights.tolist())
