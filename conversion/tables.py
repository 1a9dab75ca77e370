"""Reversible tables of names: the original's state dict <-> ours, as rows instead of code.

A pattern's `{}` is a number (a block index), its `*` the rest of the name; both are carried to the other side. Rows are
linear maps of values (renaming, transposition, cutting), so a table converts gradients and moments as well as weights, in
both directions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch


class ConversionError(ValueError):
    """A checkpoint and a table, or a converted state and a model, that do not fit."""


class Row:
    """One tensor of the original <-> one or more of ours, unchanged in value unless a subclass says so.

    Args:
        original: pattern of the original's name.
        ours: patterns of our names, with the same `{}` and `*` in the same order.
    """

    def __init__(self, original: str, *ours: str):
        self.original = original
        self.ours = ours

    def cut(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The original's tensor -> ours, one for each name."""
        return [value]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensors -> the original's; the inverse of `cut`."""
        return parts[0]


class Rename(Row):
    """The same tensor under another name."""


class Transpose(Row):
    """A matrix [in, out] that the original multiplies from the right; ours is a Linear weight [out, in]."""

    def cut(self, value):
        if value.ndim != 2:
            raise ConversionError(f"a tensor of shape {tuple(value.shape)} is no matrix")
        return [value.t().contiguous()]

    def join(self, parts):
        return parts[0].t().contiguous()


class Split(Row):
    """One tensor of the original that is several of ours laid along `dim`, in equal parts (fused query, key, value)."""

    def __init__(self, original: str, ours: Iterable[str], dim: int = 0):
        super().__init__(original, *ours)
        self.dim = dim

    def cut(self, value):
        if value.shape[self.dim] % len(self.ours):
            raise ConversionError(f"shape {tuple(value.shape)} cannot be cut into {len(self.ours)} equal parts")
        return [
            part.clone() for part in value.chunk(len(self.ours), self.dim)
        ]  # clones: parts that share memory cannot be saved

    def join(self, parts):
        return torch.cat(list(parts), self.dim)


class Cut(Row):
    """One tensor of the original whose first rows are one of ours and the others a second one.

    rows: of the first.
    """

    def __init__(self, original: str, first: str, second: str, rows: int):
        super().__init__(original, first, second)
        self.rows = rows

    def cut(self, value):
        if len(value) <= self.rows:
            raise ConversionError(f"shape {tuple(value.shape)} has no more than {self.rows} rows")
        return [value[: self.rows].clone(), value[self.rows :].clone()]

    def join(self, parts):
        return torch.cat(list(parts))


class Unbatched(Row):
    """A table [1, N, D] that is ours as [N, D]."""

    def cut(self, value):
        if value.ndim != 3 or len(value) != 1:
            raise ConversionError(f"a tensor of shape {tuple(value.shape)} is no table with one leading axis")
        return [value[0].clone()]

    def join(self, parts):
        return parts[0].unsqueeze(0)


class Squeezed(Row):
    """A tensor that has leading axes of size 1 which ours has not.

    axes: how many.
    """

    def __init__(self, original: str, ours: str, axes: int = 1):
        super().__init__(original, ours)
        self.axes = axes

    def cut(self, value):
        if tuple(value.shape[: self.axes]) != (1,) * self.axes:
            raise ConversionError(f"a tensor of shape {tuple(value.shape)} has no {self.axes} leading axes of size 1")
        return [value.reshape(value.shape[self.axes :]).clone()]

    def join(self, parts):
        return parts[0].reshape((1,) * self.axes + tuple(parts[0].shape))


class Drop(Row):
    """An entry of the original that ours does without, and why. Absent after `revert`."""

    def __init__(self, original: str, reason: str):
        super().__init__(original)
        self.reason = reason

    def cut(self, value):
        return []


class Repeat(Drop):
    """An entry of the original that is the same tensor as another one, of which ours is made. `revert` writes it again.

    of: that other name. Neither name has a `{}` or a `*`.
    """

    def __init__(self, original: str, of: str):
        super().__init__(original, f"{of}, stored twice")
        self.of = of


Table = Sequence[Row]


@lru_cache(maxsize=4096)
def _expression(pattern: str) -> re.Pattern:
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)").replace(r"\*", r"(.+)"))


def _fill(pattern: str, fields: Sequence[str]) -> str:
    values = iter(fields)
    return re.sub(r"\{\}|\*", lambda _: next(values), pattern)


def find_row(name: str, table: Table) -> tuple[Row, tuple[str, ...]] | None:
    """The row for a name of the original and our names for it; None if no row fits. The first row that fits counts."""
    for row in table:
        if match := _expression(row.original).fullmatch(name):
            return row, tuple(_fill(pattern, match.groups()) for pattern in row.ours)
    return None


