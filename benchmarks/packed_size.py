"""Bytes of packed files against bfloat16, for sizes with random weights.

    python benchmarks/packed_size.py [tiny base_plus ...]

`default` is what recipes do: 8 bits for patch embedding and output heads, norms and embeddings in float. `all` lays one
rule over it, {match: "*", weight_bits: BITS}: every Linear and convolution at the low bits. Weights alone are quantized
(MinMax, one scale a channel); the scales of activations, a few hundred numbers, come on top.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.formats.packed import model_bytes, save_packed
from qsam2.layers.convert import convert, finalize
from qsam2.models import build_sam2
from qsam2.recipe import build_recipe

RULES: dict[str, list[dict[str, Any]]] = {"default": [], "all": [{"match": "*"}]}


def measure(size: str, bits: int, rules: str) -> dict[str, float]:
    """Bytes of the file, of its header, of what is float in it, and of the model in bfloat16."""
    torch.manual_seed(0)
    model = build_sam2(size)
    given = [{**rule, "weight_bits": bits} for rule in RULES[rules]]
    recipe = build_recipe({"quantize": {"weights": {"method": "minmax", "bits": bits}, "rules": given}})
    assert recipe.quantize is not None
    convert(model, recipe.quantize)
    find_ranges(model, lambda batch: None, [])
    finalize(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(path, model, recipe.model_dump(mode="json"))
        with path.open("rb") as file:
            header = 8 + struct.unpack("<Q", file.read(8))[0]
        return {"file": path.stat().st_size, "header": header, "bfloat16": model_bytes(model)["bfloat16"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=("tiny", "base_plus"))
    print("| size | weights | rules | bfloat16 MB | packed MB | times smaller | header |")
    print("|---|---|---|---|---|---|---|")
    for size in parser.parse_args().sizes:
        for bits in (2, 4):
            for rules in RULES:
                found = measure(size, bits, rules)
                megabytes = [f"{found[key] / 1e6:.2f}" for key in ("bfloat16", "file")]
                share = f"{100 * found['header'] / found['file']:.1f} %"
                times = f"{found['bfloat16'] / found['file']:.2f}"
                print("|", " | ".join([size, f"W{bits}", rules, *megabytes, times, share]), "|", flush=True)


if __name__ == "__main__":
    main()
