"""Range calibration: weights from themselves, activations from what passes through a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from qsam2.errors import UserError
from qsam2.layers.convert import quantized_weights, quantizers
from qsam2.quantizers import QuantizerState

Batch = TypeVar("Batch")
MAX_NAMED = 5
"""How many quantizers an error message names before it counts the rest."""


@torch.no_grad()
def calibrate_ranges(model: nn.Module, run: Callable[[Batch], object], batches: Iterable[Batch]) -> int:
    """Find the range of every quantizer and switch all of them, whatever their state, to QUANTIZE.

    `run` passes one batch through the model, in the mode (train, eval) that the caller has put it into; nothing
    is quantized meanwhile. All activation ranges are set at the end, so that none is found on quantized inputs. Returns
    the number of batches. In a distributed run all ranks call it.

    Raises:
        UserError: a batch or a weight holds NaN or infinity, or no batch reached some quantizer.
    """
    activations = [quantizer for _, quantizer in quantizers(model) if quantizer.role == "activation"]
    for _, _, quantizer in quantized_weights(model):
        quantizer.state = QuantizerState.FLOAT
    for quantizer in activations:
        quantizer.state = QuantizerState.OBSERVE
    count = 0
    for batch in batches:
        run(batch)
        count += 1

    unreached = []
    for quantizer in activations:
        try:
            quantizer.finish_observing()
        except UserError:  # every rank has to ask every quantizer before one of them gives up
            unreached.append(quantizer.name)
    if unreached:
        named = ", ".join(unreached[:MAX_NAMED])
        named += f" and {len(unreached) - MAX_NAMED} more" if len(unreached) > MAX_NAMED else ""
        raise UserError(
            f"{count} calibration batches never reached {named}: calibrate on clips with mask and point prompts, "
            "or keep these layers in float by a rule"
        )
    for _, layer, quantizer in quantized_weights(model):
        quantizer.initialize_from(layer.weight)
    return count
