"""Trains a model by a recipe, from data to a folder that `AutoModel.from_pretrained` loads.

    CPU      accelerate launch --cpu examples/pretrain.py
    1 GPU    accelerate launch examples/pretrain.py --config examples/configs/clip_rn50.yaml --data.train pairs.jsonl
    N GPUs   accelerate launch --num_processes N examples/pretrain.py --config ... --data.train ...

Without --config: the built-in emoji pictures, a few minutes on two CPU cores. Any recipe key can follow as
`--section.key value`, or `--key value` where only one section has it. `--resume auto` goes on from the last checkpoint
of `--output` (default runs/<recipe>), `--dry-run` prints size, memory and time of a few steps and writes nothing.
"""

import argparse
import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForPreTraining, AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_vlp.auto import TABLE, resolve
from hf_vlp.data.collate import PairCollator
from hf_vlp.data.pairs import ImageTextPairs, caption_with_keywords, draw_caption, first_caption
from hf_vlp.data.readers import read_records
from hf_vlp.data.record import RecordError
from hf_vlp.data.samplers import UniqueImageBatchSampler
from hf_vlp.export.hub import write_card
from hf_vlp.files import files_into, write_text
from hf_vlp.inputs.image_augmentations import TrainingTransform
from hf_vlp.inputs.text_cleaning import clean_clip_text
from hf_vlp.inputs.vocabulary import clip_tokenizer_from_merges, fingerprint, train_clip_tokenizer
from hf_vlp.training.loop import dry_run, train
from hf_vlp.training.optim import optimizer_of, schedule
from hf_vlp.training.recipe import DataRecipe, Recipe, RecipeError, differences, flatten, load_recipe
from hf_vlp.training.report import RunLog, check_trackers, draw_curves
from hf_vlp.training.results import HeldOut
from hf_vlp.training.state import Checkpoints, StateError, refuse_taken_folder
from hf_vlp.training.steps import choose_step
from hf_vlp.training.stream import BatchStream

HERE = Path(__file__).resolve().parent


def threads_per_process() -> int:
    """This machine's cores, shared by the processes on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def read_split(data: DataRecipe, split: str):
    """The records of "train", "validation" or "test"; paths count from the working folder, then from the repository."""
    source = getattr(data, split)
    if source is None:
        return None
    if not Path(source).exists() and (HERE.parent / source).exists():
        source = str(HERE.parent / source)
    chosen = getattr(data, f"{split}_split")
    return read_records(source, split=chosen, columns=data.columns, image_root=data.image_root)


def build_config(recipe: Recipe):
    """The saved or new configuration, with the recipe's fields."""
    if recipe.model.from_pretrained is None:
        if recipe.model.model_type not in CONFIG_MAPPING:
            nearest = difflib.get_close_matches(recipe.model.model_type, [*CONFIG_MAPPING.keys()], n=1, cutoff=0)[0]
            raise RecipeError(f"model.model_type = {recipe.model.model_type!r} is unknown; the nearest is {nearest!r}")
        try:
            config = AutoConfig.for_model(recipe.model.model_type, **recipe.model.config)
        except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
            raise RecipeError(f"model.config: {' '.join(str(error).split())}") from error
        refuse_ignored(config, recipe.model.config)
        return config
    config = AutoConfig.from_pretrained(recipe.model.from_pretrained)
    override(config, recipe.model.config)
    return config


def override(config: PreTrainedConfig, values: dict, where: str = "model.config") -> None:
    """Sets fields of a saved configuration and of those inside it."""
    for name, value in values.items():
        if name == "model_type" and value != config.model_type:
            raise RecipeError(
                f"{where}.model_type = {value!r}: the saved model has {config.model_type!r}, leave it out"
            )
        if name not in settable(config) and name not in vars(config):
            raise unknown_field(config, name, where)
        if isinstance(value, dict) and isinstance(getattr(config, name), PreTrainedConfig):
            override(getattr(config, name), value, f"{where}.{name}")
        elif name != "model_type":
            try:
                setattr(config, name, value)
            except (TypeError, ValueError, StrictDataclassError) as error:
                raise RecipeError(f"{where}.{name} = {value!r}: {' '.join(str(error).split())}") from error


def refuse_ignored(config: PreTrainedConfig, values: dict, where: str = "model.config") -> None:
    """Errs at a key that a new configuration only carries along.

    transformers keeps what no field takes as an attribute; an older name that a foreign configuration understands is used up.
    """
    for name, value in values.items():
        if name not in settable(config) and name in vars(config):
            raise unknown_field(config, name, where)
        if isinstance(value, dict) and isinstance(getattr(config, name, None), PreTrainedConfig):
            refuse_ignored(getattr(config, name), value, f"{where}.{name}")


