"""Crisscrossed Captions (Parekh et al. 2021, https://arxiv.org/abs/2004.15020): retrieval with graded annotations.

People judged how well captions and images of COCO's test fit each other, captions each other and images each other, so
that a query has positives besides its own. Protocol of Chen et al. 2021 (VSE-infinity), over the 5,000 test images: the
rank of a query is the best of any of its positives among the evaluated images or captions.

- image to text, text to image: every annotated pair is a positive, whatever its score. A query without any counts as missed.
- text to text: the other captions of the image, and captions annotated with 3.0 or more.
- image to image: images annotated with 2.5 or more; an image without any is no query.
- within a kind a query is ranked among the rest with a similarity of 0 to itself, as the published numbers have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_vlp.evaluation.encoding import without_pictures
from hf_vlp.evaluation.ranks import MISS, best_ranks_of_pairs, recalls
from hf_vlp.evaluation.report import Report
from hf_vlp.evaluation.retrieval import RetrievalSet, evaluate_retrieval

TEXT_TO_TEXT_SCORE = 3.0
IMAGE_TO_IMAGE_SCORE = 2.5

Annotations = Mapping[str, Mapping[str, Sequence[tuple[Any, float]]]]


@dataclass
class CrisscrossedReport(Report):
    """metrics: `image_to_text/R@1`, ... `image_to_image/R@10` in percent; counts: `images`, `captions`, and per direction
    `<direction>/queries` and, among them, `<direction>/without_positive`; protocol: in words, what was scored.
    """

    def table(self) -> str:
        """The metrics as an aligned plain-text table."""
        names = list(dict.fromkeys(name.partition("/")[2] for name in self.metrics))
        lines = [f"{'':<14}" + "".join(f"{name:>13}" for name in names)]
        for direction in dict.fromkeys(name.partition("/")[0] for name in self.metrics):
            values = (self.metrics[f"{direction}/{name}"] for name in names)
            lines.append(f"{direction.replace('_', ' '):<14}" + "".join(f"{value:>13.1f}" for value in values))
        return "\n".join([*lines, self.protocol])


def crisscrossed_ranks(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_ids: Sequence[str],
    text_ids: Sequence[str],
    owners: torch.Tensor,
    annotations: Annotations,
) -> dict[str, torch.Tensor]:
    """Ranks in the four directions.

    Args:
        image_features: [N, E]. text_features: [M, E].
        image_ids: [N] names of the images. text_ids: [M] names of the captions.
        owners: [M] int64, the row of the image that each caption was written for.
        annotations: `image_to_text`, `text_to_image`, `text_to_text`, `image_to_image` -> name of a query -> its
            (name, score) pairs. Names that are not evaluated are passed over.

    Returns:
        Direction -> int64, from 0, `MISS` where a query has no positive: [N] of `image_to_text`, [M] of `text_to_image`
        and `text_to_text`, one for each image that has a positive of `image_to_image`.

    Raises:
        ValueError: a name is given twice, counts that do not fit, or annotations of a direction that know none of the queries.
    """
    images, texts = _rows_of("image", image_ids, image_features), _rows_of("caption", text_ids, text_features)
    if owners.shape != (len(texts),):
        raise ValueError(f"{len(texts)} captions need one owner each; owners have the shape {tuple(owners.shape)}.")
    anything = -float("inf")
    pairs = {
        "image_to_text": _annotated("image_to_text", annotations, images, texts, anything),
        "text_to_image": _annotated("text_to_image", annotations, texts, images, anything),
        "text_to_text": _annotated("text_to_text", annotations, texts, texts, TEXT_TO_TEXT_SCORE),
        "image_to_image": _annotated("image_to_image", annotations, images, images, IMAGE_TO_IMAGE_SCORE),
    }
    pairs["text_to_text"] = torch.cat([pairs["text_to_text"], _siblings(owners)])
    features = {"image": image_features, "text": text_features}
    ranks = {}
    for direction, positives in pairs.items():
        query, _, target = direction.partition("_to_")
        within = 0.0 if query == target else None
        ranks[direction] = best_ranks_of_pairs(features[query], features[target], positives, self_score=within)
    ranks["image_to_image"] = ranks["image_to_image"][ranks["image_to_image"] != MISS]
    return ranks


def crisscrossed_metrics(ranks: Mapping[str, torch.Tensor], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recalls in percent, `<direction>/R@k`, of `crisscrossed_ranks`; 0 in a direction without a query."""
    metrics = {}
    for direction, found in ranks.items():
        values = recalls(found, ks) if len(found) else dict.fromkeys((f"R@{k}" for k in ks), 0.0)
        # a missed query has no rank: their median and mean would mean nothing
        metrics |= {f"{direction}/{name}": value for name, value in values.items() if name.startswith("R@")}
    return metrics


