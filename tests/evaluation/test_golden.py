"""J&F of the golden cases against the values of the two reference evaluators."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qsam2.evaluation.metrics.folders import score_folders


@pytest.fixture(scope="module")
def golden() -> Path:
    if "QSAM2_DATA" not in os.environ:
        pytest.skip("QSAM2_DATA is not set: it names the folder that holds golden_jf")
    root = Path(os.environ["QSAM2_DATA"]) / "golden_jf"
    if not root.is_dir():
        pytest.skip(f"{root} is absent")
    return root


def test_davis_equals_the_reference_evaluator(golden: Path) -> None:
    expected = json.loads((golden / "davis/expected.json").read_text())
    found = score_folders(golden / "davis/results", golden / "davis/Annotations/480p", "davis")
    assert found["protocol"] == "davis"
    assert found["J&F"] == pytest.approx(100 * expected["J&F"], abs=1e-9)
    for measure in ("J", "F"):
        for key, name in ((measure, "M"), (f"{measure}_recall", "R"), (f"{measure}_decay", "D")):
            assert found[key] == pytest.approx(100 * expected[measure][name], abs=1e-9), key
    per_object = {
        f"{sequence}_{object_id}": {"J": scores["J"] / 100, "F": scores["F"] / 100}
        for sequence, objects in found["per_object"].items()
        for object_id, scores in objects.items()
    }
    assert per_object.keys() == expected["per_object"].keys()
    for name, scores in expected["per_object"].items():
        assert per_object[name] == pytest.approx(scores, abs=1e-11), name


@pytest.mark.parametrize("case", ["sav", "sav_late"])
def test_sav_equals_the_reference_evaluator(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())
    found = score_folders(golden / case / "pred", golden / case / "gt", "sav")
    assert found["protocol"] == "sav"
    for key in ("J&F", "J", "F"):
        assert found[key] == pytest.approx(expected[key], abs=1e-9), key
    names = {(sequence, object_id) for sequence, objects in found["per_object"].items() for object_id in objects}
    assert names == {(sequence, object_id) for sequence, o in expected["per_object"].items() for object_id in o}
    for sequence, object_id in names:
        scores, reference = found["per_object"][sequence][object_id], expected["per_object"][sequence][object_id]
        assert {key: scores[key] for key in ("J", "F")} == pytest.approx(reference, abs=1e-9), (sequence, object_id)
        assert scores["J&F"] == pytest.approx((reference["J"] + reference["F"]) / 2, abs=1e-9)