def settable(config: PreTrainedConfig) -> set[str]:
    """Names that a configuration takes: fields, their other names, and properties that can be set."""
    kind = type(config)
    properties = {name for name in dir(kind) if getattr(getattr(kind, name), "fset", None)}
    return {field.name for field in fields(kind)} | set(kind.attribute_map) | properties | {"model_type"}


def unknown_field(config: PreTrainedConfig, name: str, where: str) -> RecipeError:
    shown = sorted(known for known in settable(config) if not known.startswith("_"))
    nearest = difflib.get_close_matches(name, shown, n=1, cutoff=0)[0]
    return RecipeError(f"{where}.{name}: {type(config).__name__} has no such field; the nearest is {nearest!r}")


def training_texts(recipe: Recipe, records) -> Iterator[str]:
    """Captions and keywords, cleaned, for a vocabulary."""
    columns = ["captions", *(recipe.data.extra_text.columns if recipe.data.extra_text else ())]
    for row in records.select_columns(columns):
        for value in row.values():
            texts = [value] if isinstance(value, str) else value or ()
            yield from (clean_clip_text(text) for text in texts if text)


def build_processor(recipe: Recipe, config, records):
    """A saved processor, or a new one with a given or a trained tokenizer; the image size is the model's."""
    chosen, size = recipe.processor, getattr(config.vision_config, "image_size", None)
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}} if size else {}
    sizes |= chosen.image_processor
    saved = chosen.from_pretrained or recipe.model.from_pretrained
    cleaning = {} if chosen.text_cleaning is None else {"text_cleaning": chosen.text_cleaning}
    if saved:
        for name in ("tokenizer", "vocabulary_size"):
            if (value := getattr(chosen, name)) is not None:
                raise RecipeError(
                    f"processor.{name} = {value!r}: the processor saved in {saved} has its own vocabulary; leave it out"
                )
        processor = AutoProcessor.from_pretrained(saved, **sizes)
        if chosen.max_length is not None:
            processor.tokenizer.model_max_length = chosen.max_length
        if cleaning:
            processor = type(processor)(processor.image_processor, processor.tokenizer, **cleaning)
        return processor
    length = chosen.max_length or 77
    if chosen.tokenizer is None:
        entries = chosen.vocabulary_size or 4096
        tokenizer = train_clip_tokenizer(training_texts(recipe, records), entries, length)
    elif chosen.tokenizer.endswith(".gz"):
        tokenizer = clip_tokenizer_from_merges(chosen.tokenizer, max_length=length)
    else:
        tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer, model_max_length=length)
    row = TABLE[config.model_type]
    image_processor = resolve(row.image_processors["torchvision"])(**sizes)
    return resolve(row.processor)(image_processor, tokenizer, **cleaning)


