"""Which box of an image a phrase means, by a map of what the model looked at, and how often that is the right one.

"Align before Fuse" (https://arxiv.org/abs/2107.07651), section 6.4: proposals of a detector are ranked by a map (Grad-CAM); the measure is
that of RefCOCO+ (Yu et al., https://arxiv.org/abs/1608.00272). Boxes are [x, y, w, h] in pixels of the image.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from hf_vlp.evaluation.answers import means_by_kind

RIGHT_FROM = 0.5  # intersection over union


def map_at_size(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps [..., h, w] resized to an image's (height, width) by cubic interpolation: [..., height, width]."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    resized = F.interpolate(flat, size=tuple(size), mode="bicubic", align_corners=False)
    return resized.reshape(*maps.shape[:-2], *size)


def box_scores(
    maps: torch.Tensor, boxes: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]], *, power: float = 0.5
) -> list[torch.Tensor]:
    """How well each proposal of each image covers its map: the sum of the map inside the box over the box's area to `power`.

    The map is resized to its image first. The sum runs over the rows from int(y) to before int(y + h) and the columns from int(x) to before
    int(x + w), of what lies in the image; the area is that of the box as it is given.

    Args:
        maps: [B, h, w]. boxes: B tensors [P, 4], P >= 1 of each image its own. sizes: (height, width) of each image.

    Returns:
        B tensors [P].

    Raises:
        ValueError: shapes or numbers that do not fit, an image without boxes, a box without an area, a map that is not finite; by the
            position of the sample.
    """
    if maps.ndim != 3 or not len(maps) == len(boxes) == len(sizes):
        raise ValueError(
            f"maps {tuple(maps.shape)} must be [B, h, w], with boxes and a size for each: found {len(boxes)} and {len(sizes)}."
        )
    scores = []
    for position, (map_, own, size) in enumerate(zip(maps, boxes, sizes)):
        own = _boxes(own, f"boxes of sample {position}")
        if own.ndim != 2 or not len(own):
            raise ValueError(f"boxes of sample {position} are {tuple(own.shape)}: give at least one, as [P, 4].")
        if not map_.isfinite().all():
            raise ValueError(f"the map of sample {position} is not finite.")
        seen = map_at_size(map_, size)
        sums = []
        for x, y, w, h in own.tolist():
            top, bottom, left, right = (max(0, math.floor(edge)) for edge in (y, y + h, x, x + w))
            sums.append(seen[top:bottom, left:right].sum())
        scores.append(torch.stack(sums) / (own[:, 2] * own[:, 3]).to(seen) ** power)
    return scores


def best_boxes(scores: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The box of the highest score of each image, of equal ones the first, also where no score is positive.

    Args:
        scores: B tensors [P]. boxes: B tensors [P, 4].

    Returns:
        [B, 4] float64.

    Raises:
        ValueError: not as many scores as boxes, by the position of the sample.
    """
    chosen = []
    for position, (own, given) in enumerate(zip(scores, boxes, strict=True)):
        given = _boxes(given, f"boxes of sample {position}")
        if len(own) != len(given):
            raise ValueError(f"sample {position} has {len(own)} scores and {len(given)} boxes: give one score a box.")
        chosen.append(given[own.argmax().to(given.device)])
    return torch.stack(chosen) if chosen else torch.zeros(0, 4, dtype=torch.float64)


def intersection_over_union(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union in whole pixels, as the measure of RefCOCO+ counts it.

    A box reaches from x to x + w - 1, and both ends belong to it; boxes that share only one row or one column share nothing.

    Args:
        boxes, others: [..., 4] of shapes that broadcast.

    Returns:
        [...] float64.

    Raises:
        ValueError: no boxes, or a box without an area.
    """
    boxes, others = _boxes(boxes, "boxes"), _boxes(others, "others")
    first = torch.maximum(boxes[..., :2], others[..., :2])
    last = torch.minimum(boxes[..., :2] + boxes[..., 2:], others[..., :2] + others[..., 2:]) - 1
    shared = torch.where((first < last).all(dim=-1), (last - first + 1).prod(dim=-1), 0.0)
    return shared / (boxes[..., 2:].prod(dim=-1) + others[..., 2:].prod(dim=-1) - shared)


def grounding_accuracy(chosen: torch.Tensor, wanted: torch.Tensor, splits: Sequence[str]) -> dict[str, float]:
    """Share of the phrases whose chosen box overlaps the wanted one by half at least, of each split.

    Args:
        chosen, wanted: [N, 4]. splits: of each phrase, e.g. `val`, `testA` or `testB`.

    Returns:
        Split -> share from 0 to 1; splits in alphabetical order.

    Raises:
        ValueError: numbers that do not fit, or a box without an area.
    """
    if not len(chosen) == len(wanted) == len(splits):
        raise ValueError(
            f"{len(chosen)} chosen boxes, {len(wanted)} wanted ones, {len(splits)} splits: give one a phrase."
        )
    return means_by_kind(intersection_over_union(chosen, wanted) >= RIGHT_FROM, splits)


def _boxes(boxes, name: str) -> torch.Tensor:
    """Boxes as float64, each with an area."""
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"{name} are {tuple(boxes.shape)}: each must be [x, y, w, h].")
    if not boxes.isfinite().all() or not (boxes[..., 2:] > 0).all():
        bad = ~(boxes.isfinite().all(dim=-1) & (boxes[..., 2:] > 0).all(dim=-1))
        raise ValueError(f"{name}: {boxes[bad][0].tolist()} is no box [x, y, w, h] with an area. Leave it out.")
    return boxes
