"""Regions to a batch: the `feature_extractor` of processors of models that see regions.

Depends on: a region store, opened when a key is first asked for, or regions handed in. It detects nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from hf_vlp.inputs.region_store import RegionStore
from hf_vlp.inputs.regions import RegionError, RegionFeatures, pad_regions

KEYS = str | int | np.integer


class VlpRegionFeatureExtractor(FeatureExtractionMixin):
    """Keys of a region store, `RegionFeatures` or raw arrays to padded tensors.

    Args:
        feature_size: width F of the features; any other is an error. None: any, the same for all of a batch.
        region_store: path of the `RegionStore` that keys are read from; saved as it is given. None: no keys.
        max_regions: most regions of an image, the first are kept (detectors put the surest first). None: all.
        with_boxes: also give `region_boxes`.
        with_class_probs: also give `region_class_probs`.

    Raises:
        ValueError: a `feature_size` or `max_regions` below 1.
    """

    def __init__(
        self,
        feature_size: int | None = None,
        region_store: str | os.PathLike | None = None,
        max_regions: int | None = None,
        with_boxes: bool = False,
        with_class_probs: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        for name, value in (("feature_size", feature_size), ("max_regions", max_regions)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is no count: give 1 or more, or None")
        self.feature_size, self.max_regions = feature_size, max_regions
        self.region_store = None if region_store is None else os.fspath(region_store)
        self.with_boxes, self.with_class_probs = with_boxes, with_class_probs
        self._store: RegionStore | None = None

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call gives."""
        names = ["region_features", "region_mask"]
        return names + ["region_boxes"] * self.with_boxes + ["region_class_probs"] * self.with_class_probs

    @property
    def store(self) -> RegionStore:
        """The region store, opened when first asked for.

        Raises:
            ValueError: there is none.
            FileNotFoundError: there is no file at its path.
        """
        if self.region_store is None:
            raise ValueError(
                "a key was given and there is no region store to look it up in: set region_store= to the path of one, "
                "or give RegionFeatures or arrays"
            )
        if self._store is None or self._store.path != Path(self.region_store):
            self._store = RegionStore(self.region_store)
        return self._store

    def __call__(self, regions: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """The batch of one image or a list of B.

        Args:
            regions: a store key (text or whole number), `RegionFeatures`, or an array [R, F] of numpy, torch or lists; or a list of
                such, which may be mixed, or an array [B, R, F].
            return_tensors: "pt" or "np".

        Returns:
            `region_features` float32 [B, R, F], `region_mask` int64 [B, R] (1 = real), and as set `region_boxes` float32 [B, R, 4]
            and `region_class_probs` float32 [B, R, C].

        Raises:
            RegionError: a key that the store lacks, bad values, another width, boxes or probabilities that are not there; names image
                and field. An image given as an array is named by its position.
            ValueError: no images, keys without a store, unknown `return_tensors`.
            TypeError: something else than these kinds.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors={return_tensors!r} is unknown: give 'pt' or 'np'")
        images = self._images(regions)
        images = [one.item() if isinstance(one, torch.Tensor) and not one.ndim else one for one in images]
        keys = [position for position, one in enumerate(images) if isinstance(one, KEYS)]
        if keys:
            for position, read in zip(keys, self.store.read_batch([images[position] for position in keys])):
                images[position] = read
        ready = [self._ready(one, position) for position, one in enumerate(images)]
        batch = pad_regions(ready, self.with_boxes, self.with_class_probs)
        if return_tensors == "np":
            batch = {name: tensor.numpy() for name, tensor in batch.items()}
        return BatchFeature(batch)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the settings, not the open store."""
        store, self._store = self._store, None
        try:
            settings = super().to_dict()
        finally:
            self._store = store
        del settings["_store"]
        return settings

    @staticmethod
    def _images(regions: Any) -> list:
        if isinstance(regions, KEYS | RegionFeatures):
            return [regions]
        if isinstance(regions, np.ndarray | torch.Tensor):
            if regions.ndim == 0:
                return [regions.item()]
            if regions.ndim == 1 and not _is_floating(regions):  # keys, as a data set hands them out
                return regions.tolist()
            return [regions] if regions.ndim < 3 else list(regions)
        if isinstance(regions, list | tuple):
            return [regions] if _is_matrix(regions) else list(regions)
        raise TypeError(
            f"regions is a {type(regions).__name__}: give keys of the store, RegionFeatures, or arrays [R, F]"
        )

    def _ready(self, image: Any, position: int) -> RegionFeatures:
        if isinstance(image, RegionFeatures):
            image.check_width(self.feature_size)
        else:
            if image is None or isinstance(image, bool | float | bytes | Mapping):
                raise TypeError(
                    f"regions of position {position} are a {type(image).__name__}: give a key, RegionFeatures, or an array [R, F]"
                )
            try:
                image = RegionFeatures(image)
                image.check_width(self.feature_size)
            except RegionError as error:
                where = f"at position {position}"
                raise RegionError(where, error.field, error.reason, error.remedy) from None
        return image if self.max_regions is None else image.select(slice(self.max_regions))


def _is_floating(value: np.ndarray | torch.Tensor) -> bool:
    return value.is_floating_point() if isinstance(value, torch.Tensor) else value.dtype.kind == "f"


def _is_matrix(value: list | tuple) -> bool:
    """Whether rows of numbers stand in a list, rather than images."""
    first = value[0] if value else None
    if isinstance(first, np.ndarray | torch.Tensor):
        return first.ndim == 1
    return isinstance(first, list | tuple) and bool(first) and isinstance(first[0], int | float)
