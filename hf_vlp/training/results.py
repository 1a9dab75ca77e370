"""Retrieval on the held-out splits of a run: its tables, its numbers for the card, its picture sheet."""

from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_vlp.evaluation.encoding import PictureError, takes_regions
from hf_vlp.evaluation.provenance import command, conditions, shortened
from hf_vlp.evaluation.retrieval import RetrievalReport, RetrievalSet, evaluate_retrieval
from hf_vlp.training.recipe import Recipe
from hf_vlp.training.report import draw_retrieval
from hf_vlp.training.stream import BatchStream


class HeldOut:
    """The validation and test splits that a recipe names; calling it evaluates them.

    Args:
        records: split -> records, or None where the recipe names none.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model, processor, records: dict[str, Any]):
        self.recipe, self.accelerator, self.model, self.processor = recipe, accelerator, model, processor
        keeps = processor if recipe.data.cache else None
        self.splits = {split: RetrievalSet(rows, keeps) for split, rows in records.items() if rows is not None}
        self.reports: dict[str, RetrievalReport] = {}
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.training.mixed_precision)

    def evaluate(self, stream: BatchStream) -> dict[str, float]:
        """Prints a table for each split and returns their metrics as "<split>/<metric>"; the same on all processes."""
        metrics = {}
        for split, pairs in self.splits.items():
            report = self.reports[split] = evaluate_retrieval(
                self.model,
                self.processor,
                pairs,
                accelerator=self.accelerator,
                autocast=self.autocast,
                progress=False,
            )
            self.accelerator.print(f"\n{split}, step {stream.progress.step}\n{report.table()}")
            metrics |= {f"{split}/{name}": value for name, value in report.metrics.items()}
        return metrics

    def results(self) -> list[dict[str, Any]]:
        """The last evaluation as entries of `results.json`, from which the card is made."""
        data = self.recipe.data
        how = conditions(self.model, self.processor, self.autocast)
        return [
            {
                "task": "retrieval",
                "data": shortened(getattr(data, split)),
                "split": getattr(data, f"{split}_split") or split,
                **report.to_dict(),
                "protocol": f"{report.protocol}, {how}",
                "command": command(self.accelerator.num_processes),
                "date": date.today().isoformat(),
            }
            for split, report in self.reports.items()
        ]

    def draw_sheet(self, output: str | Path, rows: int = 12) -> Path | None:
        """Captions of the last split, evenly chosen, with their five best pictures.

        None without a split, and for a model that sees regions whose records give no pictures to show.
        """
        if not self.reports:
            return None
        split, report = list(self.reports.items())[-1]
        images = self.splits[split]
        found = report.top(min(5, len(images)))
        found = found[:: max(1, len(found) // rows)][:rows]
        try:
            pictures = [[images[index]["image"] for index in indices] for _, _, indices in found]
        except PictureError:
            if takes_regions(self.processor):
                return None
            raise
        return draw_retrieval(
            [text for text, _, _ in found],
            pictures,
            [[index == own for index in indices] for _, own, indices in found],
            output,
        )
