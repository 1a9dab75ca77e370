"""Outputs that architectures share."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DualEncoderOutput(ModelOutput):
    """What a model with two towers returns for B images and C texts.

    logits_per_image: [B, C], scaled similarities; logits_per_text: its transpose.
    image_embeds: [B, E], text_embeds: [C, E], unit length.
    text_model_output, vision_model_output: token states and pooled states of each tower.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: ModelOutput | None = None
    vision_model_output: ModelOutput | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """What `ForPreTraining` returns.

    loss: scalar, the weighted sum of `losses`; losses: the named terms before weighting, float32 scalars.
    image_embeds, text_embeds: [B, E], unit length, where the architecture has them.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
