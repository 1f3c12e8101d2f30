"""Sharing in the training forward: the same code, with gradients, an object each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_videos import SIZE_PX, distance, random_nano, track, track_with
from torch import Tensor
from training.utils.data_utils import BatchedVideoDatapoint

from qsam2.calibration.activation_ranges import find_ranges
from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.layers.convert import convert
from qsam2.memory.reader import use_memory
from qsam2.models import SAM2
from qsam2.recipe.quantize import QuantizeRecipe
from qsam2.recipe.quantizer_specs import LSQSpec
from qsam2.recipe.recipe import MemoryRecipe
from qsam2.recipe.train import PromptRecipe
from qsam2.train.video_training import prompted_forward, set_dropout, set_prompts

FRAMES = 5


@pytest.fixture(scope="module")
def clip() -> BatchedVideoDatapoint:
    """One clip with two objects."""
    videos = moving_objects("train", 2, num_frames=FRAMES, max_objects=2)
    clips = ClipDataset(videos, num_frames=FRAMES, max_objects=2, image_size=SIZE_PX, length=2, augment=False)
    return collate_clips([clips[0]])


@pytest.fixture(scope="module")
def trained() -> SAM2:
    model = random_nano().train()
    set_prompts(model, PromptRecipe(point=0, box=0, conditioning_frames=1, correction_frames=1, correction_clicks=1))
    set_dropout(model, 0.0)
    return model


def run(model: SAM2, clip: BatchedVideoDatapoint, **memory: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mask logits (frames, objects, H, W) of a training forward with mask prompts, and the gradients of their sum."""
    use_memory(model, MemoryRecipe(**memory))
    masks = torch.stack([frame["multistep_pred_masks"][:, 0] for frame in model(clip)])
    weights = torch.linspace(-1, 1, masks[1:].numel()).view_as(masks[1:])
    model.zero_grad()
    (masks[1:] * weights).mean().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return masks.detach(), gradients


def test_the_cache_trains_as_sam2_does(trained: SAM2, clip: BatchedVideoDatapoint) -> None:
    masks, gradients = run(trained, clip)
    cached_masks, cached_gradients = run(trained, clip, cache=True)
    assert (masks[1:] - cached_masks[1:]).abs().max() < 1e-5
    assert gradients.keys() == cached_gradients.keys()
    for name, gradient in gradients.items():
        error = (gradient - cached_gradients[name]).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("sharing", ["adaptive", "oldest", "stride", "pool", "sparse", "synthesis"])
def test_gradients_flow_through_shared_keys(sharing: Any, trained: SAM2, clip: BatchedVideoDatapoint) -> None:
    masks, _ = run(trained, clip)
    shared, gradients = run(trained, clip, sharing=sharing, frames=2, cache=sharing != "pool")
    assert (masks[1:3] - shared[1:3]).abs().max() < 1e-5  # one remembered frame and the prompted one: nothing to share
    assert 1e-5 < (masks[3:] - shared[3:]).abs().max() < 5
    for name in ("k_proj.weight", "v_proj.weight"):
        gradient = gradients[f"memory_attention.layers.0.cross_attn_image.{name}"]
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert gradients["memory_encoder.out_proj.weight"].abs().max() > 0
    assert gradients["maskmem_tpos_enc"].abs().max() > 0


def test_objects_of_a_batch_are_as_on_their_own(trained: SAM2, clip: BatchedVideoDatapoint) -> None:
    """Different objects share different frames."""
    together, _ = run(trained, clip, sharing="adaptive", frames=3, cache=True)
    for item in range(2):
        alone = copy.copy(clip)
        alone.masks = clip.masks[:, item : item + 1]
        alone.obj_to_frame_idx = clip.obj_to_frame_idx[:, item : item + 1]
        masks, _ = run(trained, alone, sharing="adaptive", frames=3, cache=True)
        assert (masks[1:, 0] - together[1:, item]).abs().max() < 1e-4


def test_a_model_that_has_tracked_can_be_trained_and_copied(trained: SAM2, clip: BatchedVideoDatapoint) -> None:
    """Nothing that tracking keeps in inference mode meets a gradient; a copy keeps tables of its own weights."""
    model = copy.deepcopy(trained).eval()
    before = track_with(model, 8, cache=True)
    twin = copy.deepcopy(model)
    assert distance(track(twin, 8), before) == 0
    with torch.no_grad():
        twin.maskmem_tpos_enc[0] += 1
    assert distance(track(twin, 8), before) > 1e-5
    torch.stack([frame["multistep_pred_masks"][:, 0] for frame in model.train()(clip)]).sum().backward()


def test_qat_with_sharing(trained: SAM2, clip: BatchedVideoDatapoint) -> None:
    """Steps of the key and value quantizers learn, and the cached keys of one step do not serve the next."""
    model = copy.deepcopy(trained).eval()
    spec = LSQSpec(bits=4, range="minmax")
    convert(model, QuantizeRecipe(weights=spec, activations=spec))
    with torch.no_grad():
        find_ranges(model, lambda points: prompted_forward(model, clip, points=points), (False,))
    model.train()
    attention = model.memory_attention.layers[0].cross_attn_image
    masks, gradients = run(model, clip, sharing="adaptive", frames=2, cache=True)
    for quantizer in (attention.k_quantizer, attention.v_quantizer, attention.k_proj.input_quantizer):
        learned = quantizer.learned_parameters()
        assert learned and all(torch.isfinite(step.grad).all() and step.grad.abs().max() > 0 for step in learned)
    assert gradients["maskmem_tpos_enc"].abs().max() > 0
    with torch.no_grad():
        attention.v_proj.weight.mul_(2)
    again, _ = run(model, clip, sharing="adaptive", frames=2, cache=True)
    assert (masks[1:] - again[1:]).abs().max() > 1e-5
