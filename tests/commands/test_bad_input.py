"""What a user gets wrong: one line on stderr that begins with "error: ", no traceback, exit status 2."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qsam2.formats.card
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.cli import main
from qsam2.formats.packed import save_packed
from qsam2.layers.convert import convert, finalize
from qsam2.models import build_sam2
from qsam2.recipe import build_recipe, load_recipe, save_recipe
from qsam2.train.trainer import SafeCheckpointIO

SMALL = ["model.image_size=64", "model.checkpoint=null"]
FAST = ["debug=fast", "data.train=moving_objects:2:train", "data.val=moving_objects:1:val", *SMALL]
TRAINING = (
    "train: {lr: 1e-4, prompts: {point: 0, box: 0, conditioning_frames: 1, correction_frames: 1, correction_clicks: 1}}"
)
SIZE = (48, 64)

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; gives its message."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        stderr = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in stderr
        assert stderr.endswith("\n") and stderr.count("\nerror: ") + stderr.startswith("error: ") == 1
        last = stderr.split("\n")[-2]
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A quantized recipe without training that writes to `tmp_path`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "quantize: {weights: {method: minmax, bits: 4}, activations: {method: minmax, bits: 8}}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    return path


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """nano's weights, random."""
    torch.manual_seed(0)
    return build_sam2("nano", image_size=64).state_dict()


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """Four frames of a square in the layout of DAVIS."""
    root = tmp_path / "DAVIS"
    for folder in ("JPEGImages/cat", "Annotations/cat", "ImageSets"):
        (root / folder).mkdir(parents=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[10:30, 10:30] = 1
    for index in range(4):
        Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(root / f"JPEGImages/cat/{index:05d}.jpg")
        Image.fromarray(mask, "L").save(root / f"Annotations/cat/{index:05d}.png")
    (root / "ImageSets/val.txt").write_text("cat\n")
    return root


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The operating system refuses to let a file grow larger, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see qsam2 --help"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train"], "the following arguments are required: RECIPE; see qsam2 train --help"),
        (["train", "r.yaml", "--steps", "3"], "unknown argument '--steps': a key of the recipe is written key=value"),
        (["train", "r.yaml", "--trainer.max_steps=3"], "unknown argument '--trainer.max_steps=3'"),
        (["train", "r.yaml", "nano"], "unknown argument 'nano': a key of the recipe is written key=value"),
        (["train", "absent.yaml"], "recipe absent.yaml does not exist: give a file, or a name"),
        (["train", "absent.yaml", "=3"], "recipe absent.yaml does not exist"),
        (["evaluate"], "nothing to score: give a MODEL (run folder, file or size), or --pred DIR --gt DIR"),
        (["evaluate", "model.size=nano"], "nothing to score: give a MODEL"),
        (["evaluate", "nano", "--frames", "x"], "argument --frames: invalid int value: 'x'; see qsam2 evaluate --help"),
        (["evaluate", "nano", "--frames", "0"], "evaluate.frames=0: should be greater than 0"),
        (["evaluate", "nano", "--protocol", "coco"], "argument --protocol: invalid choice: 'coco'"),
        (["evaluate", "nano", "a..b=3"], "'a..b=3' is no override; write key=value with a dotted key"),
        (["evaluate", "--pred", "p"], "--pred DIR and --gt DIR go together, without a MODEL"),
        (["evaluate", "nano", "--pred", "p", "--gt", "g"], "--pred DIR and --gt DIR go together, without a MODEL"),
        (["evaluate", "--pred", "p", "--gt", "g", "--frames", "3"], "--frames does nothing with --pred and --gt"),
        (["evaluate", "--pred", "p", "--gt", "g", "seed=3"], "seed=3 does nothing with --pred and --gt"),
        (
            ["evaluate", "--pred", "p", "--gt", "absent"],
            "absent: no such folder; give the one that holds the sequences",
        ),
    ],
)
def test_command_line(refused: Refused, arguments: list[str], message: str) -> None:
    assert refused(*arguments).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.weights.bit=4", "unknown recipe key 'quantize.weights.bit': quantize.weights has method, bits,"),
        ("quantize.weights.bits=0", "quantize.weights.bits=0: bits=0 is not supported: give 2 to 8"),
        ("quantize.activations.bits=33", "quantize.activations.bits=33: bits=33 is not supported: give 2 to 8"),
        ("debug=foo", "debug='foo': should be 'fast', 'overfit' or 'profile'"),
        (
            "model.size=tiy",
            "model.size='tiy': should be 'nano', 'nano_heavy', 'tiny', 'small', 'base_plus' or 'large'; did you mean",
        ),
        ("model.image_size=65", "model.image_size=65 is impossible: give a multiple of 32 from 64 to 4096"),
        (
            "data.val=davis:/absent:val",
            "data 'davis:/absent:val': there is no folder /absent; give the dataset's folder",
        ),
        ("data.val=davi:/absent", "data 'davi:/absent': 'davi' is no kind of data; did you mean 'davis'?"),
        ("data.val=moving_objects:0", "moving_objects: count is 0; give a whole number from 1"),
    ],
)
def test_recipe_values(refused: Refused, recipe: Path, override: str, message: str) -> None:
    assert refused("train", recipe, *FAST, override).startswith(message)


