"""Words of a text and their tokens, and what the maps over a picture have in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class WordMap:
    """Where one word of a text goes.

    word: as it stands in the text. mass: [h, w] float32 over the picture's patches, how much of the word each has: of a transport plan its
    share of the text's mass of 1, of attention its Grad-CAM. heat: [h, w] float32 from 0 to 1, the same for display.
    """

    word: str
    mass: torch.Tensor
    heat: torch.Tensor


def real_ids(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens [L] of the only text of a batch, padded on the right, without its padding."""
    return batch["input_ids"][0, : int(batch["attention_mask"][0].sum())]


def word_tokens(tokenizer: Any, text: str, input_ids: torch.Tensor) -> list[tuple[str, list[int]]]:
    """The words of a text as they stand in it, and the places of each one's tokens in `input_ids` [L], which a processor made of it.

    `tokenizer`: a fast one. A text that was cut has the words that are left.

    Raises:
        ValueError: a text without words; `input_ids` are other tokens than the tokenizer makes of the text.
    """
    encoding = tokenizer(text, verbose=False)
    owners, ids = encoding.word_ids(0), encoding["input_ids"]
    inner = [place for place, owner in enumerate(owners) if owner is not None]
    marks = len(ids) - 1 - inner[-1] if inner else 0  # behind the words; a text that was cut still has them
    first, end = inner[0] if inner else 0, len(input_ids) - marks
    if not inner or end <= first:
        raise ValueError(f"the text {text!r} has no words: give one or more")
    if input_ids[first:end].tolist() != ids[first:end]:
        raise ValueError(
            f"the processor makes other tokens of {text!r} than its tokenizer does: give the text as the processor's cleaning leaves it"
        )
    words: dict[int, list[int]] = {}
    for place in range(first, end):
        words.setdefault(owners[place], []).append(place)
    return [(text[slice(*encoding.word_to_chars(0, owner))], places) for owner, places in words.items()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
