"""Mistakes in a recipe, each told in one line: the key as the user wrote it, the value it has, what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qsam2.errors import UserError
from qsam2.recipe import build_recipe
from qsam2.recipe.section import Section, describe

QUANTIZED = {"quantize": {"weights": {"method": "lsc", "bits": 4}, "activations": {"method": "lsq", "bits": 4}}}
METHODS = "minmax, percentile, mse, entropy, lsq, lsq_plus, pact, dorefa, sawb, statsq, seq or lsc"


def error_of(*overrides: str, values: dict | None = None) -> str:
    with pytest.raises(UserError) as caught:
        build_recipe(QUANTIZED if values is None else values, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MESSAGES = {
    "foo": "'foo' is no override; write key=value with a dotted key, as trainer.max_steps=100",
    "=3": "'=3' is no override; write key=value with a dotted key",
    "a..b=3": "'a..b=3' is no override; write key=value with a dotted key",
    ".a=1": "'.a=1' is no override; write key=value with a dotted key",
    "a.=1": "'a.=1' is no override; write key=value with a dotted key",
    "data.val={": "'data.val={': '{' is not a valid YAML value",
    "quantize.weights.bits=0": "quantize.weights.bits=0: bits=0 is not supported: give 2 to 8, or null in place",
    "quantize.weights.bits=33": "quantize.weights.bits=33: bits=33 is not supported: give 2 to 8",
    "quantize.weights.bits=four": "quantize.weights.bits='four': should be a valid integer",
    "quantize.weights.method=foo": f"quantize.weights.method='foo' is unknown: give {METHODS}",
    "quantize.weights={bits: 4, method: null}": "quantize.weights.method=None is unknown: give minmax",
    "quantize.weights=4": "quantize.weights=4: set its keys instead, as quantize.weights.method=...: method, bits,",
    "quantize=4": "quantize=4: set its keys instead, as quantize.weights=...: weights, activations, rules",
    "quantize.rules={match: a}": "quantize.rules={'match': 'a'}: give a list, as [a, b]",
    "quantize.rules=[{bits: 4}]": "quantize.rules.0 lacks the key 'match'",
    "quantize.rules=[{match: a}]": "quantize.rules.0: rule 'a' gives neither: give bits (2 to 8) or keep_float=true",
    "quantize.rules=[{match: a, bits: 1}]": "quantize.rules.0.bits=1: should be greater than or equal to 2",
    "trainer.max_steps=0": "trainer.max_steps=0: should be greater than 0",
    "trainer.max_steps=": "trainer.max_steps=None: should be a valid integer",
    "trainer.devices=[0, 1]": "trainer.devices=[0, 1]: should be a valid integer",
    "train.lr=.inf": "train.lr=inf: should be a finite number",
    "train.lr=.nan": "train.lr=nan: should be a finite number",
    "train.stages=[]": "train.stages=[]: ",
    "train.stages=stills": "train.stages='stills': give a list, as [a, b]",
    "train.stages=[{kind: photos}]": "train.stages.0.kind='photos': should be 'clips' or 'stills'",
    "train.stages=[{kind: stills, num_frames: 2}]": "train.stages.0: num_frames=2 is for kind=clips, stills have",
    "train.stages=[{weights: 9}, {}]": "train.stages.0.weights=9: ",
    "train.stages=[{weights: 4}]": "recipe: train.stages: the last stage trains other bits than the run ships: leave",
    "train.stages=[{weights: 4}, {}]": "recipe: train.stages.0: weights=4 changes no layer, as quantize gives them",
    "train.stages=[{}, {activations: float}]": "recipe: train.stages: the last stage trains other bits than the run",
    "train={stages: [{kind: stills}], image_encoder_lr: 0}": "recipe: train.stages: kind=stills trains the image ",
    "train.prompts.point=0.9": "train.prompts: point=0.9 and box=0.25 are shares of the clips and sum to more than 1",
    "calibrate.num_frames=1": "recipe: calibrate.num_frames=1 reaches no layer that reads memory",
    "data=davis": "data='davis': set its keys instead, as data.train=...: train, weights, val, root",
    "data.train=3": "data.train=3: give a list, as [a, b]",
    "data.train=[davis, 3]": "data.train.1=3: should be a valid string",
    "data.weights=[1, 2]": "data: 2 weights for 1 train sources; give one each",
    "evaluate.protocol=coco": "evaluate.protocol='coco': should be 'davis' or 'sav'",
    "model.version=3": "model.version='3': should be '2' or '2.1'",
    "model.size=tiy": "model.size='tiy': should be 'nano', 'nano_heavy', 'nano_tails', 'tiny', 'small', 'base_plus' or",
    "debug=foo": "debug='foo': should be 'fast', 'overfit' or 'profile'",
    "debug=[fast]": "debug=['fast']: should be 'fast', 'overfit' or 'profile'",
    "name=a b": "name='a b': give letters, digits, '_', '-' and '.', not dots alone",
    "name=..": "name='..': give letters, digits, '_', '-' and '.', not dots alone",
    "name=[.]": "name=['.']: should be a valid string",
    f"name={'x' * 300}": "name='xxx",
    "output={}": "output={}: Input is not a valid path",
    "train.lr=true": "train.lr=True: should be a number, not true or false",
    "trainer.devices=true": "trainer.devices=True: should be a number, not true or false",
    "data.weights=[true]": "data.weights=[True]: should be a number, not true or false",
    "quantize.rules=[{match: a, bits: true}]": "quantize.rules.0.bits=True: should be a number, not true or false",
    "train.lr=1e300": "train.lr=1e+300: should be a number from -4294967295 to 4294967295",
    "train.lr='1e300'": "train.lr='1e300': should be a number from -4294967295 to 4294967295",
    "train.lr=2000": "train.lr=2000: should be less than or equal to 1000",
    "train.losses.dice=-.inf": "train.losses.dice=-inf: should be a finite number",
    "train.losses.dice='nan'": "train.losses.dice='nan': should be a finite number",
    "seed=99999999999": "seed=99999999999: should be a number from -4294967295 to 4294967295",
    f"seed={'9' * 4000}": f"'seed={'9' * 90}",
    f"trainer.max_steps=!!int 0x{'f' * 6000}": "'trainer.max_steps=!!int 0xff",
    "seed=!!int x": "'seed=!!int x': '!!int x' is not a valid YAML value",
    "train={lr: 1, lr: 2}": "'train={lr: 1, lr: 2}': '{lr: 1, lr: 2}' is not a valid YAML value (line 1 gives 'lr' a",
    "data={1: 2}": "'data={1: 2}': '{1: 2}' is not a valid YAML value (line 1 has a key that is no text",
    "data=&a [*a, *a]": "'data=&a [*a, *a]': '&a [*a, *a]' is not a valid YAML value (it is nested too deeply",
    f"data={'[' * 3000}": f"'data={'[' * 90}",
    'output="a\\0b"': "'output=\"a\\\\0b\"': '\"a\\\\0b\"' is not a valid YAML value (line 1 has a null character",
    f"data.val={'x ' * 3000}": "data.val='x x ",
    f"{'x' * 3000}=1": "unknown recipe key 'xxx",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_messages(override: str) -> None:
    assert error_of(override).startswith(MESSAGES[override])
    assert len(error_of(override)) < 700, "shows at most 200 characters of the value, beside the keys that there are"


def test_a_quantizer_is_said_in_full() -> None:
    assert error_of("quantize={}", values={}).startswith("quantize: neither weights nor activations are given")
    assert error_of("quantize.weights.bits=4", values={}) == f"quantize.weights.method is missing: give {METHODS}"


@pytest.mark.parametrize(
    ("override", "unknown", "holder", "nearest"),
    [
        ("trainr.max_steps=3", "trainr", "a recipe has name, output,", "trainer"),
        ("trainer.max_step=3", "trainer.max_step", "trainer has max_steps,", "max_steps"),
        ("quantize.weights.momentun=1", "quantize.weights.momentun", "quantize.weights has ", "momentum"),
        ("quantize.rules=[{match: a, bitz: 1}]", "quantize.rules.0.bitz", "quantize.rules.0 has match,", "bits"),
        ("train.distill.mask_logit=1", "train.distill.mask_logit", "train.distill has mask_logits,", "mask_logits"),
        ("evaluate.zzzz=1", "evaluate.zzzz", "evaluate has protocol, ", None),
    ],
)
def test_unknown_keys_name_the_nearest(override: str, unknown: str, holder: str, nearest: str | None) -> None:
    message, hint = error_of(override), f"; did you mean {nearest!r}?"
    assert message.startswith(f"unknown recipe key {unknown!r}: {holder}")
    assert message.endswith(hint) if nearest else "did you mean" not in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=3", "train.lr or reconstruct.lr?"),
        ("max_steps=3", "trainer.max_steps?"),
        ("train.max_steps=3", "trainer.max_steps?"),
        ("num_worker=0", "data.num_workers?"),
        ("trainer.seed=1", "seed?"),
        ("bits=4", "quantize.weights.bits or quantize.activations.bits?"),
        ("quantize.weights.bit=4", "'bits'?"),
    ],
)
def test_unknown_keys_name_those_of_other_sections(override: str, hint: str) -> None:
    assert error_of(override).endswith(f"; did you mean {hint}")


@given(st.text("abcdefgmopst_", min_size=1, max_size=8), st.sampled_from(["", "trainer.", "quantize.weights."]))
def test_no_unknown_key_is_accepted(key: str, prefix: str) -> None:
    message = error_of(f"{prefix}{key}__=1")
    assert message.startswith(f"unknown recipe key '{prefix}{key}__': {prefix[:-1] or 'a recipe'} has ")


def test_the_float_model_is_no_teacher_of_itself() -> None:
    values = {"train": {"distill": {"image_embeddings": 1.0}}}
    assert error_of(values=values).endswith("quantize=null trains just that: set them to 0, or give quantize")
    assert build_recipe(values, ["train.distill.image_embeddings=0"]).quantize is None
    assert build_recipe({**QUANTIZED, **values}).quantize is not None


class Part(Section):
    size: int
    label: str = ""


class Whole(Section):
    parts: dict[str, Part] = {}
    row: tuple[Part, ...] = ()
    first: Part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the table lacks the key 'first'"),
        ({"first": {}}, "first lacks the key 'size'"),
        ({"frist": 1, "first": {"size": 1}}, "unknown table key 'frist': a table has parts, row, first; did you mean"),
        ({"parts": {"a.b": {"size": 1, "labl": ""}}}, "unknown table key 'parts.a.b.labl': parts.a.b has size, label;"),
        ({"parts": {"a": 3}}, "parts.a=3: set its keys instead, as parts.a.size=...: size, label"),
        ({"parts": {"a": {"size": "x"}}}, "parts.a.size='x': should be a valid integer"),
        ({"row": [{"size": 1}, {"siz": 1, "size": 1}]}, "unknown table key 'row.1.siz': row.1 has size, label; did"),
        ({"row": {}}, "row={}: give a list"),
    ],
)
def test_files_of_another_kind_name_their_keys_alike(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(values)
    assert describe(caught.value, Whole, "table").startswith(message)


WEIGHTS_ALONE = {"quantize": {"weights": {"method": "mse", "bits": 4}}}
FLOAT_MEMORY = [{"match": name, "keep_float": True} for name in ("memory_attention.*", "obj_ptr_tpos_proj")]


@pytest.mark.parametrize(
    "more", [{}, {"reconstruct": {"method": "brecq"}}, {"calibrate": {"rounding": "gptq"}}], ids=str
)
@pytest.mark.parametrize("keeps_float", [True, False])
def test_one_frame_is_enough_for_what_reads_no_memory(more: dict[str, Any], keeps_float: bool) -> None:
    rules = {"rules": FLOAT_MEMORY} if keeps_float else {}
    weights = {"quantize": {**WEIGHTS_ALONE["quantize"], **rules}, **more}
    if more and not keeps_float:
        assert "give num_frames=2 or more" in error_of("calibrate.num_frames=1", values=weights)
    else:
        assert build_recipe(weights, ["calibrate.num_frames=1"]).calibrate.num_frames == 1
    both = {"quantize": {**QUANTIZED["quantize"], **rules}}
    if keeps_float:
        assert build_recipe(both, ["calibrate.num_frames=1"]).calibrate.num_frames == 1
