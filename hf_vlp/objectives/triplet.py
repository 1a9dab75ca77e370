"""Hinge ranking loss with all or the hardest negatives.

VSE++, "Improving Visual-Semantic Embeddings with Hard Negatives" (https://arxiv.org/abs/1707.05612), equations 5 (all, "sum of hinges")
and 6 (hardest, "max of hinges"); VSE-infinity (https://arxiv.org/abs/2011.04305) trains by the second after a warm-up by the first.

For scores S [B, B] of B pairs: hinge(i, j) = max(0, margin + S[i, j] - S[i, i]) for image i and the caption of another pair j, likewise
for captions. The loss is a SUM over the batch in both forms, as in the released code.
"""

import torch


def triplet_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    *,
    margin: float = 0.2,
    hardest: float = 1.0,
    all_image_embeds: torch.Tensor | None = None,
    all_text_embeds: torch.Tensor | None = None,
    image_ids: torch.Tensor | None = None,
    all_image_ids: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """The loss of one batch.

    Args:
        image_embeds, text_embeds: rows of this rank, [b, E]; row i of both is a pair. Scores are their inner products.
        hardest: share of the hardest-negatives form, 1 for it alone and 0 for the sum over all negatives; between, their mixture.
        all_image_embeds, all_text_embeds: the gathered batch [N, E]; None: this rank's rows are the batch.
        image_ids: identities [b]. Given: a caption of the same image is no negative. None: every other pair is.
        all_image_ids: gathered identities [N].
        offset: column of this rank's first row in the gathered batch.

    Returns:
        float32 scalar, computed in float32 whatever the autocast. On several ranks the mean over ranks is the loss of the whole batch.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_embeds, text_embeds = image_embeds.float(), text_embeds.float()
        images = image_embeds if all_image_embeds is None else all_image_embeds.float()  # [N, E]
        texts = text_embeds if all_text_embeds is None else all_text_embeds.float()
        per_image = image_embeds @ texts.T  # [b, N]
        per_text = per_image.T if all_image_embeds is None else text_embeds @ images.T
        rows, columns = per_image.shape
        if image_ids is None:
            own = torch.arange(columns, device=per_image.device) - offset
            positive = torch.arange(rows, device=per_image.device)[:, None] == own
        else:
            others = image_ids if all_image_ids is None else all_image_ids
            positive = image_ids[:, None] == others[None, :]  # [b, N]
        matched = per_image.diagonal(offset)[:, None]  # [b, 1]
        loss = per_image.new_zeros(())
        for scores in (per_image, per_text):
            hinges = (margin + scores - matched).clamp(min=0).masked_fill(positive, 0.0)
            if hardest < 1:
                loss = loss + (1 - hardest) * hinges.sum()
            if hardest > 0:
                loss = loss + hardest * hinges.max(dim=1).values.sum()
        return loss * (columns / rows)


def collapsed_loss(pairs: int, *, margin: float = 0.2, hardest: float = 1.0) -> float:
    """The loss of `pairs` pairs whose scores are all equal: 2 x margin x B in the hardest form, where a collapsed model stays."""
    return 2 * margin * pairs * ((1 - hardest) * (pairs - 1) + hardest * (pairs > 1))
