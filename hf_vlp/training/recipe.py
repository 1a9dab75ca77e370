"""Typed recipes: nested dataclasses read from YAML, overridden from the command line.

Every number of a run is a key here. A key that does not exist, a value of the wrong type and a missing required key are
each a `RecipeError` that names the key. A relative path is meant from the folder the run is started in.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_vlp.files import write_text


class RecipeError(ValueError):
    """A recipe that cannot be run as written; the message names the key, the value and the remedy."""


@dataclass
class ModelRecipe:
    """Which model: `model_type` with a `config` for random weights, or the folder `from_pretrained`.

    `towers`: parts of a new model that start from pretrained weights, e.g. `{text_model: google-bert/bert-base-uncased}`; the value is
    a folder or Hub id that `AutoModel.from_pretrained` loads, or where the model takes it a name of timm, `timm/vit_base_patch32_384`.
    """

    model_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    towers: dict[str, str] = field(default_factory=dict)
    from_pretrained: str | None = None

    def __post_init__(self):
        if (self.model_type is None) == (self.from_pretrained is None):
            raise RecipeError("model: give exactly one of model.model_type (random weights) and model.from_pretrained")
        if self.towers and self.from_pretrained:
            raise RecipeError("model.towers: the model of model.from_pretrained has its towers; leave one of the two out")


@dataclass
class ProcessorRecipe:
    """What turns images and captions into tensors: a saved processor, or one made for this run.

    `from_pretrained`: a saved processor (default with `model.from_pretrained`: that folder). `tokenizer`: a tokenizer
    folder or Hub id, a merges file in the layout of CLIP's `bpe_simple_vocab_16e6.txt.gz`, or a `vocab.json` of words in VSE-infinity's
    layout. Without either a `vocabulary` is trained on the training texts, and on those of the files `vocabulary_records`: "byte_pairs"
    in CLIP's layout, "word_pieces" in BERT's, of `vocabulary_size` (4096) entries, or whole "words" seen at least `minimum_count` (4)
    times. `max_length`: tokens with both marks; if not given 77 for byte pairs, else the tokenizer's own limit, and no more than the model
    has positions. `end_mark`: false leaves out the mark behind a text, as ALBEF's word pieces do.
    `image_processor`: further arguments of the image processor (the size comes from the model's config).
    A saved processor has its tokenizer: `tokenizer`, `vocabulary` and what it is made by are an error beside it;
    `max_length`, `text_cleaning`, `max_words` and `image_processor` override what was saved. `text_cleaning` and `max_words`, after which a
    cleaned text is cut: what the processor of the model knows.
    """

    from_pretrained: str | None = None
    tokenizer: str | None = None
    vocabulary: Literal["byte_pairs", "word_pieces", "words"] | None = None
    vocabulary_size: int | None = None
    vocabulary_records: list[str] | None = None
    minimum_count: int | None = None
    end_mark: bool | None = None
    max_length: int | None = None
    text_cleaning: Literal["clip", "none", "caption", "question"] | None = None
    max_words: int | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _at_least("processor", self, vocabulary_size=1, minimum_count=1, max_length=3, max_words=1)
        if self.minimum_count is not None and self.vocabulary != "words":
            raise RecipeError("processor.minimum_count: only a vocabulary of words counts them; set processor.vocabulary to words")


@dataclass
class ExtraTextRecipe:
    """Keywords appended to the training captions: the `columns` that hold them (comma-separated or lists), what stands
    before each, whether their order is drawn anew every epoch, the chance `keep` of each to be kept, and the `chance` of a
    caption to be given any."""

    columns: list[str]
    separator: str = ", "
    shuffle: bool = False
    keep: float = 1.0
    chance: float = 1.0


@dataclass
class SizeAugmentationRecipe:
    """Elements of a set left out while training, so that pooling by learned weights meets sets of many sizes (VSE-infinity).

    `captions`: share of the words that are masked, replaced or deleted. `regions`: share of the regions dropped. `grid`: largest share
    of the cells dropped. The paper's is 0.2 for each; 0 leaves that side alone.
    """

    captions: float = 0.0
    regions: float = 0.0
    grid: float = 0.0

    def __post_init__(self):
        for name in ("captions", "regions", "grid"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"data.size_augmentation.{name} = {getattr(self, name)}: expected a share from 0 to below 1")


@dataclass
class MaskingRecipe:
    """Words hidden from the model, which is to name them.

    `probability`: share of the tokens. `whole_words`: all pieces of a word together. Of the chosen tokens 80 % become the mask, 10 %
    another token, and 10 % stay. `padded_to`: tokens that a text counts as in the share of whole words, if it is not longer; null = its
    own. `patches`: share of the patches to be predicted, by models that predict patches.
    """

    probability: float = 0.15
    whole_words: bool = False
    padded_to: int | None = None
    patches: float = 0.15

    def __post_init__(self):
        for name in ("probability", "patches"):
            if not 0 < getattr(self, name) < 1:
                raise RecipeError(f"data.masking.{name} = {getattr(self, name)}: expected a share between 0 and 1")
        _at_least("data.masking", self, padded_to=1)
        if self.padded_to is not None and not self.whole_words:
            raise RecipeError("data.masking.padded_to is for whole words: set data.masking.whole_words, or leave it out")


@dataclass
class AnswersRecipe:
    """The answers a model chooses from: those of the training records that are seen `minimum_seen` times or more, of these the `top_k`
    most frequent; or those of `file`, a JSON list of texts or the folder of a model that answers. `count_validation`: those of the
    validation records count as well, as published models have it.
    """

    minimum_seen: int = 1
    top_k: int | None = None
    count_validation: bool = False
    file: str | None = None

    def __post_init__(self):
        _at_least("data.answers", self, minimum_seen=1, top_k=1)
        if self.file is not None and (self.minimum_seen != 1 or self.top_k is not None or self.count_validation):
            raise RecipeError("data.answers.file lists the answers: leave it out, or what else is in data.answers")


@dataclass
class DataRecipe:
    """The records. `train`, `validation`, `test`: a .parquet, .jsonl, .json, .csv or .tsv file, an image folder or a Hub
    id (with `*_split`). Karpathy's `dataset_coco.json` or `dataset_flickr30k.json` can stand for all three, with
    `train_split: train`, `validation_split: val`, `test_split: test` and `image_root`.

    `columns` renames the file's columns to the record's (`image`, `captions`, `image_id`; `captions` may join several).
    `augmentation`: `name`, `canvas` and the numbers of a `TrainingTransform` of `hf_vlp.inputs.image_augmentations`; empty
    is CLIP's own random square crop. `regions`: a region store, whose regions stand for the pictures; a record's `regions`, else its
    `image_id`, is its key there. `cache` keeps the decoded uint8 pictures in memory. `first_caption`: always the
    first of several instead of a drawn one. `max_tokens`: of a text in training, where they are not the `processor.max_length` that is
    saved and cuts texts ever after.

    For models that read words and image together: `masking` hides words, `false_images` shows half of the texts of a batch with the image
    of another record. Fine-tuning for retrieval shows each image with `false_texts` captions of other records beside its own, for
    questions `answers` says which there are to choose from.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    columns: dict[str, Any] | None = None
    image_root: str | None = None
    extra_text: ExtraTextRecipe | None = None
    first_caption: bool = False
    max_tokens: int | None = None
    augmentation: dict[str, Any] = field(default_factory=dict)
    regions: str | None = None
    size_augmentation: SizeAugmentationRecipe = field(default_factory=SizeAugmentationRecipe)
    masking: MaskingRecipe | None = None
    false_images: bool = False
    false_texts: int | None = None
    answers: AnswersRecipe | None = None
    cache: bool = False
    on_bad_record: Literal["raise", "skip"] = "raise"

    def __post_init__(self):
        _at_least("data", self, false_texts=1, max_tokens=3)
        if self.regions is None and self.size_augmentation.regions:
            raise RecipeError("data.size_augmentation.regions: there are no regions without data.regions, a region store")
        for name in ("augmentation", "cache"):
            if self.regions is not None and getattr(self, name):
                raise RecipeError(f"data.{name} is for pictures, and data.regions takes their place: leave one of the two out")


@dataclass
class OptimizerRecipe:
    """AdamW. Patterns are regular expressions searched in the parameter names.

    `lr` holds for `lr_batch` pairs a step where that is given and is scaled by `lr_rule` to the run's own batch.
    `lr_factors` multiplies the rate of the matching parameters; `layer_decay` multiplies it once more for every block
    between a parameter and the top of its tower; `no_decay` adds to norms, biases and scales, which do not decay unless
    `decay` is "all". `update`: "torch", or "transformers" for the AdamW that transformers had until its fifth version and several papers
    were trained with.
    """

    update: Literal["torch", "transformers"] = "torch"
    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.2
    decay: Literal["matrices", "all"] = "matrices"
    no_decay: list[str] = field(default_factory=list)
    lr_batch: int | None = None
    lr_rule: Literal["linear", "sqrt"] = "linear"
    lr_factors: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self):
        _at_least("optimizer", self, lr=0, eps=0, weight_decay=0, layer_decay=0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optimizer.betas = {self.betas}: expected two numbers in [0, 1)")


@dataclass
class ScheduleRecipe:
    """The factor on the learning rate: linear warm-up from `start_factor`, then `name` down to `end_factor`.

    The warm-up is `warmup_steps` long, or `warmup_share` of the run (0.1: the first tenth of its steps).
    "step" multiplies by `gamma` at each of the `milestones`, which are parts of the whole run (0.6: after 60 % of the steps).
    "cosine_epochs" changes the rate once an epoch and, within the first, every `warmup_unit` of the `warmup_steps`.
    """

    name: Literal["cosine", "cosine_epochs", "linear", "polynomial", "constant", "step"] = "cosine"
    warmup_steps: int = 0
    warmup_share: float = 0.0
    start_factor: float = 0.0
    warmup_unit: int = 100
    power: float = 1.0
    end_factor: float = 0.0
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1

    def __post_init__(self):
        _at_least("schedule", self, warmup_steps=0, start_factor=0, warmup_unit=1, power=0, end_factor=0, gamma=0)
        if self.name == "cosine_epochs" and (self.warmup_share or self.warmup_steps % self.warmup_unit):
            raise RecipeError(
                f"schedule.warmup_steps = {self.warmup_steps}, schedule.warmup_share = {self.warmup_share}: cosine_epochs expects steps, a "
                f"multiple of schedule.warmup_unit = {self.warmup_unit}"
            )
        if not 0 <= self.warmup_share < 1 or (self.warmup_share and self.warmup_steps):
            raise RecipeError(
                f"schedule.warmup_share = {self.warmup_share}: expected a part of the run from 0 to below 1, and none beside "
                "schedule.warmup_steps"
            )
        if bool(self.milestones) != (self.name == "step") or not all(0 < part < 1 for part in self.milestones):
            raise RecipeError(
                f"schedule.milestones = {self.milestones}: expected parts of the run between 0 and 1 with schedule.name = step, "
                "and none with another"
            )

    def numbers(self, total_steps: int, epoch_steps: float | None = None) -> dict[str, Any]:
        """What `hf_vlp.training.optim.schedule` takes, for a run of `total_steps`, `epoch_steps` an epoch."""
        numbers = dataclasses.asdict(self) | {"epoch_steps": epoch_steps}
        share = numbers.pop("warmup_share")
        return numbers | {"warmup_steps": int(total_steps * share)} if share else numbers


@dataclass
class RampRecipe:
    """A number that changes while training: `values` at the places `at`, counted in `unit` from the start of the run.

    "step" holds each value until the next place, "linear" goes evenly from one to the next; a place named twice is a jump. The last
    value stays. Epochs count parts too: 0.5 is the middle of the first.
    """

    at: list[float]
    values: list[float]
    unit: Literal["steps", "epochs"] = "epochs"
    shape: Literal["step", "linear"] = "step"

    def __post_init__(self):
        rising = all(place >= before for before, place in zip([0.0, *self.at], self.at))
        if not self.at or len(self.at) != len(self.values) or not rising:
            raise RecipeError(
                f"ramps: at = {self.at} and values = {self.values}: expected as many rising places, from 0 on, as values"
            )


@dataclass
class TrainingRecipe:
    """The loop. `batch_size` counts the pairs of one contrastive batch over all processes, so that the number of
    processes does not change the run; a step takes `accumulation` such batches.

    `threads`: of the arithmetic on a CPU, a process; null = the cores shared evenly (`accelerate launch` alone would give one).
    `mixed_precision`: "auto" is bf16 where the device is quick in it, else no; a CPU without AVX-512 is several times slower in it.
    `cached_chunk_size`: pairs (a process) per forward of the cached contrastive step; null = the plain step.
    `evaluate_every`, `save_every`: steps; null = only at the start and the end, and only at the end. `best_metric`: the
    validation metric (higher is better) that marks the best checkpoint, null = the one of the task; `final`: which one becomes the saved
    model. `evaluate_records`: of each held-out split, the first so many; null = all. `evaluate_candidates`: of retrieval, score only
    the so many images for each caption and captions for each image that the model itself embeds nearest, all where there are fewer;
    null = every pair. `rank_records`: of a model that is pre-trained to score pairs, also ranks the images of the first so many among
    each other; null = none.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 128
    accumulation: int = 1
    cached_chunk_size: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    clip_norm: float | None = None
    seed: int = 0
    channels_last: bool = False
    compile: bool = False
    checkpointing: bool = False
    attention: str | None = None
    workers: int = 0
    threads: int | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    evaluate_records: int | None = None
    evaluate_candidates: int | None = None
    rank_records: int | None = None
    save_every: int | None = None
    keep: int = 2
    best_metric: str | None = None
    final: Literal["last", "best"] = "last"

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("training: give exactly one of training.steps and training.epochs")
        _at_least("training", self, steps=1, epochs=1, batch_size=2, accumulation=1, cached_chunk_size=1, workers=0, threads=1)
        _at_least("training", self, log_every=1, evaluate_every=1, evaluate_records=1, rank_records=1, save_every=1, keep=1, seed=0)
        _at_least("training", self, evaluate_candidates=1)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise RecipeError(
                f"training.clip_norm = {self.clip_norm}: expected more than 0 (0 would train nothing), or null for none"
            )


@dataclass
class Recipe:
    """One run, whole. `task`: what a model is fine-tuned for; null = pre-training, and "text_assignment" the second one, before NLVR2.

    `ramps`: `loss_factor`, which multiplies the gradient, and what the model names in its `ramps()`.
    """

    model: ModelRecipe
    data: DataRecipe
    training: TrainingRecipe
    name: str = "run"
    task: Literal["vqa", "nlvr2", "retrieval", "entailment", "grounding", "text_assignment"] | None = None
    processor: ProcessorRecipe = field(default_factory=ProcessorRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    ramps: dict[str, RampRecipe] = field(default_factory=dict)
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self):
        if "frozen_stages" in self.ramps and self.optimizer.freeze:
            raise RecipeError(
                f"optimizer.freeze = {self.optimizer.freeze} beside ramps.frozen_stages, which lets what it does not freeze train: "
                "leave one of the two out"
            )
        if self.training.final == "best" and self.data.validation is None:
            raise RecipeError(
                "training.final = best needs data.validation to choose by; the test split must not choose"
            )
        if self.processor.image_processor and self.data.regions is not None:
            raise RecipeError(
                "processor.image_processor is for pictures, and data.regions takes their place: leave one of the two out"
            )
        for name, task in {"masking": None, "false_images": None, "false_texts": "retrieval", "answers": "vqa"}.items():
            if getattr(self.data, name) and self.task != task:
                wanted = f"the task {task}" if task else "pre-training, without a task"
                raise RecipeError(f"data.{name} is for {wanted}, and task = {self.task or 'null'}: leave one of the two out")
        if self.training.evaluate_candidates is not None and self.task != "retrieval":
            raise RecipeError(
                f"training.evaluate_candidates is for the task retrieval, and task = {self.task or 'null'}: leave one of the two out"
            )
        if self.training.rank_records is not None and self.task is not None:
            raise RecipeError(
                f"training.rank_records is for pre-training, without a task, and task = {self.task}: leave one of the two out"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self, path: str | Path) -> Path:
        """Writes every key, defaults too, under a temporary name that is then renamed."""
        return write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file; its name without suffix is the recipe's name unless the key `name` says otherwise.
        overrides: command-line words: `--training.batch_size 64`, `--training.batch_size=64`, or the last part of the
            key alone where only one key ends so (`--batch_size 64`). Values are read as YAML. A truth value may stand
            without a word after it.

    Raises:
        RecipeError: no such file, not YAML, an unknown, ambiguous or missing key, a value of the wrong type.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds {type(tree).__name__}, expected the sections {', '.join(_names(Recipe))}")
    for words, value in _pairs(list(overrides)):
        _put(tree, words, value)
    tree.setdefault("name", path.stem)
    return _build(Recipe, tree, "")


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, each with both values."""
    a, b = flatten(one.to_dict()), flatten(other.to_dict())
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted(a | b) if a.get(key) != b.get(key)]


