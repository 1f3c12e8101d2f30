"""YAML and key=value into a recipe: presets, the way back, and every message."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from qsam2.errors import UserError
from qsam2.recipe import Recipe, build_recipe, load_recipe, save_recipe
from qsam2.recipe.load import DEBUG_PRESETS, merge
from qsam2.recipe.quantize import QuantizeRecipe, Rule
from qsam2.recipe.recipe import PromptRecipe, TrainRecipe

QUANTIZED = {"quantize": {"weights": {"method": "lsc", "bits": 4}, "activations": {"method": "lsq", "bits": 4}}}


def error_of(*overrides: str, values: dict | None = None) -> str:
    with pytest.raises(UserError) as caught:
        build_recipe(values or QUANTIZED, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def reload(recipe: Recipe, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(save_recipe(recipe))
    return load_recipe(folder / "recipe.yaml")


@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "train.lr": st.floats(1e-12, 1e3),
            "train.lr_end": st.floats(0, 1),
            "trainer.max_steps": st.integers(1, 10**9),
            "quantize.weights.bits": st.integers(2, 8),
            "data.augment": st.sampled_from([True, False, "real"]),
            "evaluate.frames": st.none() | st.integers(1, 500),
            "log.wandb": st.sampled_from(["auto", "online", "offline", "off"]),
            "model.version": st.sampled_from(["2", "2.1"]),
            "name": st.from_regex(r"[a-zA-Z_][\w.\-]*", fullmatch=True, alphabet="aeEfnoO12._-"),
        }
    )
)
def test_any_value_comes_through_an_override_and_a_file(values: dict[str, object]) -> None:
    recipe = build_recipe(QUANTIZED, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    for key, value in values.items():
        holder: typing.Any = recipe
        for name in key.split("."):
            holder = getattr(holder, name)
        assert holder == value and type(holder) is type(value), key
    saved = save_recipe(recipe)
    assert build_recipe(yaml.safe_load(saved)) == recipe  # any reader of YAML 1.1 sees the same


# Defaults, presets, files


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    fields = [field.annotation for field in model.model_fields.values()]
    parts = [part for annotation in fields for part in (annotation, *typing.get_args(annotation))]
    inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return {model}.union(*(sections(part) for part in inner))


def test_every_default_is_valid() -> None:
    found = sections(Recipe)
    assert {TrainRecipe, PromptRecipe, QuantizeRecipe} < found
    for section in found - {QuantizeRecipe, Rule}:  # these have to say something
        assert section.model_config["validate_default"]
        section()


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("preset", DEBUG_PRESETS)
def test_a_preset_lies_over_the_file_and_below_overrides(preset: str) -> None:
    steps = DEBUG_PRESETS[preset]["trainer"]["max_steps"]
    values = {"trainer": {"max_steps": 77, "accumulate": 3}}
    assert build_recipe(values, [f"debug={preset}"]).trainer.max_steps == steps
    assert build_recipe({**values, "debug": preset}).trainer.max_steps == steps
    recipe = build_recipe(values, [f"debug={preset}", "trainer.max_steps=5"])
    assert (recipe.trainer.max_steps, recipe.trainer.accumulate) == (5, 3)


@pytest.mark.parametrize("preset", [None, *DEBUG_PRESETS])
def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path, preset: str | None) -> None:
    overrides = ["data.root=/data", "trainer.max_steps=5", "train.lr=1e-7", "log.wandb=off", "model.version=2"]
    rules = {"rules": [{"match": "*.mlp.*", "weight_bits": 3}, {"match": "obj_ptr_proj", "keep_float": True}]}
    values = merge(QUANTIZED, {"quantize": rules, "debug": preset})
    recipe = build_recipe(values, overrides)
    assert recipe.quantize.rules[0].weight_bits == 3
    assert reload(recipe, tmp_path) == recipe


@pytest.mark.parametrize("name", ["1e5", "2024", "off", "null", "1_0", "0x1F", "2024-01-01", ".5", "-"])
def test_names_that_look_like_values_stay_text(tmp_path: Path, name: str) -> None:
    recipe = Recipe(name=name)
    assert reload(recipe, tmp_path).name == name
    assert yaml.safe_load(save_recipe(recipe))["name"] == name


def test_scalars_of_a_file_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("log: {wandb: off}\nmodel: {version: 2.1, size: tiny}\ntrain: {lr: 1e-4}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["model.version=2"])
    assert (recipe.log.wandb, recipe.model.version, recipe.train.lr) == ("off", "2", 1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\n", "is not valid YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00", "is not valid YAML"),
        (b"- 1\n- 2\n", "holds no `key: value` pairs"),
        (b"just words\n", "holds no `key: value` pairs"),
        (b"", "holds no `key: value` pairs"),
        (b"!!python/object/apply:os.mkdir [pwned]", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value).startswith(f"recipe r.yaml {message}") and "\n" not in str(caught.value)
    assert not Path("pwned").exists()


def test_absent_file(tmp_path: Path) -> None:
    for path in (tmp_path / "r.yaml", tmp_path):
        with pytest.raises(UserError, match=f"^recipe {path} does not exist: give a file, or a name that"):
            load_recipe(path)


def test_the_float_model_is_no_teacher_of_itself() -> None:
    values = {"train": {"distill": {"image_embeddings": 1.0}}}
    with pytest.raises(UserError, match=r"quantize=null trains just that: set both to 0, or give quantize"):
        build_recipe(values)
    assert build_recipe(values, ["train.distill.image_embeddings=0"]).quantize is None
    assert build_recipe({**QUANTIZED, **values}).quantize is not None


# Messages

METHODS = "minmax, percentile, mse, entropy, lsq, lsq_plus, pact, dorefa, sawb, statsq, seq or lsc"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.weights.bits=0", "quantize.weights.bits=0: bits=0 is not supported: give 2 to 8, or null in place"),
        ("quantize.weights.bits=33", "quantize.weights.bits=33: bits=33 is not supported: give 2 to 8"),
        ("quantize.weights.bits=four", "quantize.weights.bits='four': should be a valid integer"),
        (
            "quantize.weights.method=foo",
            f"quantize.weights.method='foo' is unknown: give {METHODS}",
        ),
        ("quantize.weights={bits: 4, method: null}", "quantize.weights.method=None is unknown: give minmax"),
        (
            "quantize.weights=4",
            "quantize.weights=4: set its keys instead, as quantize.weights.method=...: method, bits,",
        ),
        ("quantize=4", "quantize=4: set its keys instead, as quantize.weights=...: weights, activations, rules"),
        ("quantize.rules={match: a}", "quantize.rules={'match': 'a'}: give a list, as [a, b]"),
        ("quantize.rules=[{bits: 4}]", "quantize.rules.0 lacks the key 'match'"),
        (
            "quantize.rules=[{match: a}]",
            "quantize.rules.0: rule 'a' gives neither: give bits (2 to 8) or keep_float=true",
        ),
        ("quantize.rules=[{match: a, bits: 1}]", "quantize.rules.0.bits=1: should be greater than or equal to 2"),
        ("trainer.max_steps=0", "trainer.max_steps=0: should be greater than 0"),
        ("trainer.max_steps=", "trainer.max_steps=None: should be a valid integer"),
        ("trainer.devices=[0, 1]", "trainer.devices=[0, 1]: should be a valid integer"),
        ("train.lr=.inf", "train.lr=inf: should be a finite number"),
        ("train.lr=.nan", "train.lr=nan: should be a finite number"),
        (
            "train.prompts.point=0.9",
            "train.prompts: point=0.9 and box=0.25 are shares of the clips and sum to more than 1",
        ),
        ("data=davis", "data='davis': set its keys instead, as data.train=...: train, weights, val, root"),
        ("data.train=3", "data.train=3: give a list, as [a, b]"),
        ("data.train=[davis, 3]", "data.train.1=3: should be a valid string"),
        ("data.weights=[1, 2]", "data: 2 weights for 1 train sources; give one each"),
        ("evaluate.protocol=coco", "evaluate.protocol='coco': should be 'davis' or 'sav'"),
        ("model.version=3", "model.version='3': should be '2' or '2.1'"),
        ("debug=foo", "debug='foo': should be 'fast', 'overfit' or 'profile'"),
        ("debug=[fast]", "debug=['fast']: should be 'fast', 'overfit' or 'profile'"),
        ("name=a b", r"name='a b': String should match pattern '^[\w.\-]+$'"),
    ],
)
def test_messages(override: str, message: str) -> None:
    assert error_of(override).startswith(message)


def test_a_quantizer_is_said_in_full() -> None:
    assert error_of("quantize={}", values={"name": "x"}).startswith(
        "quantize: neither weights nor activations are given"
    )
    message = error_of("quantize.weights.bits=4", values={"name": "x"})
    assert message == f"quantize.weights.method is missing: give {METHODS}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainr.max_steps=3", "unknown recipe key 'trainr': a recipe has name, output,"),
        ("trainer.max_step=3", "unknown recipe key 'trainer.max_step': trainer has max_steps,"),
        (
            "quantize.weights.momentun=0.1",
            "unknown recipe key 'quantize.weights.momentun': quantize.weights has ",
        ),
        (
            "quantize.rules=[{match: a, bitz: 1}]",
            "unknown recipe key 'quantize.rules.0.bitz': quantize.rules.0 has match,",
        ),
        (
            "train.distill.mask_logitss=1",
            "unknown recipe key 'train.distill.mask_logitss': train.distill has mask_logits,",
        ),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, message: str) -> None:
    found = error_of(override)
    wanted = {"trainr": "trainer", "max_step": "max_steps", "momentun": "momentum", "bitz": "bits"}
    nearest = next((near for wrong, near in wanted.items() if wrong in override), "mask_logits")
    assert found.startswith(message) and found.endswith(f"; did you mean {nearest!r}?")


def test_unknown_key_that_is_near_to_none() -> None:
    message = error_of("evaluate.zzzz=1")
    assert message.startswith("unknown recipe key 'evaluate.zzzz': evaluate has protocol, ")
    assert "did you mean" not in message


@given(st.text("abcdefgmopst_", min_size=1, max_size=8), st.sampled_from(["", "trainer.", "quantize.weights."]))
def test_no_unknown_key_is_accepted(key: str, prefix: str) -> None:
    message = error_of(f"{prefix}{key}__=1")
    assert message.startswith(f"unknown recipe key '{prefix}{key}__': {prefix[:-1] or 'a recipe'} has ")


@pytest.mark.parametrize(
    ("data", "scored"),
    [
        ({}, "moving_objects"),
        ({"train": "moving_objects:5:train"}, "moving_objects"),
        ({"train": "davis:/x:train"}, "davis:/x"),
        ({"train": ["davis", "sav"]}, "davis"),
        ({"train": "davis:/x", "val": "sav:/y:test"}, "sav:/y:test"),
    ],
)
def test_scored_source_is_the_first_train_source_s_val_split(data, scored):
    assert build_recipe({"data": data}).data.scored == scored
