"""Trains a model by a recipe, from data to a folder that `AutoModel.from_pretrained` loads.

    CPU      accelerate launch --cpu examples/pretrain.py
    1 GPU    accelerate launch examples/pretrain.py --config examples/configs/clip_rn50.yaml --data.train pairs.jsonl
    N GPUs   accelerate launch --num_processes N examples/pretrain.py --config ... --data.train ...

Without --config: the built-in emoji pictures, a few minutes on two CPU cores. Any recipe key can follow as
`--section.key value`, or `--key value` where only one section has it. `--resume auto` goes on from the last checkpoint
of `--output` (default runs/<recipe>), `--dry-run` prints size, memory and time of a few steps and writes nothing.
"""

import argparse
import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import set_seed
from transformers import AutoProcessor, AutoTokenizer

from hf_vlp.auto import TABLE, resolve
from hf_vlp.data.collate import PairCollator
from hf_vlp.data.pairs import ImageTextPairs, caption_with_keywords, draw_caption, first_caption
from hf_vlp.data.readers import read_records
from hf_vlp.data.record import RecordError
from hf_vlp.data.samplers import UniqueImageBatchSampler
from hf_vlp.export.hub import write_card
from hf_vlp.files import files_into, write_text
from hf_vlp.inputs.caption_augmentation import CaptionAugmentation
from hf_vlp.inputs.grid_augmentation import GridDropping
from hf_vlp.inputs.image_augmentations import TrainingTransform
from hf_vlp.inputs.region_store import RegionStore
from hf_vlp.inputs.regions import RegionDropping
from hf_vlp.inputs.text_cleaning import clean_clip_text
from hf_vlp.inputs.vocabulary import (
    clip_tokenizer_from_merges,
    fingerprint,
    train_clip_tokenizer,
    train_wordpiece_tokenizer,
)
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer, train_word_tokenizer
from hf_vlp.training.building import build_config, build_model, chosen_precision
from hf_vlp.training.loop import dry_run, train
from hf_vlp.training.optim import optimizer_of, schedule
from hf_vlp.training.ramps import FROZEN_STAGES, ramped
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
    """The records of "train", "validation" or "test".

    Raises:
        RecipeError: no such file, or a split that it does not have.
        RecordError: records that cannot be used.
    """
    source = getattr(data, split)
    if source is None:
        return None
    chosen = getattr(data, f"{split}_split")
    needed = ("captions",) if data.regions is not None else ("image", "captions")
    try:
        return read_records(
            located(source), split=chosen, columns=data.columns, image_root=data.image_root, required=needed
        )
    except RecordError:
        raise
    except (ValueError, OSError) as error:
        raise RecipeError(f"data.{split} = {source!r}: {error}") from error


def located(source: str) -> str:
    """A path of a recipe: below the working folder, else below the repository."""
    return str(HERE.parent / source) if not Path(source).exists() and (HERE.parent / source).exists() else source


def training_texts(recipe: Recipe, records) -> Iterator[str]:
    """Captions and keywords for a vocabulary, cleaned where the processor will clean them."""
    columns = ["captions", *(recipe.data.extra_text.columns if recipe.data.extra_text else ())]
    clean = clean_clip_text if recipe.processor.vocabulary in (None, "byte_pairs") else str
    for row in records.select_columns(columns):
        for value in row.values():
            texts = [value] if isinstance(value, str) else value or ()
            yield from (clean(text) for text in texts if text)


def build_tokenizer(recipe: Recipe, records):
    """Given, or trained on the captions and keywords."""
    chosen = recipe.processor
    kind = chosen.vocabulary or "byte_pairs"
    limit = {} if chosen.max_length is None else {"model_max_length": chosen.max_length}
    if chosen.tokenizer is None:
        texts, entries = training_texts(recipe, records), chosen.vocabulary_size or 4096
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


