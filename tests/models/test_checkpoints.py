"""Loading: what fits loads, what does not is named, and no code in a file is ever run."""

import argparse
import io
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from qsam2.errors import UserError
from qsam2.loading import load_model
from qsam2.models import SIZES, build_sam2, load_sam2
from qsam2.models.checkpoints import find_checkpoint, guess_size


@pytest.fixture(scope="module")
def state():
    return build_sam2("nano").state_dict()


def count(state):
    return sum(tensor.numel() for tensor in state.values())


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
    assert count(official) <= SIZES[size].parameters < 1.1 * count(official)


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


def one(state, change):
    return {"no_mem_embed": change(state["no_mem_embed"])}


@pytest.mark.filterwarnings("ignore::UserWarning")
def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


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
        (lambda _: b"\x10\0\0\0\0\0\0\0{}", r"cannot be read \(10 bytes\)"),
        (
            lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "pointer that Git LFS leaves",
        ),
        (lambda _: b" <!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (lambda state: {"model": state, "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace, which could run"),
        (lambda state: {"a": state, "b": state}, r"holds several state dicts \('a', 'b'\): save one of them alone"),
        (lambda state: {f"{k}.{n}": t for k in "ab" for n, t in state.items()}, r"several models \('a.', 'b.'\)"),
        (lambda state: state | one(state, lambda t: t.to(torch.int8)), r"no_mem_embed \(int8\): give dense tensors"),
        (lambda state: state | one(state, lambda t: t > 0), r"no_mem_embed \(bool\): give dense tensors"),
        (lambda state: state | one(state, lambda t: t.to(torch.complex64)), r"no_mem_embed \(complex64\): give dense"),
        (
            lambda state: state | one(state, lambda t: t.to(torch.float8_e4m3fn)),
            r"no_mem_embed \(float8_e4m3fn\): give",
        ),
        (lambda state: state | one(state, torch.Tensor.to_sparse), r"no_mem_embed \(sparse_coo\): give dense tensors"),
        (lambda state: state | one(state, lambda t: t.to("meta")), r"no_mem_embed \(on meta, without values\): give"),
        (lambda state: state | one(state, quantized), r"no_mem_embed \(qint8\): give dense tensors"),
        (lambda state: state | one(state, lambda t: t.double() + 1e300), "NaN or infinite values in no_mem_embed"),
        (lambda state: state | {"no_mem_embed": 3}, "missing: no_mem_embed"),
        (
            lambda state: {n: t.new_zeros(1).expand(t.shape) for n, t in state.items()},
            "it holds 383 values, the size has",
        ),
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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model.module._orig_mod.", "sam_model."])
@pytest.mark.parametrize("wrap", ["model", "state_dict", "ema", None])
def test_names_with_a_prefix_load(tmp_path, state, prefix, wrap):
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save({wrap: named, "epoch": 3, "optimizer": {"state": {0: {"lr": 1}}}} if wrap else named, tmp_path / "c.pt")
    assert equal(load_sam2("nano", checkpoint=tmp_path / "c.pt"), state)


def test_a_compiled_part_and_numbers_beside_the_tensors_load(tmp_path, state):
    named = {name.replace("image_encoder.", "image_encoder._orig_mod."): tensor for name, tensor in state.items()}
    torch.save({**named, "epoch": 3}, tmp_path / "c.pt")
    assert equal(load_sam2("nano", checkpoint=tmp_path / "c.pt"), state)


def test_the_content_decides_not_the_suffix(tmp_path, state):
    save_file(state, tmp_path / "c.pt")
    torch.save(state, tmp_path / "c.safetensors")
    for file in ("c.pt", "c.safetensors"):
        assert equal(load_sam2("nano", checkpoint=tmp_path / file), state)
        assert equal(load_model(tmp_path / file)[0], state)


def test_a_zip_file_that_unpacks_to_far_more_is_refused(tmp_path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
        packed.writestr("archive/data/bomb", bytes(2**28))
    with pytest.raises(UserError, match="would unpack to .*: PyTorch does not compress its files"):
        load_sam2("nano", checkpoint=tmp_path / "c.pt")


def test_a_file_too_small_for_its_size_is_refused_before_the_model_is_built(tmp_path, monkeypatch, state):
    width = torch.zeros(144, 3, 7, 7)  # the stem of large and the names of its blocks, in 100 kB
    blocks = {f"image_encoder.trunk.blocks.{index}.norm1.weight": torch.zeros(1) for index in range(48)}
    torch.save({"image_encoder.trunk.patch_embed.proj.weight": width, **blocks}, tmp_path / "c.pt")
    monkeypatch.setattr("qsam2.models.checkpoints.build_sam2", None)
    with pytest.raises(
        UserError, match=r"does not fit model.size=large: it holds 21,216 values, the size has about 224,"
    ):
        load_model(tmp_path / "c.pt")


def test_an_official_file_that_is_empty_is_said_to_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sam2.1_hiera_tiny.pt").touch()
    with pytest.raises(UserError, match="empty, .*; model.checkpoint=auto found it: remove it, or give another path"):
        load_sam2("tiny")


def test_a_truncated_safetensors_file_is_named(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(UserError, match="cannot be read"):
        load_sam2("nano", checkpoint=tmp_path / "c.safetensors")


@pytest.mark.parametrize("size", ["nano", "tiny", "small", "base_plus"])
def test_guess(size):
    state = build_sam2(size).state_dict()
    assert guess_size(state) == (size, "2.1") and count(state) == SIZES[size].parameters


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
    monkeypatch.setattr("qsam2.models.checkpoints.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(download, lambda *names: asked.append(names) or str(tmp_path / "file.pt"))
    assert find_checkpoint("small", "2") == find_checkpoint("base_plus") == tmp_path / "file.pt"
    assert asked == [
        ("facebook/sam2-hiera-small", "sam2_hiera_small.pt"),
        ("facebook/sam2.1-hiera-base-plus", "sam2.1_hiera_base_plus.pt"),
    ]

    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr("qsam2.models.checkpoints.get_hf_file_metadata", refuse)  # no minute of retries follows
    with pytest.raises(UserError, match=r"sam2.1_hiera_large.pt is not in ./ or ./checkpoints/ .* or give model.check"):
        find_checkpoint("large")
