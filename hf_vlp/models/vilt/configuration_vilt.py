"""Configuration of ViLT: one transformer over words and patches.

Paper: "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", https://arxiv.org/abs/2102.03334.
Defaults are ViLT-B/32, the paper's only size, and its pre-training.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from hf_vlp.configuration import CheckedConfig, require_choice, require_heads_of_equal_width, require_positive


@strict
class VlpViltConfig(CheckedConfig, PreTrainedConfig):
    """One stream of words and patches.

    vocab_size V, hidden_size D, num_hidden_layers, num_attention_heads, intermediate_size: of the transformer. hidden_act: of its blocks
    and heads. hidden_dropout_prob: after the embeddings, the attention's projection and both layers of the feed-forward network.
    max_position_embeddings: the longest text L. type_vocab_size: rows of BERT's segment table, of which the first is used.
    image_size and patch_size give the position table 1 + (image_size // patch_size)^2; other sizes interpolate it. layer_norm_eps: of
    the blocks and the last norm; text_layer_norm_eps: of the text embeddings and the heads of masked objectives.
    max_image_length: patches kept of each image in pre-training, drawn at random; None for all. It is the collator that draws.
    mlm_weight, itm_weight, wpa_weight, mpp_weight: of the pre-training terms (0.1 of word-patch alignment is the paper's); 0 switches a
    term off, and its head does not exist. Word-patch alignment needs matching, with whose pass it is computed.
    wpa_solver: "ipot" (the paper), "sinkhorn" or "exact"; wpa_beta, wpa_iterations: of the first two.
    """

    model_type = "vlp_vilt"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 40
    type_vocab_size: int = 2
    image_size: int = 384
    patch_size: int = 32
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    text_layer_norm_eps: float = 1e-12
    max_image_length: int | None = None
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0
    mlm_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    wpa_weight: float | int = 0.1
    mpp_weight: float | int = 0.0
    wpa_solver: str = "ipot"
    wpa_beta: float | int = 0.5
    wpa_iterations: int = 50

    def validate_architecture(self):
        require_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
        )
        require_positive(self, "max_position_embeddings", "type_vocab_size", "image_size", "patch_size", "num_channels")
        require_positive(self, "wpa_iterations")
        require_choice(self, wpa_solver=("ipot", "sinkhorn", "exact"))
        require_heads_of_equal_width(self)
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")
        if self.max_image_length is not None and self.max_image_length < 1:
            raise ValueError(
                f"max_image_length must be 1 or more, or None for every patch; got {self.max_image_length}"
            )
        if not self.wpa_beta > 0:
            raise ValueError(f"wpa_beta must be above 0, got {self.wpa_beta}")
        for name in ("mlm_weight", "itm_weight", "wpa_weight", "mpp_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.wpa_weight > 0 and not self.itm_weight > 0:
            raise ValueError(
                f"wpa_weight {self.wpa_weight} with itm_weight 0: word-patch alignment is computed on the pass of matching; set "
                "itm_weight above 0, or wpa_weight to 0"
            )
