import numpy as np
import pytest
import torch

from qsam2.data.clips import ClipDataset, collate_clips
from qsam2.data.synthetic.moving_objects import moving_objects
from qsam2.models import build_sam2
from qsam2.models.nano.scratch import initialise
from qsam2.recipe import build_recipe
from qsam2.train.video_training import VideoTraining


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    model = build_sam2("nano", image_size=256)
    initialise(model)
    return model


def first_losses(model):
    clips = ClipDataset(
        moving_objects("train", 2, num_frames=2), num_frames=2, max_objects=1, image_size=256, length=2, augment=False
    )
    recipe = build_recipe({"train": {"prompts": {"point": 1, "box": 0}}})
    module = VideoTraining(model, recipe.train)
    model.train()
    batch = collate_clips([clips[0], clips[1]])
    model.rng = np.random.default_rng(0)
    backbone = model.prepare_prompt_inputs(model.forward_image(batch.flat_img_batch), batch)
    losses = module.loss(model.forward_tracking(backbone, batch), batch.masks)
    model.eval()
    return losses


def test_masks_can_be_learned_from_the_first_step(fresh):
    torch.manual_seed(0)
    before = float(first_losses(build_sam2("nano", image_size=256))["loss_mask"])
    losses = first_losses(fresh)
    assert losses["loss_mask"] < 0.2 * before  # sam2's own start writes -1024 into the masks
    losses["core_loss"].backward()
    heads = [mlp.layers[-1].weight.grad for mlp in fresh.sam_mask_decoder.output_hypernetworks_mlps]
    assert any(grad is not None and grad.abs().max() > 0 for grad in heads)
    fresh.zero_grad()


@torch.no_grad()
def test_a_click_attends_to_its_place(fresh):
    attention = fresh.sam_mask_decoder.transformer.layers[0].cross_attn_token_to_image
    encoder = fresh.sam_prompt_encoder
    places = encoder.get_dense_pe()[0].flatten(1).T  # (256, C), 16 a row
    for row, column in ((3, 12), (8, 8), (14, 1)):
        pixel = torch.tensor([[[16.0 * column + 8, 16.0 * row + 8]]])
        click = encoder.pe_layer.forward_with_coords(pixel, (256, 256))[0]
        scores = attention.q_proj(click) @ attention.k_proj(places).T
        assert int(scores.argmax()) == 16 * row + column


@torch.no_grad()
def test_a_pixel_attends_to_what_looks_alike_in_memory(fresh):
    width = fresh.hidden_dim
    features = torch.randn(1, width, 4, 4)
    memory = fresh.memory_encoder(features, torch.zeros(1, 1, 64, 64), skip_mask_sigmoid=True)["vision_features"]
    for layer in fresh.memory_attention.layers:
        keys = layer.cross_attn_image.k_proj(memory.flatten(2)[0].T)
        queries = layer.cross_attn_image.q_proj(features.flatten(2)[0].T)
        assert (queries @ keys.T).argmax(1).eq(torch.arange(16)).float().mean() > 0.9


def test_same_seed_same_weights(fresh):
    def weights(seed):
        torch.manual_seed(0)
        model = build_sam2("nano")
        initialise(model, seed)
        return model.state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