def evaluate_crisscrossed(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    captions_of: Mapping[str, Sequence[str]],
    annotations: Annotations,
    **options,
) -> CrisscrossedReport:
    """Encode images and captions of COCO's test, rank in four directions.

    Args:
        model, processor: as for `evaluate_retrieval`.
        records: rows of those images with `image_id`, and `captions` in the order of the annotated names.
        captions_of: image_id -> the names of its captions, the same number for each.
        annotations: as for `crisscrossed_ranks`.
        options: `batch_size`, `device`, `accelerator`, `autocast`, `progress` of `evaluate_retrieval`.

    Raises:
        ValueError: as `evaluate_retrieval` and `crisscrossed_ranks`; or an image that `captions_of` lacks.
    """
    numbers = {len(names) for names in captions_of.values()}
    if len(numbers) != 1:
        raise ValueError(f"the images have {sorted(numbers)} annotated captions: all must have the same number.")
    pairs = RetrievalSet(records, captions_per_image=numbers.pop())
    plain = without_pictures(records)
    image_ids = [str(plain[row].get("image_id", row)) for row in pairs.image_rows]
    for row, name in zip(pairs.image_rows, image_ids):
        if name not in captions_of:
            raise ValueError(
                f"record {row} has the image_id {name}, which the annotations lack. Give COCO's test images under COCO's "
                f"own ids."
            )
    report = evaluate_retrieval(model, processor, pairs, **options)
    # the captions of an image in their order, wherever its records stand
    names = {index: iter(captions_of[name]) for index, name in enumerate(image_ids)}
    text_ids = [next(names[owner]) for owner in pairs.text_ids.tolist()]
    ranks = crisscrossed_ranks(
        report.image_features, report.text_features, image_ids, text_ids, pairs.text_ids, annotations
    )
    counts = {"images": len(image_ids), "captions": len(text_ids)}
    for direction, found in ranks.items():
        counts |= {
            f"{direction}/queries": len(found),
            f"{direction}/without_positive": int((found == MISS).sum()),
        }
    protocol = (
        f"Crisscrossed Captions over {len(image_ids):,} images and {len(text_ids):,} captions, "
        f"best annotated positive counts, ties count against it"
    )
    return CrisscrossedReport(crisscrossed_metrics(ranks), counts, protocol)


def _rows_of(kind: str, names: Sequence[str], features: torch.Tensor) -> dict[str, int]:
    rows = {str(name): row for row, name in enumerate(names)}
    if len(names) != len(features) or len(rows) != len(names):
        raise ValueError(
            f"{len(features)} {kind} features need one name each; {len(names)} are given, {len(rows)} of them different."
        )
    return rows


def _annotated(
    direction: str, annotations: Annotations, queries: Mapping[str, int], targets: Mapping[str, int], least: float
) -> torch.Tensor:
    """[Q, 2] rows of the pairs that are evaluated and score `least` or more."""
    lists = annotations[direction]
    known = [query for query in queries if query in lists]
    if not known:
        raise ValueError(
            f"the annotations {direction} know none of the {len(queries)} queries, such as {next(iter(queries))}; they "
            f"name such as {next(iter(lists), None)}. Evaluate the images and captions that were annotated."
        )
    pairs = [
        (queries[query], targets[str(target)])
        for query in known
        for target, score in lists[query]
        if str(target) in targets and score >= least
    ]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _siblings(owners: torch.Tensor) -> torch.Tensor:
    """[Q, 2] rows of the pairs of different captions of one image."""
    captions: dict[int, list[int]] = {}
    for row, owner in enumerate(owners.tolist()):
        captions.setdefault(owner, []).append(row)
    pairs = [(row, other) for rows in captions.values() for row in rows for other in rows if other != row]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
