"""Fewer keys than a full bank has: adaptive sharing, and what it is measured against, behind one interface.

A policy turns the remembered frames that were not prompted into at most `budget` frames' worth of keys. Conditioning
frames and object pointers are no policy's business.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qsam2.memory.bank import HISTORY, Bank, Remembered
from qsam2.memory.cache import FrameMemory
from qsam2.recipe.recipe import MemoryRecipe, Sharing

Mix = Mapping[int, float]
SPARSE_FLOOR = 0.05
"""Share of tokens that sparse retrieval keeps of a frame however small the budget is: that of Efficient-SAM2."""
SYNTHESIZED = 3
"""How many memories are averaged into one (Mix-QSAM2)."""


@dataclass(frozen=True)
class KeySet:
    """The keys and values of a remembered frame, or of an average of several, as attention reads them for B objects.

    Args:
        frames: whose keys and values, the latest last.
        weights: (frames, B) of the average; None for a single frame.
        positions: weights of the temporal positions, {slot: weight} an object.
        counts: how many frames it stands for, an object each; 0: that object does not read it.
        window: tokens (rows, columns) that are averaged into one.
        share: of its tokens the most attended ones that are read once it has been read as a whole; None: all of them.
    """

    frames: tuple[FrameMemory, ...]
    weights: Tensor | None
    positions: tuple[Mix, ...]
    counts: tuple[int, ...]
    window: tuple[int, int] = (1, 1)
    share: float | None = None

    @classmethod
    def whole(cls, frame: FrameMemory) -> KeySet:
        """The frame as it is."""
        objects = len(frame.features)
        return cls((frame,), None, ({frame.slot: 1.0},) * objects, (1,) * objects)

    @classmethod
    def average(cls, frames: Sequence[FrameMemory], weights: Tensor, counts: Sequence[int]) -> KeySet:
        """By weights (frames, B); frames that no object takes part of are left out."""
        columns = weights.T.tolist()
        used = [index for index in range(len(frames)) if any(column[index] for column in columns)]
        positions = tuple({frames[index].slot: column[index] for index in used if column[index]} for column in columns)
        single = len(used) == 1
        return cls(tuple(frames[index] for index in used), None if single else weights[used], positions, tuple(counts))


def key_sets(bank: Bank, recipe: MemoryRecipe) -> list[KeySet]:
    """Key sets that a frame reads by the recipe, prompted frames first."""
    prompted = [KeySet.whole(frame) for frame in bank.conditioning]
    if recipe.sharing == "none" or not bank.recent:
        return prompted + [KeySet.whole(frame) for frame in bank.recent]
    budget = len(bank.recent)
    if recipe.frames is not None:
        # The latest frame stays, however many were prompted; a budget of one frame is for the prompted one alone.
        budget = min(budget, max(recipe.frames - len(prompted), min(recipe.frames - 1, 1)))
    if budget == 0:
        return prompted
    if recipe.sharing == "adaptive":
        return prompted + adaptive(bank, budget, recipe.quantile)
    if budget == len(bank.recent) and recipe.sharing != "sparse":  # which remembers what was attended
        return prompted + [KeySet.whole(frame) for frame in bank.recent]
    return prompted + POLICIES[recipe.sharing](bank.recent, budget)


def adaptive(bank: Bank, budget: int, quantile: float | None) -> list[KeySet]:
    """Runs of similar neighbours share one set of keys, their average, its scores raised by the log of their number.

    The most similar neighbours are joined until the budget holds; with a quantile also all that are at least as similar
    as that quantile of the object's similarities so far. Frames on two sides of a prompted frame are never joined.
    Temporal positions are averaged, too: of identical frames full attention is matched exactly where these agree, else
    up to the spread of the scores that they cause (ours, after Q-MiniSAM2).
    """
    frames, objects = bank.recent, len(bank.recent[0].features)
    neighbours = list(zip(frames, frames[1:], strict=False))
    edges = [_similarity(older, newer, bank.remembered) for older, newer in neighbours]
    allowed = [
        index
        for index, (older, newer) in enumerate(neighbours)
        if not any(min(older.time, newer.time) <= time <= max(older.time, newer.time) for time in bank.prompted_times)
    ]
    weights = torch.zeros(len(frames), len(frames), objects)  # (run by its last frame, frame, object)
    counts = [[0] * objects for _ in frames]
    for item in range(objects):
        ranked = sorted(allowed, key=lambda index: edges[index][item], reverse=True)
        joined = set(ranked[: len(frames) - budget])
        if quantile is not None and allowed:
            ordered = sorted(bank.remembered.similarities[item])
            threshold = ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]
            joined |= {index for index in allowed if edges[index][item] >= threshold}
        run: list[int] = []
        for index in range(len(frames)):
            run.append(index)
            if index in joined:
                continue
            weights[index, run, item] = 1 / len(run)
            counts[index][item] = len(run)
            run = []
    sets = []
    for index, stands in enumerate(counts):
        if any(stands):
            weights[index, index, [item for item in range(objects) if not stands[item]]] = 1.0  # read by other objects
            sets.append(KeySet.average(frames, weights[index], stands))
    return sets


def oldest(frames: Sequence[FrameMemory], budget: int) -> list[KeySet]:
    """Drops the oldest frames."""
    return [KeySet.whole(frame) for frame in frames[-budget:]]


def stride(frames: Sequence[FrameMemory], budget: int) -> list[KeySet]:
    """Evenly spaced frames, the latest among them."""
    step = (len(frames) - 1) / max(budget - 1, 1)
    return [KeySet.whole(frames[len(frames) - 1 - round(index * step)]) for index in reversed(range(budget))]


def pool(frames: Sequence[FrameMemory], budget: int) -> list[KeySet]:
    """Windows of tokens are averaged, keys and values alike, their scores raised by the log of the window's size."""
    height, width = frames[0].features.shape[-2:]
    needed = len(frames) / budget
    every = itertools.product(range(1, height + 1), range(1, width + 1))
    windows = [(rows, columns) for rows, columns in every if height % rows == width % columns == 0]
    fitting = [window for window in windows if math.prod(window) >= needed]
    window = min(fitting or [(height, width)], key=lambda window: (math.prod(window), abs(window[0] - window[1])))
    return [replace(KeySet.whole(frame), window=window) for frame in frames]


