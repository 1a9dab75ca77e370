"""Evaluation within a run: region inputs kept or read anew, and the picture sheet of records with and without pictures."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_vlp.evaluation.encoding import PictureError
from hf_vlp.evaluation.fusion_retrieval import evaluate_fusion_retrieval
from hf_vlp.training.recipe import RecipeError
from hf_vlp.training.results import LEAST_BATCH, TERM_BATCH, HeldOutRetrieval, HeldOutTask, HeldOutTerms
from tests.objectives.pair_model import PairModel, PairProcessor, TwoStageModel, pair_records


class RegionModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(8))

    def get_image_features(self, region_features, region_mask):
        return self.table[(region_features[..., 0] * region_mask).amax(dim=1).long()]

    def get_text_features(self, input_ids, attention_mask):
        return self.table[input_ids[:, 0]]


class PictureModel(RegionModel):
    def get_image_features(self, pixel_values):
        return self.table[pixel_values[:, 0, 0, 0].long()]


class Processor:
    """Regions of image i: 1 + i % 2 rows that tell i. Counts what it was asked for."""

    def __init__(self, of_regions=True):
        self.feature_extractor = "of regions" if of_regions else None
        self.asked = 0

    def __call__(self, images=None, regions=None, text=None, return_tensors="pt", padding=True):
        if text is not None:
            ids = torch.tensor([[int(line)] for line in text])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.asked += len(regions or images)
        if images is not None:
            levels = torch.tensor([image.getpixel((0, 0))[0] for image in images])
            return {"pixel_values": levels[:, None, None, None].expand(-1, 3, 2, 2).float()}
        mask = torch.tensor([[1, key % 2] for key in regions])
        return {"region_features": torch.tensor(regions)[:, None, None] * mask[..., None].float(), "region_mask": mask}


def held_out(model, processor, rows, cache=True):
    data = SimpleNamespace(cache=cache, test="pairs.jsonl", test_split=None)
    recipe = SimpleNamespace(
        data=data, training=SimpleNamespace(mixed_precision="no", evaluate_records=None, evaluate_candidates=None)
    )
    return HeldOutRetrieval(recipe, Accelerator(cpu=True), model, processor, {"validation": None, "test": rows})


def rows_of(**columns):
    return [
        {"captions": [str(i)], "image_id": i, **{name: give(i) for name, give in columns.items()}} for i in range(6)
    ]


def ranking(model, candidates, rank=evaluate_fusion_retrieval):
    data = SimpleNamespace(cache=False, validation="pairs.jsonl", validation_split=None)
    numbers = {"mixed_precision": "no", "evaluate_records": None, "evaluate_candidates": candidates}
    recipe = SimpleNamespace(data=data, training=SimpleNamespace(**numbers))
    rows = {"validation": pair_records(), "test": None}
    return HeldOutRetrieval(recipe, Accelerator(cpu=True), model, PairProcessor(), rows, rank=rank)


STREAM = SimpleNamespace(progress=SimpleNamespace(step=3))


@pytest.mark.parametrize("cache", [True, False])
def test_regions_are_processed_once_or_at_every_evaluation(cache, capsys):
    processor = Processor()
    run = held_out(RegionModel(), processor, rows_of(regions=lambda i: i), cache)
    first, second = run.evaluate(STREAM), run.evaluate(STREAM)
    assert first == second and first["test/rsum"] == 600.0
    assert processor.asked == (6 if cache else 12)
    assert "test, step 3" in capsys.readouterr().out
    assert run.results()[0]["protocol"].endswith("float32, regions")


def test_a_sheet_needs_pictures(tmp_path):
    run = held_out(RegionModel(), Processor(), rows_of(regions=lambda i: i))
    assert run.draw_sheet(tmp_path / "sheet.png") is None  # nothing was evaluated
    run.evaluate(STREAM)
    assert run.draw_sheet(tmp_path / "sheet.png") is None and not list(tmp_path.iterdir())
    for missing in (lambda i: None, lambda i: Image.new("RGB", (4, 4)) if i else None):
        run = held_out(RegionModel(), Processor(), rows_of(regions=lambda i: i, image=missing))
        run.evaluate(STREAM)
        assert run.draw_sheet(tmp_path / "sheet.png") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("of_regions", [True, False])
def test_a_sheet_of_records_with_pictures(tmp_path, of_regions):
    rows = rows_of(regions=lambda i: i, image=lambda i: Image.new("RGB", (4, 4), (i, 0, 0)))
    run = held_out(RegionModel() if of_regions else PictureModel(), Processor(of_regions), rows)
    run.evaluate(STREAM)
    assert run.draw_sheet(tmp_path / "sheet.png") == tmp_path / "sheet.png"
    assert Image.open(tmp_path / "sheet.png").width > 100


def test_a_recipe_says_how_many_candidates_are_put_in_order(capsys):
    numbers, scored = {}, {}
    for candidates in (None, 2, 7, 50):  # of 7 images and 21 captions
        model = TwoStageModel().train()
        numbers[candidates] = ranking(model, candidates).evaluate(STREAM)
        scored[candidates] = len(model.scored)
        assert model.training
    assert 2 * 21 <= scored[2] <= 2 * (21 + 7) < scored[7] == scored[None] == scored[50] == 147
    first = {name: value for name, value in numbers[50].items() if "first_stage/" in name}
    assert {name: value for name, value in numbers[50].items() if name not in first} == numbers[None]
    assert len(first) == len(numbers[None]) and numbers[2]["validation/rsum"] != numbers[50]["validation/rsum"]
    assert {name: value for name, value in numbers[2].items() if name in first} == first
    assert "its own embedding proposes k = 7 images for each caption and 21 captions" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="training.evaluate_candidates = 2: PairModel embeds no side alone"):
        ranking(PairModel(), 2)


def test_a_model_of_pictures_does_not_pass_over_a_missing_one(tmp_path):
    rows = rows_of(image=lambda i: Image.new("RGB", (4, 4), (i, 0, 0)))
    run = held_out(PictureModel(), Processor(of_regions=False), rows)
    run.evaluate(STREAM)
    for row in rows:
        row["image"] = None
    with pytest.raises(PictureError, match="has no picture"):
        run.draw_sheet(tmp_path / "sheet.png")
    with pytest.raises(PictureError, match="record 0 has no picture"):
        held_out(PictureModel(), Processor(of_regions=False), rows_of(regions=lambda i: i))


class TermModel(torch.nn.Module):
    """Words are right where the id is even and counted where it is below 50; nothing is counted of the term `rare`."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.modes = set()

    def forward(self, input_ids):
        self.modes.add((self.training, torch.is_grad_enabled()))
        ids = input_ids[:, 0]
        counted = ids < 50
        none = counted.sum() * 0
        return {
            "losses": {
                "words": ids.float().mean() * self.weight,
                "aligned": ids.float().amin(),
                "rare": self.weight * 0,
            },
            "correct": {"words": ((ids % 2 == 0) & counted).sum(), "rare": none},
            "counts": {"words": counted.sum(), "rare": none},
        }


