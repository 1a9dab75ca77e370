"""What every architecture's parity run shares: reading a case folder, comparing, and accounting for all it holds.

A case folder holds some of config.json, inputs.safetensors, outputs.safetensors, grads.json, weight files and other
files. A kind's procedure compares what ours computes with what is stored; each stored tensor, gradient and JSON entry,
and each file, must end up compared, read as an input, or on the kind's list of what is no output, with a reason.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

ARCHITECTURES = {"clip": "tests.parity.clip", "vse": "tests.parity.vse", "vilt": "tests.parity.vilt", "albef": "tests.parity.albef"}
WEIGHT_FILES = re.compile(r"checkpoint\.\w+|model\.bin|pytorch_model_\d+\.bin|pytorch_ckpt_\d+\.tar")
NO_GRADIENT = (None, "__no_gradient__")
LISTED = {"README.md": "for people; nothing is taken from it"}

Bound = Callable[[torch.Tensor], float]


class CaseError(Exception):
    """A folder, kind or architecture that cannot be run: says what is wrong with it."""


def at_least(absolute: float, of_largest: float) -> Bound:
    """The larger of `absolute` and `of_largest` times the largest stored magnitude."""
    return lambda stored: max(absolute, of_largest * largest(stored))


def sum_of(absolute: float, of_largest: float) -> Bound:
    """`absolute` plus `of_largest` times the largest stored magnitude."""
    return lambda stored: absolute + of_largest * largest(stored)


def largest(tensor: torch.Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor."""
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


