"""What a run shows: the progress bar and `metrics.jsonl`, the curves, the picture sheet, the dry run's tables."""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from hf_vlp.files import whole_file, write_text
from hf_vlp.training.state import Progress

_NOT_LOSSES = {"step", "lr", "grad_norm", "seconds"}


def check_trackers(names: list[str]) -> None:
    """accelerate leaves out trackers that are not installed without a word; this raises ValueError instead."""
    available = {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise ValueError(
                f"trackers: {name!r} is not installed or unknown; there are: {', '.join(sorted(available)) or 'none'}"
            )


class RunLog:
    """Progress bar, `metrics.jsonl` and accelerate's trackers; only the main process writes.

    Args:
        path: of `metrics.jsonl`, one JSON object a line: {"step", "loss", every named loss, "lr", "grad_norm", scales,
            "seconds"} for a step and {"step", "evaluation": {...}} for an evaluation. None: nothing is written.
        start: the step the run goes on from; later lines of an interrupted run are cut off.
    """

    def __init__(self, accelerator: Accelerator, path: str | Path | None, *, steps: int, start: int = 0):
        self.accelerator = accelerator
        self.path = Path(path) if path is not None and accelerator.is_main_process else None
        if self.path is not None:
            kept = [line for line in read_metrics(self.path) if line["step"] <= start] if start else []
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not accelerator.is_main_process)

    def steps(self, lines: list[dict[str, float]], progress: Progress) -> None:
        """Lines of `Meter.read`; `seconds` is the training time up to the last of them."""
        if not lines:
            return
        self._write([line | {"seconds": round(progress.training_seconds, 3)} for line in lines])
        last = lines[-1]
        shown = {name: f"{value:.3g}" for name, value in last.items() if name not in ("step", "grad_norm")}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(last["step"] - self.bar.n)
        if self.accelerator.trackers:
            for line in lines:
                self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write([{"step": step, "evaluation": metrics}])
        if self.accelerator.trackers:
            self.accelerator.log({f"evaluation/{name}": value for name, value in metrics.items()}, step=step)

    @contextmanager
    def paused(self):
        """Room for the prints of an evaluation below the bar."""
        self.bar.clear()
        yield
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; one that a crash cut short is left out."""
    path = Path(path)
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def draw_curves(metrics: str | Path, output: str | Path) -> Path:
    """Losses, what was evaluated in percent and the learning rate over the steps, from `metrics.jsonl` to a picture."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "evaluation" in line]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, percent, rates = figure.subplots(1, 3)
    steps = [line["step"] for line in trained]
    hidden = ("scale", "ramp/")
    terms = [name for name in (trained[0] if trained else {}) if name not in _NOT_LOSSES and not any(h in name for h in hidden)]
    # with a single term the total says nothing new
    for name in [name for name in terms if name != "loss" or len(terms) != 2]:
        losses.plot(steps, [line.get(name, math.nan) for line in trained], label=name, linewidth=0.8)
    shares = _share_names(evaluated)
    for name in shares:
        values = [line["evaluation"].get(name, math.nan) for line in evaluated]
        style = "--" if "image_to_text" in name or name.endswith("majority") else "-"
        percent.plot(
            [line["step"] for line in evaluated],
            values,
            style,
            marker=".",
            label=name.removeprefix("test/").replace("_", " "),
        )
    rates.plot(steps, [line["lr"] for line in trained], color="tab:gray", label="learning rate")
    split = "test split" if any(name.startswith("test/") for name in shares) else "held out"
    titles = ("losses", f"{split}, %", "learning rate")
    for axes, title in zip((losses, percent, rates), titles, strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return _save_figure(figure, output)


def draw_retrieval(
    queries: Sequence[str],
    retrieved: Sequence[Sequence[Image.Image]],
    right: Sequence[Sequence[bool]],
    output: str | Path,
) -> Path:
    """The picture sheet: each query with its best pictures in order, the right ones in a green frame.

    Args:
        queries: Q captions; retrieved: Q lists of K pictures, best first; right: Q lists of K truth values.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = max(len(row) for row in retrieved)
    figure = Figure(figsize=(1.15 * columns + 3, 1.2 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), columns + 1, squeeze=False, width_ratios=[2.4] + [1.0] * columns)
    for axes, query, images, truths in zip(grid, queries, retrieved, right, strict=True):
        axes[0].text(1.0, 0.5, query, ha="right", va="center", wrap=True, fontsize=10, transform=axes[0].transAxes)
        for cell in axes:
            cell.axis("off")
        for cell, image, truth in zip(axes[1:], images, truths, strict=False):
            cell.imshow(_on_white(image))
            if truth:
                frame = {"fill": False, "edgecolor": "tab:green", "linewidth": 4, "transform": cell.transAxes}
                cell.add_patch(Rectangle((0, 0), 1, 1, **frame))
    return _save_figure(figure, output)


def parameter_table(model: nn.Module) -> str:
    """Total and trainable parameters of every part: the children, and the children of a base model that holds most."""
    whole = list(model.parameters())
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        holds_most = sum(p.numel() for p in child.parameters()) > 0.5 * sum(p.numel() for p in whole)
        if holds_most and name == getattr(model, "base_model_prefix", None):
            parts += [(f"{name}.{inner}", module) for inner, module in child.named_children()]
        else:
            parts.append((name, child))
    rows = [(name, list(module.parameters())) for name, module in parts]
    width = max([len(name) for name, _ in rows] + [len("all")])
    lines = [f"{'part':<{width}}  {'parameters':>14}  {'trainable':>14}"]
    for name, parameters in [*[row for row in rows if row[1]], ("all", whole)]:
        total = sum(p.numel() for p in parameters)
        free = sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{name:<{width}}  {total:>14,}  {free:>14,}")
    return "\n".join(lines)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a CUDA device, or that this process held in all on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _share_names(evaluated: list[dict[str, Any]]) -> list[str]:
    """Recalls and accuracies of the test split if it was evaluated, else all there are."""
    percent = ("accuracy", "majority", "consistency")
    names = [name for name in (evaluated[0]["evaluation"] if evaluated else {}) if "/R@" in name or name.endswith(percent)]
    return [name for name in names if name.startswith("test/")] or names


def _on_white(image: Image.Image) -> Image.Image:
    """Transparent pictures as they look on paper."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _save_figure(figure, output: str | Path) -> Path:
    with whole_file(output) as partial:
        figure.savefig(partial, dpi=110)
    return Path(output)
