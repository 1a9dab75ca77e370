"""Scores of many pairs by a model that reads image and text together; every image is encoded once.

Images are dealt to the processes one by one, so that each pair is scored by one of them. A process encodes some images at
a time, scores all their pairs, those of like length together, and forgets the images. Padding is masked by the model:
scores do not depend on what shares a batch, up to rounding.

Of a model whose texts attend to an image that does not attend to them, each text too is encoded once and kept, in its real
length, and what texts attend to of an image is computed once for all that are read with it.
"""

import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from hf_vlp.distributed import gather_without_gradient, rank, world_size
from hf_vlp.evaluation.encoding import ahead, apart, from_all_processes, shard, text_inputs, together
from hf_vlp.files import whole_file

SAVE_SECONDS = 60.0  # between two writes of a progress file
MEASURED_BATCHES = 3  # after a first one that warms up, before the time is foretold

Prepare = Callable[[Sequence[int]], dict[str, torch.Tensor]]


def require_pair_scorer(model: Any) -> None:
    """Raise TypeError if a model lacks the two verbs of scoring pairs: `encode_image` and `score_pairs`."""
    missing = [verb for verb in ("encode_image", "score_pairs") if not hasattr(model, verb)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no {' and no '.join(missing)}: it scores no pairs. Load the model for "
            f"image-text retrieval, or evaluate a model with two towers with evaluate_retrieval."
        )


class TokenizedTexts:
    """M texts as token ids, each in its real length.

    input_ids: [M, L] int64, 0 behind a text. lengths: [M] int64.

    Raises:
        ValueError: a tokenizer that pads on the left.
    """

    def __init__(self, processor: Any, texts: Sequence[str], chunk: int = 1024):
        rows: list[torch.Tensor] = []
        for start in range(0, len(texts), chunk):
            batch = text_inputs(processor, texts[start : start + chunk])
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            lengths = mask.sum(dim=1)
            if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths[:, None]):
                raise ValueError("the tokenizer pads on the left; pairs are scored with padding on the right.")
            rows += [ids[:length] for ids, length in zip(batch["input_ids"], lengths.tolist())]
        self.lengths = torch.tensor([len(row) for row in rows])
        self.input_ids = pad_sequence(rows, batch_first=True)

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [B, L] of texts `rows` [B], as long as the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {"input_ids": self.input_ids[rows, :longest], "attention_mask": mask}


def score_wanted(
    model: torch.nn.Module,
    prepare: Prepare,
    texts: TokenizedTexts,
    wanted: torch.Tensor,
    *,
    image_batch_size: int,
    pair_batch_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    file: "ProgressFile | None" = None,
    progress: bool = True,
) -> torch.Tensor:
    """Scores of the wanted pairs.

    Args:
        model: `encode_image(**inputs)` -> tensors [B, ...] of B images, with `x_mask` [B, n] where their lengths differ;
            `score_pairs(input_ids=..., attention_mask=..., **rows of those tensors)` -> [B]. With `encode_text` and
            `keys_and_values` as well it is asked as `_image_by_image` does.
        prepare: positions of images -> inputs of `encode_image`; runs in a thread beside the model.
        wanted: [N, M] bool, images x texts.
        image_batch_size, pair_batch_size: images encoded and pairs scored at a time, at most.
        file: what was scored before is taken from it, and what is scored is written to it every minute and at the end,
            also if the run is stopped by an error.
        progress: print the number of pairs, after a few batches the time they will take, and show a bar.

    Returns:
        [N, M] float32 on the CPU, the same on every process; -inf where not wanted.

    Raises:
        ValueError: a score that is not finite, with its pair; or as `ProgressFile.read`.
    """
    scores = torch.full(wanted.shape, torch.nan)  # NaN: not scored yet
    if file is not None:
        file.read(scores, device)
    todo = wanted & scores.isnan()
    remaining = todo.any(dim=1).nonzero()[:, 0].tolist()
    mine = [remaining[place] for place in shard(len(remaining), rank(), world_size())]
    groups = [mine[start : start + image_batch_size] for start in range(0, len(mine), image_batch_size)]
    clock = _Clock(int(todo[mine].sum()), texts, progress and rank() == 0)
    clock.announce(todo, wanted)
    context = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    saved = time.monotonic()
    try:
        with torch.no_grad(), context, clock.bar:
            score = partial(_pair_by_pair, model, texts, pair_batch_size, device)
            if mine and hasattr(model, "keys_and_values") and hasattr(model, "encode_text"):
                columns = todo[mine].any(dim=0).nonzero()[:, 0]
                score = partial(
                    _image_by_image,
                    model,
                    EncodedTexts(model, texts, columns, pair_batch_size, device),
                    pair_batch_size,
                )
            for group, inputs in zip(groups, ahead(prepare, groups)):
                encoded = apart(model.encode_image(**_to(device, inputs)))
                started = time.monotonic()
                for images, columns, found in score(encoded, todo[group]):
                    found = found.float().cpu()
                    images = torch.tensor(group)[images]
                    _refuse_not_finite(found, images, columns)
                    scores[images, columns] = found
                    clock.add(time.monotonic() - started, columns, encoded)
                    started = time.monotonic()
                    if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                        file.write(scores)
                        saved = time.monotonic()
    except BaseException:
        if file is not None:
            file.write(scores)
        raise
    if remaining:
        place = {image: index for index, image in enumerate(remaining)}
        rows = scores[mine] if mine else torch.zeros(0, 0)
        scores[remaining] = from_all_processes(rows, [place[image] for image in mine], len(remaining), device)
    if file is not None:
        file.finish(scores)
    return scores.masked_fill_(~wanted, -torch.inf)