def test_nearest_key_is_named(refused: Refused, recipe: Path) -> None:
    assert refused("train", recipe, "trainer.max_step=3").endswith("; did you mean 'max_steps'?")


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1\n", "holds no `key: value` pairs"), ("a: [1\n", "is not valid YAML: "), ("name: a b\n", "name='a b': ")],
)
def test_file_that_is_no_recipe(refused: Refused, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    assert message in refused("train", path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.accelerator=foo", "trainer: You selected an invalid accelerator name: `accelerator='foo'`."),
        ("trainer.devices=x", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("trainer.strategy=foo", "trainer: You selected an invalid strategy name: `strategy='foo'`."),
    ],
)
def test_no_such_devices(refused: Refused, recipe: Path, override: str, message: str) -> None:
    assert refused("train", recipe, *FAST, "trainer.accelerator=cpu", override).startswith(message)


def test_rule_that_matches_nothing(refused: Refused, recipe: Path) -> None:
    message = refused("train", recipe, *FAST, "quantize.rules=[{match: image_encoder.trunk.block.*, bits: 8}]")
    assert "'image_encoder.trunk.block.*' matches no layer" in message and "image_encoder.trunk.blocks" in message


# Data


def evaluate(davis: Path) -> list[str | Path]:
    return ["evaluate", "nano", "--data", f"davis:{davis}:val", *SMALL]


def test_corrupt_jpeg(refused: Refused, davis: Path) -> None:
    frame = davis / "JPEGImages/cat/00002.jpg"
    frame.write_bytes(frame.read_bytes()[:200])
    assert refused(*evaluate(davis)).startswith(f"{frame}: cannot be read as a picture (")


def test_mask_of_another_size(refused: Refused, davis: Path) -> None:
    mask = davis / "Annotations/cat/00002.png"
    Image.fromarray(np.zeros((24, 32), np.uint8), "L").save(mask)
    assert refused(*evaluate(davis)).startswith(f"{mask}: is 24x32 (height x width), expected 48x64")


def test_mask_without_its_frame(refused: Refused, davis: Path) -> None:
    (davis / "JPEGImages/cat/00002.jpg").unlink()
    mask, frames = davis / "Annotations/cat/00002.png", davis / "JPEGImages/cat"
    assert refused(*evaluate(davis)) == f"{mask}: is a mask without its frame in {frames}; add the frame"


def test_empty_split(refused: Refused, davis: Path) -> None:
    (davis / "ImageSets/val.txt").write_text("\n")
    assert refused(*evaluate(davis)) == f"{davis / 'ImageSets/val.txt'}: lists no sequences; write one name per line"


def test_too_few_frames(refused: Refused, davis: Path) -> None:
    assert refused(*evaluate(davis), "--frames", "2").startswith("cat: 2 annotated frames; at least 3 are needed")


def test_damaged_training_data(refused: Refused, davis: Path, recipe: Path) -> None:
    frame = davis / "JPEGImages/cat/00001.jpg"
    frame.write_bytes(b"")
    training = [f"data.train=davis:{davis}:val", "calibrate.clips=1", "calibrate.num_frames=4"]
    assert refused("train", recipe, *FAST, *training).startswith(f"{frame}: cannot be read as a picture (")


# Models


def test_no_model(refused: Refused, tmp_path: Path) -> None:
    target = tmp_path / "absent.pt"
    message = refused("evaluate", target)
    assert (
        message
        == f"{target} is no run folder, no model file and no size (nano, nano_heavy, tiny, small, base_plus, large)"
    )


def test_unfinished_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert refused("evaluate", tmp_path).startswith(f"{tmp_path} holds no model.safetensors: the run is not finished")


def test_truncated_checkpoint(refused: Refused, tmp_path: Path, state: dict[str, torch.Tensor], recipe: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[:500_000])
    message = f"checkpoint {path} cannot be read (500000 bytes): truncated or not a checkpoint; fetch it again"
    assert refused("train", recipe, *FAST, f"model.checkpoint={path}") == message
    assert refused("evaluate", path) == message


def test_truncated_model_file(refused: Refused, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:500_000])
    assert refused("evaluate", path).startswith(f"{path} cannot be read: truncated or another kind of file")


