"""Configurations of ALBEF: an image encoder, a text encoder, the layers that fuse them, and how they are trained.

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.
Defaults are those of the paper, whose only size is ViT-B/16 with BERT-base cut in two.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_vlp.configuration import CheckedConfig, require_choice, require_heads_of_equal_width, require_positive


@strict
class VlpAlbefVisionConfig(CheckedConfig, PreTrainedConfig):
    """The vision transformer (section 3.1).

    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps: of its blocks; attention_dropout,
    hidden_dropout: 0 in the paper. image_size and patch_size give the position table 1 + (image_size // patch_size)^2; other sizes
    interpolate it.
    """

    model_type = "vlp_albef_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 256
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        require_positive(self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        require_positive(self, "num_channels", "image_size", "patch_size")
        require_heads_of_equal_width(self)
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}: the grid of patches would not cover the "
                f"image; the nearest is {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )


@strict
class VlpAlbefTextConfig(CheckedConfig, PreTrainedConfig):
    """The text encoder: the first half of BERT (section 3.1).

    vocab_size V, max_position_embeddings, type_vocab_size: rows of its tables. hidden_dropout_prob, attention_probs_dropout_prob: as in
    BERT. The other fields as of `VlpAlbefVisionConfig`.
    """

    model_type = "vlp_albef_text_model"
    base_config_key = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0

    def validate_architecture(self):
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        require_positive(self, "num_attention_heads", "max_position_embeddings", "type_vocab_size")
        require_heads_of_equal_width(self)


@strict
class VlpAlbefMultimodalConfig(CheckedConfig, PreTrainedConfig):
    """The multimodal encoder: the second half of BERT, whose layers attend to the image as well (section 3.1).

    hidden_size: that of the text encoder. The other fields as of `VlpAlbefTextConfig`.
    """

    model_type = "vlp_albef_multimodal_model"
    base_config_key = "multimodal_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        require_positive(self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        require_heads_of_equal_width(self)


@strict
class VlpAlbefConfig(CheckedConfig, PreTrainedConfig):
    """The three parts, their joint space and the training.

    vision_config, text_config, multimodal_config: of the parts (transformers keeps the name fusion_config for itself); text_config also
    any text configuration of transformers, or a name
    ("FacebookAI/xlm-roberta-base", a folder), whose model then is the text encoder, whole. projection_dim: width E of the joint space.
    temperature_init_value: divides similarities; temperature_min, temperature_max: its limits in pre-training.
    itc_weight, itm_weight, mlm_weight: of the pre-training terms, of which the paper weighs none; 0 switches a term off.
    momentum_teacher: whether the model has a momentum copy of itself and a queue of its features, for training. momentum: share of the
    copy that is kept in an update. distillation_weight: alpha of equations 6 and 7. queue_size: features Q kept of earlier batches.
    contrastive_targets: "identity" takes all texts of an image for its own where a batch has `image_ids`, "exclude" leaves the others
    out of the sum, "plain" never looks (the paper's pre-training).
    tie_word_embeddings: the masked-language head predicts by the word embeddings.
    shared_image_keys: reading two images, the layers of the second make keys and values by the projections of the first (NLVR2).
    answer_layers: of the decoder that writes answers to questions. answer_length: tokens of the longest in the list of answers.
    answer_candidates: how many of the list are compared for a question. count_first_token_twice: as in the released code, the first
    word's log probability counts twice in their scores.
    """

    model_type = "vlp_albef"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(VlpAlbefVisionConfig, model_type="vlp_albef_vision_model"),
        "text_config": SubConfigSpec(AutoConfig, model_type="vlp_albef_text_model"),
        "multimodal_config": SubConfigSpec(VlpAlbefMultimodalConfig, model_type="vlp_albef_multimodal_model"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | str | None = None
    multimodal_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    temperature_init_value: float | int = 0.07
    temperature_min: float | int = 0.001
    temperature_max: float | int = 0.5
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    momentum_teacher: bool = True
    momentum: float | int = 0.995
    distillation_weight: float | int = 0.4
    queue_size: int = 65536
    contrastive_targets: str = "identity"
    shared_image_keys: bool = True
    answer_layers: int = 6
    answer_length: int = 32
    answer_candidates: int = 128
    count_first_token_twice: bool = True
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True

    def validate_architecture(self):
        require_positive(self, "projection_dim", "queue_size")
        require_positive(self, "answer_layers", "answer_length", "answer_candidates")
        require_choice(self, contrastive_targets=("identity", "exclude", "plain"))
        if not 0 < self.temperature_min <= self.temperature_init_value <= self.temperature_max:
            raise ValueError(
                f"temperature_init_value {self.temperature_init_value} must lie between temperature_min {self.temperature_min} and "
                f"temperature_max {self.temperature_max}, all above 0"
            )
        for name in ("momentum", "distillation_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("itc_weight", "itm_weight", "mlm_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.text_config.hidden_size != self.multimodal_config.hidden_size:
            raise ValueError(
                f"multimodal_config.hidden_size {self.multimodal_config.hidden_size} is not that of the text encoder, "
                f"{self.text_config.hidden_size}: the fusion layers go on with its states"
            )
