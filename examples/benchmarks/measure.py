"""How the benchmark measures: contenders in turns, the machine's matmul ceiling beside them, memory in fresh processes.

Machines drift, so the contenders of a row run A B C A B C ...; a ratio is the median over the rounds of the ratio within one
round, and the ceiling is a large matmul of the same dtype in the same rounds. Knows no architecture.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BASE = "plain"  # the contender that ratios refer to
CEILING = "matmul ceiling"


@dataclass(frozen=True)
class Settings:
    """What a run measures with.

    batch: samples B of a call. repeat: rounds of a row. device: "cpu" or "cuda". dtypes: torch.float32, or the dtype of autocast.
    small: tiny models and inputs, to see that everything runs.
    """

    batch: int = 16
    repeat: int = 5
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    small: bool = False


class Call:
    """What one call of a contender is given: its precision, and a stopwatch for its phases.

    dtype: torch.float32, or the dtype of autocast; None where precision plays no part.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype | None = None):
        self.device, self.dtype = device, dtype
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase that began with the call or with the phase before."""
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now

    def autocast(self) -> AbstractContextManager:
        if self.dtype in (None, torch.float32):
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Contender:
    """One way to the result of a row.

    run: does the work once. result: what must equal the plain formulation's; None: what `run` returns. flops: of the plain
    formulation for this contender's input. tolerance: largest |difference| / max(1, largest |value|); None: results are not compared.
    """

    run: Callable[[Call], torch.Tensor | None]
    result: Callable[[], torch.Tensor] | None = None
    flops: float | None = None
    tolerance: float | None = 1e-4


@dataclass(frozen=True)
class TimedRow:
    """Contenders for the same result, one of them BASE.

    samples: of one call, counted in `unit`. by_dtype: measured once per dtype, with the ceiling. train: runs with gradients.
    parts: name -> phases whose sum is reported as a row of its own.
    """

    title: str
    unit: str
    samples: int
    contenders: dict[str, Contender]
    by_dtype: bool = True
    train: bool = False
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def measure(self, settings: Settings) -> list[dict]:
        """One record per contender, dtype and part.

        Raises:
            AssertionError: a contender's result is not the plain formulation's.
        """
        self.check()
        records = []
        for dtype in settings.dtypes if self.by_dtype else (None,):
            rounds = self._rounds(settings, dtype)
            for part, phases in {"": None, **self.parts}.items():
                records += self._records(part, phases, settings, dtype, rounds)
        return records

    def check(self) -> None:
        """In float32 every contender gives the plain formulation's numbers, or there is nothing to compare."""
        expected = self._result(self.contenders[BASE])
        for name, contender in self.contenders.items():
            if contender.tolerance is None or name == BASE:
                continue
            found = self._result(contender)
            if found.shape != expected.shape:
                raise AssertionError(f"{self.title}: {name} gives {tuple(found.shape)}, plain {tuple(expected.shape)}")
            difference = float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
            if not difference <= contender.tolerance:
                raise AssertionError(
                    f"{self.title}: {name} differs from the plain formulation by {difference:.1e}, "
                    f"more than {contender.tolerance:.0e}"
                )

    def _result(self, contender: Contender) -> torch.Tensor:
        with torch.enable_grad() if self.train else torch.inference_mode():
            result = contender.run(Call()) if contender.result is None else contender.result()
        return result.detach().double().cpu()

    def _rounds(self, settings: Settings, dtype: torch.dtype | None) -> list[dict[str, dict[str, float]]]:
        """For each round: contender or CEILING -> phase -> seconds. A round before the first warms up."""
        runs = {name: contender.run for name, contender in self.contenders.items()}
        if dtype is not None:
            runs[CEILING] = matmul(settings, dtype)
        rounds = []
        for _ in range(1 + settings.repeat):
            rounds.append({})
            for name, run in runs.items():
                with torch.enable_grad() if self.train else torch.inference_mode():
                    call = Call(settings.device, dtype)
                    run(call)
                    call.lap("rest")
                rounds[-1][name] = call.seconds
        return rounds[1:]

    def _records(self, part, phases, settings, dtype, rounds) -> list[dict]:
        def seconds(name: str, phases: tuple[str, ...] | None = phases) -> list[float]:
            return [sum(one[name][phase] for phase in phases or one[name]) for one in rounds]

        ceiling = None
        if dtype is not None:
            ceiling = matmul_flops(settings) / statistics.median(seconds(CEILING, None))
        records = []
        for name, contender in self.contenders.items():
            spent = seconds(name)
            median = statistics.median(spent)
            ratios = [base / own for base, own in zip(seconds(BASE), spent, strict=True)]
            every = {phase: statistics.median(one[name][phase] for one in rounds) for phase in rounds[0][name]}
            records.append(
                {
                    "row": f"{self.title}, {part}" if part else self.title,
                    "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
                    "contender": name,
                    "unit": f"{self.unit}/s",
                    "value": self.samples / median,
                    "ms": 1e3 * median,
                    "ms_range": [1e3 * min(spent), 1e3 * max(spent)],
                    "mfu": contender.flops / median / ceiling if contender.flops and ceiling else None,
                    "ceiling_gflops": None if ceiling is None else ceiling / 1e9,
                    "ratio": statistics.median(ratios),
                    "phases_ms": {}
                    if phases or len(every) == 1
                    else {key: 1e3 * every[key] for key in every if key != "rest"},
                }
            )
        return records


def matmul_side(settings: Settings) -> int:
    return 128 if settings.small else 2048 if settings.device == "cpu" else 8192


def matmul_flops(settings: Settings) -> float:
    return 2.0 * matmul_side(settings) ** 3


def matmul(settings: Settings, dtype: torch.dtype) -> Callable[[Call], None]:
    """Two square matrices multiplied: what the machine can do at best with this dtype and these threads."""
    side = matmul_side(settings)
    left, right = torch.randn(2, side, side, device=settings.device, dtype=dtype).unbind()
    result = torch.empty_like(left)
    return lambda call: torch.mm(left, right, out=result)


def count_flops(work: Callable[[], object]) -> float:
    """Operations in the matmuls and convolutions of `work`, forward and backward; on meta tensors it costs nothing.

    Attention is counted as its two matmuls each way, not as what a fused kernel computes twice.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of two training steps, each contender in a process of its own.

    contenders: names that the architecture's `step_alone` knows.
    """

    title: str
    architecture: str
    batch: int
    contenders: tuple[str, ...]

    def measure(self, settings: Settings) -> list[dict]:
        """One record per contender and dtype; resident memory of the whole process, or on CUDA what its tensors took."""
        records = []
        for dtype in settings.dtypes[-1:] if settings.small else settings.dtypes:  # a process takes seconds to start
            short = str(dtype).removeprefix("torch.")
            bytes_of = {name: self._peak(settings, short, name) for name in self.contenders}
            for name, peak in bytes_of.items():
                records.append(
                    {
                        "row": self.title,
                        "dtype": short,
                        "contender": name,
                        "unit": "GB",
                        "value": peak / 1e9,
                        "ratio": bytes_of[BASE] / peak,
                    }
                )
        return records

    def _peak(self, settings: Settings, dtype: str, name: str) -> int:
        script = Path(__file__).parent.parent / "benchmark.py"
        command = [sys.executable, str(script), self.architecture, "--peak", name]
        command += ["--batch", str(self.batch), "--device", settings.device, "--dtype", dtype]
        command += ["--threads", str(torch.get_num_threads()), *(["--small"] if settings.small else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.title}, {name}: the process failed\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def peak_bytes(device: str) -> int:
    """The most memory this process has held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
