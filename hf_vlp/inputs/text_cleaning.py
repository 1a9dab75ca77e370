"""Cleaning of captions and questions before they are tokenized.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020), section 2.4,
in the order of the released tokenizer; captions and questions of "Align before Fuse" (https://arxiv.org/abs/2107.07651), as its released
code reads its annotations. Depends on ftfy, some of whose repairs differ between its versions.
"""

import html
import re

import ftfy

_DELETED = str.maketrans({mark: None for mark in ",.'!?\"()*#:;~"} | {"-": " ", "/": " "})


def clean_clip_text(text: str) -> str:
    """A caption as CLIP's vocabulary wants it: repaired, unescaped, on one line and in lower case.

    The order matters: broken encodings are repaired first, HTML entities undone twice (`&amp;amp;` is common on the web), and
    lower case comes last, because it depends on the neighbours (a Greek sigma at the end of a word).

    Args:
        text: one caption; may be empty.

    Returns:
        The cleaned caption; cleaning it again can only undo further entities.

    Raises:
        TypeError: `text` is no string.
    """
    _check_text(text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def clean_caption(text: str, max_words: int = 30) -> str:
    """A caption without punctuation, in lower case, on one line, and cut after some words.

    A hyphen or slash is a space, other marks join what they part; `<person>`, which stands for names in captions from the web, is the
    word. One tab or line break alone stays; two or more characters of space become one space.

    Args:
        text: one caption; may be empty.
        max_words: longest caption, in words between single spaces.

    Raises:
        TypeError: `text` is no string.
        ValueError: `max_words` is below 1.
    """
    _check_text(text)
    text = text.lower().translate(_DELETED).replace("<person>", "person")
    return _first_words(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 30) -> str:
    """A question without punctuation and in lower case, cut after some words; its spaces stay, but for those at the end.

    Args:
        text: one question; may be empty.
        max_words: longest question; between two spaces lies a word, though an empty one. The released code trains with 30, tests with 50.

    Raises:
        TypeError: `text` is no string.
        ValueError: `max_words` is below 1.
    """
    _check_text(text)
    return _first_words(text.lower().translate(_DELETED).rstrip(" "), max_words)


def _first_words(text: str, count: int) -> str:
    if count < 1:
        raise ValueError(f"max_words={count} leaves no word of a text: give 1 or more")
    return " ".join(text.split(" ")[:count])


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(
            f"a caption must be a string, got {type(text).__name__} {text!r:.80}: convert it, or leave the row out"
        )
