"""Phrases that each mean one object of a picture, as items to train on: what they mean is not looked at.

RefCOCO+ (Yu et al., https://arxiv.org/abs/1608.00272), weakly supervised in "Align before Fuse" (https://arxiv.org/abs/2107.07651), section
6.4. The boxes of a record are for `hf_vlp.evaluation.grounding` alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.data.record import check_record


class Phrases(ImageTextPairs):
    """Items {"image": uint8 [3, h, w], "text": phrase, "image_id", "draw"}; the phrases of one image have its identity.

    Args:
        records: with `phrase`; otherwise as of `PreparedRecords`.
        options: as of `PreparedRecords`.

    Raises:
        RecordError: as of `PreparedRecords`; a phrase that is none.
    """

    def __init__(self, records: Any, prepare: Callable[[Any], torch.Tensor] | None = None, **options: Any):
        super().__init__(records, prepare, compose=_phrase, **options)

    def check(self, record: Mapping[str, Any], row: int) -> None:
        """A phrase and an identity."""
        check_record(record, row, required=("phrase", "image_id"))

    def caption_counts(self) -> np.ndarray:
        """[N], one phrase each."""
        return np.ones(len(self), dtype=np.int64)


def _phrase(record: Mapping[str, Any], generator: np.random.Generator) -> str:
    return record["phrase"]
