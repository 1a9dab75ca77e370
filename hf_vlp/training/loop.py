"""The training loop: fetch, forward, backward, clip, step, schedule, log, evaluate, save.

It knows no architecture. What a run needs beyond these verbs comes in as a model, a stream, a step function or a log.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from hf_vlp.training.meter import Meter
from hf_vlp.training.optim import training_mode
from hf_vlp.training.report import RunLog, parameter_table, peak_memory
from hf_vlp.training.state import Checkpoints, Progress
from hf_vlp.training.steps import Step, plain_step
from hf_vlp.training.stream import BatchStream


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stream: BatchStream,
    *,
    steps: int,
    step: Step = plain_step,
    accumulation: int = 1,
    clip_norm: float | None = None,
    log: RunLog,
    log_every: int = 10,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
) -> dict[str, float] | None:
    """Trains until `stream.progress.step == steps`.

    Args:
        model, optimizer: as `accelerator.prepare` returned them; `scheduler` is not prepared and stepped once a step. A model that has
            `before_step` or `after_step` is told of every step.
        stream: endless batches, and the progress of the run, which is brought forward here.
        evaluate: returns metrics; called by all processes before step 0, every `evaluate_every` steps and at the end.
        checkpoints: saved every `save_every` steps, whenever an evaluation is the best so far, and at the end.

    Returns:
        The metrics of the last evaluation.

    Raises:
        NonFiniteLoss (hf_vlp.training.meter): checkpoints of earlier steps stay as they are.
    """
    inner, progress = accelerator.unwrap_model(model), stream.progress
    before_step, after_step = (getattr(inner, name, lambda: None) for name in ("before_step", "after_step"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    meter = Meter(accelerator, inner, getattr(stream.sampler, "batch_size", None))
    metrics = None

    def evaluated() -> dict[str, float] | None:
        if evaluate is None:
            return None
        with log.paused(), _timed(progress, "evaluation_seconds"):
            found = evaluate()
        log.evaluation(progress.step, found)
        training_mode(model)
        return found

    if progress.step == 0:
        metrics = evaluated()
    training_mode(model)
    batches = iter(stream)
    optimizer.zero_grad()
    while progress.step < steps:
        with _timed(progress, "training_seconds"):
            fetched = [next(batches) for _ in range(accumulation)]
            before_step()
            losses = step(accelerator, model, fetched)
            norm = accelerator.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            after_step()
            progress.step += 1
            meter.add(progress.step, losses, norm, rate)
            done = progress.step == steps
            save_now = done or _due(progress.step, save_every)
            evaluate_now = done or _due(progress.step, evaluate_every)
            if save_now or evaluate_now or _due(progress.step, log_every):
                log.steps(meter.read(), progress)
        if evaluate_now:
            metrics = evaluated()
        if checkpoints is not None and (save_now or (evaluate_now and checkpoints.improves(metrics))):
            checkpoints.save(metrics if evaluate_now else None)
    return metrics


def dry_run(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stream: BatchStream,
    *,
    steps: int = 5,
    **options,
) -> str:
    """Parameters of every part, peak memory and seconds a step over `steps` real ones; nothing is written.

    `options`: of `train`. The first step, which allocates and compiles, is told apart.
    """
    log = RunLog(accelerator, None, steps=steps + 1)
    seconds = []
    for last in (1, steps + 1):
        train(accelerator, model, optimizer, scheduler, stream, steps=last, log=log, **options)
        seconds.append(stream.progress.training_seconds)
    log.close()
    pairs = getattr(stream.sampler, "batch_size", 0) * options.get("accumulation", 1)
    each = (seconds[1] - seconds[0]) / steps
    return "\n".join(
        (
            parameter_table(accelerator.unwrap_model(model)),
            f"peak memory      {peak_memory(accelerator.device) / 2**30:.2f} GiB a process",
            f"seconds a step   {each:.3f} ({pairs / each:,.0f} pairs/s on {accelerator.num_processes} processes); "
            f"the first {seconds[0]:.2f}",
        )
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextmanager
def _timed(progress: Progress, name: str):
    start = time.perf_counter()
    yield
    setattr(progress, name, getattr(progress, name) + time.perf_counter() - start)
