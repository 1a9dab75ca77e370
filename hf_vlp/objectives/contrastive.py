"""Image-text contrastive loss (CLIP section 2.3, figure 3).

L = exp(t) * I T^t with unit rows; loss = (CE(rows of L) + CE(columns of L)) / 2, mean over the rows.

On several processes each rank scores its own rows and columns against the gathered batch; the mean of the rank losses is
the loss of the whole batch. Gathering happens before these functions.
"""

import torch
from torch import nn


def match_targets(row_ids: torch.Tensor, column_ids: torch.Tensor) -> torch.Tensor:
    """Target distributions from identities: columns of the row's own image share its probability equally.

    `row_ids` [b], `column_ids` [N] -> [b, N] float32, rows sum to 1. A row whose identity is in no column is all zero.
    """
    same = (row_ids[:, None] == column_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True).clamp(min=1)


def pair_targets(rows: int, offset: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """The paper's plain targets: row i belongs to column offset + i alone, [rows] int64."""
    return torch.arange(offset, offset + rows, device=device)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor,
    *,
    all_image_embeds: torch.Tensor | None = None,
    all_text_embeds: torch.Tensor | None = None,
    image_ids: torch.Tensor | None = None,
    all_image_ids: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """Symmetric cross-entropy over the scaled similarities of one batch.

    Args:
        image_embeds, text_embeds: unit rows of this rank, [b, E]; row i of both is a pair.
        scale: exp(t), a scalar.
        all_image_embeds, all_text_embeds: the gathered batch [N, E]; None: this rank's rows are the batch.
        image_ids: identities [b]. Given: two captions of one image are both positives, and an image's other pairs are never
            negatives. None: the paper's plain targets, every other pair is a negative.
        all_image_ids: gathered identities [N].
        offset: column of this rank's first row in the gathered batch.

    Returns:
        float32 scalar, computed in float32 whatever the autocast.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
        images = image_embeds if all_image_embeds is None else all_image_embeds.float()  # [N, E]
        texts = text_embeds if all_text_embeds is None else all_text_embeds.float()
        per_image = scale * image_embeds @ texts.T  # [b, N]
        per_text = per_image.T if all_image_embeds is None else scale * text_embeds @ images.T
        if image_ids is None:
            targets = pair_targets(len(image_embeds), offset, image_embeds.device)
        else:
            targets = match_targets(image_ids, image_ids if all_image_ids is None else all_image_ids)
        return (nn.functional.cross_entropy(per_image, targets) + nn.functional.cross_entropy(per_text, targets)) / 2