def test_checkpoint_of_another_size(refused: Refused, tmp_path: Path, recipe: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"model": build_sam2("tiny", version="2").state_dict()}, path)
    message = refused("train", recipe, *FAST, f"model.checkpoint={path}")
    assert message.startswith(f"checkpoint {path} does not fit model.size=nano (missing: ")
    assert message.endswith("; it fits model.size=tiny model.version=2")


def test_checkpoint_of_another_model(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    assert refused("evaluate", path).startswith(f"{path} is no SAM2 checkpoint that qsam2 knows")


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.folder,)


def test_pickle_that_runs_code(refused: Refused, tmp_path: Path, recipe: Path) -> None:
    path, made = tmp_path / "c.pt", tmp_path / "made"
    torch.save({"model": Runs(made)}, path)
    for command in (["train", recipe, *FAST, f"model.checkpoint={path}"], ["evaluate", path]):
        message = refused(*command)
        assert message.startswith(f"checkpoint {path} was not loaded: it holds more than tensors and could run code")
    assert not made.exists()


def test_nan_in_a_calibration_batch_names_the_layer(
    refused: Refused, tmp_path: Path, state: dict[str, torch.Tensor], recipe: Path
) -> None:
    layer = "image_encoder.trunk.blocks.3.mlp.layers.0"
    broken = {name: tensor.clone() for name, tensor in state.items()}
    weight = broken[f"{layer}.weight"]
    broken[f"{layer}.weight"] = weight / weight.abs().max() * 3e38  # finite, but its outputs are not
    path = tmp_path / "c.pt"
    torch.save({"model": broken}, path)
    message = refused("train", recipe, *FAST, f"model.checkpoint={path}")
    assert "image_encoder.trunk.blocks.3.mlp.layers.1" in message and "NaN" in message  # the first to see it


def test_nan_in_a_weight_names_the_layer(
    refused: Refused, tmp_path: Path, state: dict[str, torch.Tensor], recipe: Path
) -> None:
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["obj_ptr_tpos_proj.weight"][0] = torch.inf
    path = tmp_path / "c.pt"
    torch.save({"model": broken}, path)
    message = refused("train", recipe, *FAST, f"model.checkpoint={path}", "quantize.activations=null")
    assert message == f"checkpoint {path} has NaN or infinite values in obj_ptr_tpos_proj.weight; it is of no use"


