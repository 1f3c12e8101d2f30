"""Loading: what fits loads, what does not is named, and no code in a file is ever run."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from qsam2.errors import UserError
from qsam2.models import build_sam2, load_sam2
from qsam2.models.checkpoints import find_checkpoint, guess_size


@pytest.fixture(scope="module")
def state():
    return build_sam2("nano").state_dict()


def equal(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "version"), [("tiny", "2"), ("tiny", "2.1"), ("small", "2.1"), ("base_plus", "2.1"), ("large", "2.1")]
)
def test_metas_layout_loads_in_every_size(tmp_path, size, version):
    official = build_sam2(size, version=version, image_size=128).state_dict()
    torch.save({"model": official}, tmp_path / "official.pt")
    loaded = load_sam2(size, version=version, checkpoint=tmp_path / "official.pt", image_size=128)
    assert equal(loaded, official) and guess_size(official) == (size, version)


def test_bare_state_dict_and_half_precision_safetensors_load(tmp_path, state):
    torch.save(state, tmp_path / "bare.pt")
    assert equal(load_sam2("nano", checkpoint=tmp_path / "bare.pt"), state)
    halves = {name: tensor.half() for name, tensor in state.items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = load_sam2("nano", checkpoint=tmp_path / "half.safetensors")
    assert equal(loaded, {name: tensor.float() for name, tensor in halves.items()})


class Runs:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


NAN = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda state: {"model": {n: t for n, t in state.items() if n != "no_mem_embed"} | {"no_obj_ptr": NAN}},
            r"missing: no_mem_embed; other shape: no_obj_ptr is \(\), not \(1, 128\)",
        ),
        (
            lambda state: {**state, "no_mem_embed": NAN + state["no_mem_embed"], "no_obj_ptr": state["no_obj_ptr"] / 0},
            "c.pt has NaN or infinite values in no_mem_embed, no_obj_ptr; it is of no use",
        ),
        (lambda _: {"model": build_sam2("small", version="2").state_dict()}, "fits model.size=small model.version=2$"),
        (lambda _: {"model": build_sam2("tiny").state_dict()}, "size=nano .*unexpected: image_encoder.trunk.blocks."),
        (lambda _: {"model": {"epoch": 3}}, "holds no state dict"),
        (lambda _: {"model": Runs()}, "could run code"),
        (lambda _: pickle.dumps({"model": Runs()}), "could run code"),
        (lambda state: state, r"c.pt cannot be read \(1000000 bytes\): truncated"),
        (lambda _: b"", r"cannot be read \(0 bytes\)"),
        (lambda _: b"\x10\0\0\0\0\0\0\0{}", "is a safetensors file under another name"),
        (lambda _: None, "does not exist"),
    ],
)
def test_files_that_do_not_load_are_named(tmp_path, monkeypatch, state, content, message):
    monkeypatch.chdir(tmp_path)
    content, file = content(state), tmp_path / "c.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    if "truncated" in message:
        file.write_bytes(file.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match=message) as error:
        load_sam2("nano", checkpoint=file)
    assert "\n" not in str(error.value) and not (tmp_path / "pwned").exists()


def test_a_truncated_safetensors_file_is_named(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(UserError, match="cannot be read"):
        load_sam2("nano", checkpoint=tmp_path / "c.safetensors")


@pytest.mark.parametrize("size", ["nano", "tiny", "small", "base_plus"])
def test_guess(size):
    assert guess_size(build_sam2(size).state_dict()) == (size, "2.1")


@pytest.mark.parametrize("name", ["weight", "image_encoder.trunk.patch_embed.proj.weight"])
def test_guess_of_a_foreign_state_dict_is_none(name):
    assert guess_size({name: torch.zeros(7, 3, 7, 7)}) is None


def test_official_checkpoint_is_found_or_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sam2.1_hiera_tiny.pt").touch()
    assert find_checkpoint("tiny").name == "sam2.1_hiera_tiny.pt"
    asked = []
    download = "qsam2.models.checkpoints.hf_hub_download"
    monkeypatch.setattr(download, lambda *names: asked.append(names) or str(tmp_path / "file.pt"))
    assert find_checkpoint("small", "2") == find_checkpoint("base_plus") == tmp_path / "file.pt"
    assert asked == [
        ("facebook/sam2-hiera-small", "sam2_hiera_small.pt"),
        ("facebook/sam2.1-hiera-base-plus", "sam2.1_hiera_base_plus.pt"),
    ]

    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(download, refuse)
    with pytest.raises(UserError, match=r"sam2.1_hiera_large.pt is not in ./ or ./checkpoints/ .* or give model.check"):
        find_checkpoint("large")
