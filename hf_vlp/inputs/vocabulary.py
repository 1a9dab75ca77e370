"""Vocabularies trained on captions or read from an original's table: byte pairs in CLIP's layout, word pieces in BERT's.

Byte pairs have an end-of-word mark, and the two special tokens come last: CLIP, "Learning Transferable Visual Models From Natural
Language Supervision" (https://arxiv.org/abs/2103.00020), section 2.4. The result is transformers' own `CLIPTokenizer`, which saves and
loads without this package. It does not clean its text: `hf_vlp.inputs.text_cleaning.clean_clip_text` comes first (`VlpClipProcessor`
does it).
Word pieces: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (https://arxiv.org/abs/1810.04805),
section 3; transformers' `BertTokenizer`, and the same without its end mark as "Align before Fuse" (https://arxiv.org/abs/2107.07651)
reads texts. Whole words are in `hf_vlp.inputs.word_tokenizer`.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
PIECE_PREFIX = "##"  # of a piece that continues a word
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The released table lists 262,144 merges; the vocabulary of 49,408 uses the first of them.
MAX_MERGES = 49408 - 2 * 256 - len(SPECIAL_TOKENS)
# A merge table is text of a few megabytes; a gzip file may unfold to a thousand times its size.
MAX_TABLE_BYTES = 64 * 1024 * 1024


def byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, in the order of CLIP's vocabulary."""
    return sorted(ByteLevel.alphabet())


def clip_tokenizer_from_merges(path: str | Path, max_length: int = 77) -> CLIPTokenizer:
    """The tokenizer of a merge table in the layout of the released `bpe_simple_vocab_16e6.txt.gz`.

    The file is gzip text: a header line, then one merge a line, two symbols with a space between, the most frequent first. n merges give
    514 + n entries; those after the first 48,894 are not used, as in the release.

    Args:
        path: of the gzip file.
        max_length: longest text in tokens, start and end included; kept as `model_max_length`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not gzip, is cut short, is no text, or a line holds no merge.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(MAX_TABLE_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no merge table at {path}: give the path of bpe_simple_vocab_16e6.txt.gz"
        ) from None
    except EOFError as error:
        raise ValueError(f"the merge table {path} is cut short: fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"the merge table {path} is not a whole gzip file ({error}): fetch it again") from error
    if len(content) > MAX_TABLE_BYTES:
        raise ValueError(f"{path} unfolds to more than {MAX_TABLE_BYTES} bytes: that is no merge table")
    try:
        lines = content.decode("utf-8").rstrip("\n").split("\n")[1:]
    except UnicodeDecodeError as error:
        raise ValueError(f"the merge table {path} is not UTF-8 text ({error}): give a file in CLIP's layout") from error
    merges = []
    for number, line in enumerate(lines[:MAX_MERGES], start=2):
        pair = line.split()
        if len(pair) != 2:
            raise ValueError(
                f"line {number} of the merge table {path} is {line!r:.80}, not two symbols with a space between"
            )
        merges.append((pair[0], pair[1]))
    try:
        return _tokenizer(merges, max_length)
    except ValueError as error:
        raise ValueError(f"the merge table {path} cannot be used: {error}") from error


def train_clip_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A tokenizer trained on captions, in CLIP's layout: the same symbols, pattern and order as the released vocabulary.

    The same texts in the same order give the same vocabulary. It is smaller than asked for where the texts hold too few pairs of
    symbols that occur twice; with any size every text can be written, by bytes if need be.

    Args:
        texts: captions, cleaned as they will be later (`clean_clip_text`).
        vocab_size: entries, of which 514 are the byte symbols and the two special tokens.
        max_length: longest text in tokens, start and end included; kept as `model_max_length`.

    Raises:
        ValueError: `vocab_size` is below 514, or `max_length` leaves no room for a word.
    """
    symbols = byte_symbols()
    bare = 2 * len(symbols) + len(SPECIAL_TOKENS)
    if vocab_size < bare:
        raise ValueError(
            f"vocab_size={vocab_size} is below {bare}, the byte symbols and special tokens alone: give {bare} or more"
        )
    pattern = _tokenizer([], max_length).backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,  # a pair seen once teaches nothing about the next text
        # Ties between pairs go by the numbers of their symbols, which the trainer hands out in the order of a hash table
        # unless they are given: named here, the same texts give the same merges.
        special_tokens=[*symbols, *(symbol + END_OF_WORD for symbol in symbols)],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _tokenizer([tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]], max_length)


