"""What a recipe names, opened: records, tokenizer, processor, store of regions."""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer

from hf_vlp.auto import TABLE, resolve
from hf_vlp.data.readers import read_records
from hf_vlp.data.record import TEXT_FIELDS, TEXT_LIST_FIELDS, RecordError
from hf_vlp.inputs.region_store import RegionStore
from hf_vlp.inputs.text_cleaning import clean_clip_text
from hf_vlp.inputs.vocabulary import (
    clip_tokenizer_from_merges,
    train_clip_tokenizer,
    train_wordpiece_tokenizer,
    without_end_mark,
)
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer, train_word_tokenizer
from hf_vlp.training.building import image_config, image_size, text_config
from hf_vlp.training.recipe import DataRecipe, Recipe, RecipeError

SPLITS = ("train", "validation", "test")
CLEANING = ("text_cleaning", "max_words")  # what a recipe says of it
TEXTS = TEXT_FIELDS + TEXT_LIST_FIELDS
REPOSITORY = Path(__file__).resolve().parents[2]


def located(source: str) -> str:
    """A path of a recipe: below the working folder, else below the repository."""
    return str(REPOSITORY / source) if not Path(source).exists() and (REPOSITORY / source).exists() else source


def read_split(data: DataRecipe, split: str, required: Sequence[str]):
    """The records of "train", "validation" or "test", with the fields required.

    Raises:
        RecipeError: no such file, or a split that it does not have.
        RecordError: records that cannot be used.
    """
    source = getattr(data, split)
    if source is None:
        return None
    chosen = getattr(data, f"{split}_split")
    try:
        return read_records(
            located(source), split=chosen, columns=data.columns, image_root=data.image_root, required=required
        )
    except RecordError:
        raise
    except (ValueError, OSError) as error:
        raise RecipeError(f"data.{split} = {source!r}: {error}") from error


def training_texts(recipe: Recipe, records, columns: Sequence[str]) -> Iterator[str]:
    """Texts for a vocabulary, cleaned where the processor will clean them.

    Raises:
        RecipeError: a file of `processor.vocabulary_records` that cannot be read.
    """
    columns = [*columns, *(recipe.data.extra_text.columns if recipe.data.extra_text else ())]
    sources = [records.select_columns(columns)]
    for source in recipe.processor.vocabulary_records or ():
        try:
            more = read_records(located(source), required=())
        except (ValueError, OSError) as error:
            raise RecipeError(f"processor.vocabulary_records: {source!r}: {error}") from error
        sources.append(more.select_columns([name for name in TEXTS if name in more.column_names]))
    clean = clean_clip_text if recipe.processor.vocabulary in (None, "byte_pairs") else str
    for row in itertools.chain(*sources):
        for value in row.values():
            texts = [value] if isinstance(value, str) else value or ()
            yield from (clean(text) for text in texts if text)


def build_tokenizer(recipe: Recipe, records, columns: Sequence[str]):
    """Given, or trained on the texts in these columns and on the keywords.

    Raises:
        RecipeError: no end mark for a tokenizer that needs it.
    """
    tokenizer = marked_tokenizer(recipe, records, columns)
    if recipe.processor.end_mark is not False:
        return tokenizer
    try:
        return without_end_mark(tokenizer)
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"processor.end_mark = False: {error}") from error


def marked_tokenizer(recipe: Recipe, records, columns: Sequence[str]):
    """As `build_tokenizer`, with the marks that the tokenizer has of its own."""
    chosen = recipe.processor
    kind = chosen.vocabulary or "byte_pairs"
    limit = {} if chosen.max_length is None else {"model_max_length": chosen.max_length}
    if chosen.tokenizer is None:
        texts, entries = training_texts(recipe, records, columns), chosen.vocabulary_size or 4096
        if kind == "words":
            return train_word_tokenizer(texts, chosen.minimum_count or 4, **limit)
        if kind == "word_pieces":
            return train_wordpiece_tokenizer(texts, entries, chosen.max_length or 512)
        return train_clip_tokenizer(texts, entries, chosen.max_length or 77)
    if chosen.tokenizer.endswith(".gz"):
        return clip_tokenizer_from_merges(chosen.tokenizer, max_length=chosen.max_length or 77)
    if chosen.tokenizer.endswith(".json"):
        return VlpWordTokenizer.from_vocabulary_json(chosen.tokenizer, **limit)
    return AutoTokenizer.from_pretrained(chosen.tokenizer, **limit)


