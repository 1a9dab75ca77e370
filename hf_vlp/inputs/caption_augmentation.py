"""Words of a caption masked, swapped and dropped while training.

VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding" (https://arxiv.org/abs/2011.04305), size augmentation:
pooling weights that depend on the length of a set want sets of many lengths.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import models
from transformers import PreTrainedTokenizerBase

from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer

MASKED, REPLACED = 0.5, 0.6  # of the words drawn: half masked, a tenth replaced, the rest deleted


class CaptionAugmentation:
    """Captions to the ids of a training batch.

    Each word has one uniform draw p. With p >= rate it stays; else q = p / rate decides: below 0.5 it is masked, below 0.6 replaced by
    uniformly random entries of the vocabulary (special ones too), else deleted.

    With a WordPiece tokenizer a word is what BERT's basic tokenisation yields (lower-cased, accents stripped, punctuation and CJK
    characters split off), and its fate is that of all its pieces, each replaced on its own; start and end marks go around what is
    left. The text of a special token inside a caption is ordinary text: `tokenizer(..., split_special_tokens=True)` gives the same ids
    without the augmentation. With a `VlpWordTokenizer` the draws cover `<start>` and `<end>` too, so these may be missing as well;
    where every word would be deleted the first stays, since an empty text cannot be pooled.

    Args:
        tokenizer: of WordPiece, such as `BertTokenizer`, or a `VlpWordTokenizer`.
        rate: share of the words drawn, 0 to 1; 0 augments nothing.
        max_length: longest text in tokens, marks included; the tokenizer's `model_max_length` if not given. Longer ones are cut after the
            augmentation, an end mark kept.

    Raises:
        ValueError: another kind of tokenizer, one without a mask or padding token, a rate outside 0 to 1, a `max_length` below 3.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float = 0.2, max_length: int | None = None):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate} is no share of the words: give 0 to 1, such as 0.2")
        self.tokenizer, self.rate = tokenizer, rate
        self.max_length = tokenizer.model_max_length if max_length is None else max_length
        if self.max_length < 3:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a word between the marks: give 3 or more"
            )
        self._by_pieces = not isinstance(tokenizer, VlpWordTokenizer)
        if self._by_pieces:
            self._check_wordpiece()

    def __call__(
        self,
        texts: Sequence[str],
        generator: torch.Generator | None = None,
        *,
        draws: Sequence[Sequence[float]] | None = None,
        random_ids: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The batch of these captions.

        Args:
            texts: B captions; an empty one is its marks.
            generator: of whatever is not given below: all draws of the batch, then all random ids.
            draws: per caption one number in [0, 1) for each word.
            random_ids: per caption the ids that stand in for its replaced words, one a piece, in order.

        Returns:
            `input_ids` and `attention_mask` int64 [B, L], padded on the right to the longest; the mask is 1 at every token, a random
            padding token included.

        Raises:
            ValueError: no captions, no generator where one is needed, or draws or ids of another number than the captions need.
            TypeError: a caption that is no string.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts={texts!r:.80} is no list of captions: give one caption or more in a list")
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"caption {position} is a {type(text).__name__} ({text!r:.80}), not a string")
        ids, words = self._pieces(list(texts))
        counts = np.array([len(one) for one in ids])
        owner = np.repeat(np.arange(len(ids)), counts)  # of each piece, its caption
        ids = np.concatenate(ids).astype(np.int64)
        word_counts = np.array([one[-1] + 1 if len(one) else 0 for one in words])
        first_word = np.cumsum(word_counts) - word_counts
        word = np.concatenate(words).astype(np.int64) + np.repeat(first_word, counts)

        if self.rate:
            draw = self._draw(draws, word_counts, generator)
            if not self._by_pieces:
                self._spare_one(draw, word_counts, first_word)
            drawn, share = (draw < self.rate)[word], (draw / self.rate)[word]
            replaced = drawn & (share >= MASKED) & (share < REPLACED)
            kept = ~drawn | (share < REPLACED)
            ids[drawn & (share < MASKED)] = self.tokenizer.mask_token_id
            ids[replaced] = self._random_ids(random_ids, np.bincount(owner[replaced], minlength=len(texts)), generator)
            ids, owner = ids[kept], owner[kept]
        return self._batch(ids, owner, len(texts))

    def _pieces(self, texts: list[str]) -> tuple[list, list]:
        """Per caption the ids of its pieces, and for each the number of its word in the caption."""
        encoded = self.tokenizer(
            texts, add_special_tokens=not self._by_pieces, split_special_tokens=True, truncation=False, verbose=False
        )
        if not self._by_pieces:
            return encoded["input_ids"], [range(len(one)) for one in encoded["input_ids"]]
        return encoded["input_ids"], [one.word_ids for one in encoded.encodings]

    def _draw(self, draws, counts: np.ndarray, generator) -> np.ndarray:
        if draws is None:
            self._need(generator, "draws")
            return torch.rand(int(counts.sum()), generator=generator, dtype=torch.float64).numpy()
        return _given(draws, counts, "draws", "words", np.float64)

    def _random_ids(self, random_ids, counts: np.ndarray, generator) -> np.ndarray:
        if random_ids is not None:
            return _given(random_ids, counts, "random_ids", "replaced pieces", np.int64)
        if not counts.any():
            return np.zeros(0, np.int64)
        self._need(generator, "random_ids")
        return torch.randint(len(self.tokenizer), (int(counts.sum()),), generator=generator).numpy()

    @staticmethod
    def _need(generator, name: str) -> None:
        if generator is None:
            raise ValueError(f"the augmentation needs a generator to draw from: give generator= or {name}=")

    def _spare_one(self, draw: np.ndarray, counts: np.ndarray, first: np.ndarray) -> None:
        deleted = (draw < self.rate) & (draw / self.rate >= REPLACED)
        draw[first[np.logical_and.reduceat(deleted, first)]] = 1.0

    def _batch(self, ids: np.ndarray, owner: np.ndarray, texts: int) -> dict[str, torch.Tensor]:
        """The pieces of all captions, in order, to padded rows cut at the limit."""
        lengths = np.bincount(owner, minlength=texts)
        place = np.arange(len(ids)) - (np.cumsum(lengths) - lengths)[owner]
        if self._by_pieces:
            place, lengths = place + 1, lengths + 2
            end, ends = self.tokenizer.sep_token_id, np.ones(texts, bool)
        else:
            end = self.tokenizer.eos_token_id
            ends = ids[np.cumsum(lengths) - 1] == end  # the end mark may have been deleted
        longest = int(min(lengths.max(), self.max_length))
        rows = np.full((texts, longest), self.tokenizer.pad_token_id, np.int64)
        fits = place < longest
        rows[owner[fits], place[fits]] = ids[fits]
        if self._by_pieces:
            rows[:, 0] = self.tokenizer.cls_token_id
        last = np.minimum(lengths, longest) - 1
        rows[ends, last[ends]] = end
        mask = (np.arange(longest) <= last[:, None]).astype(np.int64)
        return {"input_ids": torch.from_numpy(rows), "attention_mask": torch.from_numpy(mask)}

    def _check_wordpiece(self) -> None:
        name = type(self.tokenizer).__name__
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        if not isinstance(model, models.WordPiece):
            kind = f"of the kind {type(model).__name__}" if model is not None else "without a tokenizers backend"
            raise ValueError(
                f"caption augmentation is defined for WordPiece tokenizers and VlpWordTokenizer, and {name} is {kind}: "
                "switch it off, or train with a text encoder that uses WordPiece"
            )
        for mark in ("pad_token", "mask_token", "cls_token", "sep_token"):
            if getattr(self.tokenizer, f"{mark}_id") is None:
                raise ValueError(f"caption augmentation needs a {mark}, which this {name} lacks: set tokenizer.{mark}")


def _given(values: Sequence[Sequence[float]], counts: np.ndarray, name: str, of: str, dtype: type) -> np.ndarray:
    """The values handed in, one after another, if they are as many as each caption needs."""
    if len(values) != len(counts):
        raise ValueError(f"{name} holds {len(values)} lists for {len(counts)} captions: give one list a caption")
    for position, (one, count) in enumerate(zip(values, counts)):
        if len(one) != count:
            raise ValueError(f"{name} holds {len(one)} numbers for the {count} {of} of caption {position}")
    return np.array([value for one in values for value in one], dtype)
