"""The paired bootstrap against theory, its symmetries and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsam2.errors import UserError
from qsam2.evaluation.metrics.bootstrap import paired_bootstrap


def block(values: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Two objects a sequence."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for i, value in enumerate(values):
        result.setdefault(f"clip{i // 2}", {})[str(i % 2)] = {"J&F": float(value), "J": float(value) / 2}
    return result


def test_interval_is_that_of_the_central_limit_theorem() -> None:
    rng = np.random.default_rng(0)
    reference = rng.uniform(20, 90, 400)
    difference = rng.normal(-3, 8, 400)  # far smaller than the spread of the scores: pairing matters
    found = paired_bootstrap(block(reference + difference), block(reference))
    half_width = 1.96 * difference.std() / 20
    assert found["objects"] == 400
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["low"] == pytest.approx(difference.mean() - half_width, abs=0.06 * half_width)
    assert found["high"] == pytest.approx(difference.mean() + half_width, abs=0.06 * half_width)


def test_interval_of_two_objects_is_exact() -> None:
    found = paired_bootstrap(block([1, 3]), block([0, 0]))  # means 1, 2, 3 with probability 1/4, 1/2, 1/4
    assert found == {"difference": 2, "low": 1, "high": 3, "objects": 2}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=20), st.integers(0, 9))
def test_swapping_the_models_mirrors_the_interval(pairs: list[tuple[float, float]], seed: int) -> None:
    ours, theirs = block([a for a, _ in pairs]), block([b for _, b in pairs])
    found = paired_bootstrap(ours, theirs, samples=200, seed=seed)
    mirrored = paired_bootstrap(theirs, ours, samples=200, seed=seed)
    assert found["low"] <= found["high"]
    assert [-found["high"], -found["low"], -found["difference"]] == pytest.approx(
        [mirrored["low"], mirrored["high"], mirrored["difference"]], abs=1e-9
    )


def test_key_seed_and_order_of_objects() -> None:
    ours, theirs = block([10, 40, 20, 70, 5]), block([12.3, 30, 25.1, 60.9, 37])
    found = paired_bootstrap(ours, theirs, samples=500)
    turned = {name: dict(reversed(objects.items())) for name, objects in reversed(ours.items())}
    assert paired_bootstrap(turned, theirs, samples=500) == found
    assert paired_bootstrap(ours, theirs, samples=500, seed=1) != found
    assert paired_bootstrap(ours, theirs, samples=500, key="J")["difference"] == found["difference"] / 2


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "message"),
    [
        (block([1, 2]), block([1]), {}, "1 objects are in one block only, e.g. clip0/1 is not in the reference"),
        (block([1]), block([1, 2, 3]), {}, "2 objects are in one block only, e.g. clip0/1 is not in the scores"),
        ({}, {}, {}, "per_object: no objects; a comparison needs at least one"),
        (block([1]), block([1]), {"key": "IoU"}, "key: 'IoU' is not scored for clip0/0; choose J&F, J"),
        (block([1]), block([1]), {"samples": 0}, "samples: 0 given; at least 1"),
    ],
)
def test_errors(ours: Any, theirs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        paired_bootstrap(ours, theirs, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
