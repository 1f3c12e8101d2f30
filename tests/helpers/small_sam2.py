"""A small SAM2 and the ways to run it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from qsam2.models import SAM2
from qsam2.models.sam2 import model_config

SIZE_PX = 64
SMALL = {
    "image_encoder": {
        "trunk": {"embed_dim": 16, "stages": [1, 1, 2, 1]},
        "neck": {"d_model": 64, "backbone_channel_list": [128, 64, 32, 16], "position_encoding": {"num_pos_feats": 64}},
    },
    "memory_attention": {
        "d_model": 64,
        "num_layers": 1,
        "layer": {
            "d_model": 64,
            "dim_feedforward": 64,
            "self_attention": {"embedding_dim": 64},
            "cross_attention": {"embedding_dim": 64, "kv_in_dim": 32},
        },
    },
    "memory_encoder": {
        "in_dim": 64,
        "out_dim": 32,
        "position_encoding": {"num_pos_feats": 32},
        "mask_downsampler": {"embed_dim": 64},
        "fuser": {"layer": {"dim": 64}},
    },
    "decoder_mlp_dim": 64,
}


def build_small_sam2() -> SAM2:
    """nano's architecture with fewer channels and blocks."""
    config = OmegaConf.merge(model_config("nano", image_size=SIZE_PX), SMALL)
    return instantiate(config, _recursive_=True).eval()


def square() -> Tensor:
    mask = torch.zeros(SIZE_PX, SIZE_PX, dtype=torch.bool)
    mask[16:48, 16:48] = True
    return mask


def segment_image(model: SAM2) -> list[Tensor]:
    """Masks, scores and logits for one click."""
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(SIZE_PX // stride,) * 2 for stride in (4, 8, 16)]  # fixed to 1024 px in sam2
    predictor.set_image(np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8))
    results = predictor.predict(np.array([[30.0, 20.0]]), np.array([1]))
    return [torch.from_numpy(result) for result in results]


def track_video(model: SAM2) -> list[Tensor]:
    """Mask logits of each frame: a mask on the first, a click on the second."""
    frames = list(torch.randn(4, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)))
    state = model.init_state(frames, video_size=(SIZE_PX, SIZE_PX))
    model.add_new_mask(state, 0, 1, square())
    model.add_new_points_or_box(state, 1, 1, points=[[30.0, 20.0]], labels=[1])
    return [masks for _, _, masks in model.propagate_in_video(state)]


def train_forward(model: SAM2) -> list[Tensor]:
    """Mask logits of all click steps of a training forward with mask and point prompts, on 3 frames with 2 objects."""
    frames, objects = 3, 2
    images = torch.randn(frames, 1, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    index = torch.stack([torch.arange(frames).repeat_interleave(objects), torch.zeros(frames * objects)], dim=1)
    masks = square().expand(frames, objects, -1, -1).clone()
    masks[:, 1] = ~masks[:, 1]
    zeros = torch.zeros(frames, objects, 3, dtype=torch.long)
    batch = BatchedVideoDatapoint(
        img_batch=images,
        obj_to_frame_idx=index.int().view(frames, objects, 2),
        masks=masks,
        metadata=BatchedVideoMetaData(unique_objects_identifier=zeros, frame_orig_size=zeros[..., :2]),
        dict_key="test",
        batch_size=[frames],
    )
    outputs = []
    for points in (0.0, 1.0):
        torch.manual_seed(0)
        model.rng = np.random.default_rng(0)
        model.prob_to_use_pt_input_for_train = model.prob_to_use_pt_input_for_eval = points
        model.num_correction_pt_per_frame = 1
        for frame in model(batch):
            outputs += frame["multistep_pred_multimasks_high_res"]
    return outputs


RUNS: dict[str, Callable[[SAM2], list[Tensor]]] = {
    "image": segment_image,
    "video": track_video,
    "training": train_forward,
}
