"""A whole training step of SAM2: forward, loss, backward and AdamW; its time and its peak memory.

`qsam2` quantizes everything that the default rules name, `qsam2_linear` and the peers the linear layers only, all from
the same calibrated ranges. One object, a click and Meta's number of corrections on the first frame.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.benchmark.measure import Seconds, held_bytes, medians, peak_allocated_bytes
from qsam2.benchmark.peers import Peer, Ranges
from qsam2.calibration.activation_ranges import find_ranges
from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.layers.convert import convert
from qsam2.layers.weight import QuantLinear
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe, Rule
from qsam2.recipe.quantizer_specs import LSCSpec
from qsam2.recipe.recipe import PromptRecipe, TrainRecipe
from qsam2.train.losses import segmentation_loss
from qsam2.train.optimizer import parameter_groups
from qsam2.train.video_training import attention_backend, prompted_forward, set_dropout, set_prompts

RECIPE = TrainRecipe(prompts=PromptRecipe(point=1.0, box=0.0, conditioning_frames=1, correction_frames=1))
CLICKS = 1 + RECIPE.prompts.correction_clicks


def measure_train_step(
    model: SAM2, batch: BatchedVideoDatapoint, peers: Sequence[Peer], *, bits: int, repeats: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The float step: time_s, peak_bytes; and {name: the same two, and time_ratio, memory_ratio to the float step}.

    Peak memory: parameters, buffers and the optimizer's state, and what the step allocates above them.
    """
    models = {"float": model, **quantized_models(model, batch, peers, bits)}
    steps = {name: TrainStep(contestant, batch) for name, contestant in models.items()}
    seconds = medians(steps, repeats, progress="training step")
    rows = {name: {"time_s": seconds[name][0], "peak_bytes": step.peak_bytes()} for name, step in steps.items()}
    ours = rows.pop("float")
    for row in rows.values():
        row["time_ratio"] = row["time_s"] / ours["time_s"]
        row["memory_ratio"] = row["peak_bytes"] / ours["peak_bytes"]
    return ours, rows


def one_clip(frames: int, image_size: int) -> BatchedVideoDatapoint:
    """A generated clip with one object."""
    videos = moving_objects("train", 1, num_frames=frames, max_objects=1)
    clips = ClipDataset(videos, num_frames=frames, max_objects=1, image_size=image_size, length=1, augment=False)
    return collate_clips([clips[0]])


def quantized_models(model: SAM2, batch: BatchedVideoDatapoint, peers: Sequence[Peer], bits: int) -> dict[str, SAM2]:
    """Copies of a float model, quantized by us and by the peers."""
    spec = LSCSpec(bits=bits)
    ours, linear_only = copy.deepcopy(model), copy.deepcopy(model)
    rows = convert(ours, QuantizeRecipe(weights=spec, activations=spec))
    find_ranges(ours, lambda points: prompted_forward(ours, batch, points=points), (False, True))

    rules = tuple(Rule(match=row.name, keep_float=True) for row in rows if row.kind != nn.Linear.__name__)
    convert(linear_only, QuantizeRecipe(weights=spec, activations=spec, rules=rules))
    linear_only.load_state_dict(ours.state_dict(), strict=False)

    models = {"qsam2": ours, "qsam2_linear": linear_only}
    linears = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)}
    for peer in peers:
        models[peer.name] = theirs = copy.deepcopy(model)
        for name, layer in linears.items():
            assert layer.weight_quantizer is not None and layer.input_quantizer is not None
            ranges = Ranges.of(layer.weight_quantizer, layer.input_quantizer)
            theirs.set_submodule(name, peer.linear(theirs.get_submodule(name), ranges))
    return models


class TrainStep:
    """The step of one model, the same prompts each time. Calling it returns its seconds."""

    def __init__(self, model: SAM2, batch: BatchedVideoDatapoint) -> None:
        self.model, self.batch = model.train(), batch
        set_prompts(model, RECIPE.prompts)
        set_dropout(model, 0.0)
        self.loss = segmentation_loss(RECIPE.losses)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE))

    def __call__(self) -> Seconds:
        self.model.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        started = time.perf_counter()
        with attention_backend(torch.device("cpu"), self.model.image_size):
            loss = self.loss(self.model(self.batch), self.batch.masks)["core_loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (time.perf_counter() - started,)

    def peak_bytes(self) -> int:
        """Memory while a step runs: what the model and the optimizer hold, and what the step allocates above it."""
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [value for state in self.optimizer.state.values() for value in state.values()]
        return held_bytes(held) + peak_allocated_bytes(self)