class ProgressFile:
    """Scores of a run that may be stopped and goes on: one .safetensors file, written whole.

    While several processes run, each has one of its own beside it (`<name>.part1.safetensors`, ...), which all must see.
    Pairs are kept as such: a run that wants other pairs of the same images and texts takes those that are there.

    Args:
        path: the file, there or not.
        fingerprint: of all that the scores depend on; see `run_fingerprint`.

    Raises:
        ValueError: another suffix.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str):
        self.path, self.fingerprint = Path(path), fingerprint
        if self.path.suffix != ".safetensors":
            raise ValueError(
                f"scores in progress are written as safetensors: {self.path.name} must end in .safetensors."
            )
        self.own = self.path if rank() == 0 else self.path.with_suffix(f".part{rank()}.safetensors")

    def parts(self) -> list[Path]:
        """The files of the other processes of a run that was stopped."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.part*.safetensors"))

    def read(self, scores: torch.Tensor, device: torch.device) -> None:
        """Put what was scored before into `scores` [N, M], on all processes; `device`: where they exchange tensors.

        Raises:
            ValueError: a file that is no such one, or one of other scores; or processes that see other files.
        """
        for file in [self.path, *self.parts()]:
            if file.is_file():
                self._read(file, scores)
        # nobody writes before all have read
        counts = gather_without_gradient((~scores.isnan()).sum()[None].to(device))
        if len(counts.unique()) > 1:
            raise ValueError(
                f"the processes see different files {self.path}: put it into a folder that all of them see."
            )

    def _read(self, file: Path, scores: torch.Tensor) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as content:
                fingerprint = (content.metadata() or {})["pair_fingerprint"]
                images, packed, values = (content.get_tensor(name) for name in ("images", "packed", "values"))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} holds no scores in progress, or is damaged ({error}). Remove it, or name another file."
            ) from None
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{file} holds scores of another model, of other images or captions, or of another precision. Name another "
                f"file, or remove it to start anew."
            )
        known = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=scores.shape[1])).bool()
        rows = scores[images]
        rows[known] = values
        scores[images] = rows

    def write(self, scores: torch.Tensor) -> None:
        """Write all that this process knows: what of `scores` [N, M] is not NaN."""
        from safetensors.torch import save_file

        known = ~scores.isnan()
        images = known.any(dim=1).nonzero()[:, 0]
        tensors = {
            "images": images,
            "packed": torch.from_numpy(np.packbits(known[images].numpy(), axis=1)),
            "values": scores[known],
        }
        with whole_file(self.own) as partial:
            save_file(tensors, partial, metadata={"pair_fingerprint": self.fingerprint})

    def finish(self, scores: torch.Tensor) -> None:
        """Write everything into the one file, and remove the others; called by all processes."""
        if rank() == 0:
            self.write(scores)
            for part in self.parts():
                part.unlink()


def run_fingerprint(
    model: torch.nn.Module, texts: TokenizedTexts, images: Sequence[Any], sample: dict[str, torch.Tensor], *more: Any
) -> str:
    """Of all that scores depend on: weights, tokens of the texts, names of the images, and an image as the model sees it.

    Args:
        images: names of the images, in their order.
        sample: the inputs of one of them, which tell how pictures are processed.
        more: what else the scores depend on, such as the precision.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([type(model).__name__, list(map(str, images)), list(map(str, more))]).encode())
    tokens = {"input_ids": texts.input_ids, "lengths": texts.lengths}
    for name, value in [*model.state_dict().items(), *tokens.items(), *sample.items()]:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class EncodedTexts:
    """Texts as a model encodes them alone, each once and without padding: S words in all, [S, D] on `device`.

    Args:
        model: `encode_text(input_ids=..., attention_mask=...)` -> `text_embeds` [B, L, D].
        columns: which of the texts. batch_size: texts encoded at a time, those of like length.
    """

    def __init__(self, model: Any, texts: TokenizedTexts, columns: torch.Tensor, batch_size: int, device: torch.device):
        self.lengths, self.device = texts.lengths, device
        order = columns[texts.lengths[columns].argsort(descending=True, stable=True)]
        self.starts = torch.zeros_like(texts.lengths)
        self.starts[order] = texts.lengths[order].cumsum(dim=0) - texts.lengths[order]
        self.states = torch.empty(0)
        filled = 0
        for rows in order.split(batch_size):
            batch = _to(device, texts.batch(rows))
            words = model.encode_text(**batch)["text_embeds"][batch["attention_mask"].bool()]
            if not filled:
                self.states = words.new_empty(int(texts.lengths[order].sum()), words.shape[1])
            self.states[filled : filled + len(words)] = words
            filled += len(words)

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """`text_embeds` [B, L, D] and `attention_mask` [B, L] of texts `rows` [B]; a text's last word stands at its padding."""
        lengths = self.lengths[rows][:, None]
        place = torch.arange(int(lengths.max()))
        words = self.starts[rows][:, None] + place.minimum(lengths - 1)
        mask = (place < lengths).long()
        return {"text_embeds": self.states[words.to(self.device)], "attention_mask": mask.to(self.device)}


