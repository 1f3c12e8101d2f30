"""The Trainer factory's choices."""

from __future__ import annotations

import pytest

from qsam2.recipe.recipe import TrainerRecipe
from qsam2.train.trainer import choose_strategy

DDP = "ddp_find_unused_parameters_true"


@pytest.mark.parametrize(
    ("given", "gpus", "strategy"),
    [
        ({}, 0, "auto"),
        ({}, 1, "auto"),
        ({}, 4, DDP),
        ({"accelerator": "cpu"}, 4, "auto"),
        ({"devices": 1}, 4, "auto"),
        ({"devices": 2, "accelerator": "cpu"}, 0, DDP),
        ({"num_nodes": 2}, 1, DDP),
        ({"devices": 2, "strategy": "fsdp"}, 4, "fsdp"),
    ],
)
def test_several_devices_get_ddp_that_allows_unused_parameters(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], gpus: int, strategy: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert choose_strategy(TrainerRecipe.model_validate(given)) == strategy
