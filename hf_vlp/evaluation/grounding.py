"""Which box of an image a phrase means, by a map of what the model looked at, and how often that is the right one.

"Align before Fuse" (https://arxiv.org/abs/2107.07651), section 6.4: proposals of a detector are ranked by a map (Grad-CAM); the measure is
that of RefCOCO+ (Yu et al., https://arxiv.org/abs/1608.00272). Boxes are [x, y, w, h] in pixels of the image.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_vlp.evaluation.answers import means_by_kind
from hf_vlp.evaluation.encoding import encode, evaluating, image_inputs, picture_of, text_inputs, without_pictures
from hf_vlp.evaluation.report import Report

RIGHT_FROM = 0.5  # intersection over union

Maps = Callable[..., torch.Tensor]


@dataclass
class GroundingReport(Report):
    """What `evaluate_grounding` found.

    metrics: in percent; `accuracy`, the share of phrases whose best proposal is right, `chance`, that of a proposal taken blindly, and
    `reachable`, that of a perfect ranking; `<split>/...` the same of each split.
    counts: `records`, `records/<split>` and `proposals`. protocol: in words, what was measured.
    scores: of the N phrases, [P] float32, of each one's proposals. chosen: [N, 4] float64, the best of them, [x, y, w, h] in pixels.
    """

    scores: list[torch.Tensor]
    chosen: torch.Tensor


def evaluate_grounding(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    maps: Maps,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> GroundingReport:
    """Find the object that each phrase means: of its picture's proposals the one that `box_scores` ranks first.

    Under several processes (`torch.distributed`) each reads its part, and all get the same. Phrases of similar length are read together.

    Args:
        model: evaluated in evaluation mode, returned in the mode it was in.
        processor: of the model; its pictures show the whole of the record's.
        records: rows with `image`, `phrase`, optionally `split`, and boxes: `box`, the one that the phrase means, and `proposals`, one at
            least, all [x, y, w, h] in pixels; or `boxes`, [x1, y1, x2, y2] as fractions of width and height, all of them proposals, and
            `label`, the position of the one that the phrase means.
        maps: (model, input_ids [B, L], attention_mask [B, L], pixel_values [B, 3, H, W]) -> [B, h, w], e.g. `pair_maps` of
            `hf_vlp.explain.attention_maps` or its `image_maps` in a block.
        batch_size, device, accelerator, autocast, progress: as for `answer_logits`.

    Raises:
        ValueError: no records; a row without a phrase, boxes or a picture, or with a box that is none, with its position; a model that has
            no such maps.
        PictureError: a picture does not decode, with its row's position.
    """
    plain = list(without_pictures(records))
    phrases = [_phrase(record, row) for row, record in enumerate(plain)]
    given = [_Boxes.of(record, row) for row, record in enumerate(plain)]
    most = max((len(one.proposals) for one in given), default=0)

    def prepare(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        pictures = [{"image": picture_of(records, row)} for row in rows]
        sizes = [(one["image"].height, one["image"].width) for one in pictures]
        images = image_inputs(processor, pictures, range(len(rows)))
        texts = text_inputs(processor, [phrases[row] for row in rows])
        return {"rows": torch.tensor(rows), "sizes": torch.tensor(sizes), **texts, **images}

    def score(rows, sizes, input_ids, attention_mask, pixel_values) -> torch.Tensor:
        """[B, 2 + P]: the size of the picture, and the scores of its proposals, 0 behind the last."""
        found = maps(inner, input_ids, attention_mask, pixel_values)
        told = sizes.tolist()
        scores = box_scores(found, [given[row].in_pixels(size)[0] for row, size in zip(rows.tolist(), told)], told)
        padded = [F.pad(own, (0, most - len(own))) for own in scores]
        return torch.cat([sizes.float(), torch.stack(padded)], dim=1)

    with evaluating(model, accelerator) as inner:
        found = encode(
            len(plain),
            prepare,
            score,
            batch_size=batch_size,
            device=torch.device(device) if device is not None else next(inner.parameters()).device,
            autocast=autocast,
            order=sorted(range(len(plain)), key=lambda row: len(phrases[row])),
            name="phrases",
            progress=progress,
        )
    pixels = [one.in_pixels(row[:2].tolist()) for one, row in zip(given, found)]
    scores = [row[2 : 2 + len(own)] for (own, _), row in zip(pixels, found)]
    chosen, wanted = best_boxes(scores, [own for own, _ in pixels]), torch.stack([box for _, box in pixels])
    right = [are_right(own, box) for own, box in pixels]
    shares = {
        "accuracy": are_right(chosen, wanted),
        "chance": torch.stack([own.double().mean() for own in right]),
        "reachable": torch.stack([own.any() for own in right]),
    }
    metrics = {name: 100.0 * float(values.double().mean()) for name, values in shares.items()}
    counts = {"records": len(plain), "proposals": sum(map(len, scores))}
    splits = [record.get("split") for record in plain]
    if all(splits):
        by_split = {name: means_by_kind(values, splits) for name, values in shares.items()}
        counts |= {f"records/{split}": number for split, number in sorted(Counter(splits).items())}
        metrics |= {
            f"{split}/{name}": 100.0 * of[split] for split in sorted(set(splits)) for name, of in by_split.items()
        }
    protocol = f"the best of {counts['proposals'] / len(plain):.1f} proposals for {len(plain):,} phrases overlaps by {RIGHT_FROM} at least"
    return GroundingReport(metrics, counts, protocol, scores, chosen)


@dataclass(frozen=True)
class _Boxes:
    """What a record says of boxes: `proposals` [P, 4] and the one that is `wanted` [4], float64; [x, y, w, h] in pixels or `fractions`."""

    proposals: torch.Tensor
    wanted: torch.Tensor
    fractions: bool

    @classmethod
    def of(cls, record: Mapping[str, Any], row: int) -> "_Boxes":
        """Of one of the two ways in which a record may say it."""
        if record.get("box") is not None:
            proposals = _boxes(_some(record.get("proposals"), name := f"proposals of record {row}"), name)
            return cls(proposals, _boxes([record["box"]], f"`box` of record {row}")[0], fractions=False)
        label = record.get("label")
        if record.get("boxes") is None or label is None:
            raise ValueError(
                f"record {row} does not say which box its phrase means. Give it `box` and `proposals`, or `boxes` and the right one's "
                "position as `label`."
            )
        corners = _fours(_some(record["boxes"], name := f"boxes of record {row}"), name)
        proposals = _boxes(torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1), name)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(proposals):
            raise ValueError(f"record {row} has the label {label!r}, no position in its {len(proposals)} boxes.")
        return cls(proposals, proposals[label], fractions=True)

    def in_pixels(self, size: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """The proposals [P, 4] and the one that is wanted [4] in pixels of a picture of this (height, width)."""
        if not self.fractions:
            return self.proposals, self.wanted
        height, width = size
        scale = torch.tensor([width, height, width, height], dtype=torch.float64)
        # a fraction of whole pixels is whole again: just below, a row or a column would be lost
        return tuple((boxes * scale).round(decimals=6) for boxes in (self.proposals, self.wanted))


def _some(boxes: Any, name: str) -> Any:
    """Boxes, one at least."""
    if boxes is None or not len(boxes):
        raise ValueError(f"{name} are {boxes!r}: give at least one. An evaluation leaves nothing out.")
    return boxes


def _phrase(record: Mapping[str, Any], row: int) -> str:
    phrase = record.get("phrase")
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(
            f"record {row} has no phrase ({phrase!r}). An evaluation leaves nothing out: repair or remove the row."
        )
    return phrase


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


def are_right(boxes: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Whether boxes [..., 4] overlap those that are wanted by half at least: [...] bool; see `intersection_over_union`."""
    return intersection_over_union(boxes, wanted) >= RIGHT_FROM


def _boxes(boxes, name: str) -> torch.Tensor:
    """Boxes as float64, each with an area."""
    boxes = _fours(boxes, name)
    if not boxes.isfinite().all() or not (boxes[..., 2:] > 0).all():
        bad = ~(boxes.isfinite().all(dim=-1) & (boxes[..., 2:] > 0).all(dim=-1))
        raise ValueError(f"{name}: {boxes[bad][0].tolist()} is no box [x, y, w, h] with an area. Leave it out.")
    return boxes


def _fours(boxes, name: str) -> torch.Tensor:
    """Boxes [..., 4] as float64, whatever their numbers are."""
    try:
        boxes = torch.as_tensor(boxes, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are {boxes!r:.80} ({error}): each must be four numbers.") from None
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"{name} are {tuple(boxes.shape)}: each must be four numbers.")
    return boxes
