"""CLIP's rows of the benchmark for pictures and captions on their way to the model."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from benchmarks import clip_plain
from benchmarks.measure import BASE, Contender, Settings, TimedRow
from hf_vlp import VlpClipImageProcessor, VlpClipImageProcessorPil, VlpClipProcessor
from hf_vlp.inputs.text_cleaning import clean_clip_text
from hf_vlp.inputs.vocabulary import byte_symbols, clip_tokenizer_from_merges, train_clip_tokenizer

OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
EMOJI = Path(__file__).parent.parent / "data" / "emoji" / "train.parquet"


def photographs(count: int, width: int = 640, height: int = 480) -> list[Image.Image]:
    """Smooth random RGB pictures of a photograph's size."""
    draw = np.random.default_rng(0)
    small = draw.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in small]


def transform_rows(settings: Settings) -> Iterator[TimedRow]:
    pictures = photographs(2 if settings.small else 32)
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() for picture in pictures]
    exact, fast, theirs = VlpClipImageProcessorPil(), VlpClipImageProcessor(), CLIPImageProcessor()
    grey_levels = 3 / 255 / min(clip_plain.STD)  # antialiased resizing of 8-bit tensors rounds otherwise than Pillow

    def contender(work, tolerance: float = 1e-4) -> Contender:
        return Contender(lambda call: work(), tolerance=tolerance)

    contenders = {
        BASE: contender(lambda: torch.stack([clip_plain.transform(picture, 224) for picture in pictures])),
        "transformers": contender(lambda: theirs(pictures, return_tensors="pt").pixel_values, grey_levels),
        "ours exact": contender(lambda: exact(pictures, return_tensors="pt").pixel_values),
        "ours tensor": contender(lambda: fast(pictures, return_tensors="pt").pixel_values, grey_levels),
        "ours tensor, given tensors": contender(lambda: fast(tensors, return_tensors="pt").pixel_values, grey_levels),
    }
    yield TimedRow("transforms, 640 x 480", "pictures", len(pictures), contenders, by_dtype=False)


def emoji_captions(count: int) -> list[str]:
    """The first captions of the built-in data, each with its keywords."""
    from pyarrow import parquet

    rows = parquet.read_table(EMOJI, columns=["caption", "keywords"]).to_pylist()
    return [f"{row['caption']}: {row['keywords']}" for row in rows[:count]]


def tokenizer_rows(settings: Settings) -> Iterator[TimedRow]:
    """The same captions in every round, so everyone who remembers words knows them all, as after thousands of captions."""
    texts = emoji_captions(20 if settings.small else 1000)
    if OPEN_CLIP:  # it brings the published merge table
        import open_clip

        tokenizer = clip_tokenizer_from_merges(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")
    else:
        tokenizer = train_clip_tokenizer([clean_clip_text(text) for text in emoji_captions(1000)], 8192, 77)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    plain = clip_plain.Tokenizer(tokenizer.get_vocab(), merges, byte_symbols())
    processor = VlpClipProcessor(VlpClipImageProcessor(), tokenizer)
    length = tokenizer.model_max_length
    padded = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}

    def contender(work: Callable[[], torch.Tensor], tolerance: float | None = 0.0) -> Contender:
        def ids_with_zeros() -> torch.Tensor:
            ids = work()
            return ids.masked_fill((ids == tokenizer.eos_token_id).cumsum(dim=1) > 1, 0)  # ours pads with end-of-text

        return Contender(lambda call: work(), ids_with_zeros, tolerance=tolerance)

    contenders = {
        BASE: contender(lambda: plain(texts, length)),
        "transformers, uncleaned": contender(lambda: tokenizer(texts, **padded).input_ids, tolerance=None),
        "ours one by one": contender(
            lambda: torch.cat([processor(text=text, padding="max_length").input_ids for text in texts])
        ),
        "ours in a batch": contender(lambda: processor(text=texts, padding="max_length").input_ids),
    }
    if OPEN_CLIP:
        theirs = open_clip.SimpleTokenizer()
        contenders["open_clip"] = contender(lambda: theirs(texts, length))
    yield TimedRow("tokenizer, padded to the limit", "captions", len(texts), contenders, by_dtype=False)
