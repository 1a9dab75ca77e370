"""Masked words: whole ones within a budget, by draws that can be given, shown in three ways, with marks and padding left alone."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_vlp.inputs.text_masking import RandomMasking, WholeWordMasking
from hf_vlp.inputs.vocabulary import train_clip_tokenizer, train_wordpiece_tokenizer
from hf_vlp.inputs.word_tokenizer import train_word_tokenizer

TEXTS = [
    "a photograph of seventeen umbrellas hanging above the marketplace",
    "two dogs",
    "unbelievable photographs",
    "the umbrella hangs",
]
FAIR = {"replaced": 1, "randomised": 0, "random_ids": 7}


@pytest.fixture(scope="module")
def pieces():
    """A vocabulary so small that most words are of several pieces."""
    return train_wordpiece_tokenizer(TEXTS, 70, 40)


def encoded(tokenizer, texts=TEXTS, **options):
    batch = tokenizer(texts, padding=options.pop("padding", True), return_tensors="pt", **options)
    return batch["input_ids"], batch["attention_mask"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shown_as_mask(ids):
    return {name: torch.full_like(ids, value) for name, value in FAIR.items()}


def by_hand(words, order, budget):
    """Tokens masked: words as lists of places, taken in the order of the numbers at their first places."""
    taken = []
    for word in sorted(words, key=lambda word: float(order[word[0]])):
        if len(taken) + len(word) <= budget:
            taken += word
    return taken


def words_of(encoding):
    """Places of the pieces of each word, as the tokenizer itself tells them."""
    words = {}
    for place, word in enumerate(encoding.word_ids):
        if word is not None:
            words.setdefault(word, []).append(place)
    return list(words.values())


@pytest.mark.parametrize("padded_to", [40, None, 12])
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_words_are_taken_in_their_order_while_the_budget_lasts(pieces, padded_to, share):
    ids, mask = encoded(pieces)
    encodings = pieces(TEXTS).encodings
    columns = max(ids.shape[1], padded_to or 0)
    passed_over = whole = 0
    for seed in range(20):
        order = torch.rand(len(ids), columns, generator=seeded(seed))
        masked, labels = WholeWordMasking(pieces, share, padded_to)(ids, mask, order=order, **shown_as_mask(ids))
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            counted = max(length, padded_to or 0)
            words, budget = words_of(encoding), max(1, round(share * counted))
            padding = [[place] for place in range(length, counted)]
            expected = sorted(place for place in by_hand(words + padding, order[row], budget) if place < length)
            assert labels[row].ne(-100).nonzero().flatten().tolist() == expected
            assert labels[row][expected].tolist() == ids[row][expected].tolist()
            assert set(masked[row][expected].tolist()) <= {pieces.mask_token_id}
            passed_over += len(expected) < budget and len(words) > 0
            whole += sum(len(word) > 1 and set(word) <= set(expected) for word in words)
            assert all(set(word) <= set(expected) or not set(word) & set(expected) for word in words)
        untouched = labels.eq(-100)
        assert torch.equal(masked[untouched], ids[untouched])
    assert whole and passed_over


@pytest.mark.parametrize(("length", "budget"), [(3, 1), (4, 1), (10, 2), (17, 3), (30, 4), (40, 6)])
def test_the_budget_is_rounded_half_to_even_and_at_least_one(pieces, length, budget):
    ids = torch.full((50, length), pieces.convert_tokens_to_ids("a"))
    ids[:, 0], ids[:, -1] = pieces.cls_token_id, pieces.sep_token_id
    mask = torch.ones_like(ids)
    _, labels = WholeWordMasking(pieces, padded_to=None)(ids, mask, seeded())
    assert set(labels.ne(-100).sum(dim=1).tolist()) == {min(budget, length - 2)}
    _, labels = WholeWordMasking(pieces)(ids, mask, seeded())  # counts as 40 tokens
    assert labels.ne(-100).sum(dim=1).max() <= 6


def test_single_tokens_split_words_and_whole_words_do_not(pieces):
    ids, mask = encoded(pieces, TEXTS[:1])
    words = [word for word in words_of(pieces(TEXTS[:1]).encodings[0]) if len(word) > 1]

    def split(masking):
        chosen = [masking(ids, mask, seeded(seed))[1][0].ne(-100) for seed in range(30)]
        return any(0 < one[word].sum() < len(word) for one in chosen for word in words)

    assert split(RandomMasking(pieces)) and not split(WholeWordMasking(pieces, share=0.4))


@pytest.mark.parametrize("kind", [RandomMasking, WholeWordMasking])
def test_what_is_masked_and_what_is_shown_have_the_chances_of_the_paper(pieces, kind):
    words = " ".join(["a"] * 14)  # of one piece each
    ids, mask = encoded(pieces, [words] * 4000)
    masked, labels = kind(pieces)(ids, mask, seeded())
    chosen = labels.ne(-100)
    assert chosen.float().mean(dim=0)[1:15].sub(6 / 38 if kind is WholeWordMasking else 0.15).abs().max() < 0.025
    hidden = masked.eq(pieces.mask_token_id) & chosen
    same = masked.eq(ids) & chosen
    count = int(chosen.sum())
    assert hidden.sum() / count == pytest.approx(0.8 + 0.1 / len(pieces), abs=0.02)
    assert same.sum() / count == pytest.approx(0.1 + 0.1 / len(pieces), abs=0.02)
    random = masked[chosen & ~hidden & ~same]
    assert random.numel() / count == pytest.approx(0.1, abs=0.02)
    assert random.unique().numel() == len(pieces) - 2  # all entries but the mask and the word itself
    per_row = chosen.sum(dim=1)
    assert per_row.min() == 0  # as published: some texts have nothing to predict
    assert WholeWordMasking(pieces, padded_to=None)(ids, mask, seeded())[1].ne(-100).sum(dim=1).eq(2).all()


@pytest.mark.parametrize("kind", [RandomMasking, WholeWordMasking])
def test_marks_and_padding_are_never_masked(pieces, kind):
    ids, mask = encoded(pieces, [*TEXTS, ""], padding="max_length")
    masked, labels = kind(pieces, share=1.0)(ids, mask, seeded())
    real = mask.bool() & ids.ne(pieces.cls_token_id) & ids.ne(pieces.sep_token_id)
    assert torch.equal(labels.ne(-100), real) and torch.equal(masked[~real], ids[~real])
    assert not real[-1].any() and real[:-1].any(dim=1).all()


def test_how_far_texts_are_padded_changes_nothing(pieces):
    tight, wide = encoded(pieces), encoded(pieces, padding="max_length")
    length = tight[0].shape[1]
    assert length < wide[0].shape[1] == 40
    masking = WholeWordMasking(pieces)
    for seed in range(5):
        ours, labels = masking(*tight, seeded(seed))
        theirs, others = masking(*wide, seeded(seed))
        assert torch.equal(ours, theirs[:, :length]) and torch.equal(labels, others[:, :length])
    own = WholeWordMasking(pieces, padded_to=None)
    assert any(not torch.equal(own(*tight, seeded(seed))[1], masking(*tight, seeded(seed))[1]) for seed in range(5))


@pytest.mark.parametrize("kind", [RandomMasking, WholeWordMasking])
def test_masks_are_a_function_of_the_generator(pieces, kind):
    ids, mask = encoded(pieces)
    before = ids.clone()
    first = kind(pieces)(ids, mask, seeded())
    torch.rand(3)  # the global generator plays no part
    again, other = kind(pieces)(ids, mask, seeded()), kind(pieces)(ids, mask, seeded(1))
    assert all(torch.equal(one, two) for one, two in zip(first, again)) and not torch.equal(first[1], other[1])
    assert torch.equal(ids, before)


def fast(model, pre_tokenizer, trainer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", pad_token="<pad>")


def byte_pairs_with_spaces():
    return fast(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<mask>", "<pad>"],
            show_progress=False,
        ),
    )


def sentence_pieces():
    return fast(
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        trainers.UnigramTrainer(vocab_size=60, special_tokens=["<mask>", "<pad>"], show_progress=False),
    )


def clip_byte_pairs():
    tokenizer = train_clip_tokenizer(TEXTS, 560, 40)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return tokenizer


@pytest.mark.parametrize("make", [byte_pairs_with_spaces, sentence_pieces, clip_byte_pairs])
def test_words_of_other_vocabularies(make):
    tokenizer = make()
    ids, mask = encoded(tokenizer)
    several = 0
    for seed in range(10):
        order = torch.rand(ids.shape, generator=seeded(seed))
        masking = WholeWordMasking(tokenizer, 0.5, padded_to=None)
        _, labels = masking(ids, mask, order=order, **shown_as_mask(ids))
        for row, encoding in enumerate(tokenizer(TEXTS).encodings):
            words = words_of(encoding)
            expected = sorted(by_hand(words, order[row], round(0.5 * len(encoding.ids))))
            assert labels[row].ne(-100).nonzero().flatten().tolist() == expected
            several += sum(len(word) > 1 for word in words)
    assert several


def test_each_token_of_a_vocabulary_of_words_is_a_word():
    tokenizer = train_word_tokenizer(TEXTS, 1)
    ids, mask = encoded(tokenizer)
    for seed in range(20):
        _, labels = WholeWordMasking(tokenizer, 0.4, None)(ids, mask, seeded(seed))
        budget = (0.4 * mask.sum(dim=1).double()).round().clamp(min=1)
        assert torch.equal(labels.ne(-100).sum(dim=1), torch.minimum(budget.long(), mask.sum(dim=1) - 2))


def test_what_cannot_be_masked_is_refused(pieces):
    ids, mask = encoded(pieces)
    with pytest.raises(ValueError, match="share=0 "):
        RandomMasking(pieces, 0)
    with pytest.raises(ValueError, match="padded_to=0"):
        WholeWordMasking(pieces, padded_to=0)
    with pytest.raises(ValueError, match="has no mask token"):
        WholeWordMasking(train_clip_tokenizer(TEXTS, 560, 40))
    characters = fast(
        models.BPE(), pre_tokenizers.Whitespace(), trainers.BpeTrainer(special_tokens=["<mask>", "<pad>"])
    )
    with pytest.raises(ValueError, match="where a word begins cannot be told"):
        WholeWordMasking(characters)
    with pytest.raises(ValueError, match="give generator= or order="):
        WholeWordMasking(pieces)(ids, mask)
    with pytest.raises(ValueError, match="give generator= or replaced="):
        RandomMasking(pieces)(ids, mask, chosen=mask)
    with pytest.raises(ValueError, match=r"order must be of the shape \[4, 40\]"):
        WholeWordMasking(pieces)(ids, mask, seeded(), order=torch.zeros(4, 39))
    with pytest.raises(ValueError, match=r"random_ids must be of the shape"):
        RandomMasking(pieces)(ids, mask, seeded(), random_ids=ids[:, 1:])
    with pytest.raises(ValueError, match=r"must both be \[B, L\]"):
        RandomMasking(pieces)(ids, mask[:, 1:], seeded())
