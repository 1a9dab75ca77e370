"""What every evaluation finds: numbers, what they are of, and how they are shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Report:
    """What an evaluation found; a subclass says which numbers, and may hold what they were made from.

    metrics: name -> number, in percent unless a subclass says otherwise; `<kind>/<name>` is the one of a kind of sample.
    counts: name -> how many there were of what was measured. protocol: in words, what was measured.
    """

    metrics: dict[str, float]
    counts: dict[str, float]
    protocol: str

    def table(self) -> str:
        """The metrics as an aligned plain-text table: a row for each kind of sample."""
        return table_of(self.metrics, self.protocol)

    def to_dict(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        return {"metrics": dict(self.metrics), "counts": dict(self.counts), "protocol": self.protocol}


def table_of(metrics: Mapping[str, float], protocol: str) -> str:
    """Metrics in percent, `<name>` and `<kind>/<name>`, as an aligned plain-text table with a row for each kind; the protocol is below."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        row, _, column = name.rpartition("/")
        rows.setdefault(row or "all", {})[column] = value
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [f"{'':<16}" + "".join(f"{column:>14}" for column in columns)] if columns else []
    for row, cells in rows.items():
        values = (f"{cells[column]:>12.1f} %" if column in cells else f"{'':>14}" for column in columns)
        lines.append(f"{row:<16}{''.join(values)}".rstrip())
    return "\n".join([*lines, protocol])
