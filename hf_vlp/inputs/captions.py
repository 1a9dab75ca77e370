"""What every processor of ours does with captions: cut with their end kept, padded on the right, never longer than it was said.

Depends on a tokenizer handed in.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers.processing_utils import ProcessingKwargs
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

SHORTEST = 3  # start, one token, end


class CaptionKwargs(ProcessingKwargs, total=False):
    """Tensors, captions padded to the longest and cut at the tokenizer's limit, unless the call says otherwise."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True}, "common_kwargs": {"return_tensors": "pt"}}


class Captions:
    """Goes before transformers' `ProcessorMixin` among the bases of a processor with a `tokenizer`."""

    valid_processor_kwargs = CaptionKwargs
    _has_warned = False

    def _options(self, call: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The options of a call over those of tokenizer and processor, by what they are for: `text_kwargs`, `images_kwargs`."""
        # a tokenizer is saved with the limit of its last call, which is no setting: `model_max_length` is
        settings = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "max_length"}
        return self._merge_kwargs(tokenizer_init_kwargs=settings, **call)

    def _encode(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Token ids and their mask; `stacklevel` of the warning counts on being called by `__call__`."""
        check_padding_side(options.get("padding_side") or self.tokenizer.padding_side)
        longest = options.pop("max_length", None)
        longest = self.tokenizer.model_max_length if longest is None else longest
        if longest < SHORTEST:
            raise ValueError(
                f"max_length={longest} leaves no room for a word between start and end of text: give {SHORTEST} or more"
            )
        bounded = longest < VERY_LARGE_INTEGER
        to_longest = options.get("padding") == "max_length"
        if to_longest and not bounded:
            raise ValueError("padding='max_length' needs a max_length: this tokenizer has no limit of its own")
        cuts = bounded and options.pop("truncation", True) not in (False, None, "do_not_truncate")
        options |= {"truncation": cuts, "max_length": longest if cuts or to_longest else None}
        encoded = self.tokenizer(texts, **options)
        if bounded and not (cuts and self._has_warned):
            self._report_long(texts, encoded, options, longest, cuts)
        # zeros for one text, and no argument of our models
        unwanted = () if options.get("return_token_type_ids") else ("token_type_ids",)
        return {name: value for name, value in encoded.items() if name not in unwanted}

    def _report_long(self, texts: list[str], encoded: Any, options: dict[str, Any], longest: int, cuts: bool) -> None:
        """An error for captions that may not be cut; one warning for those that were."""
        if encoded.encodings is not None and cuts:
            long = [position for position, encoding in enumerate(encoded.encodings) if encoding.overflowing]
        else:
            full = range(len(texts))
            if cuts and "attention_mask" in encoded:  # a caption that does not reach the limit was not cut
                full = [row for row in full if torch.as_tensor(encoded["attention_mask"][row]).sum() >= longest]
            plain = {name: options[name] for name in ("add_special_tokens", "split_special_tokens") if name in options}
            lengths = {row: len(self.tokenizer(texts[row], verbose=False, **plain)["input_ids"]) for row in full}
            long = [row for row, length in lengths.items() if length > longest]
        if long and not cuts:
            raise ValueError(
                f"caption {long[0]} has {lengths[long[0]]} tokens, more than {longest}: shorten it, or leave truncation on"
            )
        if long:
            self._has_warned = True
            warnings.warn(
                f"{len(long)} of {len(texts)} captions had more than {longest} tokens and were cut, their marks kept. "
                "This processor does not warn again.",
                stacklevel=4,
            )


def listed(text: str | Sequence[str]) -> list[str]:
    """One caption or several, as a list.

    Raises:
        ValueError: none.
        TypeError: a caption that is no string.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("no captions were given: the list is empty")
    for position, one in enumerate(texts):
        if not isinstance(one, str):
            raise TypeError(
                f"caption {position} is a {type(one).__name__} ({one!r:.80}), not a string: convert or leave it out"
            )
    return texts


def check_padding_side(side: str) -> None:
    """Refuse padding in front of a caption.

    Raises:
        ValueError: any side but the right.
    """
    if side != "right":
        raise ValueError(
            f"the tokenizer pads on the {side}, but pooling and positions count from the start of a caption: "
            "set tokenizer.padding_side = 'right'"
        )