def build_processor(recipe: Recipe, config, records):
    """A saved processor, or a new one with a given or a trained tokenizer; the image size, or the width of regions, is the model's.

    Raises:
        RecipeError: data of another kind than the model sees, or settings that its processor does not have.
    """
    chosen, size = recipe.processor, getattr(config.vision_config, "image_size", None)
    saved = chosen.from_pretrained or recipe.model.from_pretrained
    cleaning = {} if chosen.text_cleaning is None else {"text_cleaning": chosen.text_cleaning}
    row = TABLE[config.model_type]
    if recipe.data.regions is None and config.vision_config is None:
        raise RecipeError(
            "data.regions is required: this model sees regions; name a region store, or give it a vision_config"
        )
    if recipe.data.regions is not None and config.vision_config is not None:
        raise RecipeError(
            f"data.regions = {recipe.data.regions!r}: this model sees pixels (its vision_config is set); leave it out"
        )
    if cleaning and "text_cleaning" not in inspect.signature(resolve(row.processor)).parameters:
        raise RecipeError(
            f"processor.text_cleaning = {chosen.text_cleaning!r}: the processor of {config.model_type} cleans no text; leave it out"
        )
    if (recipe.data.regions is None) == (config.vision_config is None):
        raise RecipeError(
            f"data.regions = {recipe.data.regions!r}: a model with a vision_config sees pixels and takes no regions, one without needs "
            "the path of a region store"
        )
    if recipe.data.regions is not None:
        options = {"region_store": located(recipe.data.regions)}
    else:
        options = ({"size": size} if size else {}) | chosen.image_processor
    if saved:
        for name in ("tokenizer", "vocabulary", "vocabulary_size", "minimum_count"):
            if (value := getattr(chosen, name)) is not None:
                raise RecipeError(
                    f"processor.{name} = {value!r}: the processor saved in {saved} has its own vocabulary; leave it out"
                )
        processor = AutoProcessor.from_pretrained(saved, **options)
        if chosen.max_length is not None:
            processor.tokenizer.model_max_length = chosen.max_length
        if cleaning:
            processor = type(processor)(processor.image_processor, processor.tokenizer, **cleaning)
        return processor
    side = "feature_extractor" if recipe.data.regions is not None else "image_processor"
    name = row.feature_extractor if recipe.data.regions is not None else row.image_processors["torchvision"]
    options |= {"feature_size": config.region_size} if recipe.data.regions is not None else {}
    tokenizer = build_tokenizer(recipe, records)
    if chosen.max_length is None and (positions := getattr(config.text_config, "max_position_embeddings", None)):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return resolve(row.processor)(**{side: resolve(name)(**options)}, tokenizer=tokenizer, **cleaning)


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


def build_collator(recipe: Recipe, processor, model, transform) -> PairCollator:
    """Pictures or regions, texts and grids, each augmented as the recipe says."""
    shares, augment = recipe.data.size_augmentation, None if transform is None else transform.augment
    if shares.regions:
        augment = RegionDropping(shares.regions)
    cells = None
    if shares.grid:
        if not hasattr(model, "count_cells") or transform is None:
            raise RecipeError("data.size_augmentation.grid: this model pools no grid of cells; set it to 0")
        cells = GridDropping(model.count_cells(transform.augment.size, transform.augment.size), shares.grid)
    try:
        texts = CaptionAugmentation(processor.tokenizer, shares.captions) if shares.captions else None
    except ValueError as error:
        raise RecipeError(f"data.size_augmentation.captions = {shares.captions}: {error}") from error
    return PairCollator(processor, augment, seed=recipe.training.seed, augment_text=texts, draw_cells=cells)


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
    training.mixed_precision = chosen_precision(training.mixed_precision, PartialState().device)
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        log_with=recipe.trackers or None,
        project_dir=folder,
        # a tower that is frozen for a while gives no gradient: the wrapper has to look, which costs time
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=FROZEN_STAGES in recipe.ramps)],
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
    regions = open_store(recipe, config)
    transform = TrainingTransform(processor.image_processor, **recipe.data.augmentation) if regions is None else None
    caption = first_caption if recipe.data.first_caption else draw_caption
    if recipe.data.extra_text is not None:
        extra = asdict(recipe.data.extra_text)
        caption = caption_with_keywords(*extra.pop("columns"), **extra, caption=caption)
    pairs = ImageTextPairs(
        records["train"],
        None if transform is None else transform.prepare,
        seed=training.seed,
        compose=caption,
        cache=recipe.data.cache,
        regions=regions,
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

    # ------------------------------------------------------------------------------------------------ model
    model = build_model(recipe, config, processor.tokenizer)
    stream = BatchStream(
        pairs,
        sampler,
        build_collator(recipe, processor, model, transform),
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=training.workers,
        seed=training.seed,
        device=accelerator.device,
        channels_last=training.channels_last,
        epoch_ended=report_skipped,
    )
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
        "step": ramped(
            choose_step(training.cached_chunk_size, training.accumulation),
            recipe.ramps,
            accelerator.unwrap_model(model, keep_torch_compile=False),
            stream,
        ),
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
    sheet = None
    if regions is not None:  # as the recipe names it, not where it lies on this machine
        processor.feature_extractor.region_store = recipe.data.regions
    if accelerator.is_main_process:
        with files_into(folder) as partial:
            accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(partial)
            processor.save_pretrained(partial)
        write_text(folder / "results.json", json.dumps(held_out.results(), indent=1, ensure_ascii=False))
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")
        sheet = held_out.draw_sheet(folder / "retrieval.png")
        write_card(folder)
    spent = stream.progress
    accelerator.print(
        f"\ntraining {spent.training_seconds:.0f} s, evaluation {spent.evaluation_seconds:.0f} s; "
        f"{folder} holds the model, curves.png, {'retrieval.png, ' if sheet else ''}results.json and README.md. To load it:\n\n"
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
