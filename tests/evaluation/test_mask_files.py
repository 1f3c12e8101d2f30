"""Tracked masks as files: who has a shared pixel, whole folders or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.errors import UserError
from qsam2.evaluation.mask_files import PALETTE, write_masks
from qsam2.recipe.recipe import EvaluateRecipe

VIDEO = moving_objects("val", 1, size=(64, 96))[0]
LEFT = np.zeros((2, *VIDEO.size), bool)
LEFT[:, :, :50] = True
RIGHT = np.zeros_like(LEFT)
RIGHT[:, :, 40:] = True
BOTH = {(VIDEO.name, 2): np.packbits(RIGHT), (VIDEO.name, 1): np.packbits(LEFT), ("other", 3): np.packbits(LEFT)}


@pytest.mark.parametrize("order", [1, -1])
def test_the_lowest_id_has_a_shared_pixel(tmp_path: Path, order: int) -> None:
    write_masks(tmp_path / "m", [VIDEO], dict(list(BOTH.items())[::order]), EvaluateRecipe(frames=2))
    files = sorted((tmp_path / "m").rglob("*.png"))
    assert files == [tmp_path / "m" / VIDEO.name / f"{name}.png" for name in VIDEO.frame_names[:2]]
    with Image.open(files[1]) as picture:
        assert picture.mode == "P" and picture.getpalette()[:9] == PALETTE[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        ids = np.array(picture)
    assert (ids[:, :50] == 1).all() and (ids[:, 50:] == 2).all()


def test_objects_of_sav_keep_their_pixels(tmp_path: Path) -> None:
    write_masks(tmp_path / "m", [VIDEO], BOTH, EvaluateRecipe(frames=2, protocol="sav"))
    for folder, mask in (("000", LEFT), ("001", RIGHT)):
        with Image.open(tmp_path / "m" / VIDEO.name / folder / f"{VIDEO.frame_names[1]}.png") as picture:
            assert (np.array(picture) == mask[1]).all()


def test_nothing_is_left_of_masks_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/m could not be written: .*; make room or give another path"):
        write_masks(tmp_path / "file" / "m", [VIDEO], BOTH, EvaluateRecipe(frames=2))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
