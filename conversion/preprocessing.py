"""How a published folder prepares its pictures, as options of our image processors, and its words.

Sources: open_clip's `preprocess_cfg` (its `PreprocessCfg`), transformers' preprocessor_config.json and, since version 5, the part
`image_processor` of processor_config.json.
"""

import json
from pathlib import Path
from typing import Any

from transformers import BertTokenizer

from conversion.tables import ConversionError

# Fields of a transformers image processor that ours has as well.
SAME_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
# What ours computes of open_clip's choices; absent means the same there.
OPEN_CLIP_FIXED = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises ConversionError where it is missing or none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error


def bert_tokenizer(vocabulary: Path, longest: int) -> BertTokenizer:
    """The tokenizer of a vocab.txt of BERT, for texts of up to `longest` tokens; raises ConversionError for another file."""
    if not vocabulary.is_file() or vocabulary.suffix == ".json":
        raise ConversionError(f"{vocabulary} is no vocabulary of this model: it needs vocab.txt, one word piece a line")
    return BertTokenizer(vocab=str(vocabulary), model_max_length=longest)


def refuse_other_vocabulary(tokenizer: BertTokenizer, size: int) -> None:
    """Raises ConversionError for a tokenizer of another size than the model's word embeddings."""
    if len(tokenizer) != size:
        raise ConversionError(
            f"the vocabulary has {len(tokenizer)} entries, the model {size}: this is another model's vocabulary"
        )


def image_options(folder: Path, image_size: int) -> dict:
    """Options of `VlpClipImageProcessor`: what the folder's files say, and `image_size` where they say nothing.

    Raises:
        ConversionError: an open_clip folder with another interpolation, way of resizing or colour mode than ours, or a size that
            is no square.
    """
    at_model_size = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    if (folder / "open_clip_config.json").exists():
        return at_model_size | _open_clip_options(folder / "open_clip_config.json")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            stored = json.loads((folder / name).read_text("utf-8"))
            stored = stored.get("image_processor", stored)
            found = {key: stored[key] for key in SAME_FIELDS if stored.get(key) is not None}
            # a size alone brings its crop along
            return found if "size" in found else at_model_size | found
    return at_model_size


def _open_clip_options(path: Path) -> dict:
    stored = json.loads(path.read_text("utf-8")).get("preprocess_cfg") or {}
    for key, ours in OPEN_CLIP_FIXED.items():
        if stored.get(key, ours) != ours:
            raise ConversionError(f"{path} sets preprocess_cfg.{key} {stored[key]!r}, ours computes {ours!r} alone")
    options = {f"image_{key}": list(stored[key]) for key in ("mean", "std") if stored.get(key) is not None}
    size = stored.get("size")
    if size is None:
        return options
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise ConversionError(f"{path} sets preprocess_cfg.size {size}, which is no square")
    side = sides.pop()
    return options | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
