"""Image-text matching with negatives drawn by how alike they are ("Align before Fuse", https://arxiv.org/abs/2107.07651, section 3.2).

Of a batch of B pairs each text gets an image of another pair, and each image a text of another: 3 B pairs to be told apart.
"""

import torch
from torch import nn

from hf_vlp.objectives.distillation import IGNORED
from hf_vlp.objectives.momentum_contrast import same_image

SMALLEST_WEIGHT = 1e-30  # of a negative that is possible at all


@torch.no_grad()
def negative_weights(similarities: torch.Tensor, image_ids: torch.Tensor | None = None) -> torch.Tensor:
    """How often each column is to be drawn as a row's negative: the softmax of the row, without what matches the row.

    A softmax that has underflowed, as where all weight lies on the own pair, still leaves every negative possible.

    Args:
        similarities: [B, B] of the pairs of a batch, divided by the temperature.
        image_ids: identities [B], -100 where unknown. Given: no column of the row's image is a negative. None: its own is not.

    Returns:
        [B, B] float32. Rows do not sum to 1, and one without negatives is all 0.
    """
    weights = similarities.float().softmax(dim=1) + SMALLEST_WEIGHT
    matches = torch.eye(len(weights), dtype=torch.bool, device=weights.device)
    if image_ids is not None:
        matches |= same_image(image_ids, image_ids)
    return weights.masked_fill(matches, 0.0)


@torch.no_grad()
def draw_negatives(weights: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One column of each row, in proportion to the weights.

    Args:
        weights: [B, B], not below 0. draws: [B], uniform on [0, 1).

    Returns:
        The index [B] int64, never of a weight of 0 where there was another, and [B] bool: whether there was.
    """
    cumulative = weights.double().cumsum(dim=1)
    index = (cumulative <= draws.double()[:, None] * cumulative[:, -1:]).sum(dim=1).clamp(max=weights.shape[1] - 1)
    # sums that are rounded in another order, as on a GPU, may rise where the weight is 0
    drawn = weights.gather(1, index[:, None])[:, 0]
    return torch.where(drawn > 0, index, weights.argmax(dim=1)), weights.gt(0).any(dim=1)


def matching_labels(image_found: torch.Tensor, text_found: torch.Tensor) -> torch.Tensor:
    """Labels of [B pairs; B texts with another image; B images with another text], 1 = the pair matches.

    `image_found`, `text_found`: [B] bool, whether there was another image for the text, and another text for the image. Where there
    was none the label is -100. Returns [3 B] int64.
    """
    negatives = torch.cat([image_found, text_found])
    return torch.cat([torch.ones_like(image_found, dtype=torch.int64), torch.where(negatives, 0, IGNORED)])


def matching_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of `logits` [N, 2] with `labels` [N], 1 = the pair matches, -100 = left out.

    Returns:
        The loss, a float32 scalar; how many pairs were told right, and how many there were.
    """
    logits, count = logits.float(), labels.ne(IGNORED).sum()
    loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count.clamp(min=1)
    return loss, logits.detach().argmax(dim=-1).eq(labels).sum(), count
