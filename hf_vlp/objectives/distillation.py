"""Cross-entropy with a teacher's soft labels beside the hard ones ("Align before Fuse", https://arxiv.org/abs/2107.07651, section 3.3)."""

import torch
from torch import nn

IGNORED = -100


def distilled_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None, weight: float
) -> torch.Tensor:
    """(1 - weight) * cross-entropy with the labels + weight * cross-entropy with the teacher's probabilities, mean over the rows.

    Args:
        logits: [B, K].
        labels: [B] int64, -100 where a row is left out of both; or target distributions [B, K].
        teacher_logits: [B, K], taken without gradient; None where the weight is 0, which never looks at them.
        weight: share of the soft labels, from 0 to 1.

    Returns:
        float32 scalar; 0 where every row is left out.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        counted = labels.ne(IGNORED) if labels.ndim == 1 else labels.new_ones(len(labels))
        targets = labels
        if weight != 0:
            targets = teacher_logits.detach().float().softmax(dim=-1) * weight
            if labels.ndim == 1:
                # hard and soft labels as one distribution: one product over the classes instead of two
                hard = targets.new_full((len(labels), 1), 1 - weight)
                targets = targets.scatter_add_(1, labels.clamp(min=0)[:, None], hard)
            else:
                targets = targets.add_(labels, alpha=1 - weight)
        rows = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")  # [B]
        return (rows * counted).sum() / counted.sum().clamp(min=1)