def test_loss_that_is_not_finite(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TRAINING)
    message = refused("train", path, *FAST, f"output={tmp_path / 'run'}", "train.lr=1e30")
    assert message == "the loss is nan at step 1; lower train.lr"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model in a file."""
    values = {"quantize": {"weights": {"method": "minmax", "bits": 4}}, "model": {"image_size": 64}}
    model = build_sam2("nano", image_size=64)
    convert(model, build_recipe(values).quantize)
    find_ranges(model, print, [])
    finalize(model)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(path, model, values)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.weights.bits=8", "is a quantized model: quantize cannot be changed by an override"),
        ("model.image_size=96", "is a quantized model: model cannot be changed by an override"),
        ("evaluate.frame=3", "did you mean 'frames'?"),
    ],
)
def test_a_quantized_model_stays_as_it_is(refused: Refused, packed: Path, override: str, message: str) -> None:
    assert refused("evaluate", packed, override).endswith(message)


def test_a_float_model_is_not_quantized_on_the_way(refused: Refused) -> None:
    message = refused("evaluate", "nano", "quantize.weights={method: lsq, bits: 8}")
    assert message.startswith("quantize=... does nothing here: this model is float")


def test_damaged_model_file(refused: Refused, packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[-1000] ^= 1
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert refused("evaluate", path).startswith(f"packed model {path} is damaged (its checksum or header is wrong)")


# Writing


def test_folder_of_another_run(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(save_recipe(load_recipe(recipe, [*FAST, "seed=7"])))
    (run / "metrics.json").write_text('{"seconds": {}}')
    message = refused("train", recipe, *FAST)
    assert message.startswith(
        f"{run} holds a run of another recipe (it differs in seed); give another folder with output="
    )


def test_a_mistake_that_is_corrected_needs_no_other_folder(refused: Refused, recipe: Path) -> None:
    assert "there is no folder /absent" in refused("train", recipe, *FAST, "data.val=davis:/absent")
    assert refused("train", recipe, *FAST, "model.checkpoint=absent.pt").startswith(
        "checkpoint absent.pt does not exist"
    )


def test_unwritable_output(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "run"):
        message = refused("train", recipe, *FAST, f"output={output}")
        assert message.startswith(f"{output} cannot be written: ") and message.endswith("give output=PATH")


def test_scores_that_cannot_be_written(refused: Refused, davis: Path, tmp_path: Path) -> None:
    """Found before the scoring, not after it."""
    (tmp_path / "file").touch()
    given = [*evaluate(davis)[:1], "absent", "--json"]
    assert refused(*given, tmp_path / "file/scores.json").startswith(f"--json {tmp_path}/file/scores.json: its folder")
    assert refused(*given, tmp_path) == f"--json {tmp_path}: is a folder; give the path of a file"


def test_full_disk_for_scores(refused: Refused, davis: Path, tmp_path: Path) -> None:
    annotations = davis / "Annotations"
    out = tmp_path / "scores.json"
    out.write_text("old")
    with largest_file(100):
        message = refused("evaluate", "--pred", annotations, "--gt", annotations, "--json", out)
    assert message == f"{out} could not be written: File too large; make room or give another path"
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["DAVIS", "scores.json"]


def test_full_disk_in_a_run(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous checkpoint survives, and the same command goes on from it, whatever could not be written."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(TRAINING)
    steps = ["trainer.max_steps=2", "trainer.checkpoint_every=1"]
    command = ["train", recipe, *FAST, *steps, f"output={run}"]
    last = run / "checkpoints/last.ckpt"
    save, save_weights = SafeCheckpointIO.save_checkpoint, qsam2.formats.card.save_weights

    def only_the_first(self: SafeCheckpointIO, checkpoint: dict, path: object, storage_options: object = None) -> None:
        if checkpoint["global_step"] == 1:
            return save(self, checkpoint, path, storage_options)
        with largest_file(1_000_000):
            save(self, checkpoint, path, storage_options)

    def no_room(*arguments: object) -> None:
        with largest_file(1_000_000):
            save_weights(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SafeCheckpointIO, "save_checkpoint", only_the_first)
        message = refused(*command)
    assert message.startswith(f"{last} could not be written: ") and "File too large" in message
    assert message.endswith("the previous one is kept: run the same command again to resume")
    assert torch.load(last, weights_only=True)["global_step"] == 1
    assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]

    with monkeypatch.context() as patch:
        patch.setattr(qsam2.formats.card, "save_weights", no_room)
        message = refused(*command)
    assert message.startswith(f"{run / 'model.safetensors'} could not be written: ") and "File too large" in message
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert not list(run.glob("model.safetensors*"))

    assert main([str(argument) for argument in command]) == 0
    assert (run / "model.safetensors").is_file() and json.loads((run / "metrics.json").read_text())["bytes"]
