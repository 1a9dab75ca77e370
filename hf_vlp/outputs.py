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
    correct, counts: of each term that predicts classes, how many predictions were right and how many there were, int64 scalars; a term
        of which a batch has nothing to predict is 0 and counts 0.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    correct: dict[str, torch.Tensor] | None = None
    counts: dict[str, torch.Tensor] | None = None


@dataclass
class FusionOutput(ModelOutput):
    """What a model returns that reads words and image together, for B pairs.

    last_hidden_state: [B, L + 1 + P, D], words, then the image's class token, then its patches; text_hidden_states [B, L, D] and
    image_hidden_states [B, 1 + P, D] are its parts. pooler_output: [B, D].
    image_mask: [B, 1 + P], 1 at the class token and at real patches. patch_index: [B, P], which patch of the grid each one is, counted
    row by row. patch_grid: (h, w), patches along the height and the width of the canvas; these two are None where the image was given
    encoded.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    text_hidden_states: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    patch_index: torch.Tensor | None = None
    patch_grid: tuple[int, int] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CrossFusionOutput(ModelOutput):
    """What a model returns whose words attend to the image, for B pairs.

    last_hidden_state: [B, L, D], the words with the image in sight. text_hidden_states: [B, L, D], the words before it.
    image_hidden_states: [B, 1 + P, D], the image's class token, then its patches.
    image_embeds, text_embeds: [B, E], unit vectors of the sides apart, where the model has a joint space.
    hidden_states: of the blocks that fuse. attentions: of the words to each other there; cross_attentions: [B, heads, L, 1 + P] of the
    words to the image.
    """

    last_hidden_state: torch.Tensor | None = None
    text_hidden_states: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