def build_processor(recipe: Recipe, config, records, columns: Sequence[str] = ("captions",)):
    """A saved processor, or a new one with a given or a trained tokenizer; the size of images and patches, or the width of regions, is the
    model's.

    Args:
        columns: of the records, whose texts a vocabulary is trained on.

    Raises:
        RecipeError: data of another kind than the model sees, or settings that its processor does not have.
    """
    chosen, pixels = recipe.processor, image_config(config) is not None
    saved = chosen.from_pretrained or recipe.model.from_pretrained
    cleaning = {name: value for name in CLEANING if (value := getattr(chosen, name)) is not None}
    row = TABLE[config.model_type]
    if recipe.data.regions is None and not pixels:
        raise RecipeError(
            "data.regions is required: this model sees regions; name a region store, or give it a vision_config"
        )
    if recipe.data.regions is not None and pixels:
        raise RecipeError(
            f"data.regions = {recipe.data.regions!r}: this model sees pixels (its vision_config is set); leave it out"
        )
    for key in cleaning.keys() - inspect.signature(resolve(row.processor)).parameters.keys():
        raise RecipeError(
            f"processor.{key} = {cleaning[key]!r}: the processor of {config.model_type} has no such setting; leave it out"
        )
    name = row.image_processors["torchvision"] if pixels else row.feature_extractor
    if pixels:
        options = seen_sizes(config, resolve(name)) | chosen.image_processor
    else:
        options = {"region_store": located(recipe.data.regions)}
    if saved:
        for key in ("tokenizer", "vocabulary", "vocabulary_size", "vocabulary_records", "minimum_count", "end_mark"):
            if (value := getattr(chosen, key)) is not None:
                raise RecipeError(
                    f"processor.{key} = {value!r}: the processor saved in {saved} has its own vocabulary; leave it out"
                )
        processor = AutoProcessor.from_pretrained(saved, **options)
        if chosen.max_length is not None:
            processor.tokenizer.model_max_length = chosen.max_length
        if cleaning:
            cleaning = {name: getattr(processor, name) for name in CLEANING if hasattr(processor, name)} | cleaning
            try:
                processor = type(processor)(processor.image_processor, processor.tokenizer, **cleaning)
            except ValueError as error:
                raise RecipeError(f"processor.{error}") from error
        return processor
    options |= {} if pixels else {"feature_size": config.region_size}
    tokenizer = build_tokenizer(recipe, records, columns)
    positions = getattr(text_config(config), "max_position_embeddings", None)
    if chosen.max_length is None and positions:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    side = "image_processor" if pixels else "feature_extractor"
    return resolve(row.processor)(**{side: resolve(name)(**options)}, tokenizer=tokenizer, **cleaning)


def seen_sizes(config, image_processor: type) -> dict:
    """The options of an image processor that the model decides: side of the images, and of patches where pictures are cut to those."""
    size, options = image_size(config), {}
    if size:
        options["size"] = size
    if hasattr(image_processor, "size_divisor"):
        options["size_divisor"] = image_config(config).patch_size
    return options


def open_store(recipe: Recipe, config) -> RegionStore | None:
    """The regions that stand for the pictures, if any.

    Raises:
        RecipeError: no such store, a damaged one, or regions of another width than the model's.
    """
    if recipe.data.regions is None:
        return None
    try:
        store = RegionStore(located(recipe.data.regions))
    except (OSError, ValueError) as error:
        raise RecipeError(f"data.regions = {recipe.data.regions!r}: {error}") from error
    width = store.header["feature_size"]
    if width != config.region_size:
        raise RecipeError(
            f"data.regions = {recipe.data.regions!r}: its features are {width} wide, and model.config.region_size is {config.region_size}"
        )
    return store
