"""Zero-shot retrieval by two towers: pictures and captions are encoded once, all pairs scored in blocks.

Records with one image id are one picture, encoded once; all their captions are its positives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_vlp.evaluation.encoding import encode, encode_images, encode_texts, evaluating, picture_of, verb_of
from hf_vlp.evaluation.ranks import ranks_both_ways, recalls, rsum, top_targets

DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass
class RetrievalReport:
    """What `evaluate_retrieval` found.

    metrics: `image_to_text/R@1`, ... `text_to_image/mean_rank`, `rsum`; recalls in percent, ranks from 1.
    counts: `images`, `captions`, and the least, mean and most captions of an image.
    protocol: in words, what was scored.
    image_features [N, E], text_features [M, E]: unit length, float32.
    image_ids [N], text_ids [M] int64: index of the image that each row is or belongs to.
    captions: [M] texts. image_rows: [N] the record that each image was read from.
    """

    metrics: dict[str, float]
    counts: dict[str, float]
    protocol: str
    image_features: torch.Tensor
    text_features: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor
    captions: list[str]
    image_rows: list[int]

    def table(self) -> str:
        """The metrics as an aligned plain-text table."""
        names = [name.partition("/")[2] for name in self.metrics if name.startswith(DIRECTIONS[0])]
        lines = [f"{'':<14}" + "".join(f"{name.replace('_', ' '):>13}" for name in names)]
        for direction in DIRECTIONS:
            values = (self.metrics[f"{direction}/{name}"] for name in names)
            lines.append(f"{direction.replace('_', ' '):<14}" + "".join(f"{value:>13.1f}" for value in values))
        lines.append(f"rsum {self.metrics['rsum']:.1f}; {self.protocol}")
        return "\n".join(lines)

    def top(self, k: int = 5) -> list[tuple[str, int, list[int]]]:
        """For every caption: the text, the index of its image, the indices of the k images found, best first."""
        found = top_targets(self.text_features, self.image_features, k).tolist()
        return list(zip(self.captions, self.text_ids.tolist(), found, strict=True))

    def five_fold_1k(self) -> dict[str, float]:
        """The metrics of the 1K protocol of COCO: means over five folds of 1,000 of the 5,000 images, in their order.

        Raises:
            ValueError: there are not 5,000 images.
        """
        if len(self.image_ids) != 5000:
            raise ValueError(
                f"the five-fold 1K protocol needs the 5,000 images of COCO's test, not {len(self.image_ids)}."
            )
        return five_fold_1k(self.image_features, self.text_features, self.image_ids, self.text_ids)

    def to_dict(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        return {"metrics": dict(self.metrics), "counts": dict(self.counts), "protocol": self.protocol}


class RetrievalSet:
    """The distinct pictures and all captions of records; optionally the processed pictures, for evaluating repeatedly.

    Args:
        records: rows with `image`, `captions` and `image_id` (the row's position where there is none).
        processor: given, all pictures are processed now and kept (N * 3 * H * W float32).
        captions_per_image: keep the first so many of each picture's captions. Published results on COCO's 5,000 test
            pictures count 5 each (25,000), while some have 6 or 7.

    Raises:
        ValueError: there are no records, or a row has no caption or an empty image_id (names the row's position), or a
            picture has fewer captions than asked for.
    """

    def __init__(self, records: Any, processor: Any = None, captions_per_image: int | None = None):
        if not len(records):
            raise ValueError("there are no records to evaluate on.")
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"captions_per_image={captions_per_image} must be positive.")
        self.captions_per_image = captions_per_image
        self.records = records
        plain = records.remove_columns("image") if hasattr(records, "remove_columns") else records
        self.image_rows: list[int] = []
        self.captions: list[str] = []
        text_ids: list[int] = []
        index_of: dict[str, int] = {}
        kept: list[int] = []  # captions of each image
        for row, record in enumerate(plain):
            if not record["captions"] or not all(text and text.strip() for text in record["captions"]):
                raise ValueError(f"record {row} has no caption or an empty one. Repair or remove the row.")
            image_id = record.get("image_id", row)
            if image_id is None or image_id != image_id or str(image_id) == "":  # NaN differs from itself
                raise ValueError(
                    f"record {row} has no image_id ({image_id!r}). Fill it in, or leave the column out if every record is "
                    f"a picture of its own."
                )
            index = index_of.setdefault(str(image_id), len(index_of))
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
                f"the picture of record {row} has {min(kept)} captions, {captions_per_image} are asked for. Ask for fewer."
            )
        self.text_ids = torch.tensor(text_ids)
        self.image_ids = torch.arange(len(self.image_rows))
        self.pixels = None
        if processor is not None:
            pictures = [picture_of(records, row) for row in self.image_rows]
            self.pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]

    def __len__(self) -> int:
        return len(self.image_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The picture of the index-th image."""
        return {"image": picture_of(self.records, self.image_rows[index])}

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
) -> RetrievalReport:
    """Encode pictures and captions, rank both ways.

    Under several processes (`torch.distributed`) each encodes its part, and all get the same report.

    Args:
        model: has `get_image_features` and `get_text_features`, itself or in its base model. Evaluated in evaluation
            mode, returned in the mode it was in.
        processor: of the model.
        records: rows with `image`, `captions`, `image_id`; or a `RetrievalSet`, which may hold them processed.
        device: where to compute; the model's if not given (it is not moved).
        accelerator: the `accelerate.Accelerator` that wrapped the model, if any.
        autocast: type of the computation, e.g. torch.bfloat16. Scores are float32 in any case.
        prompt: caption -> text that is encoded (the CLIP paper puts "a photo of" before each).
        progress: show bars.

    Raises:
        ValueError: no records, an empty caption or image_id, or a picture that does not decode, with the row's position.
        TypeError: the model cannot embed one side alone.
    """
    pairs = records if isinstance(records, RetrievalSet) else RetrievalSet(records)
    texts = [prompt(caption) for caption in pairs.captions] if prompt is not None else pairs.captions
    with evaluating(model, accelerator) as inner:
        place = torch.device(device) if device is not None else next(inner.parameters()).device
        options = {"batch_size": batch_size, "device": place, "autocast": autocast, "progress": progress}
        if pairs.pixels is None:
            images = encode_images(inner, processor, pairs, **options)
        else:
            images = _encode_pixels(inner, pairs, options)
        captions = encode_texts(inner, processor, texts, **options)
    # low-precision features are of unit length only roughly
    images, captions = (torch.nn.functional.normalize(side, dim=1) for side in (images, captions))
    counts = pairs.counts()
    protocol = (
        f"{counts['captions']:,} captions ({counts['captions_per_image_mean']:g} an image) against all "
        f"{counts['images']:,} images, cosine, best positive counts, ties count against it"
    )
    if pairs.captions_per_image is not None:
        protocol += f", the first {pairs.captions_per_image} captions of each image"
    metrics = retrieval_metrics(images, captions, pairs.image_ids, pairs.text_ids)
    ids = {"image_ids": pairs.image_ids, "text_ids": pairs.text_ids}
    return RetrievalReport(
        metrics, counts, protocol, images, captions, **ids, captions=pairs.captions, image_rows=pairs.image_rows
    )


def retrieval_metrics(
    image_features: torch.Tensor, text_features: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor
) -> dict[str, float]:
    """Recalls and ranks both ways, and the sum of the recalls.

    Args:
        image_features: [N, E]. text_features: [M, E].
        image_ids: [N], text_ids: [M] int64; equal ids belong together.
    """
    to_text, to_image = map(recalls, ranks_both_ways(image_features, text_features, image_ids, text_ids))
    metrics = {f"image_to_text/{name}": value for name, value in to_text.items()}
    metrics |= {f"text_to_image/{name}": value for name, value in to_image.items()}
    return metrics | {"rsum": rsum(to_text, to_image)}


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
    if len(image_ids) % folds:
        raise ValueError(f"{len(image_ids)} images do not divide into {folds} folds.")
    results = []
    for rows in torch.arange(len(image_ids)).chunk(folds):
        texts = torch.isin(text_ids, image_ids[rows])
        results.append(retrieval_metrics(image_features[rows], text_features[texts], image_ids[rows], text_ids[texts]))
    return {name: sum(result[name] for result in results) / folds for name in results[0]}


def _encode_pixels(model: Any, pairs: RetrievalSet, options: dict[str, Any]) -> torch.Tensor:
    def prepare(rows):
        return {"pixel_values": pairs.pixels[list(rows)]}

    return encode(len(pairs), prepare, verb_of(model, "get_image_features"), name="pictures", **options)
