"""Ensembles of retrieval models: the mean of their scores of all images with all captions, and files of such scores.

Protocol: Chen et al. 2021 (VSE-infinity), section 4: the scores of models trained apart are averaged before ranking. A
file holds float32 and a fingerprint of the captions, so that scores of other captions are never averaged.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vlp.evaluation.ranks import BLOCK_ELEMENTS
from hf_vlp.files import whole_file


def write_scores(path: str | os.PathLike, scores: torch.Tensor, text_ids: torch.Tensor, fingerprint: str) -> Path:
    """Write the scores of a model, whole.

    Args:
        path: a .safetensors file.
        scores: [N, M], images x captions; stored as float32.
        text_ids: [M] int64, the row of the image that each caption belongs to.
        fingerprint: of images and captions in their order, as `RetrievalReport.fingerprint` gives.

    Raises:
        ValueError: another suffix, or shapes that do not fit.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"scores are written as safetensors: {path.name} must end in .safetensors.")
    if scores.ndim != 2 or text_ids.shape != scores.shape[1:]:
        raise ValueError(f"scores {tuple(scores.shape)} and text_ids {tuple(text_ids.shape)} must be [N, M] and [M].")
    tensors = {"scores": scores.float().contiguous().cpu(), "text_ids": text_ids.contiguous().cpu()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"fingerprint": fingerprint})
    return path


class SavedScores:
    """A file of `write_scores`; `saved[rows]` reads those images' scores alone, float32 [n, M].

    shape: (N, M). text_ids: [M] int64. fingerprint: as written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no file of scores.
    """

    def __init__(self, path: str | os.PathLike):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"there is no file of scores {path}. `examples/evaluate.py --save-scores` writes one."
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                self.shape = tuple(file.get_slice("scores").get_shape())
                self.text_ids = file.get_tensor("text_ids")
                self.fingerprint = (file.metadata() or {})["fingerprint"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is no file of scores, or a damaged one ({error}). Write it with `examples/evaluate.py "
                f"--save-scores`."
            ) from None

    def __getitem__(self, rows: slice) -> torch.Tensor:
        from safetensors import safe_open

        # opened anew for each block: what is mapped counts as memory until the file is closed
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice("scores")[rows]


def mean_scores(members: Sequence[Any]) -> torch.Tensor:
    """The mean of the scores of several models.

    Args:
        members: each [N, M], images x captions in one order: tensors, arrays (memory-mapped ones, too) or `SavedScores`.

    Returns:
        [N, M] float32. Besides it and the members a block of scores is in memory.

    Raises:
        ValueError: no member, members of different shapes, or saved scores of different captions.
    """
    if not members:
        raise ValueError("there are no scores to average.")
    shapes = {tuple(member.shape) for member in members}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"the scores have the shapes {sorted(shapes)}: all must be [N, M], of the same N and M.")
    saved = [member for member in members if isinstance(member, SavedScores)]
    for member in saved[1:]:
        check_fingerprint(member, saved[0].fingerprint, str(saved[0].path.name))
    images, captions = shapes.pop()
    result = torch.empty(images, captions)
    size = max(1, BLOCK_ELEMENTS // max(1, captions))
    for start in range(0, images, size):
        rows = slice(start, min(start + size, images))
        # float64: the sum does not depend on the order of the members, and the mean of one score twice is that score
        result[rows] = sum(_block(member, rows) for member in members) / len(members)
    return result


def check_fingerprint(saved: SavedScores, fingerprint: str, other: str) -> None:
    """Raise ValueError if saved scores are of other captions, or another order of them, than those of `other`."""
    if saved.fingerprint != fingerprint:
        raise ValueError(
            f"{saved.path.name} holds scores of other captions, or of another order of images and captions, than {other}. "
            f"Evaluate all members of an ensemble on the same records."
        )


def _block(member: Any, rows: slice) -> torch.Tensor:
    """Scores of some images, float64 [n, M]."""
    block = member[rows]
    # copied: torch takes no array that cannot be written to, such as a mapped one
    block = block if isinstance(block, torch.Tensor) else torch.from_numpy(np.array(block, np.float64))
    return block.to("cpu", torch.float64)
