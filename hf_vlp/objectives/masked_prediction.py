"""Cross-entropy where something was masked: words, or the colours of patches.

BERT (https://arxiv.org/abs/1810.04805), section 3.1; colours as in ViLT (https://arxiv.org/abs/2102.03334), section 3.3; soft
labels as in "Align before Fuse" (https://arxiv.org/abs/2107.07651), section 3.3.
"""

from collections.abc import Callable

import torch
from torch import nn

from hf_vlp.objectives.distillation import IGNORED, distilled_cross_entropy

COLOURS = 256


def masked_prediction_loss(
    states: torch.Tensor, labels: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the masked places, whose logits alone are computed.

    In a traced graph, where shapes cannot depend on the labels, the logits of all places are.

    Args:
        states: [B, L, D]. labels: [B, L], or [B, L, G] of G classifications at each place; -100 where nothing is to be predicted.
        head: states [..., D] -> logits [..., V], or [..., G * V].

    Returns:
        The loss, a float32 scalar, 0 where nothing is masked; how many predictions were right, and how many there were.
    """
    places = labels.unsqueeze(-1) if labels.ndim == 2 else labels  # [B, L, G]
    if not torch.compiler.is_compiling():
        masked = places.ne(IGNORED).any(dim=-1)
        states, places = states[masked], places[masked]  # [M, D], [M, G]
    logits = head(states).unflatten(-1, (places.shape[-1], -1)).flatten(0, -2).float()  # [M * G, V]
    targets = places.flatten()
    count = targets.ne(IGNORED).sum()
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / count.clamp(min=1)
    return loss, logits.detach().argmax(dim=-1).eq(targets).sum(), count


def distilled_masked_prediction_loss(
    states: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    teacher_states: torch.Tensor,
    teacher_head: Callable[[torch.Tensor], torch.Tensor],
    distillation_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1 - weight) * `masked_prediction_loss` + weight * the mean cross-entropy with a teacher's probabilities at masked places.

    Args:
        states, teacher_states: [B, L, D]. labels: [B, L], -100 where nothing is to be predicted.
        head, teacher_head: states [..., D] -> logits [..., V]; the teacher's without gradient, and not called where the weight is 0.
        distillation_weight: share of the soft labels, from 0 to 1.

    Returns:
        As `masked_prediction_loss`.
    """
    states, teacher_states, labels = states.flatten(0, 1), teacher_states.flatten(0, 1), labels.flatten()
    if not torch.compiler.is_compiling():
        places = labels.ne(IGNORED).nonzero()[:, 0]  # found once: each search waits for the device
        states, teacher_states, labels = states[places], teacher_states[places], labels[places]
    logits, teacher_logits = head(states).float(), None
    if distillation_weight != 0:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_states)
    loss = distilled_cross_entropy(logits, labels, teacher_logits, distillation_weight)
    return loss, logits.detach().argmax(dim=-1).eq(labels).sum(), labels.ne(IGNORED).sum()


def patch_colours(pixel_values: torch.Tensor, patch_size: int, mean: float = 0.5, std: float = 0.5) -> torch.Tensor:
    """The mean colour of every patch, whole numbers from 0 to 255 of red, green and blue.

    Args:
        pixel_values: [B, 3, H, W], normalised by `mean` and `std`.

    Returns:
        [B, P, 3] int64, patches row by row.
    """
    means = nn.functional.avg_pool2d((pixel_values.float() * std + mean), patch_size, patch_size)  # [B, 3, h, w]
    return (means * (COLOURS - 1)).long().clamp(0, COLOURS - 1).flatten(2).transpose(1, 2)