@dataclass(frozen=True)
class Kind:
    """How folders of one kind are run.

    procedure: compares on the `Case` it is given. bounds: (pattern of tensor names, bound), the first that fits counts;
    where none fits, `default_bound`. gradient_floor: least absolute part of the bound of gradient norms. listed:
    pattern of entries or files that are no outputs -> reason.
    """

    procedure: Callable[["Case"], None]
    bounds: tuple[tuple[str, Bound], ...] = ()
    default_bound: Bound = at_least(2e-5, 2e-5)
    gradient_floor: float = 0.0
    listed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One verdict: "ok", "FAIL", "input" or "listed". difference, bound: None where no numbers were compared."""

    name: str
    verdict: str
    difference: float | None = None
    bound: float | None = None
    note: str = ""

    def __str__(self) -> str:
        numbers = ["-" if number is None else f"{number:.2e}" for number in (self.difference, self.bound)]
        return f"{self.name:<64} {numbers[0]:>9} {numbers[1]:>9}  {self.verdict:<6} {self.note}".rstrip()


class Case:
    """One folder on its way through a procedure.

    config: of config.json, {} without one. inputs, outputs: tensors of inputs.safetensors and outputs.safetensors.
    gradients: section -> parameter -> stored norm, of grads.json. lines: the verdicts so far.

    Raises:
        CaseError: not a folder, or a file of these four that cannot be read.
    """

    def __init__(self, folder: str | Path, kind: Kind):
        self.folder, self.kind = Path(folder), kind
        if not self.folder.is_dir():
            raise CaseError(f"{folder} is {'not a folder' if self.folder.exists() else 'missing'}: give a case folder")
        try:
            self.files = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        except OSError as error:
            raise CaseError(f"{folder} cannot be read: {error}") from error
        self.lines: list[Line] = []
        self.stored: dict[str, object] = {}
        self._settled: set[str] = set()
        self._read: set[str] = set()
        self.config = self.json("config.json") if "config.json" in self.files else {}
        self.inputs = self._tensors("inputs.safetensors")
        self.outputs = self._tensors("outputs.safetensors")
        self.stored |= self.outputs
        self._read.add("outputs.safetensors")
        sections = self.json("grads.json") if "grads.json" in self.files else {}
        if not isinstance(self.config, dict) or not isinstance(sections, dict):
            raise CaseError(f"{folder}: config.json and grads.json must hold objects")
        self.gradients = {section: norms for section, norms in sections.items() if isinstance(norms, dict)}
        self.stored |= {f"grads.json: {name}": sections[name] for name in sections if name not in self.gradients}
        for section, norms in self.gradients.items():
            self.stored |= {f"grads.json: {section}: {name}": norm for name, norm in norms.items()}

    def path(self, name: str) -> Path:
        """The path of a file that the procedure reads as an input.

        Raises:
            CaseError: the folder has no such file.
        """
        if name not in self.files:
            raise CaseError(f"{self.folder} has no {name}")
        self._read.add(name)
        return self.folder / name

    def json(self, name: str):
        """The content of a JSON file."""
        try:
            return json.loads(self.path(name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CaseError(f"{self.folder / name} cannot be read as JSON: {error}") from error

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.files:
            return {}
        try:
            return load_file(self.path(name))
        except (OSError, SafetensorError, ValueError) as error:
            raise CaseError(f"{self.folder / name} cannot be read as safetensors: {error}") from error

    def weight_files(self) -> list[Path]:
        """Every weight file of the folder, by name.

        Raises:
            CaseError: there is none.
        """
        names = sorted(name for name in self.files if WEIGHT_FILES.fullmatch(name))
        if not names:
            raise CaseError(f"{self.folder} has no weight file such as checkpoint.pt")
        return [self.path(name) for name in names]

    def expect(self, entries: Mapping[str, object]) -> None:
        """More stored values to account for, of a JSON file: entry name -> value."""
        self.stored |= entries

    def compare(self, ours: Mapping[str, object], label: str = "", mask: torch.Tensor | None = None) -> None:
        """Compare what ours computed with the stored entries of the same names; names without an entry are passed over.

        `label` goes before the names in the lines. `mask` [...], of the leading dimensions: only places with 1 count.
        """
        for name, value in ours.items():
            if name in self.stored:
                self._compare(name, value, label, mask)

    def _compare(self, name: str, value, label: str, mask: torch.Tensor | None) -> None:
        stored = self.stored[name]
        if not isinstance(stored, torch.Tensor):
            same = type(value) is type(stored) and value == stored
            self._add(label + name, same, note="" if same else f"{shown(value)} instead of {shown(stored)}", entry=name)
            return
        value = torch.as_tensor(value).detach().cpu()
        if value.shape != stored.shape:
            self._add(
                label + name, False, note=f"shape {list(value.shape)} instead of {list(stored.shape)}", entry=name
            )
            return
        if mask is not None:
            value, stored = value[mask.bool()], stored[mask.bool()]
        bound = self._bound(name)(stored) if stored.is_floating_point() else 0.0
        self._measure(label + name, value, stored, bound, name)

    def _bound(self, name: str) -> Bound:
        return next(
            (bound for pattern, bound in self.kind.bounds if fnmatchcase(name, pattern)), self.kind.default_bound
        )

    def compare_gradients(self, section: str, ours: Mapping[str, torch.Tensor | None], label: str = "") -> None:
        """Compare the norms of gradients, under the original's names, with a section of grads.json.

        None, zero and null all mean that the parameter gets no gradient. Stored names that `ours` lacks stay
        unaccounted for.
        """
        norms = {name: 0.0 if norm in NO_GRADIENT else norm for name, norm in self.gradients[section].items()}
        floor = max(self.kind.gradient_floor, 1e-6 * max(norms.values(), default=0.0))
        for name in norms:
            if name in ours:
                found = torch.zeros(()) if ours[name] is None else ours[name].double().norm()
                entry, stored = f"grads.json: {section}: {name}", torch.tensor(norms[name], dtype=torch.float64)
                self._measure(label + entry, found, stored, 1e-4 * norms[name] + floor, entry)

    def check(self, name: str, found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
        """Compare two tensors that are no stored entry and ours, for instance one value found in two ways."""
        self._measure(name, found, wanted, bound, None)

    def _measure(self, name: str, value: torch.Tensor, stored: torch.Tensor, bound: float, entry: str | None) -> None:
        value, stored = value.double(), stored.double()
        # equal infinities differ by nothing; a NaN on either side is a difference that no bound covers
        difference = largest(torch.where(value == stored, 0.0, value - stored))
        self._add(name, difference <= bound, difference, bound, entry=entry)

    def settle(
        self, entry: str, ok: bool, difference: float | None = None, bound: float | None = None, note: str = ""
    ) -> None:
        """The verdict on a stored entry that the procedure compared itself."""
        self._add(entry, ok, difference, bound, note, entry)

    def listed(self, entry: str, reason: str) -> None:
        """A stored entry that is no output, and why."""
        self._settled.add(entry)
        self.lines.append(Line(entry, "listed", note=reason))

    def _add(self, name, ok: bool, difference=None, bound=None, note="", entry=None) -> None:
        self.lines.append(Line(name, "ok" if ok else "FAIL", difference, bound, note))
        self._settled.add(entry or name)

    def finish(self, failure: str = "") -> None:
        """The last lines: what went wrong, what is listed, what nothing accounts for.

        `failure`: why the procedure ended early, if it did.
        """
        if failure:
            self.lines.append(Line("the procedure", "FAIL", note=failure))
        rest = [entry for entry in self.stored if entry not in self._settled]
        rest += sorted(self.files - self._read)
        reasons = {**LISTED, **self.kind.listed}
        for entry in rest:
            reason = next((reason for pattern, reason in reasons.items() if fnmatchcase(entry, pattern)), None)
            verdict = "FAIL" if reason is None else "listed"
            self.lines.append(Line(entry, verdict, note=reason or "nothing accounts for it"))
        self.lines += [Line(name, "input") for name in sorted(self._read - {"outputs.safetensors", "grads.json"})]
        if not any(line.verdict == "ok" for line in self.lines):
            self.lines.append(Line("the folder", "FAIL", note="holds nothing to compare"))

    @property
    def passed(self) -> bool:
        """Whether every line is in order."""
        return all(line.verdict != "FAIL" for line in self.lines)


def shown(value, limit: int = 60) -> str:
    """A value for a message, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def find_kind(architecture: str, kind: str) -> Kind:
    """The table entry of a kind.

    Raises:
        CaseError: an unknown architecture or kind; names the known ones.
    """
    if architecture not in ARCHITECTURES:
        raise CaseError(f"unknown architecture {architecture!r}: known are {', '.join(ARCHITECTURES)}")
    kinds = importlib.import_module(ARCHITECTURES[architecture]).KINDS
    if kind not in kinds:
        raise CaseError(f"unknown kind {kind!r} of {architecture}: known are {', '.join(kinds)}")
    return kinds[kind]


def run(architecture: str, kind: str, folder: str | Path) -> Case:
    """Run a folder through the procedure of its kind.

    Raises:
        CaseError: the architecture, the kind or the folder cannot be run at all.
    """
    case = Case(folder, find_kind(architecture, kind))
    failure = ""
    try:
        case.kind.procedure(case)
    except Exception as error:  # whatever stops a procedure is the verdict on this folder; the next one still runs
        failure = f"{type(error).__name__}: {error}"
    case.finish(failure)
    return case


def report(case: Case) -> Iterable[str]:
    """The lines of a finished case and its summary."""
    yield f"{case.folder}"
    yield f"{'name':<64} {'diff':>9} {'bound':>9}  verdict"
    yield from map(str, case.lines)
    failed = sum(line.verdict == "FAIL" for line in case.lines)
    compared = sum(line.verdict == "ok" for line in case.lines)
    yield f"{'passed' if case.passed else 'FAILED'}: {compared} equal, {failed} FAIL"
