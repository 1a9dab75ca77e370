"""CLIP's image tower under a classifier: linear probe, or a head built from class names (sections 3.1 and 3.2)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from hf_vlp.layers.pooling import unit_rows
from hf_vlp.models.clip.configuration_clip import VlpClipConfig
from hf_vlp.models.clip.modeling_clip import (
    VlpClipModel,
    VlpClipPreTrainedModel,
    build_image_side,
)


class VlpClipImageSide(VlpClipPreTrainedModel):
    """The image tower and its projection, under the names they have in `VlpClipModel`."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: VlpClipConfig):
        super().__init__(config)
        self.vision_model, self.visual_projection = build_image_side(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    encode_image = VlpClipModel.encode_image
    pool_image = staticmethod(VlpClipModel.pool_image)


class VlpClipForImageClassification(VlpClipPreTrainedModel):
    """A linear classifier on the image embedding [B, E].

    Train it (freeze the rest for a probe), set it with `set_linear_head` from a logistic regression on raw embeddings, or
    with `set_zero_shot_head` from class names, on unit ones. The image side of a pre-trained folder loads into it; the text
    side is left out.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^(clip\.)?(text_model|text_projection|logit_scale)", r"^logit_bias"]

    def __init__(self, config: VlpClipConfig):
        super().__init__(config)
        self.clip = VlpClipImageSide(config)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.vision_model.get_input_embeddings()

    @torch.no_grad()
    def _set_head(self, weight: torch.Tensor, bias: torch.Tensor, labels: list[str], classifier_input: str) -> None:
        classes, width = weight.shape
        if width != self.config.projection_dim or len(bias) != classes or len(labels) != classes:
            raise ValueError(
                f"a head of {classes} classes x {width} with {len(bias)} biases and {len(labels)} labels does not fit embeddings of "
                f"{self.config.projection_dim}: give one row, one bias and one label per class"
            )
        head = nn.Linear(width, classes).to(self.classifier.weight)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        self.classifier = head
        self.config.id2label = dict(enumerate(labels))
        self.config.label2id = {label: index for index, label in enumerate(labels)}
        self.config.classifier_input = classifier_input

    def set_linear_head(self, weight: torch.Tensor, bias: torch.Tensor, labels: list[str]) -> None:
        """Take a logistic regression on raw embeddings: `weight` [K, E], `bias` [K], K label names.

        Raises:
            ValueError: if the numbers of rows, biases and labels, or the width, do not fit.
        """
        self._set_head(weight, bias, labels, "raw")

    def set_zero_shot_head(self, classifier: torch.Tensor, labels: list[str], scale: float = 100.0) -> None:
        """Take a zero-shot classifier `classifier` [E, K] of unit columns: logits = scale * cosine (100 in the paper's recipe).

        Raises:
            ValueError: if the number of columns and labels, or the width, do not fit.
        """
        self._set_head(scale * classifier.T, torch.zeros(classifier.shape[1]), labels, "unit")

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """`pixel_values` [B, 3, H, W], `labels` [B] class indices (-100 ignored) -> logits [B, K] and, with labels, cross-entropy; the
        image tower's hidden states and attention maps where they are asked for.

        Raises:
            ValueError: without pixel_values.
        """
        if pixel_values is None:
            raise ValueError("image classification needs pixel_values")
        recorded = {
            key: True for key in ("output_hidden_states", "output_attentions") if kwargs.get(key, getattr(self.config, key))
        }
        if recorded:  # every state of the tower, so no short cut through its last block
            tower = self.clip.vision_model(pixel_values, return_dict=True, **recorded)
            embeds = self.clip.visual_projection(self.clip.pool_image(tower))
        else:
            tower, embeds = {}, self.clip.encode_image(pixel_values)
        logits = self.classifier(unit_rows(embeds) if self.config.classifier_input == "unit" else embeds)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=tower.get("hidden_states"), attentions=tower.get("attentions")
        )
