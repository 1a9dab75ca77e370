"""Words masked, replaced and deleted: whose fate is drawn, what it is, and what is left in every corner."""

import pytest
import torch
from transformers import BertTokenizer, CLIPTokenizer

from hf_vlp.inputs.caption_augmentation import CaptionAugmentation
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "play", "##ing", "[", "]", "mask"]
WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "plays"]  # and <mask>, 7
PAD, CLS, SEP, MASK = 0, 2, 3, 4
KEEP, HIDE, SWAP, DROP = 0.9, 0.05, 0.11, 0.15  # draws that decide so at a rate of 0.2


def bert(**options) -> BertTokenizer:
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(PIECES)}, **options)


def words(**options) -> VlpWordTokenizer:
    return VlpWordTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(batch) -> list[list[int]]:
    """Each row as far as its mask goes; what follows must be padding."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
    lengths = mask.sum(dim=1)
    assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths[:, None]).long())
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


# Word pieces


@pytest.mark.parametrize(
    "draws, swaps, expected",
    [
        ([KEEP, KEEP, KEEP], [], [5, 7, 8, 6]),
        ([KEEP, HIDE, KEEP], [], [5, MASK, MASK, 6]),
        ([KEEP, SWAP, KEEP], [10, CLS], [5, 10, CLS, 6]),
        ([KEEP, DROP, KEEP], [], [5, 6]),
        ([HIDE, SWAP, DROP], [PAD, 9], [MASK, PAD, 9]),
        ([SWAP, KEEP, SWAP], [1, 11], [1, 7, 8, 11]),
        ([DROP, DROP, DROP], [], []),
    ],
)
def test_a_words_fate_is_that_of_its_pieces_and_the_marks_have_none(draws, swaps, expected):
    batch = CaptionAugmentation(bert())(["A playing cat"], draws=[draws], random_ids=[swaps])
    assert rows(batch) == [[CLS, *expected, SEP]]


def test_where_one_fate_ends_and_the_next_begins():
    def fate(draw, rate=1.0):
        swaps = [7] if 0.5 <= draw < 0.6 else []
        return rows(CaptionAugmentation(bert(), rate)(["cat"], draws=[[draw]], random_ids=[swaps]))[0]

    assert fate(0.49999) == [CLS, MASK, SEP] and fate(0.5) == [CLS, 7, SEP]
    assert fate(0.59999) == [CLS, 7, SEP] and fate(0.6) == [CLS, SEP]
    assert fate(0.19999, 0.2) == [CLS, SEP] and fate(0.2, 0.2) == [CLS, 6, SEP]


def test_draws_go_from_caption_to_caption_and_padding_follows():
    batch = CaptionAugmentation(bert())(
        ["a cat", "", "playing a cat"],
        draws=[[DROP, SWAP], [], [SWAP, KEEP, HIDE]],
        random_ids=[[11], [], [5, 6]],
    )
    assert rows(batch) == [[CLS, 11, SEP], [CLS, SEP], [CLS, 5, 6, 5, MASK, SEP]]
    assert (batch["input_ids"][1, 2:] == PAD).all()


def test_a_random_padding_token_is_a_token():
    batch = CaptionAugmentation(bert())(["a cat"], draws=[[KEEP, SWAP]], random_ids=[[PAD]])
    assert rows(batch) == [[CLS, 5, PAD, SEP]]


def test_special_tokens_in_a_caption_are_text():
    batch = CaptionAugmentation(bert())(["a [MASK]"], draws=[[KEEP, KEEP, DROP, KEEP]])
    assert rows(batch) == [[CLS, 5, 9, 10, SEP]]  # "[", "mask", "]": three words
    assert rows(CaptionAugmentation(words(), rate=0.0)(["a <mask>"])) == [[1, 4, 3, 3, 3, 2]]


# Whole words


@pytest.mark.parametrize(
    "draws, swaps, expected",
    [
        ([KEEP] * 5, [], [1, 4, 5, 6, 2]),
        ([HIDE, KEEP, SWAP, KEEP, KEEP], [7], [7, 4, 7, 6, 2]),
        ([KEEP, KEEP, KEEP, KEEP, HIDE], [], [1, 4, 5, 6, 7]),
        ([DROP, DROP, KEEP, KEEP, DROP], [], [5, 6]),
        ([SWAP, KEEP, KEEP, DROP, SWAP], [0, 2], [0, 4, 5, 2]),
        ([DROP] * 5, [], [1]),  # nothing at all cannot be pooled
        ([DROP, DROP, DROP, DROP, HIDE], [], [7]),
    ],
)
def test_start_and_end_are_drawn_too(draws, swaps, expected):
    batch = CaptionAugmentation(words())(["A cat plays"], draws=[draws], random_ids=[swaps])
    assert rows(batch) == [expected]


# Lengths


def test_long_captions_are_cut_after_the_augmentation_and_keep_an_end():
    text = "a cat " * 5
    short = CaptionAugmentation(bert(model_max_length=6), rate=0.0)([text, "a"])
    assert rows(short) == [[CLS, 5, 6, 5, 6, SEP], [CLS, 5, SEP]]
    draws = [[DROP] * 6 + [KEEP] * 4]
    assert rows(CaptionAugmentation(bert(), max_length=6)([text], draws=draws)) == [[CLS, 5, 6, 5, 6, SEP]]
    assert rows(CaptionAugmentation(words(model_max_length=5), rate=0.0)([text])) == [[1, 4, 5, 4, 2]]
    gone = [[KEEP] * 11 + [DROP]]  # the end mark itself
    assert rows(CaptionAugmentation(words(), max_length=5)([text], draws=gone)) == [[1, 4, 5, 4, 5]]


@pytest.mark.parametrize("tokenizer", [bert, words])
def test_without_a_rate_it_is_the_tokenizer(tokenizer):
    texts = ["a playing cat!", "", "Cat", "cat " * 30]
    augmented = CaptionAugmentation(tokenizer(), rate=0.0)(texts)
    plain = tokenizer()(texts, padding=True, return_tensors="pt")
    assert torch.equal(augmented["input_ids"], plain["input_ids"])
    assert torch.equal(augmented["attention_mask"], plain["attention_mask"])
    some = CaptionAugmentation(tokenizer(), rate=0.9)(texts, generator())
    assert rows(some) != rows(plain)


# Draws


@pytest.mark.parametrize("tokenizer", [bert, words])
def test_the_generator_alone_decides(tokenizer):
    augmentation, texts = CaptionAugmentation(tokenizer()), ["a cat a cat a cat a cat"] * 8
    first = rows(augmentation(texts, generator(1)))
    state = torch.get_rng_state()
    assert first == rows(augmentation(texts, generator(1))) != rows(augmentation(texts, generator(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_shares_of_the_fates():
    tokenizer, count = words(), 40_000
    text = "cat " * (count // 10)
    ids = torch.cat([CaptionAugmentation(tokenizer)([text], generator(seed))["input_ids"][0] for seed in range(10)])
    found = torch.bincount(ids, minlength=8) / count
    assert found[5] == pytest.approx(0.8 + 0.02 / 8, abs=0.01)  # kept, or drawn
    assert found[7] == pytest.approx(0.1 + 0.02 / 8, abs=0.01)  # masked, or drawn
    assert found.sum() == pytest.approx(1 - 0.08, abs=0.01)  # the rest is deleted
    assert (found[[0, 1, 2, 3, 4, 6]] > 0.001).all()  # special words are drawn as well
    assert found[[0, 1, 2, 3, 4, 6]].sum() == pytest.approx(6 * 0.02 / 8, abs=0.004)


def test_random_ids_reach_both_ends_of_the_vocabulary():
    for tokenizer in (bert(), words()):
        size = len(tokenizer)
        draws = [[SWAP] * (500 + 2 * isinstance(tokenizer, VlpWordTokenizer))]
        batch = CaptionAugmentation(tokenizer, max_length=10_000)(["cat " * 500], generator(), draws=draws)
        assert set(batch["input_ids"][0].tolist()) == set(range(size))


# Refusals


@pytest.mark.parametrize(
    "arguments, options, match",
    [
        ((["a"],), {}, "needs a generator"),
        ((["a"],), {"draws": [[SWAP]]}, "give generator= or random_ids="),
        ((["a"],), {"draws": [[KEEP, KEEP]]}, "2 numbers for the 1 words of caption 0"),
        ((["a", "cat"],), {"draws": [[KEEP]]}, "1 lists for 2 captions"),
        ((["a"],), {"draws": [[SWAP]], "random_ids": [[]]}, "0 numbers for the 1 replaced pieces of caption 0"),
        (([],), {}, "no list of captions"),
        (("a cat",), {}, "no list of captions"),
    ],
)
def test_calls_that_are_refused(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        CaptionAugmentation(bert())(*arguments, **options)
    with pytest.raises(TypeError, match="caption 1 is a NoneType"):
        CaptionAugmentation(bert())(["a", None], generator())


def test_augmentations_that_cannot_be_made():
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"rate={rate}"):
            CaptionAugmentation(bert(), rate)
    with pytest.raises(ValueError, match="max_length=2"):
        CaptionAugmentation(bert(), max_length=2)
    merges = CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[])
    with pytest.raises(ValueError, match="CLIPTokenizer is of the kind BPE"):
        CaptionAugmentation(merges)
    maskless = bert()
    maskless.mask_token = None
    with pytest.raises(ValueError, match="needs a mask_token"):
        CaptionAugmentation(maskless)
