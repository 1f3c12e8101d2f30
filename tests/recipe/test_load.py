"""YAML files, `key=value`, bases, sizes and presets into a recipe, and the way back."""

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
from qsam2.recipe.load import DEBUG_PRESETS, Kind, find, merge, parse_overrides, shipped
from qsam2.recipe.quantize import QuantizeRecipe, Rule
from qsam2.recipe.train import PromptRecipe, TrainRecipe

QUANTIZED = {"quantize": {"weights": {"method": "lsc", "bits": 4}, "activations": {"method": "lsq", "bits": 4}}}


def reload(recipe: Recipe, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(save_recipe(recipe))
    return load_recipe(folder / "recipe.yaml")


# Values

VALUES = {
    "3": 3, "-2": -2, "010": 10.0, "0.5": 0.5, ".5": 0.5, "1e-4": 1e-4, "1E3": 1000.0, "-1.5e+2": -150.0,
    "true": True, "False": False, "null": None, "~": None, "": None, "off": "off", "yes": "yes", '"2"': "2",
    "1:30": "1:30", "2024-01-01": "2024-01-01", "davis:/data/DAVIS:val": "davis:/data/DAVIS:val", "a=b": "a=b",
    "[1, x, 2e-3]": [1, "x", 2e-3], "{bits: 2, reason: off}": {"bits": 2, "reason": "off"},
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_values_are_those_of_yaml_1_2(text: str) -> None:
    """Neither octal, nor truth values, times or dates of YAML 1.1."""
    value = parse_overrides([f"a.b={text}"])["a"]["b"]
    assert value == VALUES[text] and type(value) is type(VALUES[text])


@pytest.mark.parametrize("name", ["1e5", "2024", "off", "null", "1_0", "0x1F", "2024-01-01", ".5", "-"])
def test_names_that_look_like_values_stay_text(tmp_path: Path, name: str) -> None:
    recipe = Recipe(name=name)
    assert reload(recipe, tmp_path) == recipe == build_recipe(yaml.safe_load(save_recipe(recipe)))


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
def test_any_value_comes_through_an_override_and_a_file(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    recipe = build_recipe(QUANTIZED, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    for key, value in values.items():
        holder: typing.Any = recipe
        for name in key.split("."):
            holder = getattr(holder, name)
        assert holder == value and type(holder) is type(value), key
    assert build_recipe(yaml.safe_load(save_recipe(recipe))) == recipe  # any reader of YAML 1.1 sees the same
    assert reload(recipe, tmp_path_factory.getbasetemp()) == recipe


def test_scalars_of_a_file_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("log: {wandb: off}\nmodel: {version: 2.1, size: tiny}\ntrain: {lr: 1e-4}\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.log.wandb, recipe.model.version, recipe.train.lr) == ("off", "2.1", 1e-4)
    assert load_recipe(tmp_path / "r.yaml", ["model.version=2"]).model.version == "2"


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfname: \xc3\xbc\n", "name: \u00fc\n".encode("utf-16")])
def test_recipes_in_other_encodings_of_unicode(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(text)
    assert load_recipe(tmp_path / "r.yaml").name == "\u00fc"


@pytest.mark.parametrize(
    ("name", "size", "folder"),
    [("run", "nano", "runs/run"), ("run", "tiny", "runs/run-tiny"), ("tiny-w8", "tiny", "runs/tiny-w8")],
)
def test_runs_of_several_sizes_have_a_folder_each(name: str, size: str, folder: str) -> None:
    recipe = Recipe.model_validate({"name": name, "model": {"size": size}})
    assert recipe.run_folder == Path(folder)
    assert build_recipe(recipe.model_dump(mode="json"), ["output=x"]).run_folder == Path("x")
    assert build_recipe({"output": "~/x"}).run_folder == Path.home() / "x"


def test_a_reset_size_is_not_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {size: tiny}\ntrain: {}\nsizes: {tiny: {train: {lr: 3}}, nano: {train: {lr: 2}}}\n"
    )
    assert load_recipe(tmp_path / "r.yaml").train.lr == 3
    reset = load_recipe(tmp_path / "r.yaml", ["model={}"])
    assert (reset.model.size, reset.train.lr) == ("nano", 2)


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    fields = [field.annotation for field in model.model_fields.values()]
    parts = [part for annotation in fields for part in (annotation, *typing.get_args(annotation))]
    inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return {model}.union(*(sections(part) for part in inner))


def test_every_default_is_valid_and_recipes_are_frozen() -> None:
    assert {TrainRecipe, PromptRecipe, QuantizeRecipe} < sections(Recipe)
    for section in sections(Recipe) - {QuantizeRecipe, Rule}:  # these have to say something
        assert section.model_config["validate_default"] and section()
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]


# Overrides


def test_overrides_are_nested_and_the_last_one_wins() -> None:
    assert parse_overrides(["a.b=1", "a.c.d=2", "a.b=3"]) == {"a": {"b": 3, "c": {"d": 2}}}
    assert parse_overrides(["a.b=1", "a=null"]) == {"a": None}
    assert parse_overrides(["a=1", "a.b=2"]) == {"a": {"b": 2}}


def test_keys_of_a_method_go_with_its_name() -> None:
    base = ["calibrate.weights=frobenius", "calibrate.rounding=gptq"]
    recipe = build_recipe(QUANTIZED, [*base, "calibrate.weights.rhos=0.1", "calibrate.rounding.damping=[0.1, 1]"])
    assert (recipe.calibrate.weights.method, recipe.calibrate.weights.rhos) == ("frobenius", (0.1,))
    assert (recipe.calibrate.rounding.method, recipe.calibrate.rounding.damping) == ("gptq", (0.1, 1.0))
    changed = build_recipe(QUANTIZED, [*base, "calibrate.weights={method: acnr, steps: [3]}"])
    assert changed.calibrate.weights.method == "acnr" and changed.calibrate.weights.steps == (3,)


trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    max_leaves=6,
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


def leaves(values: object, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(values, dict):
        return {path: values}
    return {leaf: value for key, inner in values.items() for leaf, value in leaves(inner, (*path, key)).items()}


@given(mappings, mappings)
def test_merging_keeps_what_is_not_overlaid(below: dict, above: dict) -> None:
    def overlaid(path: tuple[str, ...]) -> bool:
        return any(path[: len(other)] == other[: len(path)] for other in leaves(above))

    before = repr((below, above))
    kept = {path: value for path, value in leaves(below).items() if not overlaid(path)}
    assert leaves(merge(below, above)) == {**kept, **leaves(above)}
    assert repr((below, above)) == before


def test_a_list_is_replaced_a_mapping_added_to_and_null_takes_away() -> None:
    values = {"data": {"train": ["davis", "sav"]}, "train": {"lr": 1}, **QUANTIZED}
    recipe = build_recipe(values, ["data.train=[coco]", "quantize.weights.bits=2", "train=null"])
    assert (recipe.data.train, recipe.train) == (("coco",), None)
    assert (recipe.quantize.weights.method, recipe.quantize.weights.bits) == ("lsc", 2)
    assert build_recipe({}, ["data.train=davis"]).data.train == ("davis",)
    assert build_recipe(QUANTIZED, ["quantize=null"]).quantize is None
    assert build_recipe({}, ["train={}"]).train.lr == 5e-6


@pytest.mark.parametrize(
    ("overrides", "prompts"),
    [
        (["train.prompts={}"], PromptRecipe()),
        (["train.prompts=null"], PromptRecipe()),
        (["train={}"], PromptRecipe()),
        (["train.prompts={}", "train.prompts.point=0.5"], PromptRecipe(point=0.5)),
        (["train.prompts.point=0.5", "train.prompts={}"], PromptRecipe()),
        (["train.prompts={point: 0.5}"], PromptRecipe(point=0.5, box=0.1)),
    ],
)
def test_an_empty_mapping_and_null_reset_a_section(overrides: list[str], prompts: PromptRecipe) -> None:
    values = {**QUANTIZED, "train": {"lr": 1, "prompts": {"point": 0.2, "box": 0.1}}}
    train = build_recipe(values, overrides).train
    assert (train.prompts, train.lr) == (prompts, 5e-6 if "train={}" in overrides else 1)
    assert build_recipe(values, ["train.prompts=null", "train=null"]).train is None


# Presets, bases, sizes


@pytest.mark.parametrize("preset", [None, *DEBUG_PRESETS])
def test_a_preset_lies_over_the_file_and_below_overrides(tmp_path: Path, preset: str | None) -> None:
    steps = DEBUG_PRESETS[preset]["trainer"]["max_steps"] if preset else 77
    rules = [{"match": "*.mlp.*", "weight_bits": 3}, {"match": "obj_ptr_proj", "keep_float": True}]
    values = merge(QUANTIZED, {"quantize": {"rules": rules}, "trainer": {"max_steps": 77, "accumulate": 3}})
    assert build_recipe(values, [f"debug={preset}"] if preset else []).trainer.max_steps == steps
    values = {**values, "debug": preset}
    assert build_recipe(values).trainer.max_steps == steps
    recipe = build_recipe(values, ["trainer.max_steps=5", "data.root=/data", "train.lr=1e-7", "log.wandb=off"])
    assert (recipe.trainer.max_steps, recipe.trainer.accumulate, recipe.quantize.rules[0].weight_bits) == (5, 3, 3)
    assert reload(recipe, tmp_path) == recipe


def test_a_preset_changes_the_stages_that_a_recipe_has_and_adds_none() -> None:
    assert build_recipe(QUANTIZED, ["debug=fast"]).reconstruct is None
    stage = build_recipe({**QUANTIZED, "reconstruct": {}}, ["debug=fast"]).reconstruct
    assert (stage.iterations, stage.video) == (2, None)


def test_stages_of_training_have_values_of_their_own_and_a_preset_shortens_each() -> None:
    stages = (
        "train.stages=[{kind: stills, steps: 900, batch_size: 8, rate: 2}, {}, {steps: 30, num_frames: 16, rate: 0.1}]"
    )
    values = {**QUANTIZED, "train": {"lr": 1e-4, "image_encoder_lr": 3e-4}, "data": {"num_frames": 4}}
    recipe = build_recipe(values, [stages, "trainer.max_steps=100"])
    found = [(each.trainer.max_steps, each.data.num_frames, each.data.batch_size) for each in recipe.training]
    assert found == [(900, 1, 8), (100, 4, 1), (30, 16, 1)]
    rates = [rate for each in recipe.training for rate in (each.train.lr, each.train.image_encoder_lr)]
    assert rates == pytest.approx([2e-4, 6e-4, 1e-4, 3e-4, 1e-5, 3e-5])
    assert [each.train.quantizer_lr for each in recipe.training] == pytest.approx([2e-3, 1e-3, 1e-4])
    assert [each.train.stages[0].kind for each in recipe.training] == ["stills", "clips", "clips"]
    written = yaml.safe_load(stages.removeprefix("train.stages="))
    fast = build_recipe(merge(values, {"train": {"stages": written}}), ["debug=fast"])
    assert [each.trainer.max_steps for each in fast.training] == [2, 2, 2]
    assert [stage.rate for stage in fast.train.stages] == [2, 1, 0.1]
    assert build_recipe(QUANTIZED).training == []
    own = ["data.train=[davis:a, moving_objects]", "data.weights=[3, 1]", "train.stages=[{sources: davis:a}, {}]"]
    drawn = build_recipe({"train": {}}, own).training
    assert [each.data.train for each in drawn] == [("davis:a",), ("davis:a", "moving_objects")]
    assert [each.data.weights for each in drawn] == [(3,), (3, 1)]
    with pytest.raises(UserError, match="^recipe: train.stages: sources=davis:b is none of data.train: davis:a, mov"):
        build_recipe({"train": {}}, [*own[:2], "train.stages=[{sources: [davis:a, davis:b]}]"])
    with pytest.raises(UserError, match="^recipe: train.stages: weights are in float anyway: give quantize.weights"):
        build_recipe({"train": {}}, ["train.stages=[{weights: 4}, {}]"])
    with pytest.raises(UserError, match="^recipe: train.stages: kind=stills follows the embeddings of the float "):
        build_recipe({"train": {}}, ["train.stages=[{kind: stills}]"])
    (one,) = build_recipe({"train": {}, "data": {"num_frames": 5}, "trainer": {"max_steps": 7}}).training
    assert (one.trainer.max_steps, one.data.num_frames) == (7, 5)


@pytest.mark.parametrize(
    ("quantize", "bits", "fewest"),
    [
        ({"rules": []}, 4, 4),
        ({"rules": []}, 2, 4),
        ({"rules": [{"match": "*.mlp.*", "weight_bits": 3}]}, 3, 3),
        ({"rules": [{"match": "*.mlp.*", "bits": 6}, {"match": "a", "keep_float": True}]}, 4, 4),
        ({"rules": [{"match": "*.mlp.*", "activation_bits": 2}]}, 4, 4),
        ({"allocate": {"choices": [3, 5], "average_bits": 4}}, 3, 3),
    ],
)
def test_a_stage_whose_bits_no_weight_is_below_is_refused(quantize: dict, bits: int, fewest: int) -> None:
    values = merge(QUANTIZED, {"quantize": quantize, "train": {}})
    stages = "train.stages=[{}, {weights: %s}, {}]"
    said = f"^recipe: train.stages.1: weights={bits} changes no layer, as quantize gives them all {fewest} bits or more"
    with pytest.raises(UserError, match=said):
        build_recipe(values, [stages % bits])
    for more in (fewest + 1, "float"):
        assert build_recipe(values, [stages % more]).train.stages[1].weights == more


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes that lie over each other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    files = {
        "low.yaml": "name: low\ntrain: {lr: 1, lr_end: 0.5}\n"
        "sizes: {nano*: {train: {lr: 2}}, tiny: {train: {lr: 3}}}\n",
        "more/middle.yaml": "base: ../low.yaml\nname: middle\ntrain: {weight_decay: 0.25}\n",
        "high.yaml": "base: more/middle.yaml\ntrain: {lr: 4}\nsizes: {large: {train: {lr: 5}}}\n",
        "named.yaml": "base: qat_w2a4\nname: named\nmodel: {size: tiny}\n",
        "loop.yaml": "base: more/loop.yaml\n",
        "more/loop.yaml": "base: ../loop.yaml\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "size", "lr"),
    [
        ("low.yaml", None, 2),
        ("low.yaml", "nano_heavy", 2),
        ("low.yaml", "tiny", 3),
        ("low.yaml", "large", 1),
        ("more/middle.yaml", "tiny", 3),
        ("high.yaml", "tiny", 4),  # a file goes before the sizes of its base
        ("high.yaml", "large", 5),
    ],
)
def test_a_file_lies_over_its_base_and_sizes_over_their_file(
    folder: Path, file: str, size: str | None, lr: int
) -> None:
    recipe = load_recipe(file, [f"model.size={size}"] if size else [])
    assert (recipe.train.lr, recipe.train.lr_end) == (lr, 0.5)
    assert recipe.train.weight_decay == (0.1 if file == "low.yaml" else 0.25)
    assert load_recipe(file, ["train.lr=9"]).train.lr == 9
    assert "base" not in save_recipe(recipe) and "sizes" not in save_recipe(recipe)


def test_a_base_is_a_shipped_name_too(folder: Path) -> None:
    recipe = load_recipe("named.yaml")
    assert (recipe.name, recipe.model.size, recipe.quantize.weights.bits) == ("named", "tiny", 2)
    assert recipe.train.image_encoder_lr == pytest.approx(9e-6)


BILLION = "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: loop.yaml", "recipe r.yaml: base leads back to itself (r.yaml -> loop.yaml -> more/loop.yaml -> "),
        ("base: qat_w4a5", "recipe r.yaml: base: recipe qat_w4a5 does not exist: give a file, or a name"),
        (
            "sizes: {nnao: {}}",
            "recipe r.yaml: sizes.nnao matches no size: there are nano, nano_heavy, nano_tails, tiny, ",
        ),
        ("sizes: {nano: 3}", "recipe r.yaml: sizes.nano=3: give a mapping of recipe keys other than model.size"),
        ("sizes: {nano: {model: {size: tiny}}}", "recipe r.yaml: sizes.nano={'model': {'size': 'tiny'}}: give"),
        ("sizes: 3", "recipe r.yaml: sizes=3: give a mapping from sizes to values"),
        ("sizes: {nano: {trainr: 3}}", "unknown recipe key 'trainr'"),
        ("a: [1\n", "recipe r.yaml is not valid YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "recipe r.yaml is not valid YAML"),
        (b"\x89PNG\r\n\x1a\n\x00", "recipe r.yaml is not valid YAML"),
        ("!!python/object/apply:os.mkdir [pwned]", "recipe r.yaml is not valid YAML"),
        ("name: a\ntrain: {lr: 1}\nname: b\n", "recipe r.yaml is not valid YAML: line 3 gives 'name' a second time"),
        ("train:\n  lr: 1\n  lr: 2\n", "recipe r.yaml is not valid YAML: line 3 gives 'lr' a second time"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + BILLION,
            "recipe r.yaml is not valid YAML: it is nested too deeply,",
        ),
        ("a: &a [*a, *a]\n", "recipe r.yaml is not valid YAML: it is nested too deeply,"),
        ("a: " + "[" * 5000, "recipe r.yaml is not valid YAML: it is nested too deeply"),
        ("a: " + "[" * 100 + "]" * 100, "recipe r.yaml is not valid YAML: it is nested too deeply"),
        ("- a: 1\n" * 30_000, "recipe r.yaml is not valid YAML: it has more than 50000 values"),
        ("# " + "x" * 10**6, "recipe r.yaml is not valid YAML: it has 524289 bytes or more"),
        (f"seed: {'9' * 5000}\n", "recipe r.yaml is not valid YAML: line 1 has a number of 5000 digits"),
        ("seed: !!int x\n", "recipe r.yaml is not valid YAML: invalid literal for int()"),
        ("seed: !!timestamp x\n", "recipe r.yaml is not valid YAML: "),
        ("seed: !!set {a, b}\n", "seed={"),
        ("1: 2\n", "recipe r.yaml is not valid YAML: line 1 has a key that is no text"),
        ("? [a]\n: 2\n", "recipe r.yaml is not valid YAML: line 1 has a key that is no text"),
        ('output: "\\ud800"\n', "recipe r.yaml is not valid YAML: line 1 has a null character or half"),
        ("- 1\n- 2\n", "recipe r.yaml holds no `key: value` pairs"),
        ("just words\n", "recipe r.yaml holds no `key: value` pairs"),
        ("", "recipe r.yaml holds no `key: value` pairs"),
    ],
)
def test_files_that_cannot_be_used(folder: Path, text: str | bytes, message: str) -> None:
    (folder / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("file", "kind", "name"),
    [
        ("qat_w4a4", "recipe", "qat_w4a4"),
        ("qat_w4a4.yaml", "recipe", "qat_w4a4"),
        ("recipes/qat_w4a4.yaml", "recipe", "qat_w4a4"),
        ("recipes/nano/pretrain_nano.yaml", "recipe", "nano/pretrain_nano"),
        ("bits", "sweep", "bits"),
        ("recipes/sweeps/bits.yaml", "sweep", "bits"),
        ("qat", "table", "qat"),
    ],
)
def test_shipped_files_are_found_from_any_folder(folder: Path, file: str, kind: Kind, name: str) -> None:
    assert find(file, kind) == shipped(kind)[name]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("name: mine")
    assert find(file, kind) == Path(file)  # an existing file goes first


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    for file, kind, near in (("qat_w4a5", "recipe", "qat_w4a4"), ("bit", "sweep", "bits")):
        with pytest.raises(UserError, match=f"{kind} {file} does not exist: .*; did you mean {near!r}"):
            find(file, kind)
    for path in (tmp_path / "r.yaml", tmp_path):
        with pytest.raises(UserError, match=f"^recipe {path} does not exist: give a file, or a name that"):
            load_recipe(path)


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
def test_scored_source_is_the_first_train_source_s_val_split(data: dict, scored: str) -> None:
    assert build_recipe({"data": data}).data.scored == scored
