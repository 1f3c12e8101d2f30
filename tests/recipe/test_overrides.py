"""key=value over a recipe: YAML values, nesting, merging, and null."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsam2.errors import UserError
from qsam2.recipe import build_recipe
from qsam2.recipe.load import merge, parse_overrides
from qsam2.recipe.recipe import PromptRecipe

QUANTIZED = {"quantize": {"weights": {"method": "lsc", "bits": 4}, "activations": {"method": "lsq", "bits": 4}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2", -2),
        ("010", 10.0),  # not octal
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("off", "off"),  # not a truth value
        ("yes", "yes"),
        ("1:30", "1:30"),  # not 90
        ("2024-01-01", "2024-01-01"),  # not a date
        ('"2"', "2"),
        ("davis:/data/DAVIS:val", "davis:/data/DAVIS:val"),
        ("a=b", "a=b"),
        ("[1, x, 2e-3]", [1, "x", 2e-3]),
        ("{bits: 2, reason: off}", {"bits": 2, "reason": "off"}),
    ],
)
def test_values_are_yaml(text: str, value: object) -> None:
    found = parse_overrides([f"a.b={text}"])["a"]["b"]
    assert found == value and type(found) is type(value)


def test_overrides_are_nested_and_the_last_one_wins() -> None:
    assert parse_overrides(["a.b=1", "a.c.d=2", "a.b=3"]) == {"a": {"b": 3, "c": {"d": 2}}}
    assert parse_overrides(["a.b=1", "a=null"]) == {"a": None}
    assert parse_overrides(["a=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize("text", ["foo", "=3", "a..b=3", ".a=1", "a.=1"])
def test_no_override(text: str) -> None:
    with pytest.raises(UserError, match=f"^'{text}' is no override; write key=value with a dotted key"):
        parse_overrides([text])


def test_override_that_is_not_yaml() -> None:
    with pytest.raises(UserError) as caught:
        parse_overrides(["data.val={"])
    assert str(caught.value) == "'data.val={': '{' is not a valid YAML value"


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


def test_override_of_a_list_replaces_it_and_of_a_mapping_adds_to_it() -> None:
    recipe = build_recipe(
        {"data": {"train": ["davis", "sav"]}, **QUANTIZED}, ["data.train=[coco]", "quantize.weights.bits=2"]
    )
    assert recipe.data.train == ("coco",)
    assert (recipe.quantize.weights.method, recipe.quantize.weights.bits) == ("lsc", 2)
    assert build_recipe({}, ["data.train=davis"]).data.train == ("davis",)


def test_null_takes_a_part_away() -> None:
    assert build_recipe({**QUANTIZED, "train": {"lr": 1}}, ["train=null"]).train is None
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
    recipe = build_recipe(values, overrides)
    assert recipe.train.prompts == prompts
    assert recipe.train.lr == (5e-6 if "train={}" in overrides else 1)
    assert build_recipe(values, ["train.prompts=null", "train=null"]).train is None
