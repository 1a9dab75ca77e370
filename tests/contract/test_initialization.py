"""What a new model starts from (the released code's `initialize_parameters`): also where a checkpoint lacks it."""

import math

import pytest
import torch

from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining
from hf_vlp.models.clip.tasks_clip import VlpClipForImageClassification

WIDTH, LAYERS, JOINT = 128, 3, 96
UNIFORM = 3**-0.5  # std of a uniform variable on [-1, 1]


def towers(vision):
    text = VlpClipTextConfig(
        vocab_size=400, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    return VlpClipConfig(text_config=text, vision_config=vision, projection_dim=JOINT, logit_scale_init_value=1.5)


VIT = VlpClipVisionConfig(
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=64,
    patch_size=8,
)
RESNET = VlpClipResNetConfig(width=4, layers=[1, 1, 1, 1], num_attention_heads=2, image_size=224, projection_dim=JOINT)


def build(model_class, config, how):
    """A new model, or a load from a checkpoint that lacks everything but each block's first norm."""
    if how == "new":
        return model_class._from_config(config)
    some = {
        name: value
        for name, value in model_class._from_config(config).state_dict().items()
        if "norm1" in name or "bn1" in name
    }
    return model_class.from_pretrained(None, config=config, state_dict=some)


@pytest.mark.parametrize("how", ["new", "loaded"])
def test_text_side(how):
    model = build(VlpClipForPreTraining, towers(VIT), how).clip
    block, residual = model.text_model.encoder.layers[1], WIDTH**-0.5 * (2 * LAYERS) ** -0.5
    for tensor, std in (
        (model.text_model.embeddings.token_embedding.weight, 0.02),
        (model.text_model.embeddings.position_embedding, 0.01),
        (block.attention.q_proj.weight, WIDTH**-0.5),
        (block.attention.v_proj.weight, WIDTH**-0.5),
        (block.attention.out_proj.weight, residual),
        (block.mlp.fc1.weight, (2 * WIDTH) ** -0.5),
        (block.mlp.fc2.weight, residual),
        (block.mlp.fc1.bias, WIDTH**-0.5 * UNIFORM),
        (model.text_projection.weight, WIDTH**-0.5),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.05 if tensor.numel() > 2000 else 0.15)
    assert not block.attention.q_proj.bias.any() and not block.attention.out_proj.bias.any()
    assert model.logit_scale.weight.item() == 1.5


@pytest.mark.parametrize("how", ["new", "loaded"])
def test_vision_transformer_keeps_torchs_defaults_in_its_blocks(how):
    model = build(VlpClipForPreTraining, towers(VIT), how).clip
    tower, block = model.vision_model, model.vision_model.encoder.layers[1]
    for tensor, std in (
        (tower.embeddings.class_embedding, WIDTH**-0.5),
        (tower.embeddings.position_embedding, WIDTH**-0.5),
        (tower.embeddings.patch_embedding.weight, (3 * 64) ** -0.5 * UNIFORM),
        (block.attention.k_proj.weight, math.sqrt(6 / (4 * WIDTH)) * UNIFORM),
        (block.attention.out_proj.weight, WIDTH**-0.5 * UNIFORM),
        (block.mlp.fc2.weight, (4 * WIDTH) ** -0.5 * UNIFORM),
        (model.visual_projection.weight, WIDTH**-0.5),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.05 if tensor.numel() > 2000 else 0.2)
    assert not block.attention.q_proj.bias.any() and not block.attention.out_proj.bias.any()


@pytest.mark.parametrize("how", ["new", "loaded"])
def test_modified_resnet(how):
    tower = build(VlpClipForPreTraining, towers(RESNET), how).clip.vision_model
    for block in (tower.resnet.layer1[0], tower.resnet.layer4[0]):
        assert not block.bn3.weight.any() and (block.bn2.weight == 1).all()
    for projection in (tower.attention_pool.attention.q_proj, tower.attention_pool.attention.out_proj):
        assert projection.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert tower.attention_pool.position_embedding.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert tower.resnet.layer4[0].conv2.weight.std().item() == pytest.approx((9 * 32) ** -0.5 * UNIFORM, rel=0.05)


@pytest.mark.parametrize("how", ["new", "loaded"])
def test_a_classifiers_image_side_starts_like_the_pairs(how):
    model = build(VlpClipForImageClassification, towers(VIT), how)
    assert model.clip.visual_projection.weight.std().item() == pytest.approx(WIDTH**-0.5, rel=0.05)
    assert not model.classifier.bias.any() and model.classifier.weight.isfinite().all()


def test_a_new_model_is_near_chance():
    torch.manual_seed(0)
    model = VlpClipForPreTraining._from_config(towers(VIT)).eval()
    ids = torch.randint(1, 300, (8, 6))
    ids[:, -1] = 399
    model.clip.text_model.config.eos_token_id = 399
    loss = model(input_ids=ids, pixel_values=torch.randn(8, 3, 64, 64)).loss
    assert loss.item() == pytest.approx(math.log(8), abs=0.6)
