"""Features of pictures and texts by a model that is handed in, over one or more processes.

Every process encodes a part of the examples; features travel with the position of their example and are put in place
by it, so that each example counts exactly once, whatever the number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_vlp.distributed import gather_without_gradient, rank, share_buffers, world_size


def shard(count: int, part: int, parts: int) -> range:
    """The examples of one of `parts` processes: every parts-th, from `part` on."""
    return range(part, count, parts)


def in_place(features: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Sort the gathered rows of all processes by their example.

    Args:
        features: [T, ...], rows in any order, with filling.
        positions: [T] int64, the example of each row, -1 for filling.
        count: number of examples.

    Returns:
        [count, ...].

    Raises:
        RuntimeError: an example was encoded not once but more often or never.
    """
    real = positions >= 0
    seen = torch.bincount(positions[real], minlength=count)
    if len(seen) != count or not bool((seen == 1).all()):
        wrong = [position for position, times in enumerate(seen.tolist()) if times != 1 or position >= count][:5]
        raise RuntimeError(f"of {count} examples, {wrong} (at most five shown) were not encoded exactly once.")
    result = features.new_empty(count, *features.shape[1:])
    result[positions[real]] = features[real]
    return result


def encode(
    count: int,
    prepare: Callable[[Sequence[int]], dict[str, torch.Tensor]],
    forward: Callable[..., Any],
    *,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    order: Sequence[int] | None = None,
    name: str = "examples",
    progress: bool = True,
) -> torch.Tensor:
    """Features of `count` examples.

    Args:
        prepare: positions of a batch -> tensors; runs in a thread beside the model, one batch ahead.
        forward: those tensors by name -> [B, E].
        autocast: type of the model's computation; as the model is if not given.
        order: order of encoding (texts of similar length together), a permutation of the examples.

    Returns:
        [count, E] float32 on the CPU, the same on every process.

    Raises:
        ValueError: there is no example.
    """
    if not count:
        raise ValueError(f"there are no {name} to encode.")
    parts = world_size()
    order = list(range(count)) if order is None else list(order)
    mine = [order[place] for place in shard(count, rank(), parts)]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    context = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    rows, bar = [], tqdm(total=len(mine), desc=name, disable=not progress or rank() != 0, leave=False)
    with torch.no_grad(), context, bar:
        for inputs in ahead(prepare, batches):
            output = forward(**{key: value.to(device, non_blocking=True) for key, value in inputs.items()})
            if not isinstance(output, torch.Tensor):
                # transformers' own models wrap the features, and their forward makes them unit length before comparing
                output = torch.nn.functional.normalize(output.pooler_output.float(), dim=-1)
            rows.append(output.float().cpu())
            bar.update(len(output))
    return from_all_processes(torch.cat(rows) if rows else torch.zeros(0, 0), mine, count, device)


