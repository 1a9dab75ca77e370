"""Whole words as tokens: the text side of VSE-infinity's BiGRU variant.

VSE-infinity, "Learning the Best Pooling Strategy for Visual Semantic Embedding" (https://arxiv.org/abs/2011.04305).
Words are those of nltk's `word_tokenize` on the lower-cased caption; a word outside the vocabulary is `<unk>`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

SPECIAL_WORDS = ("<pad>", "<start>", "<end>", "<unk>")
MASK_WORD = "<mask>"
# Without the full stop. nltk's sentence splitter learnt a longer list, in a file of its own that has to be downloaded.
ABBREVIATIONS = """
    a.d a.m adm apr aug ave b.c bros capt co col corp d.c dec dr e.g feb fri gen gov hon i.e inc jan jr jul jun l.a lt ltd messrs
    mr mrs ms mt n.c n.j n.y nov oct p.m ph.d prof rep rev sen sept sgt sr st ste thu tues u.k u.n u.s u.s.a v vs wed
""".split()  # fmt: skip
SEVERAL_SENTENCES = re.compile(r"[.!?].", re.DOTALL)


@lru_cache(maxsize=1)
def _splitters() -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
    """Text to sentences, sentence to words."""
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    except ImportError as error:
        raise ImportError('captions are split into words by nltk: pip install "hf_vlp[bigru]"') from error
    parameters = PunktParameters()
    parameters.abbrev_types.update(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters).tokenize, NLTKWordTokenizer().tokenize


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of a caption, lower-cased, as nltk's `word_tokenize` gives them.

    Sentences are split first, since a full stop is a word of its own only at the end of one. nltk's rules are used without the
    abbreviations, collocations and sentence starters that it learnt from newspapers: a short list of everyday abbreviations stands in
    for them. The words differ only in captions of several sentences, around an abbreviation that is on one list alone.

    Raises:
        ImportError: nltk is not installed.
    """
    sentences, words = _splitters()
    text = text.lower().strip()
    if SEVERAL_SENTENCES.search(text):
        return [word for sentence in sentences(text) for word in words(sentence)]
    return words(text)


class VlpWordTokenizer(PreTrainedTokenizer):
    """A transformers tokenizer of whole words: `<start>`, the words of `split_words`, `<end>`; padded on the right.

    Its file `vocab.json` is in the original's layout, {"word2idx": {word: id}, "idx2word": {id: word}, "idx": number of words}, with
    `<pad>` 0, `<start>` 1, `<end>` 2, `<unk>` 3. `<mask>` is added as the last entry where a file lacks it, so it counts in
    `len(tokenizer)`. The text of a special word inside a caption is ordinary text.

    Args:
        vocab_file: path of such a JSON file.
        vocab: {word: id} in place of a file.
        model_max_length: longest text in tokens, `<start>` and `<end>` included; no bound if not given.

    Raises:
        ValueError: neither or both of the sources, a file that is not in this layout, a missing special word, ids that are not 0 to
            n - 1 once each.
        FileNotFoundError: there is no such file.
        ImportError: at the first caption, where nltk is not installed.
    """

    vocab_files_names = {"vocab_file": "vocab.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"

    def __init__(self, vocab_file: str | Path | None = None, vocab: Mapping[str, int] | None = None, **kwargs: Any):
        if (vocab_file is None) == (vocab is None):
            raise ValueError(
                "give vocab_file=, a vocab.json in the original's layout, or vocab=, {word: id}; one of them"
            )
        source = "the vocabulary" if vocab_file is None else f"the vocabulary {vocab_file}"
        self._ids = _checked(_read(Path(vocab_file)) if vocab is None else vocab, source)
        self._ids.setdefault(MASK_WORD, len(self._ids))
        self._words = {index: word for word, index in self._ids.items()}
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL_WORDS), mask_token=MASK_WORD)
        # "<mask>" in a caption is text, as in the original
        fixed = {"split_special_tokens": True, "special_tokens_pattern": "bos_eos"}
        super().__init__(**{**names, **kwargs, **fixed})

    @classmethod
    def from_vocabulary_json(cls, path: str | Path, **kwargs: Any) -> "VlpWordTokenizer":
        """The tokenizer of an original's vocabulary JSON; errors and options as for the class."""
        return cls(vocab_file=path, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Words of the file and `<mask>`; `len(tokenizer)` also counts words added since."""
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        """{word: id}, words added since included."""
        return self._ids | self.get_added_vocab()

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `vocab.json` in the original's layout, `<mask>` included; returns its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        words = sorted(self._words.items())
        content = {
            "word2idx": {word: index for index, word in words},
            "idx2word": {str(index): word for index, word in words},
            "idx": len(words),
        }
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return (str(path),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return split_words(text)

    def _convert_token_to_id(self, token: str) -> int:
        index = self._ids.get(token)
        return self._ids[SPECIAL_WORDS[3]] if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        try:
            return self._words[index]
        except KeyError:
            raise ValueError(f"token id {index} is outside the vocabulary of {len(self)} words") from None


def train_word_tokenizer(texts: Iterable[str], threshold: int = 4, **kwargs: Any) -> VlpWordTokenizer:
    """A tokenizer of the words that occur in the texts at least `threshold` times, in the order in which they are first seen.

    The original counts the captions of its training and development splits, with a threshold of 4.

    Args:
        texts: captions.
        threshold: least count of a word.
        kwargs: of `VlpWordTokenizer`, such as `model_max_length`.

    Raises:
        ValueError: a threshold below 1.
        ImportError: nltk is not installed.
    """
    if threshold < 1:
        raise ValueError(f"threshold={threshold} is no count: give 1 to keep every word, 4 as the original does")
    counts = Counter(word for text in texts for word in split_words(text))
    words = [*SPECIAL_WORDS, *(word for word, count in counts.items() if count >= threshold)]
    return VlpWordTokenizer(vocab={word: index for index, word in enumerate(words)}, **kwargs)


def _read(path: Path) -> dict[str, int]:
    """`word2idx` of a vocabulary file."""
    remedy = "give a file of the original, or one that save_vocabulary wrote"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no vocabulary at {path}: give the path of a vocab.json") from None
    except ValueError as error:
        raise ValueError(f"the vocabulary {path} is not JSON ({error}): {remedy}") from error
    if not isinstance(content, dict) or not isinstance(content.get("word2idx"), dict):
        raise ValueError(f"the vocabulary {path} has no table word2idx: {remedy}")
    ids = content["word2idx"]
    others = content.get("idx2word", {})
    if not isinstance(others, dict) or any(ids.get(word) != _number(index) for index, word in others.items()):
        raise ValueError(f"in the vocabulary {path} word2idx and idx2word disagree: {remedy}")
    if content.get("idx", len(ids)) != len(ids):
        raise ValueError(f"the vocabulary {path} names {content['idx']!r} words and holds {len(ids)}: {remedy}")
    return ids


def _number(index: str) -> int | None:
    return int(index) if index.isdecimal() else None


def _checked(ids: Mapping[str, int], source: str) -> dict[str, int]:
    missing = [word for word in SPECIAL_WORDS if word not in ids]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: it needs {', '.join(SPECIAL_WORDS)}")
    if any(type(index) is not int for index in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"the ids of {source} are not 0 to {len(ids) - 1}, each once: number the words again")
    return dict(ids)
