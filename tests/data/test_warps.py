"""The parts of generated videos: warps, waves, outlines, textures, sprites."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import box

from qsam2.data.synthetic.appearance import PHOTOGRAPHS, _read, draw_outline, photographs, smooth_patch, texture_patch
from qsam2.data.synthetic.scenes import Sprite, add_grain, blend, brighten, draw_grain, draw_sprite
from qsam2.data.synthetic.warps import Wave, corners, interpolate, positions, project, similarity
from qsam2.errors import UserError

seeds = st.integers(0, 2**32 - 1)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(seeds)
@settings(max_examples=20)
def test_interpolation_is_exact_integer_arithmetic(seed: int):
    image = noise(seed, 20, 30, 4)
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 28 << 16, (17, 23), dtype=np.int32), rng.integers(0, 18 << 16, (17, 23), dtype=np.int32)
    column, row, fx, fy = x >> 16, y >> 16, ((x >> 11) & 31)[..., None], ((y >> 11) & 31)[..., None]
    grey = image.astype(int)
    upper = grey[row, column] * (32 - fx) + grey[row, column + 1] * fx
    lower = grey[row + 1, column] * (32 - fx) + grey[row + 1, column + 1] * fx
    expected = (upper * (32 - fy) + lower * fy + 512) >> 10
    np.testing.assert_array_equal(interpolate(image, x, y), expected)


@given(seeds, st.booleans())
@settings(max_examples=30)
def test_positions_agree_with_the_matrix(seed: int, tilted: bool):
    rng = np.random.default_rng(seed)
    matrix = similarity(*rng.uniform(-50, 50, 2), rng.uniform(-4, 4), rng.uniform(0.3, 3), rng.uniform(0.5, 2))
    if tilted:
        matrix[2, :2] = rng.uniform(-2e-3, 2e-3, 2)
    x, y = positions(matrix, (40, 60), origin=(7, 3))
    grid = np.stack(np.meshgrid(np.arange(7, 67), np.arange(3, 43)), axis=-1).reshape(-1, 2)
    expected = project(matrix, grid).reshape(40, 60, 2)
    np.testing.assert_allclose(x / 65536, expected[..., 0], atol=2e-3)
    np.testing.assert_allclose(y / 65536, expected[..., 1], atol=2e-3)
    whole = np.stack(positions(matrix, (43, 67)))
    np.testing.assert_array_equal(whole[:, 3:, 7:], [x, y])  # whatever the window


@given(seeds, st.floats(-100, 100), st.floats(0, 50))
@settings(max_examples=30)
def test_a_wave_starts_where_it_should_and_waves_add(seed: int, start: float, reach: float):
    rng = np.random.default_rng(seed)
    wave, other = Wave.draw(rng, start, reach, (10, 30), 0.3), Wave.draw(rng, 1.0, 2.0, (5, 9))
    assert wave(0) == pytest.approx(start)
    assert (wave + other)(7.5) == pytest.approx(wave(7.5) + other(7.5))
    assert all(abs(wave(t) - 0.3 * t - start) <= 2 * reach + 1e-9 for t in range(40))


def test_a_similarity_stretches_scales_turns_then_moves():
    moved = project(similarity(10, 20, np.pi / 2, 2.0, 3.0), corners(1, 1))
    np.testing.assert_allclose(moved, [[10, 20], [10, 26], [8, 26], [8, 20]], atol=1e-9)


@given(seeds)
@settings(max_examples=20)
def test_blending_weighs_by_opacity(seed: int):
    below, above, opacity = noise(seed, 9, 8, 3), noise(seed + 1, 9, 8, 3), noise(seed + 2, 9, 8)
    opacity[0], opacity[1] = 0, 255
    share = (opacity.astype(int) + (opacity >= 128))[..., None] / 256
    blended = below.copy()
    blend(blended, above, opacity)
    np.testing.assert_array_equal(blended, np.floor(below * (1 - share) + above * share + 0.5))
    np.testing.assert_array_equal(blended[0], below[0])
    np.testing.assert_array_equal(blended[1], above[1])


def test_brightness_saturates():
    assert brighten(np.array([[0, 100, 200]], np.uint8), 1.0).tolist() == [[0, 200, 255]]
    assert brighten(np.array([[0, 100, 200]], np.uint8), -1.0).tolist() == [[0, 50, 100]]


def test_grain_changes_from_frame_to_frame_and_stays_below_its_strength():
    grain = draw_grain(np.random.default_rng(0), (20, 24), 9)
    flat = np.full((20, 24, 3), 100, np.uint8)
    frames = [add_grain(flat, grain, index).astype(int) for index in range(64)]
    assert all(0 < np.abs(frame - 100).max() < 9 for frame in frames)
    assert len({frame.tobytes() for frame in frames}) == 64


@given(seeds)
@settings(max_examples=25)
def test_an_outline_fills_its_canvas_but_not_the_edge(seed: int):
    opacity = draw_outline(np.random.default_rng(seed), 48)
    assert opacity.shape == (48, 48) and opacity.dtype == np.uint8
    assert opacity.sum() == opacity[1:-1, 1:-1].sum()
    assert (opacity >= 128).mean() > 0.03
    rows, columns = np.nonzero(opacity)
    assert max(np.ptp(rows), np.ptp(columns)) > 0.45 * 48


def test_outlines_differ_in_their_concavity():
    solidity = []
    for seed in range(40):
        inside = (draw_outline(np.random.default_rng(seed), 64) >= 128).astype(np.uint8)
        contours = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        hull = cv2.convexHull(np.concatenate(contours))
        solidity.append(inside.sum() / cv2.contourArea(hull))
    assert min(solidity) < 0.75 and max(solidity) > 0.9


@pytest.mark.parametrize("photo", range(len(PHOTOGRAPHS)))
def test_patches_have_the_size_and_variety_asked_for(photo: int):
    rng = np.random.default_rng(photo)
    patches = np.stack([texture_patch(rng, 40, 60, photo) for _ in range(4)])
    assert patches.shape == (4, 40, 60, 3) and patches.dtype == np.uint8 and len(np.unique(patches, axis=0)) == 4
    assert photographs()[photo][0].std() > 5


def test_a_smooth_patch_has_no_fine_texture():
    patch = smooth_patch(np.random.default_rng(3), 64, 64).astype(int)
    assert np.abs(np.diff(patch, axis=0)).max() < 24


def test_a_missing_photograph_says_how_to_get_it():
    with pytest.raises(UserError, match=r"lacks data/nothing\.png.*--force-reinstall scikit-image"):
        _read("nothing.png")


def square(side: int = 20, **motion: Any) -> Sprite:
    picture = np.full((side, side, 4), 200, np.uint8)
    picture[..., 3] = np.pad(np.full((side - 4, side - 4), 255), 2)
    return Sprite(picture, 1, **({"x": Wave(0.0), "y": Wave(0.0), "angle": Wave(0.0)} | motion))


def drawn(sprite: Sprite, size: tuple[int, int] = (50, 60), **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """A black frame with the sprite, and its label map."""
    frame, labels = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    draw_sprite(frame, labels, sprite, np.eye(3), 0, **options)
    return frame, labels


def test_a_sprite_lands_where_its_placement_says():
    frame, labels = drawn(square(x=Wave(30.0), y=Wave(20.0)))
    np.testing.assert_array_equal(labels, box((50, 60), 12, 22, 16, 16))
    np.testing.assert_array_equal(frame[..., 0], np.uint8(200) * labels)


def test_a_pixel_belongs_to_a_sprite_from_half_its_opacity_on():
    sprite = square(side=16, x=Wave(8.0), y=Wave(8.0))
    sprite.picture[..., 3] = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(drawn(sprite, (16, 16))[1], sprite.picture[..., 3] >= 128)


@pytest.mark.parametrize(("x", "y"), [(-40.0, 20.0), (30.0, 90.0)])
def test_a_sprite_out_of_view_leaves_the_frame_alone(x, y):
    frame, labels = drawn(square(x=Wave(x), y=Wave(y)))
    assert not frame.any() and not labels.any()


def test_smear_widens_the_picture_and_not_the_label():
    sprite = square(x=Wave(30.0), y=Wave(25.0))
    sharp, labels = drawn(sprite)
    smeared, same = drawn(sprite, blur=np.array([10.0, 0.0]))
    np.testing.assert_array_equal(labels, same)
    assert np.count_nonzero(smeared.any((0, 2))) == np.count_nonzero(sharp.any((0, 2))) + 8
    np.testing.assert_array_equal(smeared.any((1, 2)), sharp.any((1, 2)))


def test_a_limb_follows_its_body():
    body = square(x=Wave(10.0, drift=2.0), y=Wave(25.0), angle=Wave(0.0, drift=0.3))
    limb = square(x=Wave(20.0), y=Wave(10.0), parent=body)
    for time in (0, 5):
        expected = project(body.placement(time), np.array([[20.0, 10.0]]))
        np.testing.assert_allclose(project(limb.placement(time), np.array([[10.0, 10.0]])), expected)
