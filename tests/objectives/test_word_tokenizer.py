"""The tokenizer of whole words: its words, its file, its training, and what it refuses."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import hf_vlp  # noqa: F401 (registers the tokenizer)
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer, split_words, train_word_tokenizer

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]
IDS = {word: index for index, word in enumerate([*SPECIAL, "a", "cat", "plays", "."])}


def original(ids: dict[str, int]) -> dict:
    """The content of a vocabulary file of the original."""
    return {"word2idx": ids, "idx2word": {str(index): word for word, index in ids.items()}, "idx": len(ids)}


@pytest.fixture
def path(tmp_path):
    def write(content) -> str:
        file = tmp_path / "coco_vocab.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    return write


# Words


@pytest.mark.parametrize(
    "text, words",
    [
        ("A Man's dog isn't HERE.", ["a", "man", "'s", "dog", "is", "n't", "here", "."]),
        ('the "dog", (small)...', ["the", "``", "dog", "''", ",", "(", "small", ")", "..."]),
        ("a dog. two cats!", ["a", "dog", ".", "two", "cats", "!"]),
        ("mr. smith walks. he stops", ["mr.", "smith", "walks", ".", "he", "stops"]),
        ("3.5 cats -- ran", ["3.5", "cats", "--", "ran"]),
        ("a <mask> <pad>", ["a", "<", "mask", ">", "<", "pad", ">"]),
        ("un café 猫", ["un", "café", "猫"]),
        ("  \n", []),
        ("", []),
    ],
)
def test_words_of_a_caption(text, words):
    assert split_words(text) == words


def test_a_caption_is_start_its_words_end(path):
    tokenizer = VlpWordTokenizer.from_vocabulary_json(path(original(IDS)))
    batch = tokenizer(["A cat plays.", "zebra", ""], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 7, 2], [1, 3, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"} and batch["input_ids"].dtype == torch.int64
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "a cat plays ."
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 8]) == [*SPECIAL, "<mask>"]


def test_the_mask_is_the_last_word_and_counts(path):
    tokenizer = VlpWordTokenizer.from_vocabulary_json(path(original(IDS)))
    assert tokenizer.mask_token_id == 8 and len(tokenizer) == tokenizer.vocab_size == 9
    assert tokenizer("a <mask>")["input_ids"] == [1, 4, 3, 3, 3, 2]  # text, not the mask
    again = VlpWordTokenizer(vocab=tokenizer.get_vocab())
    assert again.get_vocab() == tokenizer.get_vocab() and len(again) == 9
    with pytest.raises(ValueError, match="token id 9 is outside the vocabulary of 9"):
        tokenizer.convert_ids_to_tokens(9)


def test_a_limit_cuts_and_keeps_the_end():
    tokenizer = VlpWordTokenizer(vocab=IDS, model_max_length=4)
    assert tokenizer("a cat plays a cat", truncation=True)["input_ids"] == [1, 4, 5, 2]
    assert tokenizer("a cat", truncation=True)["input_ids"] == [1, 4, 5, 2]


# Training


def test_words_seen_often_enough_in_the_order_of_first_sight():
    texts = ["A cat plays", "the cat; the DOG", "the dog plays", "a"]
    tokenizer = train_word_tokenizer(iter(texts), threshold=2, model_max_length=12)
    assert list(tokenizer.get_vocab()) == [*SPECIAL, "a", "cat", "plays", "the", "dog", "<mask>"]
    assert list(tokenizer.get_vocab().values()) == list(range(10)) and tokenizer.model_max_length == 12
    assert list(train_word_tokenizer(texts, threshold=3).get_vocab()) == [*SPECIAL, "the", "<mask>"]
    assert list(train_word_tokenizer(["cat " * 3 + "dog " * 4]).get_vocab()) == [*SPECIAL, "dog", "<mask>"]
    assert len(train_word_tokenizer(texts, threshold=1)) == 11
    with pytest.raises(ValueError, match="threshold=0"):
        train_word_tokenizer(texts, threshold=0)


# Files


def test_a_saved_folder_and_a_saved_file_are_the_same_tokenizer(tmp_path):
    tokenizer = train_word_tokenizer(["un café, 猫", "a cat"], threshold=1, model_max_length=7)
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    assert stored == original(tokenizer.get_vocab()) and "café" in stored["word2idx"]
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        VlpWordTokenizer.from_vocabulary_json(tmp_path / "vocab.json", model_max_length=7),
    ):
        assert type(loaded) is VlpWordTokenizer and loaded.model_max_length == 7
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded("un café <mask>") == tokenizer("un café <mask>") != tokenizer("un café")


@pytest.mark.parametrize(
    "content, match",
    [
        ("not json", "is not JSON"),
        ([1, 2], "no table word2idx"),
        ({"word2idx": [1]}, "no table word2idx"),
        ({"word2idx": {"<pad>": 0}}, "lacks <start>, <end>, <unk>"),
        ({"word2idx": {**IDS, "dog": 5}}, "ids of the vocabulary .* are not 0 to 8"),
        ({"word2idx": {**IDS, "dog": 9}}, "are not 0 to 8"),
        ({"word2idx": {**IDS, "dog": "8"}}, "are not 0 to 8"),
        ({**original(IDS), "idx": 7}, "names 7 words and holds 8"),
        ({**original(IDS), "idx2word": {"4": "cat"}}, "word2idx and idx2word disagree"),
        ({**original(IDS), "idx2word": {"four": "a"}}, "word2idx and idx2word disagree"),
    ],
)
def test_files_that_are_no_vocabulary(path, content, match):
    with pytest.raises(ValueError, match=match) as error:
        VlpWordTokenizer.from_vocabulary_json(path(content))
    assert "coco_vocab.json" in str(error.value)


def test_sources_that_are_missing_or_too_many(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vocabulary at"):
        VlpWordTokenizer.from_vocabulary_json(tmp_path / "vocab.json")
    with pytest.raises(ValueError, match="one of them"):
        VlpWordTokenizer()
    with pytest.raises(ValueError, match="one of them"):
        VlpWordTokenizer(vocab_file="vocab.json", vocab=IDS)
    with pytest.raises(ValueError, match="the vocabulary lacks <pad>"):
        VlpWordTokenizer(vocab={"<start>": 0, "<end>": 1, "<unk>": 2})
