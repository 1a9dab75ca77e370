"""Words of tokenized captions masked, for masked language modelling.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (https://arxiv.org/abs/1810.04805), section 3.1, single
tokens; ViLT (https://arxiv.org/abs/2102.03334), section 3.3, whole words, as its released code draws them.
Depends on a tokenizer handed in.
"""

import torch
from tokenizers import models
from transformers import PreTrainedTokenizerBase

from hf_vlp.inputs.vocabulary import PIECE_PREFIX
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer

IGNORED = -100
SHARE = 0.15
HIDDEN, RANDOM = 0.8, 0.5  # of the masked tokens, shown as the mask; of the others, as a random token
SPACES = ("\u2581", "\u0120")  # the space in front of a word, in SentencePiece's vocabularies and in byte-level ones


class _Masking:
    """What both ways of choosing tokens share: what is never masked, and what is shown in place of a masked token.

    Args:
        tokenizer: with a mask token.
        share: of the tokens to mask.

    Raises:
        ValueError: a tokenizer without a mask token, a share that is not above 0 and at most 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float = SHARE):
        if not 0 < share <= 1:
            raise ValueError(f"share={share} is no share of the tokens: give a number above 0, at most 1, such as 0.15")
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"this {type(tokenizer).__name__} has no mask token, and masking needs one: set tokenizer.mask_token"
            )
        self.share, self.mask_id, self.entries = share, tokenizer.mask_token_id, len(tokenizer)
        marks = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.marks = torch.tensor(sorted({mark for mark in marks if mark is not None}), dtype=torch.int64)

    def _words(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """bool [B, L], True at the tokens of a text: neither marks of its ends nor padding."""
        if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be [B, L], got {tuple(input_ids.shape)} and "
                f"{tuple(attention_mask.shape)}"
            )
        return attention_mask.ne(0) & ~torch.isin(input_ids, self.marks.to(input_ids.device))

    def _masked(self, input_ids, chosen, columns, generator, replaced, randomised, random_ids):
        """(ids [B, L] with the chosen tokens hidden, labels [B, L]); draws not given are made for `columns` tokens a row."""
        shape, length = (len(input_ids), columns), input_ids.shape[1]
        if replaced is None:
            replaced = _uniform(shape, generator, "replaced")[:, :length] < HIDDEN
        if randomised is None:
            randomised = _uniform(shape, generator, "randomised")[:, :length] < RANDOM
        if random_ids is None:
            _need(generator, "random_ids")
            random_ids = torch.randint(self.entries, shape, generator=generator, device=generator.device)[:, :length]
        replaced, randomised, random_ids = (
            _given(values, input_ids.shape, name).to(input_ids.device)
            for name, values in (("replaced", replaced), ("randomised", randomised), ("random_ids", random_ids))
        )
        hidden = chosen & replaced.bool()
        random = chosen & ~replaced.bool() & randomised.bool()
        masked = torch.where(random, random_ids, input_ids).masked_fill(hidden, self.mask_id)
        return masked, input_ids.masked_fill(~chosen, IGNORED)


class RandomMasking(_Masking):
    """Each token on its own: masked with the chance `share`.

    A masked token is shown as the mask (80 %), as a uniformly random entry of the vocabulary (10 %) or as it is (10 %).
    Arguments and errors as of `_Masking`.
    """

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        chosen: torch.Tensor | None = None,
        replaced: torch.Tensor | None = None,
        randomised: torch.Tensor | None = None,
        random_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask these texts.

        Args:
            input_ids, attention_mask: [B, L] int64, mask 1 at tokens.
            generator: of the draws that are not given, in their order.
            chosen: [B, L], 1 at the tokens to mask; start and end of a text and padding are left alone.
            replaced: [B, L], 1 where a masked token is shown as the mask.
            randomised: [B, L], 1 where it is shown as a random one, unless replaced.
            random_ids: [B, L] int64, the random ones.

        Returns:
            `input_ids` with masked tokens, and labels: the ids of these tokens, -100 elsewhere; both [B, L] int64.

        Raises:
            ValueError: neither draws nor a generator, or tensors of another shape.
        """
        words = self._words(input_ids, attention_mask)
        if chosen is None:
            chosen = _uniform(input_ids.shape, generator, "chosen") < self.share
        chosen = words & _given(chosen, input_ids.shape, "chosen").to(input_ids.device).bool()
        return self._masked(input_ids, chosen, input_ids.shape[1], generator, replaced, randomised, random_ids)


