"""Image-text contrastive loss against a momentum teacher's features and a queue of earlier ones, with soft targets.

"Align before Fuse" (https://arxiv.org/abs/2107.07651), sections 3.2 and 3.3. Gradients reach the embeddings and the temperature; the
teacher's features, the queue and the targets are constants. On several processes each scores its own rows against its own keys and the
queue, which has those of all; the loss is the mean over processes.
"""

import torch

from hf_vlp.objectives.contrastive import pair_targets
from hf_vlp.objectives.distillation import distilled_cross_entropy

UNKNOWN_IMAGE = -100  # the identity of what is of no known image: the same as no other


def momentum_contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    queue_image_embeds: torch.Tensor,
    queue_text_embeds: torch.Tensor,
    temperature: torch.Tensor,
    distillation_weight: float,
    *,
    image_ids: torch.Tensor | None = None,
    queue_ids: torch.Tensor | None = None,
    exclude: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of image-to-text and text-to-image cross-entropy; keys are the teacher's B rows, then the queue's Q.

    Args:
        image_embeds, text_embeds, teacher_image_embeds, teacher_text_embeds: unit rows [B, E]; row i of all is one pair.
        queue_image_embeds, queue_text_embeds: unit rows [Q, E] of earlier pairs; Q may be 0.
        temperature: similarities are divided by it, a scalar.
        distillation_weight: share of the teacher's similarities, after a softmax, in the targets; at 0 they are not computed.
        image_ids: identities [B], -100 where unknown. Given: all keys of the row's image are targets of equal probability. None: its
            own pair is the target alone, and all others are negatives.
        queue_ids: identities [Q]; None: none is known.
        exclude: the other keys of the row's image are no targets but left out, of the teacher's softmax as well.

    Returns:
        The loss, a float32 scalar whatever the autocast, and the similarities image_to_text and text_to_image [B, B + Q], divided by
        the temperature and with nothing left out.

    Raises:
        ValueError: `exclude` without `image_ids`.
    """
    if exclude and image_ids is None:
        raise ValueError("exclude=True leaves out other pairs of the same image: give image_ids, or exclude=False")
    size = len(image_embeds)
    labels, left_out = pair_targets(size, device=image_embeds.device), None
    if image_ids is not None:
        same = _key_of_same_image(image_ids, queue_ids, len(queue_image_embeds))  # [B, B + Q]
        if exclude:
            left_out = same.fill_diagonal_(False)
        else:
            labels = same.float() / same.sum(dim=1, keepdim=True)

    with torch.autocast(image_embeds.device.type, enabled=False):
        temperature, loss, found = temperature.float(), 0.0, []
        for embeds, teacher_embeds, keys, queue in (
            (image_embeds, teacher_image_embeds, teacher_text_embeds, queue_text_embeds),
            (text_embeds, teacher_text_embeds, teacher_image_embeds, queue_image_embeds),
        ):
            keys = torch.cat([keys.detach().float(), queue.detach().float()])  # [B + Q, E]
            similarities = embeds.float() / temperature @ keys.T
            soft = None
            if distillation_weight != 0:
                soft = _without(teacher_embeds.detach().float() / temperature.detach() @ keys.T, left_out)
            loss = (
                loss + distilled_cross_entropy(_without(similarities, left_out), labels, soft, distillation_weight) / 2
            )
            found.append(similarities)
    return loss, *found


def same_image(image_ids: torch.Tensor, other_ids: torch.Tensor) -> torch.Tensor:
    """Identities [B] and [N] -> [B, N] bool, whether both are of one image; unknown ones (-100) never are."""
    return (image_ids[:, None] == other_ids[None, :]) & image_ids.ne(UNKNOWN_IMAGE)[:, None]


def _key_of_same_image(image_ids: torch.Tensor, queue_ids: torch.Tensor | None, queued: int) -> torch.Tensor:
    """[B, B + Q] bool: whether a key is of the row's image, which its own always is."""
    if queue_ids is None:
        queue_ids = image_ids.new_full((queued,), UNKNOWN_IMAGE)
    return same_image(image_ids, torch.cat([image_ids, queue_ids])).fill_diagonal_(True)


def _without(similarities: torch.Tensor, left_out: torch.Tensor | None) -> torch.Tensor:
    """Similarities whose softmax is 0 at what is left out; finite, since the targets of 0 there are multiplied with its logarithm."""
    return similarities if left_out is None else similarities.masked_fill(left_out, torch.finfo(similarities.dtype).min)
