"""A run, from its command line to its folder: what pre-training and fine-tuning have in common."""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from torch import nn

from hf_vlp.auto import OWN_AUTO_CLASSES
from hf_vlp.export.hub import write_card
from hf_vlp.files import files_into, write_text
from hf_vlp.momentum.queue import FeatureQueue
from hf_vlp.training.building import chosen_precision
from hf_vlp.training.loop import dry_run, train
from hf_vlp.training.optim import optimizer_of, schedule
from hf_vlp.training.ramps import FROZEN_STAGES, ramped
from hf_vlp.training.recipe import Recipe, differences, flatten, load_recipe
from hf_vlp.training.report import RunLog, check_trackers, draw_curves
from hf_vlp.training.results import HeldOut
from hf_vlp.training.state import Checkpoints, refuse_taken_folder
from hf_vlp.training.steps import choose_step
from hf_vlp.training.stream import BatchStream


@dataclass
class Run:
    """A recipe, the folder it writes and the processes it runs on."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator = field(repr=False)
    resume: str | None = None
    dry: bool = False


def read_command(description: str, config: Path | None) -> tuple[argparse.Namespace, Recipe]:
    """The options of a script and its recipe; `config` is the recipe's file if the command names none."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=config, required=config is None)
    parser.add_argument("--output", type=Path, help="run folder; runs/<name of the recipe> if not given")
    parser.add_argument("--resume", help="auto, or the folder of a checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="size, memory and seconds a step; nothing is written")
    options, overrides = parser.parse_known_args()
    return options, load_recipe(options.config, overrides)


def start(options: argparse.Namespace, recipe: Recipe) -> Run:
    """Processes, precision, threads and seed of a run.

    Raises:
        StateError: its folder holds a run already.
    """
    folder, training = options.output or Path("runs") / recipe.name, recipe.training
    check_trackers(recipe.trackers)
    # of all processes: without the flag of `accelerate launch --cpu`, those of a CPU would each be alone
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    training.mixed_precision = chosen_precision(training.mixed_precision, state.device)
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
    return Run(recipe, folder, accelerator, options.resume, options.dry_run)


def threads_per_process() -> int:
    """This machine's cores, shared by the processes on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def leave_queues_alone(accelerator: Accelerator, model: nn.Module) -> None:
    """Of a model with a queue of features, which every process writes alike, no buffer is sent to the other processes in each forward."""
    if any(isinstance(part, FeatureQueue) for part in model.modules()):
        accelerator.ddp_handler.broadcast_buffers = False


def open_stream(run: Run, dataset, sampler, collate) -> BatchStream:
    """The batches of a run; what was skipped is told at the end of each epoch."""
    accelerator, training = run.accelerator, run.recipe.training

    def report_skipped(epoch: int) -> None:
        report = dataset.report()
        if report["skipped"]:
            first = "; ".join(report["first_faults"][:1])
            accelerator.print(f"epoch {epoch}: {report['skipped']} of {report['rows']} records skipped. {first}")

    return BatchStream(
        dataset,
        sampler,
        collate,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=training.workers,
        seed=training.seed,
        device=accelerator.device,
        channels_last=training.channels_last,
        epoch_ended=report_skipped,
    )


def train_and_save(
    run: Run,
    model,
    processor,
    stream: BatchStream,
    held_out: HeldOut,
    vocabulary: str,
    load_with: str,
    store: str | None = None,
) -> None:
    """Trains `model`, evaluates it as it goes, and leaves the run folder.

    Args:
        held_out: the splits not trained on; its model is the prepared one afterwards.
        vocabulary: of texts and answers, by which a checkpoint knows whether it may go on.
        load_with: name of the Auto class that loads the folder.
        store: name of the region store that the saved processor opens.
    """
    recipe, folder, accelerator, training = run.recipe, run.folder, run.accelerator, run.recipe.training
    steps = training.steps or max(1, training.epochs * len(stream.sampler) // training.accumulation)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
    if training.compile:
        model.compile()
    leave_queues_alone(accelerator, model)
    optimizer = optimizer_of(model, recipe.optimizer, training.batch_size * training.accumulation)
    epoch_steps = len(stream.sampler) / training.accumulation
    scheduler = schedule(optimizer, total_steps=steps, **recipe.schedule.numbers(steps, epoch_steps))
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(training.seed, device_specific=True)
    inner = accelerator.unwrap_model(model, keep_torch_compile=False)
    step = choose_step(training.cached_chunk_size, training.accumulation, contrasts=hasattr(inner, "objective"))
    how: dict[str, Any] = {
        "step": ramped(step, recipe.ramps, inner, stream),
        "accumulation": training.accumulation,
        "clip_norm": training.clip_norm,
    }
    if run.dry:
        accelerator.print(dry_run(accelerator, model, optimizer, scheduler, stream, **how))
        return

    # ------------------------------------------------------------------------------------------------ training
    held_out.model = model
    checkpoints = Checkpoints(
        folder,
        accelerator,
        model,
        optimizer,
        scheduler,
        stream,
        keep=training.keep,
        metric=training.best_metric or held_out.best_metric,
        vocabulary=vocabulary,
    )
    if run.resume:
        accelerator.print(f"resumed from {checkpoints.resume(run.resume)}")
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
        **how,
    )
    log.close()
    if training.final == "best":
        accelerator.print(f"the best checkpoint becomes the model: {checkpoints.best()}")
        checkpoints.load_weights(checkpoints.best())
    if training.final == "best" or not held_out.reports:
        held_out.evaluate(stream)

    # ------------------------------------------------------------------------------------------------ results
    sheet = None
    if store is not None:  # as the recipe names it, not where it lies on this machine
        processor.feature_extractor.region_store = store
    if accelerator.is_main_process:
        with files_into(folder) as partial:
            inner.save_pretrained(partial)
            processor.save_pretrained(partial)
        write_text(folder / "results.json", json.dumps(held_out.results(), indent=1, ensure_ascii=False))
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")
        sheet = held_out.draw_sheet(folder / "retrieval.png")
        write_card(folder)
    spent = stream.progress
    own = load_with in OWN_AUTO_CLASSES
    accelerator.print(
        f"\ntraining {spent.training_seconds:.0f} s, evaluation {spent.evaluation_seconds:.0f} s; "
        f"{folder} holds the model, curves.png, {'retrieval.png, ' if sheet else ''}results.json and README.md. To load it:\n\n"
        f"{f'from hf_vlp import {load_with}' if own else 'import hf_vlp'}; "
        f"from transformers import {'' if own else f'{load_with}, '}AutoProcessor\n"
        f'model = {load_with}.from_pretrained("{folder}")\n'
        f'processor = AutoProcessor.from_pretrained("{folder}")'
    )
    accelerator.end_training()
