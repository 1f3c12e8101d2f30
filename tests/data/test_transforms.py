"""The model's input against SAM2's own loading, and the properties of the augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sam2.utils.misc import load_video_frames_from_jpg_images
from small_datasets import box

from qsam2.data.transforms import MEAN, STD, ClipAugmentation, resize_masks, to_model_input

FRAMES = 3


def clip() -> tuple[np.ndarray, np.ndarray]:
    """A clip of 40 x 60 whose object 1 is painted pure red, and object 2 pure blue."""
    frames = np.full((FRAMES, 40, 60, 3), 90, np.uint8)
    masks = np.stack([[box((40, 60), 12, 14, 14, 16), box((40, 60), 18, 34, 12, 12)]] * FRAMES)
    frames[masks[:, 0]], frames[masks[:, 1]] = (255, 0, 0), (0, 0, 255)
    return frames, masks


def colours(images: torch.Tensor) -> torch.Tensor:
    """Normalised (T, 3, S, S) -> 0..255."""
    return 255 * (images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


def is_grey(pixels: torch.Tensor) -> bool:
    return bool((pixels.max(1).values - pixels.min(1).values).max() < 20)


@pytest.mark.parametrize("image_size", [64, 100])
def test_the_model_input_is_bit_for_bit_sam2s(tmp_path, image_size):
    noise = np.random.default_rng(0).integers(0, 256, (2, 75, 110, 3), dtype=np.uint8)
    for i, frame in enumerate(noise):
        Image.fromarray(frame).save(tmp_path / f"{i:05d}.jpg", quality=90)
    cpu = torch.device("cpu")
    expected, _, _ = load_video_frames_from_jpg_images(str(tmp_path), image_size, True, compute_device=cpu)
    for i in range(2):
        ours = to_model_input(np.array(Image.open(tmp_path / f"{i:05d}.jpg")), image_size)
        assert ours.dtype == torch.float32 and torch.equal(ours, expected[i])


def test_masks_are_resized_as_a_mask_prompt_is():
    masks = np.random.default_rng(1).random((2, 37, 53)) > 0.6
    prompt = torch.from_numpy(masks).float()[:, None]
    expected = F.interpolate(prompt, (24, 24), align_corners=False, mode="bilinear", antialias=True)[:, 0] >= 0.5
    assert torch.equal(resize_masks(masks, 24), expected)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_an_augmented_clip_depends_on_its_generator_alone(seed):
    frames, masks = clip()
    augment = ClipAugmentation(32)
    first = augment(frames, masks, np.random.default_rng(seed))
    np.random.seed(seed % 1000)
    augment(frames, masks, np.random.default_rng(seed + 1))
    again = augment(frames, masks, np.random.default_rng(seed))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(first[0], ClipAugmentation(32)(frames, masks, np.random.default_rng(seed))[0])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_masks_follow_their_objects_in_all_frames(seed):
    frames, masks = clip()
    images, moved = ClipAugmentation(64)(frames, masks, np.random.default_rng(seed))
    assert images.shape == (FRAMES, 3, 64, 64) and moved.shape == (FRAMES, 2, 64, 64) and moved.dtype == torch.bool
    assert all(torch.equal(moved[t], moved[0]) for t in range(FRAMES))  # the geometry is one for the clip
    inside = -F.max_pool2d(-moved.float(), 5, 1, 2) > 0  # two pixels in from the edge
    pixels = colours(images)
    for t in range(FRAMES):
        for o, channel in ((0, 0), (1, 2)):
            found = pixels[t][:, inside[t, o]]
            assert found.shape[1] > 0
            assert is_grey(pixels[:1]) or (found.argmax(0) == channel).all()


def test_flip_grey_and_jitter_come_at_their_rates_and_apart():
    augment = ClipAugmentation(32)
    flips, greys, both, frame_spread, clip_spread = 0, 0, 0, [], []
    for seed in range(400):
        images, masks = augment(*clip(), np.random.default_rng(seed))
        columns = torch.arange(32.0)
        red, blue = (float((masks[0, o].any(0) * columns).sum() / masks[0, o].any(0).sum()) for o in (0, 1))
        pixels = colours(images)
        grey = is_grey(pixels)
        flips, greys, both = flips + (red > blue), greys + grey, both + (grey and red > blue)
        brightness = pixels.mean((1, 2, 3))
        frame_spread.append(float(brightness.max() / brightness.min()))
        clip_spread.append(float(brightness.mean()))
    assert 160 <= flips <= 240  # 400 draws at 0.5
    assert 6 <= greys <= 38  # at 0.05
    assert 0 < both < greys  # the draws are independent
    assert 1.0 < np.median(frame_spread) < 1.25  # each frame's own jitter is at most 0.9..1.1 and some contrast
    assert np.std(clip_spread) > 1


def test_an_affine_that_would_lose_an_object_is_left_out():
    frames, masks = clip()
    masks[:, 1] = box((40, 60), 0, 0, 2, 2)  # a corner, which most rotations move out of view
    seen = [ClipAugmentation(40)(frames, masks, np.random.default_rng(seed))[1][0] for seed in range(30)]
    assert all(moved[1].any() for moved in seen)
    assert sum(torch.equal(moved, resize_masks(masks[0], 40)) for moved in seen) > 5
