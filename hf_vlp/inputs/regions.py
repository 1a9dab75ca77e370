"""Region features of an image: what a detector, or a grid, says about each of its R regions; their padding and their dropping.

Bottom-up attention, "Bottom-Up and Top-Down Attention for Image Captioning and Visual Question Answering"
(https://arxiv.org/abs/1707.07998), section 3.1. The dropping is of VSE-infinity, "Learning the Best Pooling Strategy for Visual
Semantic Embedding" (https://arxiv.org/abs/2011.04305); the location code of ViLBERT (https://arxiv.org/abs/1908.02265), section 2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Detectors round: a corner may lie outside by a pixel, or by this share of a side where the image's size is not known.
EDGE = 1e-3
# No box of fractions has such a corner, and hardly any box of pixels has none.
SURELY_PIXELS = 2.0
PROBABILITY_SLACK = 1e-2  # of probabilities that were stored in half precision

SHAPES = {"features": "[R, F]", "boxes": "[R, 4]", "class_probs": "[R, C]", "objectness": "[R]"}

Array = np.ndarray


class RegionError(ValueError):
    """Region features that cannot be used.

    Attributes:
        image_id: of the image.
        field: of `RegionFeatures`, the one at fault.
        reason: what is wrong, with the value at fault.
        remedy: what to do about it.
    """

    def __init__(self, image_id: Any, field: str, reason: str, remedy: str):
        self.image_id, self.field, self.reason, self.remedy = image_id, field, reason, remedy
        which = "an image without id" if image_id is None else f"image {image_id!r}"
        super().__init__(f"regions of {which}, field '{field}': {reason}. {remedy}")

    def __reduce__(self):  # the error crosses from a loader's worker to the main process
        return type(self), (self.image_id, self.field, self.reason, self.remedy)


@dataclass(eq=False)
class RegionFeatures:
    """The regions of one image, in the order of the detector.

    Attributes:
        features: [R, F] float16 or float32, as the detector gives them (bottom-up attention: F 2048, not normalised).
        boxes: [R, 4] float32, corners x1 y1 x2 y2 as fractions of the image's width and height, 0 to 1 from the upper left; or None.
            `from_pixels` takes pixels.
        width: of the image, pixels; or None.
        height: of the image, pixels; or None.
        class_probs: [R, C] float, the detector's distribution over classes, each 0 to 1; or None.
        objectness: [R] float, the detector's confidence that there is something; or None.
        image_id: text or number by which the image is known; or None.

    Anything that numpy or torch can make an array of is accepted, and numbers of other kinds become float32.

    Raises:
        RegionError: zero regions, NaN or infinite numbers, boxes outside the image or in pixels, sizes below 1, probabilities
            outside 0 to 1, shapes or counts that disagree. It names the image and the field.
    """

    features: Array
    boxes: Array | None = None
    width: int | None = None
    height: int | None = None
    class_probs: Array | None = None
    objectness: Array | None = None
    image_id: str | int | None = None

    def __post_init__(self):
        for field in SHAPES:
            value = getattr(self, field)
            if value is not None:
                setattr(self, field, self._array(field, value))
        if self.boxes is not None:
            self.boxes = self.boxes.astype(np.float32, copy=False)
        self.check()

    @classmethod
    def from_pixels(cls, features: Any, boxes: Any, width: int, height: int, **fields: Any) -> "RegionFeatures":
        """Regions whose boxes are in pixels, as files of detectors have them.

        Args:
            features: [R, F].
            boxes: [R, 4], corners x1 y1 x2 y2 in pixels of an image of `width` x `height`.
            width: of the image, pixels.
            height: of the image, pixels.
            fields: the other fields of the class.

        Raises:
            RegionError: as the class; also boxes that are fractions already.
        """
        image_id = fields.get("image_id")
        width, height = _size("width", width, image_id), _size("height", height, image_id)
        boxes = _as_array(boxes, "boxes", image_id).astype(np.float32, copy=False)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise _bad_shape(image_id, "boxes", boxes)
        if len(boxes) and min(width, height) > 2 * SURELY_PIXELS and 0 < boxes.max() <= 1:
            reason = f"no corner is beyond {boxes.max():.3g} in an image of {width} x {height} pixels, so these are fractions"
            raise RegionError(
                image_id, "boxes", reason, "Give fractions to RegionFeatures(...), pixels to from_pixels."
            )
        fractions = boxes / np.array([width, height, width, height], np.float32)
        return cls(features, fractions, width, height, **fields)

    @classmethod
    def checked_before(cls, fields: dict[str, Any]) -> "RegionFeatures":
        """Regions made of all their fields as they are, without a look at them: for those read from where only checked ones go."""
        regions = object.__new__(cls)
        regions.__dict__ = fields
        return regions

    def __len__(self) -> int:
        return len(self.features)

    def check(self, feature_size: int | None = None) -> None:
        """Raise for the first field that cannot be used.

        Args:
            feature_size: the width F that is needed, if any.

        Raises:
            RegionError: as the class; also another width.
        """
        features = self.features
        if features.ndim != 2:
            raise _bad_shape(self.image_id, "features", features)
        if not features.size:
            reason = f"there are no regions (shape {list(features.shape)})"
            raise RegionError(self.image_id, "features", reason, "Give at least one, or leave the image out.")
        self.check_width(feature_size)
        self._check_finite("features")
        if (self.width is None) != (self.height is None):
            reason = f"width is {self.width} and height {self.height}"
            raise RegionError(self.image_id, "width", reason, "Give both in pixels, or neither.")
        if self.width is not None:
            self.width = _size("width", self.width, self.image_id)
            self.height = _size("height", self.height, self.image_id)
        if self.boxes is not None:
            self._check_shape("boxes", 2)
            if self.boxes.shape[1] != 4:
                raise _bad_shape(self.image_id, "boxes", self.boxes)
            self._check_boxes()
        if self.class_probs is not None:
            self._check_shape("class_probs", 2)
            lowest, highest = self.class_probs.min(initial=0), self.class_probs.max(initial=0)
            if lowest < 0 or highest > 1 + PROBABILITY_SLACK:
                reason = f"values from {lowest:.3g} to {highest:.3g} are no probabilities"
                raise RegionError(
                    self.image_id, "class_probs", reason, "Give the softmax of the scores, or leave them out."
                )
        if self.objectness is not None:
            self._check_shape("objectness", 1)

    def check_width(self, feature_size: int | None) -> None:
        """Raise a RegionError if the features have another width than `feature_size`; None fits all."""
        if feature_size is not None and self.features.shape[1] != feature_size:
            reason = f"the features are {self.features.shape[1]} wide, {feature_size} is expected"
            raise RegionError(
                self.image_id, "features", reason, "Take features of the detector that the model was trained with."
            )

    def select(self, rows: Any) -> "RegionFeatures":
        """The regions that `rows` names, a slice or whatever else indexes an array; of a slice, views."""
        kept = {field: getattr(self, field) for field in SHAPES}
        kept = {field: None if value is None else value[rows] for field, value in kept.items()}
        return self.checked_before(self.__dict__ | kept)

    def _array(self, field: str, value: Any) -> Array:
        return _as_array(value, field, self.image_id)

    def _check_shape(self, field: str, dimensions: int) -> None:
        value = getattr(self, field)
        if value.ndim != dimensions:
            raise _bad_shape(self.image_id, field, value)
        if len(value) != len(self.features):
            reason = f"it has {len(value)} rows and features {len(self.features)}"
            raise RegionError(self.image_id, field, reason, "Give one row a region, in the same order.")
        self._check_finite(field)

    def _check_finite(self, field: str) -> None:
        finite = np.isfinite(getattr(self, field))
        if not finite.all():
            place = tuple(int(i) for i in np.argwhere(~finite)[0])
            value, where = getattr(self, field)[place], "" if len(place) == 1 else f", number {place[1]}"
            reason = f"{value} in region {place[0]}{where} ({int((~finite).sum())} such values)"
            raise RegionError(self.image_id, field, reason, "Extract the image again, or leave it out.")

    def _check_boxes(self) -> None:
        boxes = self.boxes
        known = self.width is not None
        slack = np.array([max(EDGE, 1 / self.width), max(EDGE, 1 / self.height)] * 2 if known else [EDGE] * 4)
        outside = (boxes < -slack) | (boxes > 1 + slack)
        if outside.any():
            row = int(outside.any(axis=1).argmax())
            box = f"box {row} is {_numbers(boxes[row])}"
            if boxes.max() > SURELY_PIXELS:
                raise RegionError(
                    self.image_id,
                    "boxes",
                    f"{box}: pixels, it seems, where fractions of width and height are expected",
                    "Use RegionFeatures.from_pixels(features, boxes, width, height).",
                )
            reason = f"{box}, outside the image, whose corners are 0 0 1 1"
            remedy = "Clip the boxes, check the image's width and height, or import with --on-bad-record skip."
            raise RegionError(self.image_id, "boxes", reason, remedy)
        turned = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
        if turned.any():
            row = int(turned.argmax())
            reason = f"box {row} is {_numbers(boxes[row])}: its second corner is above or left of its first"
            raise RegionError(self.image_id, "boxes", reason, "Give corners x1 y1 x2 y2, not a corner and a size.")


def pad_regions(
    regions: Sequence[RegionFeatures], boxes: bool = False, class_probs: bool = False
) -> dict[str, torch.Tensor]:
    """The regions of B images as one batch, filled up with zeros to the most regions R.

    Args:
        regions: of B images, of one width F.
        boxes: also `region_boxes`.
        class_probs: also `region_class_probs`.

    Returns:
        `region_features` float32 [B, R, F], `region_mask` int64 [B, R] (1 = real), and where asked for `region_boxes` float32
        [B, R, 4] and `region_class_probs` float32 [B, R, C].

    Raises:
        ValueError: no images.
        RegionError: an image with another width, or without the boxes or probabilities asked for.
    """
    if not regions:
        raise ValueError("cannot make a batch of no regions: give those of one image or more")
    counts = torch.tensor([len(one) for one in regions])
    batch = {
        "region_features": _padded(regions, "features"),
        "region_mask": (torch.arange(int(counts.max())) < counts[:, None]).long(),
    }
    if boxes:
        batch["region_boxes"] = _padded(regions, "boxes")
    if class_probs:
        batch["region_class_probs"] = _padded(regions, "class_probs")
    return batch


def _padded(regions: Sequence[RegionFeatures], field: str) -> torch.Tensor:
    """[B, R, W] float32 of one field."""
    values = [getattr(one, field) for one in regions]
    for one, value in zip(regions, values):
        if value is None:
            raise RegionError(
                one.image_id, field, "these regions have none", "Store them with it, or do not ask for it."
            )
        if value.shape[1] != values[0].shape[1]:
            reason = f"it is {value.shape[1]} wide, and {values[0].shape[1]} wide for image {regions[0].image_id!r}"
            raise RegionError(one.image_id, field, reason, "Batch regions of one detector.")
    most, width = max(map(len, values)), values[0].shape[1]
    batch = torch.empty(len(values), most, width)
    # through a small piece that stays in the cache: torch turns half to single several times as fast as numpy
    half = torch.empty(most, width, dtype=torch.float16)
    for row, value in enumerate(values):
        count = len(value)
        if value.dtype == np.float16:
            np.copyto(half.numpy()[:count], value)
            batch[row, :count] = half[:count]
        else:
            np.copyto(batch[row, :count].numpy(), value)
        batch[row, count:] = 0
    return batch


class RegionDropping:
    """Regions dropped at random while training (VSE-infinity's size augmentation of region sets).

    Each region has one uniform draw and stays where it is above `rate`; the order is kept. An image never loses all: where no draw is
    above, the region with the largest stays.

    Args:
        rate: share of regions to drop, 0 to 1; the paper's is 0.2.

    Raises:
        ValueError: a rate outside 0 to 1.
    """

    def __init__(self, rate: float = 0.2):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate} is no share of the regions: give 0 to 1, such as 0.2")
        self.rate = rate

    def __call__(
        self,
        regions: Sequence[RegionFeatures],
        generator: torch.Generator | None = None,
        draws: Sequence[Sequence[float]] | None = None,
    ) -> list[RegionFeatures]:
        """The regions that stay.

        Args:
            regions: of B images.
            generator: for the draws.
            draws: B rows of uniform draws in place of the generator's, one a region or more (those beyond are ignored).

        Raises:
            ValueError: neither generator nor draws, or too few draws.
        """
        if not self.rate:
            return list(regions)
        if draws is None:
            if generator is None:
                raise ValueError("dropping regions needs a generator to draw from: give generator= or draws=")
            total = torch.rand(sum(map(len, regions)), generator=generator, dtype=torch.float64).numpy()
            draws = np.split(total, np.cumsum([len(one) for one in regions])[:-1])
        if len(draws) != len(regions):
            raise ValueError(f"draws has {len(draws)} rows for {len(regions)} images: give one row an image")
        return [self._drop(one, row) for one, row in zip(regions, draws)]

    def _drop(self, regions: RegionFeatures, draws: Sequence[float]) -> RegionFeatures:
        draws = np.asarray(draws, np.float64)[: len(regions)]
        if len(draws) < len(regions):
            raise ValueError(
                f"draws has {len(draws)} numbers for the {len(regions)} regions of image {regions.image_id!r}: give one a region"
            )
        kept = np.flatnonzero(draws > self.rate)
        if len(kept) == len(regions):
            return regions
        return regions.select(kept if len(kept) else slice(at := int(draws.argmax()), at + 1))


def location_code(boxes: Any) -> Any:
    """ViLBERT's five numbers of a box: x1 y1 x2 y2 and the share of the image's area that it covers.

    Args:
        boxes: [..., 4] fractions x1 y1 x2 y2, of numpy or torch.

    Returns:
        [..., 5] of the same kind; the whole image is 0 0 1 1 1.
    """
    area = (boxes[..., 2:3] - boxes[..., 0:1]) * (boxes[..., 3:4] - boxes[..., 1:2])
    if isinstance(boxes, torch.Tensor):
        return torch.cat([boxes, area], dim=-1)  # [..., 5]
    return np.concatenate([boxes, area], axis=-1)


def _as_array(value: Any, field: str, image_id: Any) -> Array:
    """As an array of float16 or float32, without a copy where it is one."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value if value.dtype in (torch.float16, torch.float32) else value.float()).numpy()
    try:
        value = np.asarray(value)
    except ValueError:
        raise RegionError(image_id, field, "its rows differ in length", "Give an array.") from None
    if value.dtype.kind not in "fiu":
        reason = f"it holds {value.dtype.name}, not numbers"
        raise RegionError(image_id, field, reason, "Give an array of numbers.")
    if value.dtype.newbyteorder("=") in (np.float16, np.float32):
        return value
    with np.errstate(over="ignore"):  # what becomes infinite is reported by the check
        return value.astype(np.float32)


def _size(field: str, value: Any, image_id: Any) -> int:
    try:
        whole = int(float(value))
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if whole < 1 or whole != float(value) or whole >= 2**31:
        raise RegionError(image_id, field, f"{value!r} is no number of pixels", "Give the size of the whole image.")
    return whole


def _bad_shape(image_id: Any, field: str, value: Array) -> RegionError:
    reason = f"its shape is {list(value.shape)}, {SHAPES[field]} is expected"
    return RegionError(image_id, field, reason, "Give one row a region.")


def _numbers(box: Array) -> str:
    return " ".join(f"{number:.4g}" for number in box.tolist())
