"""The held-out splits of a run: what is measured on them, its tables, its numbers for the card, its picture sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_vlp.evaluation.encoding import PictureError, evaluating, takes_regions
from hf_vlp.evaluation.fusion_retrieval import embeds_each_side, evaluate_fusion_retrieval, propose
from hf_vlp.evaluation.provenance import command, conditions, shortened
from hf_vlp.evaluation.report import Report
from hf_vlp.evaluation.retrieval import RetrievalReport, RetrievalSet, evaluate_retrieval
from hf_vlp.training.recipe import Recipe, RecipeError
from hf_vlp.training.report import draw_retrieval
from hf_vlp.training.stream import BatchStream

LEAST_BATCH = 3  # least examples to draw false pairs from, where there are as many
TERM_BATCH = 32  # most examples of a batch of `HeldOutTerms`, whatever the number of processes


class HeldOut:
    """The validation and test splits that a recipe names; a subclass says what is measured of one.

    task: its name in `results.json`. best_metric: the one by which the best checkpoint is known, higher is better.

    Args:
        records: split -> records, or None where the recipe names none.
    """

    task: str
    best_metric: str

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model, processor, records: dict[str, Any]):
        self.recipe, self.accelerator, self.model, self.processor = recipe, accelerator, model, processor
        self.most = recipe.training.evaluate_records
        self.splits = {
            split: self.opened(first(rows, self.most)) for split, rows in records.items() if rows is not None
        }
        self.reports: dict[str, Report] = {}
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.training.mixed_precision)

    def opened(self, records: Any) -> Any:
        """What `measure` takes of the records."""
        return records

    def measure(self, examples: Any) -> Report:
        """The report of a split, the same on all processes."""
        raise NotImplementedError

    def _how(self) -> dict[str, Any]:
        """What every evaluation of a model is told."""
        return {"accelerator": self.accelerator, "autocast": self.autocast, "progress": False}

    def evaluate(self, stream: BatchStream) -> dict[str, float]:
        """Prints a table for each split and returns their metrics as "<split>/<metric>"; the same on all processes."""
        metrics = {}
        for split, examples in self.splits.items():
            report = self.reports[split] = self.measure(examples)
            self.accelerator.print(f"\n{split}, step {stream.progress.step}\n{report.table()}")
            metrics |= {f"{split}/{name}": value for name, value in report.metrics.items()}
        return metrics

    def results(self) -> list[dict[str, Any]]:
        """The last evaluation as entries of `results.json`, from which the card is made; none of a split without right answers."""
        data = self.recipe.data
        how = conditions(self.model, self.processor, self.autocast)
        how += f", the first {self.most:,} records at most" if self.most else ""
        return [
            {
                "task": self.task,
                "data": shortened(getattr(data, split)),
                "split": getattr(data, f"{split}_split") or split,
                **report.to_dict(),
                "protocol": f"{report.protocol}, {how}",
                "command": command(self.accelerator.num_processes),
                "date": date.today().isoformat(),
            }
            for split, report in self.reports.items()
            if report.metrics
        ]

    def draw_sheet(self, output: str | Path, rows: int = 12) -> Path | None:
        """A picture of what was found; None where there is nothing to see."""
        return None


def first(records: Any, count: int | None) -> Any:
    """The first so many records, all of them if not given."""
    if count is None or count >= len(records):
        return records
    return records.select(range(count)) if hasattr(records, "select") else records[:count]


def draw_found(report: RetrievalReport, images: RetrievalSet, output: str | Path, rows: int = 12) -> Path:
    """Captions, evenly chosen, with their five best pictures."""
    found = report.top(min(5, len(images)))
    found = found[:: max(1, len(found) // rows)][:rows]
    return draw_retrieval(
        [text for text, _, _ in found],
        [[images[index]["image"] for index in indices] for _, _, indices in found],
        [[index == own for index in indices] for _, own, indices in found],
        output,
    )


class HeldOutTask(HeldOut):
    """A task for which each record has a right answer.

    Args:
        task: its name. answer: (model, processor, records, accelerator=, autocast=, progress=) -> a report whose metrics have `accuracy`.
    """

    best_metric = "validation/accuracy"

    def __init__(self, *arguments, task: str, answer: Callable[..., Report]):
        self.task, self.answer = task, answer
        super().__init__(*arguments)

    def measure(self, examples: Any) -> Report:
        return self.answer(self.model, self.processor, examples, **self._how())


class HeldOutRetrieval(HeldOut):
    """Retrieval by two towers, or by `rank` where that is given; by both where the recipe has `evaluate_candidates`.

    Args:
        rank: (model, processor, pairs, accelerator=, autocast=, progress=, candidates= in two stages) -> a `RetrievalReport`.

    Raises:
        RecipeError: `evaluate_candidates` of a model that embeds no side alone.
    """

    task = "retrieval"
    best_metric = "validation/rsum"

    def __init__(self, *arguments, rank: Callable[..., RetrievalReport] = evaluate_retrieval):
        self.rank = rank
        super().__init__(*arguments)
        self.candidates = self.recipe.training.evaluate_candidates
        if self.candidates is not None and not embeds_each_side(self.model):
            raise RecipeError(
                f"training.evaluate_candidates = {self.candidates}: {type(self.model).__name__} embeds no side alone and proposes no "
                f"pairs; leave it out"
            )

    def opened(self, records: Any) -> RetrievalSet:
        return RetrievalSet(records, self.processor if self.recipe.data.cache else None)

    def measure(self, examples: RetrievalSet) -> RetrievalReport:
        told, how = (self.model, self.processor, examples), self._how()
        if self.candidates is None:
            return self.rank(*told, **how)
        of_each = (min(self.candidates, there) for there in (len(examples), len(examples.captions)))
        return self.rank(*told, candidates=propose(*told, *of_each, **how), **how)

    def draw_sheet(self, output: str | Path, rows: int = 12) -> Path | None:
        """Captions of the last split, evenly chosen, with their five best pictures.

        None without a split, and for a model that sees regions whose records give no pictures to show.
        """
        if not self.reports:
            return None
        split, report = list(self.reports.items())[-1]
        try:
            return draw_found(report, self.splits[split], output, rows)
        except PictureError:
            if takes_regions(self.processor):
                return None
            raise


@dataclass
class TermReport(Report):
    """How well the terms of pre-training are solved on held-out examples.

    metrics: `<term>/accuracy` in percent of every term that predicts classes, `accuracy`, their mean, and `<term>/loss`; those of the
    ranking, if any, as well.
    counts: `examples`, and what each term predicted. ranking: of some of the examples' images among each other.
    """

    ranking: RetrievalReport | None = None

    def table(self) -> str:
        """The metrics as an aligned plain-text table."""
        terms = [name.removesuffix("/loss") for name in self.metrics if name.endswith("/loss")]
        lines = [f"{'':<8}{'accuracy %':>12}{'loss':>10}"]
        for term in terms:
            right = self.metrics.get(f"{term}/accuracy")
            lines.append(f"{term:<8}{'' if right is None else f'{right:.1f}':>12}{self.metrics[f'{term}/loss']:>10.3f}")
        return "\n".join(lines if self.ranking is None else [*lines, self.ranking.table()])


def dealt(image_ids: Sequence[int]) -> list[list[int]]:
    """All rows in batches of `TERM_BATCH` at most, as even as can be: a few left over would be too few to draw false pairs from.

    Rows of one image share a batch only where it has more than a third of them all: a false pair of one image is none.

    Args:
        image_ids: [N] identity of every row's image.
    """
    order = np.argsort(image_ids, kind="stable")
    repeated = int(np.unique(image_ids, return_counts=True)[1].max())
    count = max(math.ceil(len(order) / TERM_BATCH), min(repeated, len(order) // LEAST_BATCH))
    return [order[start::count].tolist() for start in range(count)]  # like cards, those of an image one after the other


class HeldOutTerms(HeldOut):
    """The terms of pre-training themselves, for models that embed no side alone.

    Args:
        open_batches: records -> a data set as training has one, with `image_ids`, and what makes a batch of its items. Both draw from
            their own seeds, so every evaluation sees the same batches.
    """

    task = "pre-training"
    best_metric = "validation/accuracy"

    def __init__(self, *arguments, open_batches: Callable[[Any], tuple[Sequence[Any], Callable]]):
        self.open_batches = open_batches
        super().__init__(*arguments)

    def opened(self, records: Any) -> tuple[Sequence[Any], Callable, RetrievalSet | None]:
        ranked = self.recipe.training.rank_records
        return *self.open_batches(records), RetrievalSet(first(records, ranked)) if ranked else None

    def measure(self, opened: tuple[Sequence[Any], Callable, RetrievalSet | None]) -> TermReport:
        examples, collate, ranked = opened
        accelerator, device = self.accelerator, self.accelerator.device
        batches = dealt(examples.image_ids)
        sums: dict[str, dict[str, float]] = {"losses": {}, "correct": {}, "counts": {}}
        with evaluating(self.model, accelerator) as model, torch.no_grad():
            for rows in batches[accelerator.process_index :: accelerator.num_processes]:
                batch = collate([examples[row] for row in rows])
                batch = {name: value.to(device) for name, value in batch.items()}
                with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
                    output = model(**batch)
                for kind, totals in sums.items():
                    weight = len(batch["input_ids"]) if kind == "losses" else 1
                    for term, value in output[kind].items():
                        totals[term] = totals.get(term, 0.0) + weight * float(value)
        everyones = gather_object([sums])
        terms = {kind: list(dict.fromkeys(term for part in everyones for term in part[kind])) for kind in sums}
        losses, correct, counts = (
            {term: sum(part[kind].get(term, 0.0) for part in everyones) for term in terms[kind]} for kind in sums
        )
        shares = {term: 100 * right / counts[term] for term, right in correct.items() if counts[term]}
        metrics = {f"{term}/accuracy": share for term, share in shares.items()}
        metrics |= {f"{term}/loss": total / len(examples) for term, total in losses.items()}
        metrics["accuracy"] = sum(shares.values()) / max(1, len(shares))
        predicted = {f"{term} predictions": int(count) for term, count in counts.items()}
        counts = {"examples": len(examples), **predicted}
        protocol = "all draws made once, the same at every evaluation"
        ranking = evaluate_fusion_retrieval(self.model, self.processor, ranked, **self._how()) if ranked else None
        if ranking is not None:
            metrics |= ranking.metrics
            counts |= ranking.counts
            protocol += f"; ranked {ranking.protocol}"
        return TermReport(metrics, counts, protocol, ranking)

    def draw_sheet(self, output: str | Path, rows: int = 12) -> Path | None:
        """Captions of the last split that was ranked, with their five best pictures; None where none was."""
        for split, report in reversed(self.reports.items()):
            if report.ranking is not None:
                return draw_found(report.ranking, self.splits[split][2], output, rows)
        return None
