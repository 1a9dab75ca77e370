"""Pairwise sigmoid loss ("Sigmoid Loss for Language Image Pre-Training", Eq. 1 and algorithm 1)."""

import torch
from torch import nn


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    *,
    bias: torch.Tensor,
    all_image_embeds: torch.Tensor | None = None,
    all_text_embeds: torch.Tensor | None = None,
    image_ids: torch.Tensor | None = None,
    all_image_ids: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """-(1/b) sum_ij log sigmoid(z_ij (scale * x_i . y_j + bias)), z = 1 for a pair and -1 otherwise.

    Arguments as in `contrastive_loss`; every image of this rank [b, E] meets every text [N, E], so the mean of the rank
    losses is the loss of the whole batch. `bias` is a scalar, -10 at the start in the paper (with scale 10). Pairs that share
    an identity are positives where `image_ids` are given. `all_image_embeds` is not needed: each pair is scored once.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        texts = (text_embeds if all_text_embeds is None else all_text_embeds).float()
        logits = scale * image_embeds.float() @ texts.T + bias.float()  # [b, N]
        if image_ids is None:
            rows = torch.arange(offset, offset + len(image_embeds), device=logits.device)
            match = rows[:, None] == torch.arange(len(texts), device=logits.device)
        else:
            match = image_ids[:, None] == (image_ids if all_image_ids is None else all_image_ids)
        return -nn.functional.logsigmoid(torch.where(match, logits, -logits)).sum() / len(image_embeds)