def train_wordpiece_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> BertTokenizer:
    """A tokenizer of lower-case word pieces trained on captions, in the layout of bert-base-uncased.

    The entries are `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3, `[MASK]` 4, the characters of the texts, those that continue a word once
    more as pieces, then what the trainer joins. The same texts in the same order give the same vocabulary. It is smaller than asked for
    where the texts hold too few pairs of pieces that occur twice. The text of a special token inside a caption is ordinary text
    (`split_special_tokens`), as in VSE-infinity.

    Args:
        texts: captions.
        vocab_size: entries.
        max_length: longest text in tokens, `[CLS]` and `[SEP]` included; kept as `model_max_length`.

    Raises:
        ValueError: `vocab_size` is below the special tokens and characters alone, or `max_length` leaves no room for a word.
    """
    if max_length < 3:
        raise ValueError(f"max_length={max_length} leaves no room for a word between [CLS] and [SEP]: give 3 or more")
    options = {"model_max_length": max_length, "split_special_tokens": True}
    pattern = BertTokenizer(**options).backend_tokenizer
    texts = list(texts)
    words = {
        word
        for text in texts
        for word, _ in pattern.pre_tokenizer.pre_tokenize_str(pattern.normalizer.normalize_str(text))
    }
    symbols = sorted({character for word in words for character in word})
    symbols += sorted({PIECE_PREFIX + character for word in words for character in word[1:]})
    bare = len(BERT_SPECIAL_TOKENS) + len(symbols)
    if vocab_size < bare:
        raise ValueError(
            f"vocab_size={vocab_size} is below {bare}, the characters of the texts and special tokens alone: give {bare} or more"
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token=BERT_SPECIAL_TOKENS[1]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once teaches nothing about the next text
        # named here for the reason given in train_clip_tokenizer
        special_tokens=[*BERT_SPECIAL_TOKENS, *symbols],
        continuing_subword_prefix=PIECE_PREFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab(), **options)


def without_end_mark(tokenizer: BertTokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with `[CLS]` before a text and nothing after it; pairs of texts keep their `[SEP]`.

    A text cut to n tokens so has n - 1 of its own. `[SEP]` written in a text is the mark still, unless the tokenizer splits special tokens.
    The class is the general one, because transformers' `BertTokenizer` puts its mark back whenever it is made: a saved folder loads with
    `AutoTokenizer`, not with `BertTokenizer`.

    Raises:
        ValueError: a tokenizer without `[CLS]` or `[SEP]`.
    """
    start, end = tokenizer.cls_token, tokenizer.sep_token
    if start is None or end is None:
        raise ValueError(f"the tokenizer's marks are {start!r} and {end!r}: it needs a cls_token and a sep_token")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:0",
        pair=f"{start}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(start, tokenizer.cls_token_id), (end, tokenizer.sep_token_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        split_special_tokens=tokenizer.split_special_tokens,
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hexadecimal) of a tokenizer's tokens and their ids, by which weights trained with it can know it again."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def decode_clip(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> str:
    """Text of token ids as the released tokenizer writes it: a space after every word, also the last, and special tokens shown.

    `tokenizer.decode` gives the same without the space at the end. Bytes that are no UTF-8 become U+FFFD.
    """
    symbols = byte_symbols()
    rest = iter(sorted(set(range(256)) - {ord(symbol) for symbol in symbols if ord(symbol) < 256}))
    value = {symbol: ord(symbol) if ord(symbol) < 256 else next(rest) for symbol in symbols}
    joined = "".join(tokenizer.convert_ids_to_tokens(list(ids)))
    return bytes(value[symbol] for symbol in joined).decode("utf-8", errors="replace").replace(END_OF_WORD, " ")


def _tokenizer(merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    """`CLIPTokenizer` of the symbols, the symbols that end a word, what each merge makes, and the special tokens, in this order."""
    if max_length < 3:
        raise ValueError(f"max_length={max_length} leaves no room for a word between start and end: give 3 or more")
    symbols = byte_symbols()
    entries = [
        *symbols,
        *(symbol + END_OF_WORD for symbol in symbols),
        *("".join(pair) for pair in merges),
        *SPECIAL_TOKENS,
    ]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    for position, pair in enumerate(merges):
        for symbol in pair:
            if symbol not in vocabulary:
                raise ValueError(
                    f"merge {position} ({' '.join(pair)}) joins {symbol!r}, which is no byte symbol or earlier merge"
                )
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