def sparse(frames: Sequence[FrameMemory], budget: int) -> list[KeySet]:
    """Only the tokens of a frame that were most attended when it was first read (Efficient-SAM2, arXiv 2602.08224).

    The latest frame is read whole; the older ones share the rest of the budget.
    """
    share = max((budget - 1) / max(len(frames) - 1, 1), SPARSE_FLOOR)
    shares = [share] * (len(frames) - 1) + [1.0]
    return [replace(KeySet.whole(frame), share=share) for frame, share in zip(frames, shares, strict=True)]


def synthesis(frames: Sequence[FrameMemory], budget: int) -> list[KeySet]:
    """The latest budget - 1 frames, and one average of the three others most similar to the latest (after Mix-QSAM2).

    Weights are the softmax of the similarities; temporal positions are averaged with them.
    """
    kept = frames[len(frames) - budget + 1 :]
    others = frames[: len(frames) - budget + 1]
    latest = frames[-1].features.detach().flatten(1).float()
    similarities = torch.stack(
        [F.cosine_similarity(frame.features.detach().flatten(1).float(), latest) for frame in others]
    ).cpu()
    top = similarities.topk(min(SYNTHESIZED, len(others)), dim=0)  # (frames, B)
    weights = torch.zeros_like(similarities).scatter(0, top.indices, top.values.softmax(dim=0))
    average = KeySet.average(others, weights, [1] * weights.shape[1])
    return [average] + [KeySet.whole(frame) for frame in kept]


POLICIES: dict[Sharing, Callable[[Sequence[FrameMemory], int], list[KeySet]]] = {
    "oldest": oldest,
    "stride": stride,
    "pool": pool,
    "sparse": sparse,
    "synthesis": synthesis,
}


def _similarity(older: FrameMemory, newer: FrameMemory, remembered: Remembered) -> list[float]:
    """Cosine of the memory features, an object each: what keys and values are linear in. Once a pair."""
    if newer.similarity is None or newer.similarity[0] is not older.features:
        with torch.no_grad():
            a, b = (frame.features.flatten(1).float() for frame in (older, newer))
            newer.similarity = older.features, F.cosine_similarity(a, b).tolist()
        if not remembered.similarities:
            remembered.similarities.extend(deque(maxlen=HISTORY) for _ in newer.similarity[1])
        for history, value in zip(remembered.similarities, newer.similarity[1], strict=True):
            history.append(value)
    return newer.similarity[1]
