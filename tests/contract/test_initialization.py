"""What a new model starts from, as the released code does: also where a checkpoint lacks it."""

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
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.modeling_vilt import MATCH, VlpViltForPreTraining
from hf_vlp.models.vilt.tasks_vilt import (
    VlpViltForImageTextRetrieval,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
from tests.contract.rows import bert_config

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
        if "norm1" in name or "bn1" in name or "region_mlp.norm" in name
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


# VSE-infinity


def uniform(tensor, bound, rel=0.05):
    assert tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound * UNIFORM, rel=rel if tensor.numel() > 2000 else 0.25)


def assert_pooling_starts_as_torchs(pooling):
    for name, tensor in pooling.gru.named_parameters():
        uniform(tensor, 32**-0.5)
        assert tensor.any(), name
    uniform(pooling.linear.weight, 32**-0.5, rel=0.4)
    assert pooling.linear.bias is None


@pytest.mark.parametrize("how", ["new", "loaded"])
def test_sides_of_regions_and_of_bert(how):
    config = VlpVseConfig(text_config=bert_config(), region_size=200, projection_dim=120)
    model = build(VlpVseForPreTraining, config, how).vse
    uniform(model.visual_projection.weight, (6 / (200 + 120)) ** 0.5)
    assert not model.visual_projection.bias.any()
    uniform(model.region_mlp.fc1.weight, 200**-0.5)
    uniform(model.region_mlp.fc1.bias, 200**-0.5)
    uniform(model.region_mlp.fc2.weight, 60**-0.5)
    uniform(model.text_projection.weight, 32**-0.5)
    uniform(model.text_projection.bias, 32**-0.5)
    norm = model.region_mlp.norm
    assert (norm.weight == 1).all() and (norm.running_var == 1).all()
    assert not norm.bias.any() and not norm.running_mean.any() and norm.num_batches_tracked == 0
    assert (norm.momentum, norm.eps) == (0.1, 1e-5)
    assert_pooling_starts_as_torchs(model.text_pooling)
    assert_pooling_starts_as_torchs(model.visual_pooling)
    # the encoder keeps its own rule
    query = model.text_model.encoder.layer[0].attention.self.query
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.1) and not query.bias.any()


@pytest.mark.parametrize("how", ["new", "loaded"])
def test_sides_of_a_grid_and_of_a_bigru(how):
    text = VlpVseGruConfig(vocab_size=300, embedding_size=30, hidden_size=50)
    sizes = {"embedding_size": 16, "hidden_sizes": (64, 64, 96), "bottleneck_sizes": (32, 48, 64)}
    grid = VlpVseGridConfig(depths=(1, 1, 1), **sizes)
    model = build(VlpVseForPreTraining, VlpVseConfig(text_config=text, vision_config=grid, projection_dim=50), how).vse
    uniform(model.text_model.embeddings.weight, 0.1)
    for tensor in model.text_model.gru.parameters():
        uniform(tensor, 50**-0.5)
    uniform(model.visual_projection.weight, (6 / (96 + 50)) ** 0.5)
    assert not model.visual_projection.bias.any()
    assert_pooling_starts_as_torchs(model.text_pooling)
    for convolution, fan_out in (
        (model.vision_model.resnet.conv1, 49 * 16),
        (model.vision_model.resnet.layer2[0].conv2, 9 * 48),
        (model.vision_model.resnet.layer3[0].downsample[0], 96),
    ):
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
    assert not list(model.text_projection.parameters())  # nothing between the BiGRU and its pooling


VILT = VlpViltConfig(
    vocab_size=400,
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=64,
    patch_size=8,
    mpp_weight=1.0,
    num_labels=30,
)
VILT_CLASSES = [
    VlpViltForPreTraining,
    VlpViltForImageTextRetrieval,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
]


@pytest.mark.parametrize("how", ["new", "loaded"])
@pytest.mark.parametrize("model_class", VILT_CLASSES)
def test_vilt_is_normal_but_for_its_patches(model_class, how):
    torch.manual_seed(0)
    model = build(model_class, VILT, how)
    patches = ("vilt.image_embeddings.patch_embedding.weight", "vilt.image_embeddings.patch_embedding.bias")
    for name, value in model.named_parameters():
        if name in patches:  # torch's default
            assert value.std().item() == pytest.approx((3 * 64) ** -0.5 * UNIFORM, rel=0.2), name
            assert value.abs().max() <= (3 * 64) ** -0.5, name
        elif name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.05 if value.numel() > 2000 else 0.25), name
            assert abs(value.mean().item()) < 0.01 and value.abs().max() > 0.04, name
    words = model.vilt.text_embeddings.word_embeddings
    assert words.padding_idx == 0 and words.weight[0].std().item() == pytest.approx(0.02, rel=0.3)
    if model_class is VlpViltForPreTraining:
        assert not torch.equal(model.mlm_head.decoder.weight, words.weight)
    if model_class is VlpViltForImageTextRetrieval:
        assert torch.equal(model.rank_head.weight[0], model.itm_head.weight[MATCH])
        assert not torch.equal(model.rank_head.weight[0], model.itm_head.weight[1 - MATCH])
    if model_class is VlpViltForVisualReasoning:
        second, modalities = model.second_image_embedding[0], model.vilt.modality_embeddings.weight
        assert torch.equal(second, modalities[1]) and not torch.equal(second, modalities[0])
