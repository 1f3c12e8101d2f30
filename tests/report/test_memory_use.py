"""Memory frames that each frame reads under sharing, watched while a video is tracked."""

from __future__ import annotations

from kept_run import Squares

from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe.recipe import MemoryRecipe
from qsam2.report.draw import draw_memory
from qsam2.report.stage import memory_use


def watched(model: SAM2, sharing: str) -> dict[int, dict]:
    use_memory(model, MemoryRecipe.model_validate({"sharing": sharing, "frames": 3}))
    used = memory_use(model, Squares(), 6)
    assert used["video"] == "squares" and model.memory_reader.watch is None
    assert "frames of keys were read" in draw_memory(used)
    return {row["frame"]: row for row in used["frames"]}


def test_frames_that_share_that_are_left_out_or_read_in_part(model: SAM2) -> None:
    rows = watched(model, "adaptive")
    assert list(rows) == [1, 2, 3, 4, 5]  # frame 0 is given
    for frame, row in rows.items():
        assert row["of"] == frame and row["key_frames"] == min(frame, 3)
        assert row["read"].keys() == set(range(1, frame))
    assert set(rows[3]["read"].values()) == {"own keys"}
    assert sorted(rows[4]["read"].values()) == ["own keys", "shared keys", "shared keys"]
    oldest = watched(model, "oldest")[5]["read"]
    assert oldest == {1: "not read", 2: "not read", 3: "own keys", 4: "own keys"}
    pooled = watched(model, "pool")[5]
    assert set(pooled["read"].values()) == {"part of its keys"} and pooled["key_frames"] <= 3
