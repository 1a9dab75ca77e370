"""How the benchmark measures: contenders in turns, the machine's matmul ceiling beside them, memory in fresh processes.

Machines drift, so contenders of a row run A B C A B C ..., a ratio is the median over the rounds of the ratio inside one
round, and the ceiling is a large matmul of the same dtype in the same rounds. Knows no architecture.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BASE = "plain"  # name of the contender that ratios refer to
Record = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """What a run measures with.

    batch: samples B of a call. repeat: rounds of each row. device: "cpu" or "cuda". dtypes: torch.float32, or the dtype
    of autocast. small: tiny models, to see that everything runs.
    """

    batch: int = 16
    repeat: int = 5
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    small: bool = False

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Laps:
    """Seconds of the named phases of one call: each `lap(name)` ends a phase."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        synchronize()
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


@dataclass(frozen=True)
class Contender:
    """One way to the result of a row.

    run: does the work once, ending its phases with `lap(name)` if it has several. result: what must equal the plain
    formulation's, `run`'s return value if None. flops: of the plain formulation for the input this contender gets.
    tolerance: largest |difference| / max(1, largest |value|).
    """

    run: Callable[[Laps], torch.Tensor | None]
    result: Callable[[], torch.Tensor] | None = None
    flops: float | None = None
    tolerance: float = 1e-4


@dataclass(frozen=True)
class TimedRow:
    """Contenders for the same result.

    samples: of one call, called `unit`. autocast: measured once per dtype. train: with gradients. parts: name -> phases that are also reported by themselves.
    """

    title: str
    unit: str
    samples: int
    contenders: dict[str, Contender]
    autocast: bool = True
    train: bool = False
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def measure(self, settings: Settings) -> list[Record]:
        """One record per contender, dtype and part.

        Raises:
            AssertionError: a contender's result differs from the plain formulation's.
        """
        self.check()
        records = []
        for dtype in settings.dtypes if self.autocast else (None,):
            rounds = self._rounds(settings, dtype)
            records += self._records(self.title, dtype, rounds, None)
            for part, phases in self.parts.items():
                records += self._records(f"{self.title}: {part}", dtype, rounds, phases)
        return records

    @torch.no_grad()
    def _difference(self, name: str, expected: torch.Tensor) -> float:
        contender = self.contenders[name]
        with torch.enable_grad() if self.train else torch.inference_mode():
            found = contender.result() if contender.result else contender.run(Laps(lambda: None))
        found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
        if found.shape != expected.shape:
            raise AssertionError(f"{self.title}: {name} gives {tuple(found.shape)}, plain {tuple(expected.shape)}")
        return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))

    def check(self) -> None:
        """Every contender gives the plain formulation's numbers in float32, or there is nothing to compare."""
        plain = self.contenders[BASE]
        with torch.enable_grad() if self.train else torch.inference_mode():
            expected = (plain.result() if plain.result else plain.run(Laps(lambda: None))).detach().clone()
        for name, contender in self.contenders.items():
            difference = self._difference(name, expected)
            if not difference <= contender.tolerance:
                raise AssertionError(
                    f"{self.title}: {name} differs from the plain formulation by {difference:.2e}, "
                    f"more than {contender.tolerance:.0e}"
                )

    def _rounds(self, settings: Settings, dtype: torch.dtype | None) -> list[dict[str, dict[str, float]]]:
        """Per round, contender (and "ceiling") -> seconds of its phases; a first round warms up and is not kept."""
        runs = {name: contender.run for name, contender in self.contenders.items()}
        if dtype is not None:
            runs["ceiling"] = matmul(settings, dtype)
        rounds = []
        for _ in range(settings.repeat + 1):
            seconds = {}
            for name, run in runs.items():
                with ExitStack() as stack:
                    if not self.train:
                        stack.enter_context(torch.inference_mode())
                    if dtype not in (None, torch.float32):
                        stack.enter_context(torch.autocast(settings.device, dtype=dtype))
                    lap = Laps(settings.synchronize)
                    run(lap)
                    lap("rest")
                seconds[name] = lap.seconds
            rounds.append(seconds)
        return rounds[1:]

    def _records(self, title: str, dtype, rounds, phases: tuple[str, ...] | None) -> list[Record]:
        def spent(laps: dict[str, float]) -> float:
            return sum(laps.values()) if phases is None else sum(laps[phase] for phase in phases)

        records = []
        ceiling = None
        if dtype is not None:
            ceiling = statistics.median(matmul_flops(one["ceiling"]["flops"]) / one["ceiling"]["matmul"] for one in rounds)
        for name, contender in self.contenders.items():
            seconds = [spent(one[name]) for one in rounds]
            median = statistics.median(seconds)
            laps = {phase: statistics.median(one[name][phase] for one in rounds) for phase in rounds[0][name]}
            laps.pop("rest", None)
            records.append(
                {
                    "row": title,
                    "dtype": str(dtype).removeprefix("torch.") if dtype else "",
                    "contender": name,
                    "unit": self.unit,
                    "samples_per_second": self.samples / median,
                    "ms": 1e3 * median,
                    "ms_lowest": 1e3 * min(seconds),
                    "ms_highest": 1e3 * max(seconds),
                    "mfu": contender.flops / median / ceiling if contender.flops and ceiling else None,
                    "ceiling_gflops": ceiling / 1e9 if ceiling else None,
                    "ratio": statistics.median(spent(one[BASE]) / spent(one[name]) for one in rounds),
                    "phases_ms": {phase: 1e3 * value for phase, value in laps.items()} if phases is None else {},
                }
            )
        return records


def matmul_flops(value: float) -> float:
    return value
