"""Loading: what fits loads, what does not is named, and no code in a file is ever run."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from qsam2.errors import UserError
from qsam2.models import build_sam2, load_sam2
from qsam2.models.checkpoints import checkpoint_name, find_checkpoint, guess_size


@pytest.fixture(scope="module")
def nano():
    return build_sam2("nano")


def equal(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "version"), [("tiny", "2"), ("tiny", "2.1"), ("small", "2.1"), ("base_plus", "2.1"), ("large", "2.1")]
)
def test_metas_layout_loads_in_every_size(tmp_path, size, version):
    state = build_sam2(size, version=version, image_size=128).state_dict()
    path = tmp_path / "official.pt"
    torch.save({"model": state}, path)
    assert equal(load_sam2(size, version=version, checkpoint=path, image_size=128), state)


def test_bare_state_dict_and_half_precision_safetensors_load(tmp_path, nano):
    torch.save(nano.state_dict(), tmp_path / "bare.pt")
    assert equal(load_sam2("nano", checkpoint=tmp_path / "bare.pt"), nano.state_dict())
    halves = {name: tensor.half() for name, tensor in nano.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = load_sam2("nano", checkpoint=tmp_path / "half.safetensors")
    assert equal(loaded, {name: tensor.float() for name, tensor in halves.items()})


def test_another_size_is_named_and_guessed(tmp_path):
    torch.save({"model": build_sam2("small", version="2").state_dict()}, tmp_path / "c.pt")
    with pytest.raises(UserError) as error:
        load_sam2("tiny", checkpoint=tmp_path / "c.pt")
    message = str(error.value)
    assert "model.size=tiny" in message and "it fits model.size=small model.version=2" in message
    assert "unexpected: image_encoder.trunk.blocks." in message and "\n" not in message


def test_missing_key_and_other_shape_are_named(tmp_path, nano):
    state = dict(nano.state_dict())
    del state["no_mem_embed"]
    state["no_obj_ptr"] = torch.zeros(1, 7)
    torch.save({"model": state}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"missing: no_mem_embed; other shape: no_obj_ptr is \(1, 7\), not \(1, 128\)"):
        load_sam2("nano", checkpoint=tmp_path / "c.pt")


def test_nan_and_infinite_weights_are_named(tmp_path, nano):
    state = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    state["no_mem_embed"][0, 0, 3] = float("nan")
    state["maskmem_tpos_enc"][0] = float("inf")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt has NaN or infinite values in maskmem_tpos_enc, no_mem_embed; it is of"):
        load_sam2("nano", checkpoint=tmp_path / "w.pt")


def test_guess_of_a_foreign_state_dict_is_none():
    assert guess_size({"weight": torch.zeros(3)}) is None
    assert guess_size({"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(7, 3, 7, 7)}) is None


@pytest.mark.parametrize("size", ["nano", "tiny", "small", "base_plus"])
def test_guess(size):
    assert guess_size(build_sam2(size).state_dict()) == (size, "2.1")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    if legacy:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Runs()}))
    else:
        torch.save({"model": Runs()}, "evil.pt")
    with pytest.raises(UserError, match="could run code"):
        load_sam2("nano", checkpoint="evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_truncated_file(tmp_path, nano):
    path = tmp_path / "c.pt"
    torch.save({"model": nano.state_dict()}, path)
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match=r"c.pt cannot be read \(1000000 bytes\): truncated"):
        load_sam2("nano", checkpoint=path)
    (tmp_path / "c.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(UserError, match="cannot be read"):
        load_sam2("nano", checkpoint=tmp_path / "c.safetensors")


def test_other_contents_and_absent_files(tmp_path):
    torch.save({"model": {"epoch": 3}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_sam2("nano", checkpoint=tmp_path / "c.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_sam2("nano", checkpoint=tmp_path / "absent.pt")


def test_official_checkpoint_is_found_by_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_name("base_plus", "2.1") == ("facebook/sam2.1-hiera-base-plus", "sam2.1_hiera_base_plus.pt")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sam2.1_hiera_tiny.pt").touch()
    assert find_checkpoint("tiny").name == "sam2.1_hiera_tiny.pt"


def test_download_that_fails_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr("qsam2.models.checkpoints.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"sam2.1_hiera_large.pt is not in ./ or ./checkpoints/ .* or give model.check"):
        find_checkpoint("large")


def test_download_goes_to_the_size_s_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "qsam2.models.checkpoints.hf_hub_download", lambda *names: asked.append(names) or str(tmp_path / "file.pt")
    )
    assert find_checkpoint("small", "2") == tmp_path / "file.pt"
    assert asked == [("facebook/sam2-hiera-small", "sam2_hiera_small.pt")]