class WholeWordMasking(_Masking):
    """Whole words, as many as a budget of tokens allows: max(1, share of the row's length), rounded half to even.

    Words are taken in a random order; one whose pieces are more than what is left of the budget is passed over. Then each piece on its
    own is shown as by `RandomMasking`.

    In the released code a row is as long as it is padded, and its padding is chosen like words, uses budget and is then left alone: of 40
    tokens the budget is 6 whatever the text is, and on average 15 % of its tokens are masked, sometimes none. Texts need not be padded for
    that: padding that is not there is drawn as if it were.

    What a word is: with WordPiece, a piece and those behind it that begin with "##"; with byte pairs that mark where a word ends (CLIP's),
    all up to such a piece; with those and SentencePiece's that mark the space in front of it, all up to the next space, so that a comma
    belongs to the word before it; with whole words, each token.

    Args:
        tokenizer: with a mask token; `tokenizers` based, or a `VlpWordTokenizer`.
        share: of a row's length, the budget.
        padded_to: how long a row counts, if it is not longer; 40 in the released code. None: as long as its text with start and end, so
            that every text with a word short enough has one masked.

    Raises:
        ValueError: as `_Masking`; a tokenizer whose words cannot be told; `padded_to` below 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float = SHARE, padded_to: int | None = 40):
        super().__init__(tokenizer, share)
        if padded_to is not None and padded_to < 1:
            raise ValueError(f"padded_to={padded_to} is no length of a row: give 1 or more, or None")
        self.padded_to = padded_to
        self._begins, self._ends = _word_bounds(tokenizer)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        order: torch.Tensor | None = None,
        replaced: torch.Tensor | None = None,
        randomised: torch.Tensor | None = None,
        random_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask these texts, padded on the right.

        Args:
            order: [B, N] with N the larger of L and `padded_to`: words are taken in the order of the numbers at their first pieces;
                numbers at other pieces are not looked at.
            input_ids, attention_mask, generator, replaced, randomised, random_ids: as of `RandomMasking`. The generator draws for N tokens
                a row: as long as no text is longer than `padded_to`, how far they are padded changes nothing.

        Returns:
            As `RandomMasking`.

        Raises:
            ValueError: neither draws nor a generator, or tensors of another shape.
        """
        words = self._words(input_ids, attention_mask)
        (rows, length), device = input_ids.shape, input_ids.device
        columns = max(length, self.padded_to or 0)
        order = _uniform((rows, columns), generator, "order") if order is None else order
        order = _given(order, (rows, columns), "order").to(device)

        tokens = attention_mask.ne(0).sum(dim=1)
        counted = (
            tokens if self.padded_to is None else tokens.clamp(min=self.padded_to)
        )  # [B], how long each row counts
        place = torch.arange(columns, device=device)
        padding = (place >= tokens[:, None]) & (place < counted[:, None])  # [B, N]
        before = torch.cat([torch.zeros_like(words[:, :1]), words[:, :-1]], dim=1)
        ends_before = self._ends.to(device)[input_ids].roll(1, dims=1)
        starts = words & (self._begins.to(device)[input_ids] | ends_before | ~before)
        starts = torch.cat([starts, starts.new_zeros(rows, columns - length)], dim=1) | padding
        inside = torch.cat([words, words.new_zeros(rows, columns - length)], dim=1) | padding

        first = torch.where(starts, place, 0).cummax(dim=1).values  # of each token, where its word starts
        sizes = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        sizes.scatter_add_(1, first, inside.long())
        # words in their order, then what starts none, of size 0
        turn = order.double().masked_fill(~starts, torch.inf).argsort(dim=1, stable=True)
        sizes = sizes.masked_fill(~starts, 0).gather(1, turn)
        left = (self.share * counted.double()).round().long().clamp(min=1)  # half to even, as Python's
        taken = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        for index in range(int(starts.sum(dim=1).max())):
            fits = sizes[:, index] <= left
            taken[:, index] = fits
            left = left - sizes[:, index] * fits
        chosen = torch.zeros_like(taken).scatter(1, turn, taken).gather(1, first)[:, :length] & words
        return self._masked(input_ids, chosen, columns, generator, replaced, randomised, random_ids)


def _word_bounds(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [V] twice: entries that begin a word whatever is before them, and entries behind which a word begins.

    Raises:
        ValueError: no rule is known for this tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    begins, ends = torch.zeros(2, max(vocabulary.values()) + 1, dtype=torch.bool)
    prefix = getattr(model, "continuing_subword_prefix", None) or PIECE_PREFIX
    suffix = getattr(model, "end_of_word_suffix", None)
    space = next((mark for mark in SPACES if mark in vocabulary), None)
    if isinstance(tokenizer, VlpWordTokenizer) or isinstance(model, models.WordLevel):
        begins[:] = True
    elif isinstance(model, models.WordPiece):
        begins[[index for token, index in vocabulary.items() if not token.startswith(prefix)]] = True
    elif suffix:
        ends[[index for token, index in vocabulary.items() if token.endswith(suffix)]] = True
    elif model is not None and space is not None:
        begins[[index for token, index in vocabulary.items() if token.startswith(space)]] = True
    else:
        raise ValueError(
            f"where a word begins cannot be told with this {type(tokenizer).__name__}: take one of word pieces, of byte pairs or of whole "
            "words that is backed by `tokenizers`, or mask single tokens with RandomMasking"
        )
    return begins, ends


def _uniform(shape, generator: torch.Generator | None, name: str) -> torch.Tensor:
    _need(generator, name)
    return torch.rand(tuple(shape), generator=generator, device=generator.device)


def _need(generator: torch.Generator | None, name: str) -> None:
    if generator is None:
        raise ValueError(f"masking needs a generator to draw from: give generator= or {name}=")


def _given(values: torch.Tensor, shape, name: str) -> torch.Tensor:
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"{name} must be of the shape {list(shape)}, got {list(values.shape)}")
    return values
