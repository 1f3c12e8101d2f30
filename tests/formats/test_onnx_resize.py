"""Resizing in NumPy against PyTorch's and Pillow's."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qsam2.formats.onnx.resize import resize, resize_frame

SIZES = st.integers(2, 40)


@settings(max_examples=50)
@given(size=st.tuples(SIZES, SIZES), new_size=st.tuples(SIZES, SIZES), antialias=st.booleans(), seed=st.integers(0, 99))
def test_masks_are_resized_as_by_pytorch(size, new_size, antialias, seed):
    x = np.random.default_rng(seed).standard_normal((1, 2, *size)).astype(np.float32)
    theirs = F.interpolate(torch.from_numpy(x), size=new_size, mode="bilinear", antialias=antialias)
    ours = resize(x, *new_size, antialias=antialias)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


@settings(max_examples=50)
@given(size=st.tuples(SIZES, SIZES), side=SIZES, seed=st.integers(0, 99))
@example(size=(16, 16), side=16, seed=0)  # stays as it is
def test_frames_are_resized_as_by_pillow(size, side, seed):
    height, width = sorted(size)  # some versions of Pillow resize the rows of upright pictures first
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(resize_frame(frame, side), np.array(Image.fromarray(frame).resize((side, side))))