def from_all_processes(rows: torch.Tensor, mine: Sequence[int], count: int, device: torch.device) -> torch.Tensor:
    """The rows of `count` examples, put together from the parts of all processes.

    Args:
        rows: [n, E] float32 on the CPU, of this process; [0, 0] where it has none.
        mine: n positions, of which `shard` gives every process a part.

    Returns:
        [count, E] on the CPU, the same on every process.
    """
    parts = world_size()
    if parts == 1:
        return in_place(rows, torch.tensor(mine), count)
    # every process sends the same number of rows; a process without any learns the width from the others
    most = -(-count // parts)
    width = gather_without_gradient(torch.tensor([rows.shape[1]], device=device)).max()
    sent = torch.zeros(most, int(width), device=device)
    positions = torch.full((most,), -1, device=device)
    if len(rows):
        sent[: len(mine)] = rows.to(device)
        positions[: len(mine)] = torch.tensor(mine, device=device)
    return in_place(gather_without_gradient(sent).cpu(), gather_without_gradient(positions).cpu(), count)


def encode_images(
    model: Any, processor: Any, records: Any, verb: str = "get_image_features", **options
) -> torch.Tensor:
    """Features of the images of records.

    Args:
        processor: one with a `feature_extractor` is handed regions, any other pictures; see `image_inputs`.
        records: rows with `image` or `regions`, e.g. a `datasets.Dataset`.
        verb: method of the model: `get_image_features` (as it is compared) or `encode_image` (as probes take it).
        options: of `encode`.

    Returns:
        [N, E] float32.

    Raises:
        PictureError: a picture does not decode, with its row's position.
        ValueError: as `region_keys`, or an image that the region store lacks.
    """

    def prepare(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return image_inputs(processor, records, rows)

    options = {"name": "images" if takes_regions(processor) else "pictures", **options}
    return encode(len(records), prepare, verb_of(model, verb), **options)


def takes_regions(processor: Any) -> bool:
    """Whether a processor makes an image of regions, with a `feature_extractor`, and not of a picture."""
    return getattr(processor, "feature_extractor", None) is not None


def image_inputs(processor: Any, records: Any, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """What a model is handed for the images of some rows.

    Args:
        processor: `processor(images=...)` gives `pixel_values` [B, 3, H, W] and, where sizes are mixed, `pixel_mask`
            [B, H, W], or [B, 2, ...] of rows of two pictures; where it has a `feature_extractor`, `processor(regions=...)`
            gives `region_features` [B, R, F] and `region_mask` [B, R] from the rows' keys.
        records: rows with `image`, with `images` (two), or with `regions` or `image_id`.
        rows: B positions.

    Raises:
        PictureError, ValueError: as `encode_images`.
    """
    if takes_regions(processor):
        return dict(processor(regions=region_keys(records, rows), return_tensors="pt"))
    pictures = [picture_of(records, row) for row in rows]
    batch = processor(images=pictures, return_tensors="pt")
    return {name: batch[name] for name in ("pixel_values", "pixel_mask") if name in batch}


def text_inputs(processor: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a model is handed for B texts: `input_ids` and `attention_mask` [B, L], as long as the longest."""
    batch = processor(text=list(texts), return_tensors="pt", padding=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def region_keys(records: Any, rows: Sequence[int]) -> list:
    """The rows' `regions`: keys of the processor's store, or regions themselves; `image_id` where that column is absent.

    Raises:
        ValueError: a row has no value there, with its position.
    """
    plain, keys = without_pictures(records), []
    for row in rows:
        record = plain[row]
        column = "regions" if "regions" in record else "image_id"
        if record.get(column) is None:
            raise ValueError(
                f"record {row} names no regions: it has no `{column}`. A model that sees regions needs the column "
                f"`regions`, or `image_id`, filled with the keys of the region store."
            )
        keys.append(record[column])
    return keys


def without_pictures(records: Any) -> Any:
    """The same rows, and reading one decodes no picture."""
    pictures = [name for name in ("image", "images") if name in getattr(records, "column_names", ())]
    return records.remove_columns(pictures) if pictures else records


def encode_texts(model: Any, processor: Any, texts: Sequence[str], **options) -> torch.Tensor:
    """Features of texts, as the model compares them.

    Texts of similar length are encoded together, because a batch is as long as its longest text.

    Args:
        texts: [N] texts.
        options: of `encode`.

    Returns:
        [N, E] float32.
    """

    def prepare(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return text_inputs(processor, [texts[row] for row in rows])

    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    options = {"name": "texts", "order": order, **options}
    return encode(len(texts), prepare, verb_of(model, "get_text_features"), **options)


class PictureError(ValueError):
    """A picture of a record cannot be read; the message has the record's position."""


def picture_of(records: Any, row: int) -> Any:
    """The decoded picture of a row, or the list of its two where it has `images`.

    Raises:
        PictureError: there is none, or not two, or it does not decode, with the row's position.
    """
    try:
        record = records[row]
        column = "image" if "image" in record else "images"
        picture = record.get(column)
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # PIL.UnidentifiedImageError is an OSError
        raise PictureError(
            f"the picture of record {row} cannot be read ({error}). An evaluation leaves nothing out: repair or remove "
            f"the row; `python -m hf_vlp.data.validate` lists all bad ones."
        ) from error
    if picture is None:
        raise PictureError(
            f"record {row} has no picture. A model that sees pictures needs one in the column `image` of every row, and "
            f"one that sees regions a processor with a feature_extractor."
        )
    if column == "images" and len(picture) != 2:
        raise PictureError(f"record {row} has {len(picture)} images where two are read. Repair or remove the row.")
    return picture


def apart(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch, each without its filling: what stands behind the last real entry of its mask.

    Args:
        batch: tensors [B, ...]; `x_mask` [B, n] or [B, H, W] is of the tensors `x_...`, [B, n, ...] and [B, ..., H, W].
    """
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    for mask_name in [name for name in batch if name.endswith("_mask")]:
        family = [name for name in batch if name.startswith(mask_name.removesuffix("mask"))]
        for row in rows:
            real = [int(places.max()) + 1 if len(places) else 0 for places in row[mask_name].nonzero().T]
            kept = tuple(slice(size) for size in real)
            place = kept if len(kept) == 1 else (..., *kept)
            row |= {name: row[name][place].clone() for name in family if row[name].ndim >= len(kept)}
    return rows


def together(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of rows of `apart`, filled up with zeros behind to the longest of it."""
    return {name: filled_up([row[name] for row in rows]) for name in rows[0]}


def filled_up(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, ...] of tensors [...] of mixed sizes, with zeros behind each in every dimension."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    if all(list(tensor.shape) == sizes for tensor in tensors):
        return torch.stack(list(tensors))
    batch = tensors[0].new_zeros(len(tensors), *sizes)
    for row, tensor in zip(batch, tensors):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return batch


def verb_of(model: Any, verb: str) -> Callable[..., Any]:
    """The method of a model, or of the base model below its head.

    Raises:
        TypeError: it has none of that name.
    """
    for owner in (model, getattr(model, "base_model", None)):
        if hasattr(owner, verb):
            return getattr(owner, verb)
    raise TypeError(
        f"{type(model).__name__} has no {verb}: it cannot embed one side alone. Evaluate a model with two towers, or one "
        f"that scores pairs (score_pairs) with evaluate_fusion_retrieval."
    )


@contextmanager
def evaluating(model: torch.nn.Module, accelerator: Any = None) -> Iterator[torch.nn.Module]:
    """The model itself, out of its distributed wrapper and in evaluation mode; every module's mode is restored.

    Entered by all processes: they encode with the buffers of the first, the ones that are saved.
    """
    inner = model if accelerator is None else accelerator.unwrap_model(model)
    share_buffers(inner)
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    try:
        yield inner
    finally:
        # module by module: train() on the whole would unfreeze what a recipe keeps in evaluation mode
        for module, mode in modes:
            module.training = mode


def ahead(prepare: Callable, batches: Sequence[Sequence[int]]) -> Iterator[dict[str, torch.Tensor]]:
    """Prepare each batch while the one before is computed."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(prepare, batch) for batch in batches[:1]]
        for following in (*batches[1:], None):
            ready = coming.pop().result() if coming else None
            if following is not None:
                coming.append(pool.submit(prepare, following))
            if ready is not None:
                yield ready
