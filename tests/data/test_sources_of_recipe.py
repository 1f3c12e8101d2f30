"""The data that a recipe names."""

import numpy as np
import pytest
from PIL import Image

from qsam2.data.sources import open_train
from qsam2.recipe.load import build_recipe


@pytest.mark.parametrize(
    ("augment", "augmented"), [(True, [True, True]), ("real", [False, True]), (False, [False, False])]
)
def test_sources_are_augmented_as_the_recipe_says(tmp_path, augment, augmented):
    for folder in ("images", "instance_png"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.ones((20, 30), np.uint8)).save(tmp_path / folder / "one.png")
    train = ["moving_objects:1:train", f"instance_png:{tmp_path}"]
    sources = open_train(build_recipe({"data": {"train": train, "augment": augment}, "train": {}}))
    assert [source.augment for source in sources] == augmented
