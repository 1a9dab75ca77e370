"""Captions to token ids: the cleaning, the released vocabulary, and vocabularies trained in its layout."""

import gzip
import json
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer

from hf_vlp.inputs.text_cleaning import clean_caption, clean_clip_text, clean_question
from hf_vlp.inputs.vocabulary import (
    byte_symbols,
    clip_tokenizer_from_merges,
    decode_clip,
    train_clip_tokenizer,
    train_wordpiece_tokenizer,
    without_end_mark,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "clip"
RELEASED = files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
TABLES = {"tokenizer_full": (RELEASED, 77), "tokenizer_small": (GOLDEN / "tokenizer_small" / "merges.txt.gz", 24)}
CAPTIONS = ["a photo of a cat", "a photo of the cat", "two photos of cats", "the cats of the photo", "猫の写真、猫"]


@pytest.fixture(scope="module", params=TABLES)
def golden(request):
    path, length = TABLES[request.param]
    cases = json.loads((GOLDEN / request.param / "cases.json").read_text("utf-8"))
    return clip_tokenizer_from_merges(path, length), length, cases


@pytest.fixture(scope="module")
def trained():
    return train_clip_tokenizer(CAPTIONS, 524, 16)


def compressed(folder, content: bytes) -> Path:
    path = folder / "merges.txt.gz"
    path.write_bytes(gzip.compress(content))
    return path


# Cleaning


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("A  Photo\tof\n a CAT ", "a photo of a cat"),
        ("Tom &amp;amp;amp; Jerry", "tom & jerry"),
        (
            "<b>Tom &amp;amp;amp; Jerry",
            "<b>tom &amp; jerry",
        ),  # ftfy leaves text with tags alone: undone twice, not three times
        ("cafÃ© â€œLuxeâ€\x9d", 'café "luxe"'),
        ("ﬁne ｆｕｌｌ", "fine full"),
        ("ΟΔΟΣ ΣΟΦΟΣ", "οδος σοφος"),
        ("<|EndOfText|>", "<|endoftext|>"),
        ("", ""),
        (" \u3000\ufeff ", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_clip_text(raw) == clean


@pytest.mark.parametrize("value", [None, 7, b"cat", ["cat"]])
def test_cleaning_refuses_what_is_no_string(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        clean_clip_text(value)


@pytest.mark.parametrize(
    "raw, caption, question",
    [
        ("A man, with his (RED) car's door!", "a man with his red cars door", "a man with his red cars door"),
        ("on-line / off-line", "on line off line", "on line   off line"),
        ("<PERSON>s & <person>", "persons & person", "<person>s & <person>"),
        ("<per.son>", "person", "<person>"),  # marks go first
        ("  a \t\n b\tc\n", "a b\tc", "  a \t\n b\tc\n"),  # a tab alone stays
        ("a \n", "a", "a \n"),
        (" a\n\n", "a", " a\n\n"),
        ("?!", "", ""),
        ("", "", ""),
        ("ÜBER 3:30; x_y", "über 330 x_y", "über 330 x_y"),
    ],
)
def test_captions_and_questions(raw, caption, question):
    assert clean_caption(raw) == caption
    assert clean_question(raw) == question


def test_words_after_which_a_text_is_cut():
    long = " ".join(map(str, range(60)))
    assert clean_caption(long) == clean_question(long) == " ".join(map(str, range(30)))
    assert clean_question(long, 50) == " ".join(map(str, range(50))) != clean_question(long)
    assert clean_caption("a\tb c d", 2) == clean_question("a\tb c d", 2) == "a\tb c"  # words lie between spaces
    assert clean_caption("a  b c", 2) == "a b"
    assert clean_question("a  b c", 2) == "a "  # an empty word is one
    for clean in (clean_caption, clean_question):
        with pytest.raises(ValueError, match="max_words=0"):
            clean("a", 0)
        with pytest.raises(TypeError, match="NoneType"):
            clean(None)


# The released vocabulary and one of another size


def test_ids_tokens_and_decoded_text_are_the_originals(golden):
    tokenizer, _, cases = golden
    for case in cases:
        ids = tokenizer(clean_clip_text(case["text"]), add_special_tokens=False, verbose=False)["input_ids"]
        assert ids == case["ids"], case["name"]
        assert tokenizer.convert_ids_to_tokens(ids) == case["tokens"], case["name"]
        assert decode_clip(tokenizer, ids) == case["decoded"], case["name"]


def test_padded_and_truncated_rows_are_the_originals_but_for_the_padding_id(golden):
    tokenizer, length, cases = golden
    cut = 0
    for case in cases:
        row = tokenizer(clean_clip_text(case["text"]), truncation=True, padding="max_length", max_length=length)
        ids, mask = row["input_ids"], row["attention_mask"]
        assert [token * real for token, real in zip(ids, mask, strict=True)] == case["truncated"], case["name"]
        assert all(token == tokenizer.eos_token_id for token, real in zip(ids, mask, strict=True) if not real)
        if case["padded"] is None:
            assert sum(mask) == length and ids[-1] == tokenizer.eos_token_id
            cut += 1
        else:
            assert case["padded"] == case["truncated"]
    assert (cut > 0) == (length == 24)


def test_without_cleaning_some_ids_differ(golden):
    tokenizer, _, cases = golden
    same = [tokenizer(c["text"], add_special_tokens=False, verbose=False)["input_ids"] == c["ids"] for c in cases]
    assert 10 <= same.count(False) < len(same)


def test_order_of_the_vocabulary(golden):
    tokenizer, length, cases = golden
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert (vocabulary["!"], vocabulary["~"], vocabulary["¡"], vocabulary["Ā"]) == (0, 93, 94, 188)
    assert vocabulary["!</w>"] == 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == length
    assert len(tokenizer) in (49408, 554)


def test_a_saved_folder_loads_as_the_same_tokenizer(golden, tmp_path):
    tokenizer, length, cases = golden
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is CLIPTokenizer and loaded.model_max_length == length
    texts = [clean_clip_text(case["text"]) for case in cases]
    assert loaded(texts, truncation=True) == tokenizer(texts, truncation=True)


# Files that are no merge table


def test_a_missing_merge_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.gz"):
        clip_tokenizer_from_merges(tmp_path / "nowhere.gz")


def test_a_truncated_or_damaged_merge_table(tmp_path):
    whole = RELEASED.read_bytes()
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        clip_tokenizer_from_merges(path)
    path.write_bytes(whole[:5000] + bytes(64) + whole[5064:])
    with pytest.raises(ValueError, match="merges.txt.gz"):
        clip_tokenizer_from_merges(path)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"head\nt h\nalone\n", "line 3"),
        (b"head\nt h e\n", "line 2"),
        (b"head\n\xff\xfe \xff\n", "UTF-8"),
        (b"head\nt h\nzz e</w>\n", "'zz'"),
        ("head\n猫 a\n".encode(), "猫"),
    ],
)
def test_lines_that_are_no_merges(tmp_path, content, match):
    with pytest.raises(ValueError, match=match):
        clip_tokenizer_from_merges(compressed(tmp_path, content))


