"""Configurations of CLIP: the text tower, the two image towers and the pair.

Paper: "Learning Transferable Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020.
Defaults are ViT-B/32, the smallest vision transformer of the paper's table 20.
"""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_vlp.configuration import CheckedConfig, require_choice, require_positive


def _heads_divide(config: PreTrainedConfig, width: int, name: str) -> None:
    if width % config.num_attention_heads:
        raise ValueError(
            f"{name} {width} is not a multiple of num_attention_heads {config.num_attention_heads}; CLIP uses heads of 64"
        )


@strict
class VlpClipTextConfig(CheckedConfig, PreTrainedConfig):
    """The causal text transformer (section 2.4).

    vocab_size V, hidden_size D, intermediate_size, num_hidden_layers, num_attention_heads (D // 64 in the paper);
    max_position_embeddings: rows of the position table, the longest text L. eos_token_id: the end-of-text id whose first
    occurrence is pooled. pooling: "eos" (a row without end-of-text is an error) or "largest_id" (the original code: the first
    occurrence of the row's largest id, whatever it is). attention_dropout: not in the paper.
    """

    model_type = "vlp_clip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    pooling: str = "eos"
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 49407

    def validate_architecture(self):
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        require_positive(self, "num_attention_heads")
        _heads_divide(self, self.hidden_size, "hidden_size")
        if self.pooling not in ("eos", "largest_id"):
            raise ValueError(f'pooling must be "eos" or "largest_id", got {self.pooling!r}')


@strict
class VlpClipVisionConfig(CheckedConfig, PreTrainedConfig):
    """The vision transformer (section 2.4: ViT with one more layer norm before the blocks).

    image_size R and patch_size give the position table (R // patch_size)^2 + 1; other sizes interpolate it.
    """

    model_type = "vlp_clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0

    def validate_architecture(self):
        require_positive(self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        require_positive(self, "image_size", "patch_size")
        _heads_divide(self, self.hidden_size, "hidden_size")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")


@strict
class VlpClipResNetConfig(CheckedConfig, PreTrainedConfig):
    """The modified ResNet with attention pooling (section 2.4); defaults are RN50.

    width: channels after the stem (64 in RN50); layers: bottlenecks in each of the four stages; projection_dim E: width of the
    attention pool's output, which is the joint embedding. num_attention_heads: of the attention pool, width * 32 // 64 in
    the paper. image_size R gives the pool's position table (R // 32)^2 + 1; other sizes interpolate it.
    """

    model_type = "vlp_clip_resnet_model"
    base_config_key = "vision_config"

    width: int = 64
    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    num_attention_heads: int = 32
    num_channels: int = 3
    image_size: int = 224
    projection_dim: int = 1024

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, the width D of the attention pool."""
        return self.width * 32

    @property
    def num_hidden_layers(self) -> int:
        return sum(self.layers)

    def complete(self) -> None:
        self.layers = list(self.layers)

    def validate_architecture(self):
        require_positive(self, "width", "layers", "num_attention_heads", "num_channels", "projection_dim")
        if self.width % 2 or len(self.layers) != 4:
            raise ValueError(f"width must be even and layers four numbers, got width {self.width} and layers {self.layers}")
        if self.image_size < 32:
            raise ValueError(f"image_size {self.image_size} is smaller than the output stride of 32")
        _heads_divide(self, self.hidden_size, "width * 32 =")


@strict
class VlpClipConfig(CheckedConfig, PreTrainedConfig):
    """Two towers and their joint space.

    text_config: a `VlpClipTextConfig`, any transformers text configuration, or a name ("FacebookAI/xlm-roberta-base", a folder).
    vision_config: a `VlpClipVisionConfig`, a `VlpClipResNetConfig`, any transformers image configuration, or a name ("timm/resnet50").
    projection_dim: width E of the joint space. logit_scale_init_value: t at the start, ln(1/0.07); logit_scale_max: its limit, None
    for none; "auto" becomes ln(100), and None with the sigmoid loss, whose paper has no limit. contrastive_loss: "softmax" (the
    paper) or "sigmoid" (SigLIP; then start the scale at ln(10) as that paper does); logit_bias_init_value: bias of the sigmoid loss.
    contrastive_targets: "identity" uses `image_ids` where a batch has them, "plain" never (the paper). negatives: "global" gathers
    over processes, "local" does not. foreign_text_pooling: of a text tower that is not CLIP's: "mean", "first" or "pooler".
    classifier_input: what an image classifier reads, "raw" embeddings (linear probe) or "unit" ones (zero-shot head).
    """

    model_type = "vlp_clip"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="vlp_clip_text_model"),
        "vision_config": SubConfigSpec(AutoConfig, model_type="vlp_clip_vision_model"),
    }

    text_config: dict | PreTrainedConfig | str | None = None
    vision_config: dict | PreTrainedConfig | str | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = math.log(1 / 0.07)
    logit_scale_max: float | int | str | None = "auto"
    contrastive_loss: str = "softmax"
    logit_bias_init_value: float | int = -10.0
    contrastive_targets: str = "identity"
    negatives: str = "global"
    foreign_text_pooling: str = "mean"
    classifier_input: str = "raw"
    initializer_range: float | int = 0.02

    def complete(self) -> None:
        if self.logit_scale_max == "auto":
            self.logit_scale_max = None if self.contrastive_loss == "sigmoid" else math.log(100)

    def validate_architecture(self):
        require_positive(self, "projection_dim")
        if isinstance(self.logit_scale_max, str):
            raise ValueError(f'logit_scale_max must be a number, None or "auto", got {self.logit_scale_max!r}')
        require_choice(
            self,
            contrastive_loss=("softmax", "sigmoid"),
            contrastive_targets=("identity", "plain"),
            negatives=("global", "local"),
            foreign_text_pooling=("mean", "first", "pooler"),
            classifier_input=("raw", "unit"),
        )
        resnet = isinstance(self.vision_config, VlpClipResNetConfig)
        if resnet and self.vision_config.projection_dim != self.projection_dim:
            raise ValueError(
                f"projection_dim {self.projection_dim} differs from the attention pool's {self.vision_config.projection_dim}: "
                "a modified ResNet projects inside its pool, give both the same value"
            )