def _image_by_image(
    model: Any, texts: EncodedTexts, size: int, encoded: list[dict[str, torch.Tensor]], todo: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Image, text and score [B] of the pairs of `todo` [G, M]: an image at a time with up to `size` of its texts.

    The model gives `keys_and_values(**one encoded image)`, and `score_pairs(text_embeds=..., attention_mask=..., key_values=...)` -> [B].
    """
    for image, wanted in enumerate(todo):
        columns = wanted.nonzero()[:, 0]
        columns = columns[texts.lengths[columns].argsort(descending=True, stable=True)]
        key_values = model.keys_and_values(**together([encoded[image]]))
        for batch in columns.split(size):
            yield torch.full_like(batch, image), batch, model.score_pairs(**texts.batch(batch), key_values=key_values)


def _pair_by_pair(
    model: Any,
    texts: TokenizedTexts,
    size: int,
    device: torch.device,
    encoded: list[dict[str, torch.Tensor]],
    todo: torch.Tensor,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Image, text and score [B] of the pairs of `todo` [G, M], each text beside an image of its own."""
    for images, columns in _batches(encoded, texts, todo, size):
        used, place = images.unique(return_inverse=True)
        rows = together([encoded[image] for image in used.tolist()])
        rows = {name: value[place.to(device)] for name, value in rows.items()}
        yield images, columns, model.score_pairs(**_to(device, texts.batch(columns)), **rows)


def _batches(
    encoded: list[dict[str, torch.Tensor]], texts: TokenizedTexts, todo: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of `todo` [G, M] as image and text [B], the longest first: what is too much for the memory fails at once."""
    images, columns = todo.nonzero().unbind(dim=1)
    image_lengths = torch.tensor([_length(row) for row in encoded])
    order = (image_lengths[images] * (1 + int(texts.lengths.max())) + texts.lengths[columns]).argsort(
        descending=True, stable=True
    )
    yield from zip(images[order].split(size), columns[order].split(size))


def _length(row: dict[str, torch.Tensor]) -> int:
    return max((len(value) for value in row.values() if value.ndim), default=1)


def _to(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}


def _refuse_not_finite(found: torch.Tensor, images: torch.Tensor, columns: torch.Tensor) -> None:
    wrong = (~found.isfinite()).nonzero()[:, 0]
    if len(wrong):
        image, text = int(images[wrong[0]]), int(columns[wrong[0]])
        raise ValueError(
            f"the score of image {image} with caption {text} is {found[wrong[0]]:g}, as are {len(wrong)} of a batch of "
            f"{len(found)}. Look for such weights, or compute in another precision."
        )


class _Clock:
    """Tells how many pairs there are and, after a few batches, how long they take; a bar of the pairs.

    The work of a pair is counted in tokens, words and image together, because the longest pairs come first.
    """

    def __init__(self, pairs: int, texts: TokenizedTexts, shown: bool):
        self.pairs, self.lengths, self.shown = pairs, texts.lengths, shown
        self.bar = tqdm(total=pairs, desc="pairs", unit="pair", unit_scale=True, disable=not shown, leave=False)
        self.batches, self.measured, self.seconds, self.tokens = 0, 0, 0.0, 0.0

    def announce(self, todo: torch.Tensor, wanted: torch.Tensor) -> None:
        if not self.shown:
            return
        count, whole = int(todo.sum()), int(wanted.sum())
        text = f"{count:,} pairs of {wanted.shape[0]:,} images and {wanted.shape[1]:,} captions to score"
        if count < whole:
            text += f", {whole - count:,} more are there already"
        processes = world_size()
        tqdm.write(text + (f"; {self.pairs:,} on each of {processes} processes" if processes > 1 else ""))

    def add(self, seconds: float, columns: torch.Tensor, encoded: list[dict[str, torch.Tensor]]) -> None:
        self.bar.update(len(columns))
        self.batches += 1
        if not self.shown or not 1 < self.batches <= 1 + MEASURED_BATCHES:
            return
        image_tokens = sum(map(_length, encoded)) / len(encoded)
        self.seconds += seconds
        self.tokens += len(columns) * image_tokens + float(self.lengths[columns].sum())
        if self.batches == 1 + MEASURED_BATCHES:
            of_a_pair = image_tokens + float(self.lengths.double().mean())
            whole = self.pairs * of_a_pair * self.seconds / self.tokens
            tqdm.write(f"about {duration(whole)}, {self.pairs / whole:,.0f} pairs a second on each process")


def duration(seconds: float) -> str:
    """In words, e.g. "2 h 5 min", "5 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"
