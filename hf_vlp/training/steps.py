"""What one training step does between the batch and the gradients: plainly, or with cached contrastive gradients.

A step takes the batches of one optimizer step (several with accumulation), leaves in `.grad` the gradient of their mean
loss, averaged over processes, and returns the named losses. The loop knows no more than that.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_vlp.distributed import average_gradients, share_buffers

Batch = dict[str, torch.Tensor]
Step = Callable[[Accelerator, nn.Module, list[Batch]], dict[str, torch.Tensor]]


def choose_step(cached_chunk_size: int | None, accumulation: int, contrasts: bool = True) -> Step:
    """The step a recipe asks for; warns where accumulation would quietly mean fewer negatives, of a model that `contrasts` a batch."""
    if accumulation > 1 and contrasts:
        warnings.warn(
            f"training.accumulation = {accumulation}: each accumulated batch is contrasted with itself only, which is "
            "not the loss of one large batch. For that raise training.batch_size and set training.cached_chunk_size.",
            stacklevel=2,
        )
    if cached_chunk_size is None:
        return plain_step
    return functools.partial(cached_contrastive_step, chunk_size=cached_chunk_size)


def plain_step(accelerator: Accelerator, model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Forward and backward of each batch.

    Args:
        model: the prepared model; `model(**batch)` has `.loss` and, where it names its terms, `.losses`.

    Returns:
        Detached float32 scalars of this process, means over the batches: "loss" and every named term.
    """
    totals: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(**batch)
            accelerator.backward(output.loss / len(batches))
        _add(totals, output.loss, output.get("losses"), len(batches))
    return totals


def cached_contrastive_step(
    accelerator: Accelerator, model: nn.Module, batches: list[Batch], *, chunk_size: int
) -> dict[str, torch.Tensor]:
    """The gradient of `plain_step` with activations of only `chunk_size` pairs at a time (GradCache, Gao et al. 2021).

    1. Embed the batch in chunks without a graph. 2. Loss of all embeddings, and its gradient on each of them. 3. Embed
    each chunk again, with the same random state, and push its embeddings' gradient into the towers.
    Batch norm sees chunks instead of the batch, as it sees each process's part in any distributed run.

    Args:
        model: unwrapped, it has `embed(**tensors) -> (image_embeds [B, E], text_embeds [B, E])`
            (the batch without `image_ids`) and
            `objective(image_embeds, text_embeds, image_ids) -> (loss, losses)`; its forward is the one after the other.
    """
    inner = accelerator.unwrap_model(model)
    for verb in ("embed", "objective"):
        if not hasattr(inner, verb):
            raise TypeError(
                f"training.cached_chunk_size needs a two-tower model with `{verb}`, {type(inner).__name__} has none: "
                "set it to null"
            )
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        size = len(next(iter(batch.values())))
        chunks = [
            {key: value[start : start + chunk_size] for key, value in batch.items() if key != "image_ids"}
            for start in range(0, size, chunk_size)
        ]
        # 1. embeddings only
        states, cached = [], []
        with torch.no_grad(), _still_statistics(inner):
            for chunk in chunks:
                states.append(_random_state(accelerator.device))
                with accelerator.autocast():
                    cached.append(inner.embed(**chunk))
        # 2. the loss, and its gradient on the embeddings and on whatever the objective itself learns
        images = torch.cat([pair[0] for pair in cached]).requires_grad_()  # [B, E]
        texts = torch.cat([pair[1] for pair in cached]).requires_grad_()  # [B, E]
        with accelerator.autocast():
            loss, losses = inner.objective(images, texts, batch.get("image_ids"))
        accelerator.backward(loss / len(batches))
        # 3. through the towers, chunk by chunk; a loss scale is already in the embedding gradients
        gradients = zip(images.grad.split(chunk_size), texts.grad.split(chunk_size), strict=True)
        for chunk, state, gradient in zip(chunks, states, gradients, strict=True):
            with _replayed(state, accelerator.device), accelerator.autocast():
                embeddings = inner.embed(**chunk)
            pairs = [(e, g) for e, g in zip(embeddings, gradient, strict=True) if e.requires_grad]
            torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
        _add(totals, loss, losses, len(batches))
    # the towers ran outside the distributed wrapper: nothing has averaged their gradients or shared their statistics
    average_gradients(inner.parameters())
    share_buffers(inner)
    return totals


def _add(totals: dict, loss: torch.Tensor, losses: dict | None, count: int) -> None:
    for name, value in {"loss": loss, **(losses or {})}.items():
        totals[name] = totals.get(name, 0.0) + value.detach().float() / count


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's statistics without adding them to the running ones: the second pass adds them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    """The random state of the first pass; afterwards the one from before, as if there had been one pass."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