def build_model(recipe: Recipe, config, tokenizer):
    """Float32 weights, saved or random; a new text tower gets the vocabulary of the tokenizer."""
    attention = {"attn_implementation": recipe.training.attention} if recipe.training.attention else {}
    if recipe.model.from_pretrained:
        # half-precision weights would not survive the first step
        source, wanted = recipe.model.from_pretrained, getattr(config.vision_config, "image_size", None)
        stored = getattr(AutoConfig.from_pretrained(source).vision_config, "image_size", None)
        if wanted != stored:
            config.vision_config.image_size = stored
        model = AutoModelForPreTraining.from_pretrained(source, config=config, dtype=torch.float32, **attention)
        if wanted != stored:
            model.resize_image_positions(wanted)
        return model
    config.text_config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    return AutoModelForPreTraining.from_config(config, **attention)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "clip_emoji.yaml")
    parser.add_argument("--output", type=Path, help="run folder; runs/<name of the recipe> if not given")
    parser.add_argument("--resume", help="auto, or the folder of a checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="size, memory and seconds a step; nothing is written")
    options, overrides = parser.parse_known_args()
    recipe = load_recipe(options.config, overrides)
    folder = options.output or Path("runs") / recipe.name
    training = recipe.training

    check_trackers(recipe.trackers)
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision, log_with=recipe.trackers or None, project_dir=folder
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(training.threads or threads_per_process())
    set_seed(training.seed)
    if not options.dry_run:
        refuse_taken_folder(folder, options.resume)

    # ------------------------------------------------------------------------------------------------ data
    with accelerator.main_process_first():
        records = {split: read_split(recipe.data, split) for split in ("train", "validation", "test")}
    config = build_config(recipe)
    processor = build_processor(recipe, config, records["train"])
    transform = TrainingTransform(processor.image_processor, **recipe.data.augmentation)
    caption = first_caption if recipe.data.first_caption else draw_caption
    if recipe.data.extra_text is not None:
        extra = asdict(recipe.data.extra_text)
        caption = caption_with_keywords(*extra.pop("columns"), **extra, caption=caption)
    pairs = ImageTextPairs(
        records["train"],
        transform.prepare,
        seed=training.seed,
        compose=caption,
        cache=recipe.data.cache,
        on_bad_record=recipe.data.on_bad_record,
        progress=accelerator.is_main_process,
    )
    sampler = UniqueImageBatchSampler(pairs.image_ids, training.batch_size, seed=training.seed)
    steps = training.steps or max(1, training.epochs * len(sampler) // training.accumulation)

    def report_skipped(epoch: int) -> None:
        report = pairs.report()
        if report["skipped"]:
            first = "; ".join(report["first_faults"][:1])
            accelerator.print(f"epoch {epoch}: {report['skipped']} of {report['rows']} records skipped. {first}")

    stream = BatchStream(
        pairs,
        sampler,
        PairCollator(processor, transform.augment, seed=training.seed),
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=training.workers,
        seed=training.seed,
        device=accelerator.device,
        channels_last=training.channels_last,
        epoch_ended=report_skipped,
    )

    # ------------------------------------------------------------------------------------------------ model
    model = build_model(recipe, config, processor.tokenizer)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
    if training.compile:
        model.compile()
    optimizer = optimizer_of(model, recipe.optimizer, training.batch_size * training.accumulation)
    scheduler = schedule(optimizer, total_steps=steps, **asdict(recipe.schedule))
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(training.seed, device_specific=True)
    run = {
        "step": choose_step(training.cached_chunk_size, training.accumulation),
        "accumulation": training.accumulation,
        "clip_norm": training.clip_norm,
    }
    if options.dry_run:
        accelerator.print(dry_run(accelerator, model, optimizer, scheduler, stream, **run))
        return

    # ------------------------------------------------------------------------------------------------ training
    held_out = HeldOut(
        recipe, accelerator, model, processor, {split: records[split] for split in ("validation", "test")}
    )
    checkpoints = Checkpoints(
        folder,
        accelerator,
        model,
        optimizer,
        scheduler,
        stream,
        keep=training.keep,
        metric=training.best_metric,
        vocabulary=fingerprint(processor.tokenizer),
    )
    if options.resume:
        accelerator.print(f"resumed from {checkpoints.resume(options.resume)}")
        for change in differences(load_recipe(folder / "recipe.yaml"), recipe):
            accelerator.print(f"the recipe changed: {change}")
    if accelerator.is_main_process:
        recipe.to_yaml(folder / "recipe.yaml")
    accelerator.init_trackers(recipe.name, config=flatten(recipe.to_dict()))
    log = RunLog(accelerator, folder / "metrics.jsonl", steps=steps, start=stream.progress.step)
    train(
        accelerator,
        model,
        optimizer,
        scheduler,
        stream,
        steps=steps,
        log=log,
        log_every=training.log_every,
        evaluate=(lambda: held_out.evaluate(stream)) if held_out.splits else None,
        evaluate_every=training.evaluate_every,
        checkpoints=checkpoints,
        save_every=training.save_every,
        **run,
    )
    log.close()
    if training.final == "best":
        accelerator.print(f"the best checkpoint becomes the model: {checkpoints.best()}")
        checkpoints.load_weights(checkpoints.best())
    if training.final == "best" or not held_out.reports:
        held_out.evaluate(stream)

    # ------------------------------------------------------------------------------------------------ results
    if accelerator.is_main_process:
        with files_into(folder) as partial:
            accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(partial)
            processor.save_pretrained(partial)
        write_text(folder / "results.json", json.dumps(held_out.results(), indent=1, ensure_ascii=False))
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")
        held_out.draw_sheet(folder / "retrieval.png")
        write_card(folder)
    spent = stream.progress
    accelerator.print(
        f"\ntraining {spent.training_seconds:.0f} s, evaluation {spent.evaluation_seconds:.0f} s; "
        f"{folder} holds the model, curves.png, retrieval.png, results.json and README.md. To load it:\n\n"
        "import hf_vlp; from transformers import AutoModel, AutoProcessor\n"
        f'model = AutoModel.from_pretrained("{folder}")\n'
        f'processor = AutoProcessor.from_pretrained("{folder}")'
    )
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, StateError, RecordError) as error:
        raise SystemExit(f"pretrain.py: {error}") from None