# ---------------------------------------------------------------------------------------------------- reading


def _build(kind: type, tree: Any, where: str):
    """`tree` as a dataclass of type `kind`; `where` is the dotted key of the section, "" at the top."""
    if not isinstance(tree, dict):
        raise RecipeError(f"{where or 'recipe'} = {tree!r}: expected a section with keys {', '.join(_names(kind))}")
    for key in tree:
        if key not in _names(kind):
            raise RecipeError(_unknown(f"{where}.{key}" if where else str(key), where))
    hints = typing.get_type_hints(kind)
    values = {}
    for item in fields(kind):
        key = f"{where}.{item.name}" if where else item.name
        if item.name in tree:
            values[item.name] = _typed(hints[item.name], tree[item.name], key)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{key} is required: write it in the recipe or give --{key} VALUE")
    return kind(**values)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type; an integer passes for a float, and so does 1e-4, which YAML reads as a word."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = RecipeError(f"{key} = {value!r}: expected {_describe(hint)}, got {type(value).__name__}")
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _build(hint, value, key)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(next(argument for argument in arguments if argument is not type(None)), value, key)
    if origin is Literal:
        # YAML 1.1 reads the bare word no as false
        value = "no" if value is False and "no" in arguments else value
        if value not in arguments:
            raise RecipeError(f"{key} = {value!r}: expected {_describe(hint)}")
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return [_typed(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {_typed(arguments[0], k, key): _typed(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise wrong from None
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise wrong
    return value


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if argument is type(None) else _describe(argument) for argument in arguments)
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")


# ---------------------------------------------------------------------------------------------------- command line


def _pairs(words: list[str]) -> list[tuple[str, Any]]:
    """`--key value`, `--key=value` and bare `--key` as (key, value)."""
    pairs, index = [], 0
    while index < len(words):
        word, index = words[index], index + 1
        if not word.startswith("--") or len(word) == 2:
            raise RecipeError(f"{word!r} on the command line: expected --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = index < len(words) and not words[index].startswith("--")
            value, index = (words[index], index + 1) if following else ("true", index)
        try:
            pairs.append((key, yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key} {value}: the value is not readable as YAML") from error
    return pairs


def _put(tree: dict, key: str, value: Any) -> None:
    """Sets a dotted key, or a last part that only one key has, in the nested dictionary."""
    if "." not in key and key not in _names(Recipe):
        matches = [full for full in _keys(Recipe) if full.rsplit(".", 1)[-1] == key]
        if len(matches) > 1:
            raise RecipeError(f"--{key} is ambiguous: write --{' or --'.join(matches)}")
        if not matches:
            raise RecipeError(_unknown(key, ""))
        key = matches[0]
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise RecipeError(_unknown(key, ""))
    tree[last] = value


# ---------------------------------------------------------------------------------------------------- names


def _names(kind: type) -> list[str]:
    return [item.name for item in fields(kind)]


def _keys(kind: type, where: str = "") -> list[str]:
    """All dotted keys, sections and leaves."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found.append(where + name)
        for section in (hint, *typing.get_args(hint)):
            if is_dataclass(section):
                found += _keys(section, f"{where}{name}.")
    return found


def _unknown(key: str, section: str) -> str:
    """The nearest key of the same section if one is near, else the nearest by its last part anywhere."""
    last = {full: full.rsplit(".", 1)[-1] for full in _keys(Recipe)}
    here = [full for full in last if full.rpartition(".")[0] == section] if section else []
    word = key.rsplit(".", 1)[-1]

    def nearness(full: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, word, last[full]).ratio() + (0.15 if full in here else 0.0), full in here

    nearest = max(last, key=nearness)
    within = f" in the section {section}" if section else ""
    return f"unknown recipe key {key!r}{within}; the nearest valid key is {nearest!r}"


def flatten(tree: dict, where: str = "") -> dict[str, Any]:
    """Nested dictionaries as one of dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat


def _at_least(section: str, recipe: Any, **bounds: float) -> None:
    for name, bound in bounds.items():
        value = getattr(recipe, name)
        if value is not None and not value >= bound:
            raise RecipeError(f"{section}.{name} = {value}: expected at least {bound}")
