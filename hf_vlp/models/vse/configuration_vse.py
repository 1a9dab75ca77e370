"""Configurations of VSE-infinity: the grid tower, the BiGRU text tower and the pair.

Paper: "Learning the Best Pooling Strategy for Visual Semantic Embedding", https://arxiv.org/abs/2011.04305.
Defaults are the paper's region model with BERT.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_vlp.configuration import CheckedConfig, require_choice, require_positive


@strict
class VlpVseGridConfig(CheckedConfig, PreTrainedConfig):
    """The convolutional tower of the grid variants; defaults are the ResNet-101 of the bottom-up-attention detector.

    graph: "caffe" strides in the first 1x1 convolution and pools the stem without padding, rounding up; "torchvision" strides in the
    3x3 one. Weights fit both, results differ. embedding_size: channels of the stem. depths, hidden_sizes, bottleneck_sizes: blocks of
    each stage, channels after them and of their 3x3 convolution. groups: of that convolution (32 in ResNeXt-101 32x8d, whose
    bottleneck_sizes equal its hidden_sizes). image_size S: the side that pictures are squashed to, 512 in the paper's recipes;
    other sizes work as well. freeze_norms: batch norms stay in evaluation mode while training, as in the paper.
    """

    model_type = "vlp_vse_grid_model"
    base_config_key = "vision_config"

    graph: str = "caffe"
    embedding_size: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    bottleneck_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    groups: int = 1
    num_channels: int = 3
    image_size: int = 512
    freeze_norms: bool = True

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        return sum(self.depths)

    def complete(self) -> None:
        for name in ("depths", "hidden_sizes", "bottleneck_sizes"):
            setattr(self, name, list(getattr(self, name)))

    def validate_architecture(self):
        require_choice(self, graph=("caffe", "torchvision"))
        require_positive(self, "embedding_size", "depths", "hidden_sizes", "bottleneck_sizes", "groups", "num_channels", "image_size")
        lengths = {name: len(getattr(self, name)) for name in ("depths", "hidden_sizes", "bottleneck_sizes")}
        if len(set(lengths.values())) > 1 or not self.depths:
            raise ValueError(f"depths, hidden_sizes and bottleneck_sizes need one number a stage, got {lengths}")
        if any(size % self.groups for size in self.bottleneck_sizes):
            raise ValueError(f"bottleneck_sizes {self.bottleneck_sizes} must be multiples of groups {self.groups}")


@strict
class VlpVseGruConfig(CheckedConfig, PreTrainedConfig):
    """The BiGRU text tower of the BiGRU variants.

    vocab_size V; embedding_size: of the word vectors; hidden_size: of each direction, which is the joint embedding's width E.
    num_hidden_layers: stacked GRUs, 1 in every published model.
    """

    model_type = "vlp_vse_gru_model"
    base_config_key = "text_config"

    vocab_size: int = 11354
    embedding_size: int = 300
    hidden_size: int = 1024
    num_hidden_layers: int = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def validate_architecture(self):
        require_positive(self, "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers")


@strict
class VlpVseConfig(CheckedConfig, PreTrainedConfig):
    """A text tower, an image side of regions or of a grid, and their pooling into one space.

    text_config: a BERT (the paper), a `VlpVseGruConfig`, any transformers text configuration, or a name ("google-bert/bert-base-uncased").
    vision_config: None for region features; for pixels a `VlpVseGridConfig`, any transformers image configuration, or a name
    ("timm/resnet50"). region_size: width F of the region features. projection_dim: width E of the joint space. region_mlp_size: width of
    the residual MLP over regions, E // 2 if None. position_size, pooling_size: of the pooling operator's position code and GRU.
    normalize_image, normalize_text: unit embeddings (the original's no_imgnorm and no_txtnorm switch them off).
    margin: of the hinge loss. hardest_negatives: share of the hardest-negatives form in the loss, 1 in the paper after its warm-up with 0;
    a recipe's `ramps` change it while training. region_norm_rows: rows that the batch norm of the regions' MLP takes its training
    statistics over, "real" regions or "all" with the padding, as the paper's models were trained.
    contrastive_targets: "identity" never takes a caption of the same image for a negative where a batch has `image_ids`, "plain" does
    (the paper). negatives: "global" gathers over processes, "local" does not.
    """

    model_type = "vlp_vse"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(AutoConfig, model_type="vlp_vse_grid_model", optional=True),
    }

    text_config: dict | PreTrainedConfig | str | None = None
    vision_config: dict | PreTrainedConfig | str | None = None
    region_size: int = 2048
    projection_dim: int = 1024
    region_mlp_size: int | None = None
    position_size: int = 32
    pooling_size: int = 32
    normalize_image: bool = True
    normalize_text: bool = True
    margin: float | int = 0.2
    hardest_negatives: float | int = 1.0
    region_norm_rows: str = "real"
    contrastive_targets: str = "identity"
    negatives: str = "global"

    def complete(self) -> None:
        if self.region_mlp_size is None:
            self.region_mlp_size = self.projection_dim // 2

    def validate_architecture(self):
        require_positive(self, "region_size", "projection_dim", "region_mlp_size", "position_size", "pooling_size")
        require_choice(
            self,
            region_norm_rows=("real", "all"),
            contrastive_targets=("identity", "plain"),
            negatives=("global", "local"),
        )
        if not 0 <= self.hardest_negatives <= 1 or self.margin < 0:
            raise ValueError(
                f"hardest_negatives {self.hardest_negatives} must lie between 0 and 1, and margin {self.margin} be 0 or more"
            )
        if self.position_size % 2:
            raise ValueError(f"position_size {self.position_size} must be even: sines and cosines come in pairs")
        gru = isinstance(self.text_config, VlpVseGruConfig)
        if gru and self.text_config.hidden_size != self.projection_dim:
            raise ValueError(
                f"projection_dim {self.projection_dim} differs from the BiGRU's hidden_size {self.text_config.hidden_size}: the BiGRU "
                "has no projection behind it, give both the same value"
            )
