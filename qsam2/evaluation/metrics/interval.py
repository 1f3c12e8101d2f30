"""Confidence interval of the difference between two models' scores on the same videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit

from qsam2.errors import UserError

CONFIDENCE = 0.95
PerObject = Mapping[str, Mapping[str, Mapping[str, float]]]


def paired_difference(
    scores: PerObject, reference: PerObject, *, key: str = "J&F", unit: str = "videos"
) -> dict[str, Any]:
    """Difference of means over objects, ``scores`` minus ``reference``, with its 95 % interval.

    Both are ``per_object`` blocks of VOSScore.compute. Objects of one video resemble each other, so videos are the
    units: the mean is a ratio of sums over videos, its standard error is linearised (Cochran 1977, section 6.3), and
    the interval is Student's with one degree of freedom less than there are videos. By simulation it covers 90 to 95 %
    from five videos on, see docs/experiments.md. With one video there is none: "low" and "high" are None.

    Args:
        key: which score.
        unit: name of the groups of objects: images, if they are stills.

    Returns:
        {"difference", "low", "high", "objects", "unit", `unit`: their number}, the first three in the scores' unit.

    Raises:
        UserError: the two do not hold the same objects, or none, or lack ``key``.
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
    by_video: dict[str, list[float]] = {}
    for video, item in sorted(first):
        by_video.setdefault(video, []).append(first[video, item] - second[video, item])
    sums = np.array([math.fsum(differences) for differences in by_video.values()])
    counts = np.array([len(differences) for differences in by_video.values()])
    mean, reach = float(sums.sum() / counts.sum()), half_width(sums, counts)
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return {"difference": mean, "low": low, "high": high, "objects": len(first), "unit": unit, unit: len(by_video)}


def half_width(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Half the interval of a mean over objects, from each video's sum and number of objects; None for one video."""
    videos = len(sums)
    if videos < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    error = math.sqrt(videos / (videos - 1) * float((residuals**2).sum())) / counts.sum()
    return float(stdtrit(videos - 1, (1 + CONFIDENCE) / 2) * error)


def interval_text(versus: Mapping[str, Any]) -> str:
    """A difference with its interval: "-1.2 (-3.1 to +0.7)"."""
    if versus["low"] is None:
        return f"{versus['difference']:+.1f} (no interval: one {versus['unit'].removesuffix('s')})"
    return f"{versus['difference']:+.1f} ({versus['low']:+.1f} to {versus['high']:+.1f})"


def interval_note(versus: Mapping[str, Any]) -> str:
    """Kind and basis of an interval: "95 % t interval over 7 videos, 9 objects"."""
    unit, objects = versus["unit"], versus["objects"]
    return f"95 % t interval over {versus[unit]} {unit}, {objects} object{'s' if objects != 1 else ''}"


def _flatten(block: PerObject, key: str) -> dict[tuple[str, str], float]:
    flat = {}
    for sequence, objects in block.items():
        for object_id, scores in objects.items():
            if key not in scores:
                raise UserError(f"key: {key!r} is not scored for {sequence}/{object_id}; choose {', '.join(scores)}")
            flat[sequence, object_id] = scores[key]
    return flat