def test_plain_text_is_not_gzip(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("head\nt h\n")
    with pytest.raises(ValueError, match="gzip"):
        clip_tokenizer_from_merges(path)


def test_any_number_of_merges_and_lengths(tmp_path):
    path = compressed(tmp_path, b"head\nt h\nth e</w>\n")
    assert len(clip_tokenizer_from_merges(path)) == 516
    assert clip_tokenizer_from_merges(path, 12)("the", max_length=12)["input_ids"] == [514, 513, 515]
    assert len(clip_tokenizer_from_merges(compressed(tmp_path, b"head\n"))) == 514
    with pytest.raises(ValueError, match="max_length=2"):
        clip_tokenizer_from_merges(path, 2)


# Trained vocabularies


def test_training_learns_the_most_frequent_pairs_first():
    tokenizer = train_clip_tokenizer(["hug hug hug hug hug", "pun pun", "bun"], 518, 16)
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(512, 518)] == [
        "hu",
        "hug</w>",
        "un</w>",
        "pun</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert tokenizer("hug bun")["input_ids"] == [516, 513, byte_symbols().index("b"), 514, 517]


def test_a_trained_vocabulary_has_the_layout_of_the_released_one(trained):
    vocabulary = trained.get_vocab()
    assert len(trained) == 524 and trained.model_max_length == 16
    assert [trained.convert_ids_to_tokens(i) for i in range(256)] == byte_symbols()
    assert vocabulary["<|endoftext|>"] == trained.eos_token_id == 523
    assert trained.tokenize("a photo")[0] == "a</w>"
    assert len(trained.tokenize("a photo of a cat")) < len(
        train_clip_tokenizer([], 514, 16).tokenize("a photo of a cat")
    )


def test_any_text_can_be_written_and_read_back(trained):
    text = "naïve 猫 🎉 zebra!"
    ids = trained(text, add_special_tokens=False)["input_ids"]
    assert trained.eos_token_id not in ids
    assert trained.decode(ids) == "naïve 猫 🎉 zebra !"
    assert decode_clip(trained, ids) == "naïve 猫 🎉 zebra ! "
    assert decode_clip(trained, ids[:-1]) != decode_clip(trained, ids)
    assert decode_clip(trained, [byte_symbols().index("ç"), 256]) == "\ufffd! "  # the first byte of three, alone


def test_training_repeats_and_a_smaller_vocabulary_is_a_prefix(trained):
    again, small = train_clip_tokenizer(iter(CAPTIONS), 524, 16), train_clip_tokenizer(CAPTIONS, 518, 16)
    assert again.get_vocab() == trained.get_vocab()
    assert [small.convert_ids_to_tokens(i) for i in range(516)] == [
        trained.convert_ids_to_tokens(i) for i in range(516)
    ]
    other = train_clip_tokenizer(["seven zebras drink seven waters"] * 3, 524, 16)
    assert other.get_vocab() != trained.get_vocab()


def test_few_texts_give_a_smaller_vocabulary():
    assert len(train_clip_tokenizer(["one two"], 600, 16)) == 514
    assert 514 < len(train_clip_tokenizer(["one two", "one two"], 600, 16)) < 600


@pytest.mark.parametrize("size", [0, 513])
def test_a_vocabulary_below_the_bytes(size):
    with pytest.raises(ValueError, match=f"vocab_size={size}.*514"):
        train_clip_tokenizer(CAPTIONS, size, 16)


def test_a_trained_tokenizer_survives_its_folder(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded(CAPTIONS) == trained(CAPTIONS)


# Word pieces

BERT_FIRST = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_word_pieces_have_the_layout_of_bert_and_join_what_is_frequent():
    tokenizer = train_wordpiece_tokenizer(["Hug hug HUG hug", "hugs pun"], 17, 16)
    entries = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert type(tokenizer) is BertTokenizer
    assert entries == [*BERT_FIRST, *"ghnpsu", "##g", "##n", "##s", "##u", "hu", "hug"]
    assert tokenizer.tokenize("a HUGS") == ["[UNK]", "hug", "##s"]
    ids = tokenizer("hug pun")["input_ids"]
    assert ids == [2, entries.index("hug"), entries.index("p"), entries.index("##u"), entries.index("##n"), 3]
    assert tokenizer.model_max_length == 16 and tokenizer.pad_token_id == 0 and tokenizer.mask_token_id == 4


def test_word_pieces_repeat_and_depend_on_the_texts(tmp_path):
    tokenizer = train_wordpiece_tokenizer(iter(CAPTIONS), 60, 16)
    assert tokenizer.get_vocab() == train_wordpiece_tokenizer(CAPTIONS, 60, 16).get_vocab()
    assert tokenizer.get_vocab() != train_wordpiece_tokenizer([*CAPTIONS, "seven zebras"], 60, 16).get_vocab()
    assert len(tokenizer.tokenize("photos")) < len("photos")
    assert "[UNK]" not in tokenizer.tokenize("the two cats of a photo 猫") and "[UNK]" in tokenizer.tokenize("zebra")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.model_max_length == 16
    assert loaded(CAPTIONS)["input_ids"] == tokenizer(CAPTIONS)["input_ids"]


def test_a_special_token_in_a_caption_is_text_after_training_and_loading(tmp_path):
    tokenizer = train_wordpiece_tokenizer(["a [mask] of a cat"] * 2, 60, 16)
    assert 4 not in tokenizer("a [MASK]")["input_ids"]
    assert tokenizer("a [MASK]", split_special_tokens=False)["input_ids"][2] == 4


def test_word_pieces_that_cannot_be_trained():
    with pytest.raises(ValueError, match="vocab_size=8 is below 9"):
        train_wordpiece_tokenizer(["ab ba"], 8, 16)  # five special tokens, a, b, ##a, ##b
    assert len(train_wordpiece_tokenizer(["ab ba"], 9, 16)) == 9
    assert len(train_wordpiece_tokenizer(["ab ba"], 900, 16)) == 9  # no pair twice
    with pytest.raises(ValueError, match="max_length=2"):
        train_wordpiece_tokenizer(["ab ba"], 20, 2)


# Word pieces without the mark at the end


def bert(**options) -> BertTokenizer:
    entries = [*BERT_FIRST, "a", "cat", "##s", "[", "]", "sep"]
    return BertTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, **{"model_max_length": 9} | options
    )


def test_a_text_without_its_end_mark():
    tokenizer = without_end_mark(bert())
    assert tokenizer(["A cats", "", "a [SEP]", "cat[SEP]"])["input_ids"] == [[2, 5, 6, 7], [2], [2, 5, 3], [2, 6, 3]]
    assert bert()("A cats")["input_ids"] == [2, 5, 6, 7, 3]
    assert tokenizer("a cats", truncation=True, max_length=3)["input_ids"] == [2, 5, 6]  # the first mark counts
    assert tokenizer("a", padding="max_length", max_length=4)["attention_mask"] == [1, 1, 0, 0]
    assert tokenizer("a", padding="max_length", max_length=4)["input_ids"] == [2, 5, 0, 0]
    assert tokenizer("a", "cat")["input_ids"] == bert()("a", "cat")["input_ids"] == [2, 5, 3, 6, 3]
    literal = without_end_mark(bert(split_special_tokens=True))
    assert literal("a [SEP]")["input_ids"] == [2, 5, 8, 10, 9]


def test_a_saved_folder_keeps_texts_without_their_end_mark(tmp_path):
    source = bert(model_max_length=4, truncation_side="left")
    source("a cats a", truncation=True, max_length=3, padding="max_length")  # a call is no setting
    tokenizer = without_end_mark(source)
    assert tokenizer("a cats a")["input_ids"] == [2, 5, 6, 7, 5]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, loaded):
        assert one("a cats")["input_ids"] == [2, 5, 6, 7] and one.model_max_length == 4
        assert one("a cats a", truncation=True)["input_ids"] == [2, 6, 7, 5]
        names = ("pad", "unk", "cls", "sep", "mask")
        assert [getattr(one, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    assert loaded.get_vocab() == source.get_vocab()
    # the sibling: BERT's own class puts its mark back
    assert BertTokenizer.from_pretrained(tmp_path)("a cats")["input_ids"] == [2, 5, 6, 7, 3]


def test_a_tokenizer_without_marks():
    with pytest.raises(ValueError, match="'\\[CLS\\]' and None: it needs"):
        tokenizer = bert()
        tokenizer.sep_token = None
        without_end_mark(tokenizer)
