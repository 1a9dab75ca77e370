"""Cleaning of captions before they are tokenized.

CLIP, "Learning Transferable Visual Models From Natural Language Supervision" (https://arxiv.org/abs/2103.00020), section 2.4,
in the order of the released tokenizer. Depends on ftfy, some of whose repairs differ between its versions.
"""

import html

import ftfy


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
    if not isinstance(text, str):
        raise TypeError(
            f"a caption must be a string, got {type(text).__name__} {text!r:.80}: convert it, or leave the row out"
        )
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
