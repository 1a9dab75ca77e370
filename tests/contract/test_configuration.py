"""Configurations: what they accept, what they say no to, and how many parameters they stand for."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, BertModel
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.models.clip.modeling_clip import VlpClipModel
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig
from hf_vlp.models.vse.modeling_vse import VlpVseModel
from tests.contract.rows import (
    bert_config,
    grid_config,
    gru_config,
    resnet_config,
    text_config,
    vision_config,
    vse_config,
)


def text(width=512):
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}


def resnet(layers, width, image_size, joint):
    return VlpClipResNetConfig(
        layers=layers, width=width, image_size=image_size, num_attention_heads=width // 2, projection_dim=joint
    )


def vit(width, layers, patch, image_size=224):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": image_size,
    }


# The counts of the published checkpoints.
PUBLISHED = {
    "RN50": (text(), resnet([3, 4, 6, 3], 64, 224, 1024), 1024, 102_007_137),
    "RN101": (text(), resnet([3, 4, 23, 3], 64, 224, 512), 512, 119_688_033),
    "RN50x4": (text(640), resnet([4, 6, 10, 6], 80, 288, 640), 640, 178_300_601),
    "RN50x16": (text(768), resnet([6, 8, 18, 8], 96, 384, 768), 768, 290_979_217),
    "RN50x64": (text(1024), resnet([3, 15, 36, 10], 128, 448, 1024), 1024, 623_258_305),
    "ViT-B/32": ({}, {}, 512, 151_277_313),
    "ViT-B/16": (text(), vit(768, 12, 16), 512, 149_620_737),
    "ViT-L/14": (text(768), vit(1024, 24, 14), 768, 427_616_513),
    "ViT-L/14@336px": (text(768), vit(1024, 24, 14, 336), 768, 427_944_193),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    text_side, image_side, joint, expected = PUBLISHED[name]
    config = VlpClipConfig(text_config=text_side, vision_config=image_side, projection_dim=joint)
    with torch.device("meta"):
        model = VlpClipModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_the_default_resnet_is_rn50():
    config = VlpClipResNetConfig()
    assert (config.width, config.layers, config.hidden_size, config.num_hidden_layers) == (64, [3, 4, 6, 3], 2048, 16)
    assert config.to_dict() == resnet([3, 4, 6, 3], 64, 224, 1024).to_dict()


POOLING = 2 * (2 * (2 * 3 * 32 * 32 + 2 * 3 * 32) + 32)  # of both sides: two directions and a score
BERT = 109_482_240 - (768 * 768 + 768)  # without the pooler
PROJECTION = 2048 * 1024 + 1024
REGION_SIDE = PROJECTION + (2048 * 512 + 512) + 2 * 512 + (512 * 1024 + 1024)
WORDS = 768 * 1024 + 1024
CLASSIFIER = 2048 * 1000 + 1000  # of the torchvision networks whose counts are below
RESNEXT = {"hidden_sizes": (256, 512, 1024, 2048), "bottleneck_sizes": (256, 512, 1024, 2048), "groups": 32}
BIGRU = 2 * (3 * 1024 * 300 + 3 * 1024 * 1024 + 2 * 3 * 1024)

PUBLISHED_VSE = {
    "region + BERT": ({}, None, BERT + WORDS + REGION_SIDE),
    "BUTD grid + BERT": ({}, {}, BERT + WORDS + PROJECTION + 44_549_160 - CLASSIFIER),
    "WSL grid + BERT": ({}, {**RESNEXT, "graph": "torchvision"}, BERT + WORDS + PROJECTION + 88_791_336 - CLASSIFIER),
    "region + BiGRU": ({"vocab_size": 11354}, None, 11354 * 300 + BIGRU + REGION_SIDE),
    "ResNet-50 grid + BiGRU": (
        {"vocab_size": 8485},
        {"depths": (3, 4, 6, 3)},
        8485 * 300 + BIGRU + PROJECTION + 25_557_032 - CLASSIFIER,
    ),
    "ResNet-152 grid + BiGRU": (
        {"vocab_size": 8485},
        {"depths": (3, 8, 36, 3)},
        8485 * 300 + BIGRU + PROJECTION + 60_192_808 - CLASSIFIER,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_VSE)
def test_published_vse_models_have_their_number_of_parameters(name):
    text_side, image_side, expected = PUBLISHED_VSE[name]
    text_side = VlpVseGruConfig(**text_side) if text_side else BertConfig()
    image_side = None if image_side is None else VlpVseGridConfig(**image_side)
    with torch.device("meta"):
        model = VlpVseModel(VlpVseConfig(text_config=text_side, vision_config=image_side))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected + POOLING


def test_the_default_vse_is_the_region_model_with_bert(tmp_path):
    config = VlpVseConfig()
    assert type(config.text_config) is BertConfig and config.vision_config is None
    assert (config.region_size, config.projection_dim, config.region_mlp_size) == (2048, 1024, 512)
    assert (config.margin, config.hardest_negatives, config.normalize_image, config.normalize_text) == (
        0.2,
        1,
        True,
        True,
    )
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vision_config is None
    assert VlpVseConfig(projection_dim=20).region_mlp_size == 10
    assert VlpVseConfig(projection_dim=20, region_mlp_size=7).region_mlp_size == 7
    grid = VlpVseGridConfig()
    assert (grid.hidden_size, grid.num_hidden_layers, grid.graph, grid.freeze_norms) == (2048, 33, "caffe", True)


def test_towers_of_a_vse_may_be_dicts_objects_or_names(tmp_path):
    grid = VlpVseConfig(vision_config={"depths": (1, 1, 1, 1)}).vision_config
    assert type(grid) is VlpVseGridConfig and grid.depths == [1, 1, 1, 1]
    gru = {"model_type": "vlp_vse_gru_model", "hidden_size": 20}
    assert type(VlpVseConfig(text_config=gru, projection_dim=20).text_config) is VlpVseGruConfig
    named = VlpVseConfig(vision_config="timm/test_resnet")
    assert named.vision_config.architecture == "test_resnet" and type(named.vision_config) is TimmWrapperConfig
    BertModel(bert_config()).save_pretrained(tmp_path)
    assert VlpVseConfig(text_config=str(tmp_path)).text_config.hidden_size == 32


def test_the_towers_of_a_vse_take_their_part_of_a_whole_configuration(tmp_path):
    vse_config(gru_config, grid_config)().save_pretrained(tmp_path)
    assert VlpVseGruConfig.from_pretrained(tmp_path).embedding_size == 20
    assert VlpVseGridConfig.from_pretrained(tmp_path).hidden_sizes == [16, 24, 32]


VSE_CONFIGS = (grid_config, gru_config, vse_config(), vse_config(gru_config, grid_config, margin=0.3))


@pytest.mark.parametrize(
    "make",
    [text_config, vision_config, resnet_config, lambda: VlpClipConfig(projection_dim=7), *VSE_CONFIGS],
)
def test_round_trip(make, tmp_path):
    config = make()
    config.save_pretrained(tmp_path)
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_pretrained(tmp_path),
        type(config)(**config.to_dict()),
    ):
        assert type(loaded) is type(config) and loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.to_diff_dict() != type(config)().to_diff_dict()


def test_the_towers_take_their_part_of_a_whole_configuration(tmp_path):
    VlpClipConfig(text_config=text_config(), vision_config=resnet_config(), projection_dim=24).save_pretrained(tmp_path)
    assert VlpClipTextConfig.from_pretrained(tmp_path).hidden_size == 32
    assert VlpClipResNetConfig.from_pretrained(tmp_path).width == 4


def test_towers_may_be_dicts_objects_or_left_out():
    config = VlpClipConfig(
        text_config={"hidden_size": 64, "num_attention_heads": 1}, vision_config=resnet_config(), projection_dim=24
    )
    assert type(config.text_config) is VlpClipTextConfig and config.text_config.hidden_size == 64
    assert type(config.vision_config) is VlpClipResNetConfig
    default = VlpClipConfig()
    assert type(default.text_config) is VlpClipTextConfig and type(default.vision_config) is VlpClipVisionConfig
    named = VlpClipConfig(vision_config={"model_type": "vlp_clip_resnet_model", "projection_dim": 512})
    assert type(named.vision_config) is VlpClipResNetConfig
    assert config.get_text_config() is config.text_config


def test_towers_by_name(tmp_path):
    BertModel(bert_config()).save_pretrained(tmp_path)
    config = VlpClipConfig(text_config=str(tmp_path), vision_config="timm/test_resnet")
    assert type(config.text_config) is BertConfig and config.text_config.hidden_size == 32
    assert type(config.vision_config) is TimmWrapperConfig and config.vision_config.architecture == "test_resnet"
    config.save_pretrained(tmp_path / "pair")
    again = AutoConfig.from_pretrained(tmp_path / "pair")
    assert type(again.text_config) is BertConfig and again.vision_config.architecture == "test_resnet"


def test_a_field_of_the_wrong_type_is_named():
    for build, field in (
        (lambda: VlpClipTextConfig(hidden_size="512"), "hidden_size"),
        (lambda: VlpClipVisionConfig(patch_size=8.5), "patch_size"),
        (lambda: VlpClipResNetConfig(width=None), "width"),
        (lambda: VlpClipConfig(projection_dim="512"), "projection_dim"),
        (lambda: VlpClipConfig(logit_scale_init_value="2.6"), "logit_scale_init_value"),
    ):
        with pytest.raises((StrictDataclassError, TypeError, ValueError), match=field):
            build()


def test_a_field_of_an_impossible_value_is_named():
    for build, message in (
        (lambda: VlpClipTextConfig(hidden_size=0), "hidden_size must be 1 or more, got 0"),
        (lambda: VlpClipTextConfig(num_hidden_layers=-1), "num_hidden_layers must be 1 or more, got -1"),
        (
            lambda: VlpClipTextConfig(hidden_size=512, num_attention_heads=7),
            "512 is not a multiple of num_attention_heads 7",
        ),
        (lambda: VlpClipTextConfig(pooling="last"), "pooling must be .*'last'"),
        (lambda: VlpClipVisionConfig(image_size=16, patch_size=32), "image_size 16 is smaller than one patch of 32"),
        (lambda: VlpClipVisionConfig(hidden_size=100), "100 is not a multiple of num_attention_heads 12"),
        (lambda: VlpClipResNetConfig(layers=[1, 1, 1]), r"layers four numbers.*\[1, 1, 1\]"),
        (lambda: VlpClipResNetConfig(layers=[1, 0, 1, 1]), r"layers must be 1 or more"),
        (lambda: VlpClipResNetConfig(width=5), "width must be even"),
        (lambda: VlpClipResNetConfig(image_size=31), "image_size 31 is smaller than the output stride of 32"),
        (lambda: VlpClipResNetConfig(num_attention_heads=3), "2048 is not a multiple of num_attention_heads 3"),
        (lambda: VlpClipConfig(projection_dim=0), "projection_dim must be 1 or more, got 0"),
        (lambda: VlpClipConfig(contrastive_loss="hinge"), "contrastive_loss must be one of .*'hinge'"),
        (lambda: VlpClipConfig(negatives="all"), "negatives must be one of .*'all'"),
        (lambda: VlpClipConfig(foreign_text_pooling="cls"), "foreign_text_pooling must be one of .*'cls'"),
        (lambda: VlpClipConfig(classifier_input="cosine"), "classifier_input must be one of .*'cosine'"),
        (lambda: VlpClipConfig(contrastive_targets="soft"), "contrastive_targets must be one of .*'soft'"),
        (lambda: VlpClipConfig(vision_config=resnet_config(), projection_dim=512), "projection_dim 512 differs .* 24"),
        (lambda: VlpVseGridConfig(graph="keras"), "graph must be one of .*'keras'"),
        (lambda: VlpVseGridConfig(depths=(3, 4, 6)), "one number a stage, got {'depths': 3, 'hidden_sizes': 4"),
        (lambda: VlpVseGridConfig(depths=(3, 4, 0, 3)), "depths must be 1 or more"),
        (lambda: VlpVseGridConfig(groups=3), r"bottleneck_sizes \[64, .* must be multiples of groups 3"),
        (lambda: VlpVseGridConfig(groups=0), "groups must be 1 or more"),
        (lambda: VlpVseGridConfig(num_channels=0), "num_channels must be 1 or more"),
        (lambda: VlpVseGridConfig(depths=(), hidden_sizes=(), bottleneck_sizes=()), "one number a stage"),
        (lambda: VlpVseGruConfig(embedding_size=0), "embedding_size must be 1 or more, got 0"),
        (lambda: VlpVseConfig(region_size=0), "region_size must be 1 or more, got 0"),
        (lambda: VlpVseConfig(position_size=7), "position_size 7 must be even"),
        (lambda: VlpVseConfig(region_norm_rows="padded"), "region_norm_rows must be one of .*'padded'"),
        (lambda: VlpVseConfig(contrastive_targets="soft"), "contrastive_targets must be one of .*'soft'"),
        (lambda: VlpVseConfig(negatives="all"), "negatives must be one of .*'all'"),
        (lambda: VlpVseConfig(hardest_negatives=1.2), "hardest_negatives 1.2 must lie between 0 and 1"),
        (lambda: VlpVseConfig(margin=-0.1), "margin -0.1 be 0 or more"),
        (lambda: VlpVseConfig(text_config=gru_config()), "projection_dim 1024 differs from the BiGRU's hidden_size 24"),
    ):
        with pytest.raises((StrictDataclassError, ValueError), match=message):
            build()


@pytest.mark.parametrize(
    ("config_class", "typo", "meant"),
    [
        (VlpClipTextConfig, "hiden_size", "hidden_size"),
        (VlpClipTextConfig, "layer_norm_epsilon", "layer_norm_eps"),
        (VlpClipVisionConfig, "patchsize", "patch_size"),
        (VlpClipResNetConfig, "widht", None),
        (VlpClipConfig, "logit_scale_initial_value", "logit_scale_init_value"),
        (VlpClipConfig, "projection_dims", "projection_dim"),
        (VlpVseConfig, "region_sizes", "region_size"),
        (VlpVseConfig, "hardest_negative", "hardest_negatives"),
        (VlpVseGridConfig, "freeze_norm", "freeze_norms"),
        (VlpVseGruConfig, "embeding_size", "embedding_size"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_right_name(config_class, typo, meant):
    if meant is None:  # too far from any field to be taken for one
        assert config_class(**{typo: 3}).widht == 3
        return
    with pytest.raises(TypeError, match=f"no field '{typo}': did you mean '{meant}'"):
        config_class(**{typo: 3})
    assert config_class(an_extra_of_my_own=3).an_extra_of_my_own == 3


def test_a_misspelt_field_of_a_tower_is_refused_too():
    with pytest.raises(TypeError, match="VlpClipTextConfig has no field 'vocab_sizes'"):
        VlpClipConfig(text_config={"vocab_sizes": 100})


def test_what_a_saved_file_carries_besides_is_kept(tmp_path):
    """Other tools write fields of their own; one that resembles ours does no harm where ours is given as well."""
    config = VlpClipTextConfig(layer_norm_eps=1e-6)
    config.layer_norm_epsilon = 1e-6
    config.save_pretrained(tmp_path)
    assert VlpClipTextConfig.from_pretrained(tmp_path).layer_norm_eps == 1e-6


def test_the_sigmoid_loss_has_no_limit_of_the_scale_unless_one_is_given(tmp_path):
    assert VlpClipConfig().logit_scale_max == VlpClipConfig(logit_scale_max="auto").logit_scale_max == math.log(100)
    assert VlpClipConfig(contrastive_loss="sigmoid").logit_scale_max is None
    assert VlpClipConfig(contrastive_loss="sigmoid", logit_scale_max=2).logit_scale_max == 2
    for loss in ("softmax", "sigmoid"):
        for limit in ("auto", None, math.log(100), 3.0):
            config = VlpClipConfig(contrastive_loss=loss, logit_scale_max=limit)
            config.save_pretrained(tmp_path)
            assert VlpClipConfig.from_pretrained(tmp_path).logit_scale_max == config.logit_scale_max
    with pytest.raises(StrictDataclassError, match="logit_scale_max must be a number"):
        VlpClipConfig(logit_scale_max="none")
