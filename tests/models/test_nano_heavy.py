"""nano_heavy: the function of nano, the weight tails of SAM2.1-B+, and files that are checked."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.data.transforms import to_model_input
from qsam2.errors import UserError
from qsam2.models import checkpoints, load_sam2
from qsam2.models.nano.heavy import COLUMN_SCALE, add_tail, make_heavy, move_scale, norms_and_readers

MEDIAN, WORST = 11.3, 39.0  # max/std of SAM2.1-B+'s trunk


def linear_layers(model):
    return {n: m for n, m in model.image_encoder.trunk.named_modules() if isinstance(m, nn.Linear)}


def tails(model):
    return {n: float((m.weight.abs().max() / m.weight.std()).detach()) for n, m in linear_layers(model).items()}


@pytest.fixture(scope="module")
def nano():
    return load_sam2("nano")


@pytest.fixture(scope="module")
def heavy():
    return load_sam2("nano_heavy")


def test_tails_are_those_of_the_official_model(nano, heavy):
    light, tail = tails(nano), tails(heavy)
    assert max(light.values()) < 8
    assert MEDIAN / 1.2 <= np.median(list(tail.values())) <= MEDIAN * 1.2
    assert WORST / 1.2 <= max(tail.values()) <= WORST * 1.2
    assert max(tail, key=tail.get).endswith("mlp.layers.1")


@torch.no_grad()
def test_the_function_stays_and_coarse_weights_break_it(nano, heavy):
    videos = moving_objects("val", 4, num_frames=1)
    images = torch.stack([to_model_input(video.frame(0), nano.image_size) for video in videos])
    reference = nano.forward_image(images)["backbone_fpn"]

    def error(model):
        features = model.forward_image(images)["backbone_fpn"]
        return max(float((a - b).square().mean() / b.var()) for a, b in zip(features, reference, strict=True)) ** 0.5

    def coarse(model):
        model = copy.deepcopy(model)
        for layer in linear_layers(model).values():
            step = layer.weight.abs().amax(1, keepdim=True) / 7
            layer.weight.copy_((layer.weight / step).round() * step)
        return model

    assert error(heavy) < 0.1
    assert error(coarse(nano)) < 0.5 < error(coarse(heavy))


def test_loading_is_deterministic_and_only_the_trunk_differs(tmp_path, nano, heavy):
    save_file(heavy.state_dict(), tmp_path / "heavy.safetensors")
    for file in ("auto", tmp_path / "heavy.safetensors"):  # weights from a file are loaded as they are
        again = load_sam2("nano_heavy", checkpoint=file).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in heavy.state_dict().items())
    changed = {name for name, value in nano.state_dict().items() if not torch.equal(value, again[name])}
    assert changed and all(name.startswith("image_encoder.trunk.blocks.") for name in changed)


@torch.no_grad()
def test_a_moved_scale_and_a_tail_along_a_norms_null_direction_change_nothing():
    norm, readers = nn.LayerNorm(16).double(), [nn.Linear(16, 5).double(), nn.Linear(16, 3).double()]
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    x = torch.randn(50, 16, dtype=torch.float64)
    before, column = [reader(norm(x)) for reader in readers], readers[0].weight[:, 3].clone()
    move_scale(norm, readers, 3)
    assert torch.equal(readers[0].weight[:, 3], COLUMN_SCALE * column)
    direction = 1 / norm.weight
    add_tail(readers[0], 100 * torch.randn(5, dtype=torch.float64), direction, (direction * norm.bias).sum())
    assert readers[0].weight.abs().max() > 30
    for reader, output in zip(readers, before, strict=True):
        torch.testing.assert_close(reader(norm(x)), output, rtol=0, atol=1e-10)


def test_every_linear_layer_behind_a_norm_is_known(nano):
    named = [name for names in norms_and_readers(nano.image_encoder.trunk).values() for name in names]
    expected = [n for n in linear_layers(nano) if n.endswith((".qkv", ".layers.0")) or n.count(".") == 2]
    assert sorted(named) == sorted(expected)


def test_tails_of_another_model_are_refused(nano):
    shipped = load_file(checkpoints.packaged("nano_heavy.safetensors"))
    name = next(key for key in shipped if key.endswith(".rows"))
    for tensors in ({k: v for k, v in shipped.items() if k != name}, {**shipped, name: torch.zeros(3)}):
        with pytest.raises(UserError, match="the file of heavy tails fits another model"):
            make_heavy(copy.deepcopy(nano), tensors)


def test_damaged_package_files_are_refused(monkeypatch):
    for name in ("nano.safetensors", "gone.safetensors"):
        monkeypatch.setitem(checkpoints.SHA256, name, "0" * 64)
        with pytest.raises(UserError, match=f"{name} is missing, damaged or of another version"):
            checkpoints.packaged(name)
    for size in ("nano", "nano_heavy"):
        with pytest.raises(UserError, match="nano.safetensors is missing"):
            load_sam2(size)