def forward_names(name: str, table: Table) -> list[str]:
    """Our names for one name of the original: several where it is cut, none where it is dropped.

    Raises:
        ConversionError: if no row of the table fits the name.
    """
    found = find_row(name, table)
    if found is None:
        raise ConversionError(f"the table has no row for {name}")
    return list(found[1])


def original_value(name: str, ours: Mapping[str, torch.Tensor | None], table: Table) -> torch.Tensor | None:
    """One value (weight, gradient) in the original's name and layout from values under our names.

    None if any of our parts is None (no gradient) or the original's entry is dropped; of one that repeats another, that one's.

    Raises:
        ConversionError: if no row fits the name or `ours` lacks a part.
    """
    row = find_row(name, table)
    if row is not None and isinstance(row[0], Repeat):
        name = row[0].of
    parts = forward_names(name, table)
    if missing := [part for part in parts if part not in ours]:
        raise ConversionError(f"{name} needs {', '.join(missing)}, absent from ours")
    values = [ours[part] for part in parts]
    return None if not values or any(value is None for value in values) else find_row(name, table)[0].join(values)


def convert(
    state: Mapping[str, torch.Tensor], table: Table, expected: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The original's state dict -> ours. Works on meta tensors too.

    Args:
        state: {name: tensor} of the original.
        table: rows; the first that fits a name counts.
        expected: our model's state dict (meta tensors will do): names and shapes must agree exactly.

    Raises:
        ConversionError: an entry without a row, a row without an entry (Drop aside), two entries for one name, or a
            difference to `expected`; with the names and shapes of both sides.
    """
    result, unknown, used = {}, {}, set()
    for name, tensor in state.items():
        found = find_row(name, table)
        if found is None:
            unknown[name] = tensor
            continue
        row, names = found
        used.add(row)
        try:
            parts = row.cut(tensor)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from None
        for ours, part in zip(names, parts, strict=True):
            if ours in result:
                raise ConversionError(f"{name} and another entry of the checkpoint both become {ours}")
            result[ours] = part
    if expected is None:
        missing = {pattern: None for row in table if row not in used for pattern in row.ours}
    else:
        missing = {name: tensor for name, tensor in expected.items() if name not in result}
        unknown |= {name: tensor for name, tensor in result.items() if name not in expected}
    refuse_difference(unknown, missing, "the checkpoint", "ours")
    if expected is not None:
        refuse_shapes(result, expected)
    return result


def revert(state: Mapping[str, torch.Tensor], table: Table) -> dict[str, torch.Tensor]:
    """Our state dict -> the original's (dropped entries stay absent, repeated ones are written again): the inverse of `convert`.

    Raises:
        ConversionError: an entry of ours without a row, or parts missing for a row.
    """
    result, unknown, missing, taken = {}, {}, {}, set()
    for name, tensor in state.items():
        if name in taken:
            continue
        for row in table:
            fields = next((match.groups() for ours in row.ours if (match := _expression(ours).fullmatch(name))), None)
            if fields is not None:
                break
        else:
            unknown[name] = tensor
            continue
        parts = [_fill(pattern, fields) for pattern in row.ours]
        taken.update(parts)
        missing |= {part: None for part in parts if part not in state}
        if not missing:
            result[_fill(row.original, fields)] = row.join([state[part] for part in parts])
    refuse_difference(unknown, missing, "our model", "the original's layout")
    repeats = {row.original: row.of for row in table if isinstance(row, Repeat)}
    return result | {name: result[of] for name, of in repeats.items() if of in result}


def refuse_difference(unknown: Mapping, missing: Mapping, source: str, target: str) -> None:
    """Raises ConversionError with a two-sided list if either side has names (name -> tensor or None) left over."""
    if unknown or missing:
        raise ConversionError(
            "the names do not fit.\n"
            f"{_listing(f'- in {source} only', unknown)}\n{_listing(f'+ in {target} only', missing)}"
        )


def refuse_shapes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises ConversionError naming every tensor whose shape differs from the expected one."""
    wrong = [name for name in expected if found[name].shape != expected[name].shape]
    if wrong:
        lines = [f"  {name}: {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}" for name in wrong[:20]]
        raise ConversionError("shapes do not fit:\n" + "\n".join(lines) + ("\n  ..." if len(wrong) > 20 else ""))


def told_shape(state: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Size:
    """The shape of a tensor that sizes are told by; raises ConversionError where it is missing or has other dimensions."""
    if name not in state or state[name].ndim != dimensions:
        found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
        raise ConversionError(f"{name} {found}, so the model's sizes cannot be told")
    return state[name].shape


def _listing(title: str, names: Mapping, limit: int = 20) -> str:
    lines = [f"{title} ({len(names)}):"]
    for name, tensor in list(names.items())[:limit]:
        lines.append(f"  {name}" + ("" if tensor is None else f" {tuple(tensor.shape)}"))
    if len(names) > limit:
        lines.append(f"  ... and {len(names) - limit} more")
    return "\n".join(lines)