class Rows(list):
    """Examples, as many of each image as said, one behind the other."""

    def __init__(self, rows, each):
        super().__init__(rows)
        self.image_ids = [place // each for place in range(len(rows))]


def terms(model, records, most=None, each=1):
    data = SimpleNamespace(cache=False, validation="pairs.jsonl", validation_split=None)
    training = SimpleNamespace(mixed_precision="no", evaluate_records=most, rank_records=None)
    recipe = SimpleNamespace(data=data, training=training)

    def collate(items):
        return {"input_ids": torch.tensor(items)[:, None]}

    return HeldOutTerms(
        recipe,
        Accelerator(cpu=True),
        model,
        Processor(of_regions=False),
        {"validation": records, "test": None},
        open_batches=lambda rows: (Rows(rows, each), collate),
    )


def test_terms_are_counted_over_all_batches(capsys):
    ids = [3 * row for row in range(TERM_BATCH + 9)]
    model = TermModel().train()
    run = terms(model, ids)
    metrics = run.evaluate(STREAM)
    counted = [number for number in ids if number < 50]
    share = 100 * sum(number % 2 == 0 for number in counted) / len(counted)
    assert metrics["validation/words/accuracy"] == pytest.approx(share) == metrics["validation/accuracy"]
    assert metrics["validation/words/loss"] == pytest.approx(sum(ids) / len(ids))
    half = (len(ids) + 1) // 2  # two even batches, weighed by their examples
    aligned = (half * ids[0] + (len(ids) - half) * ids[1]) / len(ids)
    assert metrics["validation/aligned/loss"] == pytest.approx(aligned)
    assert "validation/rare/accuracy" not in metrics and "validation/aligned/accuracy" not in metrics
    assert model.modes == {(False, False)} and model.training
    shown = capsys.readouterr().out
    assert "validation, step 3" in shown and "aligned" in shown
    (entry,) = run.results()
    assert entry["counts"] == {"examples": len(ids), "words predictions": len(counted), "rare predictions": 0}
    assert (entry["task"], run.best_metric) == ("pre-training", "validation/accuracy")
    assert run.draw_sheet("nowhere.png") is None
    assert terms(model, ids, most=7).evaluate(STREAM)["validation/words/loss"] == pytest.approx(9)


class Witness(TermModel):
    """Keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, input_ids):
        self.shown.append(input_ids[:, 0].tolist())
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("count", "each", "sizes"),
    [(80, 4, [20, 20, 20, 20]), (20, 4, [5, 5, 5, 5]), (100, 1, [25, 25, 25, 25]), (10, 2, [5, 5])],
)
def test_captions_of_one_image_are_in_batches_apart(count, each, sizes):
    """Records of one caption put those of an image next to each other, of which none is a false one of another."""
    model = Witness()
    run = terms(model, list(range(count)), each=each)
    first = run.evaluate(STREAM)
    shown, model.shown = model.shown, []
    assert [len(batch) for batch in shown] == sizes and sorted(sum(shown, [])) == list(range(count))
    assert all(len({row // each for row in batch}) == len(batch) for batch in shown)
    assert run.evaluate(STREAM) == first and model.shown == shown


@pytest.mark.parametrize(("count", "each"), [(7, 6), (40, 40), (100, 50), (2, 1), (1, 1)])
def test_no_batch_is_too_small_to_draw_false_pairs_from(count, each):
    model = Witness()
    terms(model, list(range(count)), each=each).evaluate(STREAM)
    assert sorted(sum(model.shown, [])) == list(range(count))
    assert min(map(len, model.shown)) >= min(LEAST_BATCH, count)
    most = [max(Counter(row // each for row in batch).values()) for batch in model.shown]
    assert max(most) - min(most) <= 1


def test_a_task_is_evaluated_by_its_function():
    seen = []

    def answer(model, processor, records, *, accelerator, autocast, progress):
        seen.append((records, autocast, progress))
        return SimpleNamespace(metrics={"accuracy": 40.0}, table=lambda: "", to_dict=dict)

    data = SimpleNamespace(cache=False)
    training = SimpleNamespace(mixed_precision="bf16", evaluate_records=2)
    recipe = SimpleNamespace(data=data, training=training)
    rows = {"validation": [1, 2, 3], "test": None}
    run = HeldOutTask(
        recipe, Accelerator(cpu=True), TermModel(), Processor(of_regions=False), rows, task="vqa", answer=answer
    )
    assert run.evaluate(STREAM) == {"validation/accuracy": 40.0}
    run.reports["test"] = SimpleNamespace(metrics={})  # as of questions without answers
    run.recipe.data.validation = run.recipe.data.validation_split = "x"
    run.reports["validation"].protocol = "asked"
    assert [entry["split"] for entry in run.results()] == ["x"]
    assert seen == [([1, 2], torch.bfloat16, False)] and (run.task, run.best_metric) == ("vqa", "validation/accuracy")
