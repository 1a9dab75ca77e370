"""Retrieval by two towers: images and captions are encoded once, all pairs scored in blocks.

Records with one image id are one image, encoded once; all their captions are its positives. What a model sees of an
image, its picture or stored regions, is its processor's matter: see `image_inputs`.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from hf_vlp.evaluation.encoding import (
    apart,
    encode,
    encode_texts,
    evaluating,
    image_inputs,
    picture_of,
    takes_regions,
    together,
    verb_of,
    without_pictures,
)
from hf_vlp.evaluation.ranks import ranks_both_ways, ranks_from_scores, recalls, rsum, top_targets
from hf_vlp.evaluation.report import Report

DIRECTIONS = ("image_to_text", "text_to_image")
UNIT_LENGTH = 0.01  # how far low precision leaves a row from unit length, at most: bfloat16 rounds by 0.004


@dataclass
class RetrievalReport(Report):
    """What an evaluation of retrieval found, whatever the scores come from; a subclass gives `scores` and `top`.

    metrics: `image_to_text/R@1`, ... `text_to_image/mean_rank`, `rsum`; recalls in percent, ranks from 1.
    counts: `images`, `captions`, and the least, mean and most captions of an image.
    protocol: in words, what was scored.
    image_ids [N], text_ids [M] int64: index of the image that each row is or belongs to.
    captions: [M] texts. image_rows: [N] the record that each image was read from.
    """

    image_ids: torch.Tensor
    text_ids: torch.Tensor
    captions: list[str]
    image_rows: list[int]

    def scores(self) -> torch.Tensor:
        """[N, M] float32, of every image with every caption."""
        raise NotImplementedError

    def top(self, k: int = 5) -> list[tuple[str, int, list[int]]]:
        """For every caption: the text, the index of its image, the indices of the k images found, best first."""
        raise NotImplementedError

    def table(self) -> str:
        """The metrics as an aligned plain-text table."""
        names = [name.partition("/")[2] for name in self.metrics if name.startswith(DIRECTIONS[0])]
        lines = [f"{'':<14}" + "".join(f"{name.replace('_', ' '):>13}" for name in names)]
        for direction in DIRECTIONS:
            values = (self.metrics[f"{direction}/{name}"] for name in names)
            lines.append(f"{direction.replace('_', ' '):<14}" + "".join(f"{value:>13.1f}" for value in values))
        lines.append(f"rsum {self.metrics['rsum']:.1f}; {self.protocol}")
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """Of the captions and whose they are, in their order: equal where the scores of two models stand for the same."""
        return fingerprint_of(self.captions, self.text_ids)

    def five_fold_1k(self) -> dict[str, float]:
        """The metrics of the 1K protocol of COCO: means over five folds of 1,000 of the 5,000 images, in their order.

        Raises:
            ValueError: there are not 5,000 images.
        """
        if len(self.image_ids) != 5000:
            raise ValueError(
                f"the five-fold 1K protocol needs the 5,000 images of COCO's test, not {len(self.image_ids)}."
            )
        return five_fold_scores(self.scores(), self.image_ids, self.text_ids)


@dataclass
class FeatureRetrievalReport(RetrievalReport):
    """What `evaluate_retrieval` found; image_features [N, E], text_features [M, E] float32: their products are the scores."""

    image_features: torch.Tensor
    text_features: torch.Tensor

    def scores(self) -> torch.Tensor:
        """[N, M] float32, of every image with every caption."""
        return self.image_features @ self.text_features.T

    def top(self, k: int = 5) -> list[tuple[str, int, list[int]]]:
        """For every caption: the text, the index of its image, the indices of the k images found, best first."""
        return with_captions(self, top_targets(self.text_features, self.image_features, k))

    def five_fold_1k(self) -> dict[str, float]:
        """The same as of any report; scores are computed a fold at a time."""
        if len(self.image_ids) != 5000:
            return super().five_fold_1k()
        return five_fold_1k(self.image_features, self.text_features, self.image_ids, self.text_ids)


class RetrievalSet:
    """The distinct images and all captions of records; optionally the processed images, for evaluating repeatedly.

    Args:
        records: rows with `captions`, `image_id` (where there is none, rows of one `regions` key are one image, and any
            other row is one of its own) and what the processor makes an image of: `image`, `regions` or `image_id`.
        processor: given, all images are processed now and kept, each in its own size (N * 3 * H * W or, with R regions
            each, N * R * F float32).
        captions_per_image: keep the first so many of each image's captions. Published results on COCO's 5,000 test
            images count 5 each (25,000), while some have 6 or 7. With 1, captions and images are pairs.

    Raises:
        ValueError: there are no records, or a row has no caption or an empty image_id (names the row's position), or an
            image has fewer captions than asked for.
    """

    def __init__(self, records: Any, processor: Any = None, captions_per_image: int | None = None):
        if not len(records):
            raise ValueError("there are no records to evaluate on.")
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"captions_per_image={captions_per_image} must be positive.")
        self.captions_per_image = captions_per_image
        self.records = records
        self.image_rows: list[int] = []
        self.captions: list[str] = []
        text_ids: list[int] = []
        index_of: dict[str, int] = {}
        kept: list[int] = []  # captions of each image
        for row, record in enumerate(without_pictures(records)):
            if not record["captions"] or not all(text and text.strip() for text in record["captions"]):
                raise ValueError(f"record {row} has no caption or an empty one. Repair or remove the row.")
            index = index_of.setdefault(_identity(record, row), len(index_of))
            if index == len(self.image_rows):
                self.image_rows.append(row)
                kept.append(0)
            captions = record["captions"]
            if captions_per_image is not None:
                captions = captions[: captions_per_image - kept[index]]
            kept[index] += len(captions)
            self.captions.extend(captions)
            text_ids.extend([index] * len(captions))
        if captions_per_image is not None and min(kept) < captions_per_image:
            row = self.image_rows[kept.index(min(kept))]
            raise ValueError(
                f"the image of record {row} has {min(kept)} captions, {captions_per_image} are asked for. Ask for fewer."
            )
        self.text_ids = torch.tensor(text_ids)
        self.image_ids = torch.arange(len(self.image_rows))
        self.kept: list[dict[str, torch.Tensor]] | None = None
        if processor is not None:
            chunks = torch.arange(len(self)).split(256)  # regions are filled up to the longest of a chunk
            self.kept = [row for chunk in chunks for row in apart(self.inputs(processor, chunk.tolist()))]

    def __len__(self) -> int:
        return len(self.image_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The picture of the index-th image."""
        return {"image": picture_of(self.records, self.image_rows[index])}

    def inputs(self, processor: Any, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """What a model is handed for some of the images, kept or processed now."""
        if self.kept is not None:
            return together([self.kept[index] for index in indices])
        return image_inputs(processor, self.records, [self.image_rows[index] for index in indices])

    def identities(self) -> dict[str, Any]:
        """What a `RetrievalReport` holds of images and captions."""
        names = ("image_ids", "text_ids", "captions", "image_rows")
        return {name: getattr(self, name) for name in names}

    def counts(self) -> dict[str, float]:
        """Images, captions, and captions of an image."""
        per_image = torch.bincount(self.text_ids, minlength=len(self))
        return {
            "images": len(self),
            "captions": len(self.captions),
            "captions_per_image_min": int(per_image.min()),
            "captions_per_image_mean": round(len(self.captions) / len(self), 3),
            "captions_per_image_max": int(per_image.max()),
        }


def evaluate_retrieval(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    autocast: torch.dtype | None = None,
    prompt: Callable[[str], str] | None = None,
    progress: bool = True,
) -> FeatureRetrievalReport:
    """Encode images and captions, rank both ways.

    Under several processes (`torch.distributed`) each encodes its part, and all get the same report.

    Args:
        model: has `get_image_features` and `get_text_features`, itself or in its base model. Their products are the
            scores: cosines where they are of unit length. Evaluated in evaluation mode, returned in the mode it was in.
        processor: of the model; one with a `feature_extractor` is handed regions, see `image_inputs`.
        records: rows as for `RetrievalSet`; or one, which may hold them processed.
        device: where to compute; the model's if not given (it is not moved).
        accelerator: the `accelerate.Accelerator` that wrapped the model, if any.
        autocast: type of the computation, e.g. torch.bfloat16. Scores are float32 in any case.
        prompt: caption -> text that is encoded (the CLIP paper puts "a photo of" before each).
        progress: show bars.

    Raises:
        ValueError: no records, an empty caption or image_id, a picture that does not decode, with the row's position, or
            an image that the region store lacks.
        TypeError: the model cannot embed one side alone.
    """
    pairs = records if isinstance(records, RetrievalSet) else RetrievalSet(records)
    texts = [prompt(caption) for caption in pairs.captions] if prompt is not None else pairs.captions
    with evaluating(model, accelerator) as inner:
        place = torch.device(device) if device is not None else next(inner.parameters()).device
        options = {"batch_size": batch_size, "device": place, "autocast": autocast, "progress": progress}
        prepare = functools.partial(pairs.inputs, processor)
        name = "images" if takes_regions(processor) else "pictures"
        images = encode(len(pairs), prepare, verb_of(inner, "get_image_features"), name=name, **options)
        captions = encode_texts(inner, processor, texts, **options)
    (images, unit_images), (captions, unit_captions) = map(exact_unit_rows, (images, captions))
    counts = pairs.counts()
    protocol = (
        f"{counts['captions']:,} captions ({counts['captions_per_image_mean']:g} an image) against all "
        f"{counts['images']:,} images, {'cosine' if unit_images and unit_captions else 'inner product'}, best positive "
        f"counts, ties count against it"
    )
    if pairs.captions_per_image is not None:
        protocol += f", the first {pairs.captions_per_image} captions of each image"
    metrics = retrieval_metrics(images, captions, pairs.image_ids, pairs.text_ids)
    return FeatureRetrievalReport(
        metrics, counts, protocol, **pairs.identities(), image_features=images, text_features=captions
    )


def exact_unit_rows(features: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Repair what low precision leaves of unit length, and nothing else: a model may compare by inner products.

    Args:
        features: [N, E].

    Returns:
        [N, E], of exact unit length if all rows were within 1 % of it, else as they are; and whether they were.
    """
    unit = bool(((features.norm(dim=1) - 1).abs() <= UNIT_LENGTH).all())
    return (normalize(features, dim=1) if unit else features), unit


def with_captions(report: RetrievalReport, found: torch.Tensor) -> list[tuple[str, int, list[int]]]:
    """The entries of `RetrievalReport.top` from `found` [M, k], the images found for each caption."""
    return list(zip(report.captions, report.text_ids.tolist(), found.tolist(), strict=True))


def fingerprint_of(captions: Sequence[str], text_ids: torch.Tensor) -> str:
    """See `RetrievalReport.fingerprint`."""
    content = json.dumps([list(captions), text_ids.tolist()], ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def retrieval_metrics(
    image_features: torch.Tensor, text_features: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor
) -> dict[str, float]:
    """Recalls and ranks both ways, and the sum of the recalls.

    Args:
        image_features: [N, E]. text_features: [M, E].
        image_ids: [N], text_ids: [M] int64; equal ids belong together.
    """
    return rank_metrics(*ranks_both_ways(image_features, text_features, image_ids, text_ids))


def score_metrics(scores: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor) -> dict[str, float]:
    """The same from given scores [N, M], images x captions, e.g. of an ensemble."""
    return rank_metrics(
        ranks_from_scores(scores, image_ids, text_ids), ranks_from_scores(scores.T, text_ids, image_ids)
    )


def five_fold_1k(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_ids: torch.Tensor,
    text_ids: torch.Tensor,
    folds: int = 5,
) -> dict[str, float]:
    """Means of the metrics over folds of consecutive images, each with its own captions (COCO 1K: 5 of 1,000).

    Raises:
        ValueError: the images do not divide into the folds.
    """
    return _mean(
        retrieval_metrics(image_features[rows], text_features[texts], image_ids[rows], text_ids[texts])
        for rows, texts in folds_of(image_ids, text_ids, folds)
    )


def five_fold_scores(
    scores: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor, folds: int = 5
) -> dict[str, float]:
    """The same from given scores [N, M], images x captions."""
    return _mean(
        score_metrics(scores[rows][:, texts], image_ids[rows], text_ids[texts])
        for rows, texts in folds_of(image_ids, text_ids, folds)
    )


def folds_of(
    image_ids: torch.Tensor, text_ids: torch.Tensor, folds: int = 5
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each fold its images, consecutive ones, and their captions: rows [N / folds] and [K], int64.

    Raises:
        ValueError: the images do not divide into the folds.
    """
    if folds < 1 or len(image_ids) % folds:
        raise ValueError(f"{len(image_ids)} images do not divide into {folds} folds.")
    for rows in torch.arange(len(image_ids)).chunk(folds):
        yield rows, torch.isin(text_ids, image_ids[rows]).nonzero()[:, 0]


def rank_metrics(to_text: torch.Tensor, to_image: torch.Tensor) -> dict[str, float]:
    """The same from ranks, from 0: of the images' captions [N], of the captions' images [M]."""
    to_text, to_image = recalls(to_text), recalls(to_image)
    metrics = {f"image_to_text/{name}": value for name, value in to_text.items()}
    metrics |= {f"text_to_image/{name}": value for name, value in to_image.items()}
    return metrics | {"rsum": rsum(to_text, to_image)}


def _mean(results: Iterator[dict[str, float]]) -> dict[str, float]:
    results = list(results)
    return {name: sum(result[name] for result in results) / len(results) for name in results[0]}


def _identity(record: Any, row: int) -> tuple[str, str]:
    """What two rows of one image have in common."""
    if "image_id" not in record:
        key = record.get("regions")
        return ("regions", str(key)) if isinstance(key, str | int) else ("row", str(row))
    image_id = record["image_id"]
    if image_id is None or image_id != image_id or str(image_id) == "":  # NaN differs from itself
        raise ValueError(
            f"record {row} has no image_id ({image_id!r}). Fill it in, or leave the column out if every record is "
            f"an image of its own."
        )
    return "image_id", str(image_id)
