"""Rules: which of them decides, what it gives, every message."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsam2.errors import UserError
from qsam2.recipe import build_recipe
from qsam2.recipe.quantize import DEFAULT_RULES, QuantizeRecipe, Rule

SPECS: dict[str, Any] = {"weights": {"method": "lsq", "bits": 3}, "activations": {"method": "lsc", "bits": 5}}
PATTERNS = st.lists(st.sampled_from(["*", "a.*", "*.b", "a.b", "mask_*", "c"]), max_size=4)


@given(patterns=PATTERNS, name=st.sampled_from(["a.b", "a.c", "c", "mask_downsample", "d"]))
def test_the_first_rule_that_matches_decides(patterns, name):
    rules = [{"match": pattern, "bits": 2 + index} for index, pattern in enumerate(patterns)]
    plan = QuantizeRecipe.model_validate({**SPECS, "rules": rules}).plan(name)
    expected = next((2 + index for index, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)
    default = (8, 8) if name == "mask_downsample" else (3, 5)
    assert (plan.weights.bits, plan.activations.bits) == (default if expected is None else (expected, expected))


def test_a_rule_changes_nothing_but_bits():
    recipe = QuantizeRecipe.model_validate({**SPECS, "rules": [{"match": "a", "weight_bits": 8}]})
    plan = recipe.plan("a")
    assert plan.weights == recipe.weights.model_copy(update={"bits": 8}) and plan.activations == recipe.activations


def test_default_rules_give_reasons():
    assert all(rule.reason != Rule(match="a", bits=8).reason and rule.bits == 8 for rule in DEFAULT_RULES)


@pytest.mark.parametrize(
    "quantize, message",
    [
        ({}, "quantize: neither weights nor activations are given: give one, or quantize=null for the float model"),
        ({**SPECS, "rules": [{"match": "a"}]}, "rule 'a' gives neither: give bits (2 to 8) or keep_float=true"),
        ({**SPECS, "rules": [{"match": "a", "bits": 4, "keep_float": True}]}, "rule 'a' gives both"),
        ({**SPECS, "rules": [{"match": "a", "bits": 9}]}, "quantize.rules.0.bits=9: "),
        ({**SPECS, "rules": [{"match": "a", "bits": 1}]}, "quantize.rules.0.bits=1: "),
        ({**SPECS, "rules": [{"match": "", "bits": 4}]}, "quantize.rules.0.match='': "),
        ({**SPECS, "rules": [{"match": "a", "bit": 4}]}, "did you mean 'bits'?"),
        *(
            (
                {f"{other}s": SPECS[f"{other}s"], "rules": [{"match": "a", f"{part}_bits": 4}]},
                f"rule 'a' gives {part}_bits, but {part}s is null: give it a quantizer",
            )
            for part, other in (("activation", "weight"), ("weight", "activation"))
        ),
    ],
)
def test_messages(quantize, message):
    with pytest.raises(UserError) as error:
        build_recipe({"quantize": quantize})
    assert message in str(error.value) and "\n" not in str(error.value)
