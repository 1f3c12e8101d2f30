"""Confidence interval of the difference between two models' scores on the same objects."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qsam2.errors import UserError

BLOCK = 100
"""Samples drawn at once."""

PerObject = Mapping[str, Mapping[str, Mapping[str, float]]]


def paired_bootstrap(
    scores: PerObject, reference: PerObject, *, key: str = "J&F", samples: int = 10_000, seed: int = 0
) -> dict[str, float | int]:
    """Difference of means over objects, ``scores`` minus ``reference``, with its 95 % percentile interval.

    Both are ``per_object`` blocks of VOSScore.compute. Objects are drawn with replacement, each with both its scores
    (Efron and Tibshirani 1993, chapter 13); objects of one sequence count as independent, which makes the interval
    somewhat narrow. Returns {"difference", "low", "high", "objects"}, the first three in the scores' unit. Raises
    UserError if the two do not hold the same objects, or none, or lack ``key``.
    """
    first, second = _flatten(scores, key), _flatten(reference, key)
    if only := sorted(first.keys() ^ second.keys()):
        where = "the reference" if only[0] in first else "the scores"
        raise UserError(
            f"per_object: {len(only)} objects are in one block only, e.g. {'/'.join(only[0])} is not in {where}; "
            "evaluate both models on the same data"
        )
    if not first:
        raise UserError("per_object: no objects; a comparison needs at least one")
    differences = np.array([first[name] - second[name] for name in sorted(first)])
    rng = np.random.default_rng(seed)
    blocks = [min(BLOCK, samples - start) for start in range(0, samples, BLOCK)]
    means = [rng.choice(differences, (count, len(differences))).mean(axis=1) for count in blocks]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    mean = float(differences.mean())
    return {"difference": mean, "low": float(low), "high": float(high), "objects": len(differences)}


def _flatten(block: PerObject, key: str) -> dict[tuple[str, str], float]:
    flat = {}
    for sequence, objects in block.items():
        for object_id, scores in objects.items():
            if key not in scores:
                raise UserError(f"key: {key!r} is not scored for {sequence}/{object_id}; choose {', '.join(scores)}")
            flat[sequence, object_id] = scores[key]
    return flat
