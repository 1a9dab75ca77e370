"""Ranks: hand-worked numbers, brute force over random cases, ties, blocks, and the retrieval report around them."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hf_vlp.evaluation.ranks as ranks_module
from hf_vlp.evaluation.encoding import PictureError, encode, in_place, shard
from hf_vlp.evaluation.ranks import best_ranks, ranks_both_ways, ranks_from_scores, recalls, rsum, top_targets
from hf_vlp.evaluation.retrieval import (
    RetrievalSet,
    evaluate_retrieval,
    exact_unit_rows,
    five_fold_1k,
    retrieval_metrics,
)


def by_hand(scores, query_ids, target_ids):
    """The definition: wrong targets that score at least as high as the best right one."""
    ranks = []
    for row, query in zip(scores.tolist(), query_ids.tolist()):
        best = max(score for score, target in zip(row, target_ids.tolist()) if target == query)
        ranks.append(sum(score >= best for score, target in zip(row, target_ids.tolist()) if target != query))
    return ranks


def test_a_worked_example():
    # two images, two captions each
    scores = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.7, 0.6, 0.5, 0.4]])
    images, captions = torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1])
    to_text = ranks_from_scores(scores, images, captions)
    assert to_text.tolist() == [0, 2]
    to_image = ranks_from_scores(scores.T, captions, images)
    assert to_image.tolist() == [1, 0, 1, 0]
    text, image = recalls(to_text, ks=(1, 2)), recalls(to_image, ks=(1, 2))
    assert text == {"R@1": 50.0, "R@2": 50.0, "median_rank": 2.0, "mean_rank": 2.0}
    assert image == {"R@1": 50.0, "R@2": 100.0, "median_rank": 1.0, "mean_rank": 1.5}
    assert rsum(text, image) == 250.0


def test_median_is_rounded_down():
    assert recalls(torch.tensor([0, 3]))["median_rank"] == 2.0  # median 1.5
    assert recalls(torch.tensor([0, 3, 4]))["median_rank"] == 4.0
    with pytest.raises(ValueError, match="no query"):
        recalls(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("seed", range(25))
def test_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    images = int(torch.randint(1, 12, (), generator=generator))
    image_ids = torch.randperm(1000, generator=generator)[:images]
    # every image has a caption, some have many, in any order
    owners = torch.cat([torch.arange(images), torch.randint(images, (20,), generator=generator)])
    text_ids = image_ids[owners[torch.randperm(len(owners), generator=generator)]]
    # few different scores: ties everywhere
    scores = torch.randint(0, 6, (images, len(text_ids)), generator=generator).float()
    expected = by_hand(scores, image_ids, text_ids)
    assert ranks_from_scores(scores, image_ids, text_ids).tolist() == expected
    assert ranks_from_scores(scores, image_ids, text_ids, block=3).tolist() == expected
    assert ranks_from_scores(scores.T, text_ids, image_ids).tolist() == by_hand(scores.T, text_ids, image_ids)
    # integers: inner products are exact, so features must give the same
    x = torch.randint(-3, 4, (images, 5), generator=generator).float()
    y = torch.randint(-3, 4, (len(text_ids), 5), generator=generator).float()
    forth, back = by_hand(x @ y.T, image_ids, text_ids), by_hand(y @ x.T, text_ids, image_ids)
    for block in (1, 4, None):
        assert best_ranks(x, y, image_ids, text_ids, block=block).tolist() == forth
    assert [ranks.tolist() for ranks in ranks_both_ways(x, y, image_ids, text_ids)] == [forth, back]


def test_ties_count_against_the_query():
    ids = torch.arange(4)
    assert ranks_from_scores(torch.zeros(4, 4), ids, ids).tolist() == [3, 3, 3, 3]
    # a tie between two right ones is no tie
    assert ranks_from_scores(torch.zeros(1, 3), torch.tensor([7]), torch.tensor([7, 7, 1])).tolist() == [1]
    assert ranks_from_scores(torch.eye(4), ids, ids).tolist() == [0, 0, 0, 0]


def test_blocks_bound_the_memory(monkeypatch):
    sizes = []
    plain = ranks_module._block_ranks

    def watched(scores, *rest):
        sizes.append(scores.numel())
        return plain(scores, *rest)

    monkeypatch.setattr(ranks_module, "_block_ranks", watched)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 8, generator=generator), torch.randn(300, 8, generator=generator)
    ids = torch.arange(60)
    whole = ranks_both_ways(x, y, ids, ids.repeat_interleave(5))
    assert 5000 * 25000 <= ranks_module.WHOLE_ELEMENTS  # COCO's scores are computed once
    monkeypatch.setattr(ranks_module, "BLOCK_ELEMENTS", 900)
    monkeypatch.setattr(ranks_module, "WHOLE_ELEMENTS", 900)
    sizes.clear()
    parts = ranks_both_ways(x, y, ids, ids.repeat_interleave(5))
    assert max(sizes) <= 900 and sum(sizes) == 2 * 60 * 300
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_half_precision_features_are_scored_in_float32():
    generator = torch.Generator().manual_seed(0)
    x, y, ids = torch.randn(20, 64, generator=generator), torch.randn(20, 64, generator=generator), torch.arange(20)
    x, y = x.bfloat16(), y.bfloat16()
    assert torch.equal(best_ranks(x, y, ids, ids), best_ranks(x.float(), y.float(), ids, ids))


def test_bad_input_is_named():
    x, ids = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"query 1 \(id 8\) has no positive"):
        best_ranks(x, x, torch.tensor([0, 8, 2]), ids)
    with pytest.raises(ValueError, match="one id each"):
        best_ranks(x, x, ids[:2], ids)
    with pytest.raises(ValueError, match=r"\[N, E\] and \[M, E\]"):
        best_ranks(x, x[:, :2], ids, ids)
    broken = x.clone()
    broken[2, 0] = torch.nan
    with pytest.raises(ValueError, match="row 2 of the queries is not finite"):
        best_ranks(broken, x, ids, ids)
    with pytest.raises(ValueError, match="query 2 hold NaN"):
        ranks_from_scores(broken, ids, ids)


def test_top_targets():
    scores = torch.tensor([[0.1, 0.3, 0.2], [3.0, 1.0, 2.0]])
    assert top_targets(scores, torch.eye(3), 2, block=1).tolist() == [[1, 2], [0, 2]]
    assert top_targets(scores, torch.eye(3), 10).shape == (2, 3)


def test_folds_are_consecutive_images_with_their_captions():
    generator = torch.Generator().manual_seed(3)
    images = normalize(torch.randn(20, 4, generator=generator), dim=1)
    texts = normalize(images.repeat_interleave(2, 0) + torch.randn(40, 4, generator=generator), dim=1)
    ids, owners = torch.arange(20), torch.arange(20).repeat_interleave(2)
    shuffled = torch.randperm(40, generator=generator)  # captions need not stand in the images' order
    result = five_fold_1k(images, texts[shuffled], ids, owners[shuffled])
    parts = [
        retrieval_metrics(images[i : i + 4], texts[2 * i : 2 * i + 8], ids[:4], owners[:8]) for i in range(0, 20, 4)
    ]
    assert result == pytest.approx({name: sum(part[name] for part in parts) / 5 for name in parts[0]})
    assert result["rsum"] > retrieval_metrics(images, texts, ids, owners)["rsum"]  # fewer wrong ones
    with pytest.raises(ValueError, match="19 images do not divide"):
        five_fold_1k(images[:19], texts[:38], ids[:19], owners[:38])


@pytest.mark.parametrize(("count", "parts"), [(7, 2), (5, 4), (3, 4), (8, 2), (1, 1)])
def test_shards_put_together_hold_each_example_once(count, parts):
    features = torch.randn(count, 3)
    most = -(-count // parts)
    rows, positions = [], []
    for part in range(parts):
        mine = list(shard(count, part, parts))
        filling = most - len(mine)
        rows.append(torch.cat([features[mine], torch.full((filling, 3), 99.0)]))
        positions += mine + [-1] * filling
    assert torch.equal(in_place(torch.cat(rows), torch.tensor(positions), count), features)
    with pytest.raises(RuntimeError, match="exactly once"):
        # what a padding sampler gives: the first example again
        in_place(torch.cat([*rows, features[:1]]), torch.tensor([*positions, 0]), count)
    with pytest.raises(RuntimeError, match="exactly once"):
        in_place(torch.cat(rows), torch.tensor([-1, *positions[1:]]), count)


class Model(torch.nn.Module):
    """Pictures and texts are numbers; features are one-hot, so that retrieval is perfect or off by `shift`."""

    def __init__(self, width=40, shift=0):
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(width))
        self.frozen = torch.nn.BatchNorm1d(2).eval()
        self.shift = shift
        self.images = 0

    def get_image_features(self, pixel_values):
        assert not self.training and not torch.is_grad_enabled()
        self.images += len(pixel_values)
        return self.table[pixel_values]

    def get_text_features(self, input_ids, attention_mask):
        return self.table[(input_ids.sum(dim=1) + self.shift) % len(self.table)]


class Processor:
    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": torch.tensor(images)}
        ids = torch.tensor([[int(line.split()[-1])] for line in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def records(images=10):
    """Image i twice (rows i and images + i), with two captions and then one."""
    first = [{"image": i, "captions": [f"it is {i}", f"{i}"], "image_id": f"n{i}"} for i in range(images)]
    return first + [{"image": i, "captions": [f"again, it is {i}"], "image_id": f"n{i}"} for i in range(images)]


def test_retrieval_encodes_each_image_once_and_counts():
    model = Model().train()
    model.frozen.eval()
    report = evaluate_retrieval(model, Processor(), records(), batch_size=4, progress=False)
    assert model.images == 10 and model.training and not model.frozen.training
    assert report.counts == {
        "images": 10,
        "captions": 30,
        "captions_per_image_min": 3,
        "captions_per_image_mean": 3.0,
        "captions_per_image_max": 3,
    }
    assert report.metrics["rsum"] == 600.0 and report.image_rows == list(range(10))
    assert report.top(2)[3][:2] == ("1", 1) and [found[0] for _, _, found in report.top(2)] == report.text_ids.tolist()
    table = report.table()
    assert "text to image" in table and "100.0" in table and len({len(line) for line in table.splitlines()[:3]}) == 1
    assert set(report.to_dict()) == {"metrics", "counts", "protocol"}
    with pytest.raises(ValueError, match="5,000 images"):
        report.five_fold_1k()
    wrong = evaluate_retrieval(Model(width=10, shift=1), Processor(), records(), progress=False)
    assert wrong.metrics["text_to_image/R@1"] == wrong.metrics["image_to_text/R@1"] == 0.0


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_a_picture_without_identity_is_no_other_picture(missing):
    rows = records()
    rows[3] = rows[3] | {"image_id": missing}
    rows[7] = rows[7] | {"image_id": missing}
    with pytest.raises(ValueError, match="record 3 has no image_id"):
        RetrievalSet(rows)
    plain = [{key: value for key, value in row.items() if key != "image_id"} for row in rows]
    assert len(RetrievalSet(plain)) == 20  # no such column: every row is a picture


def test_the_first_captions_of_each_image():
    pairs = RetrievalSet(records(), captions_per_image=2)
    assert pairs.captions == [text for i in range(10) for text in (f"it is {i}", f"{i}")]
    assert len(RetrievalSet(records(), captions_per_image=3).captions) == len(RetrievalSet(records()).captions) == 30
    report = evaluate_retrieval(Model(), Processor(), pairs, progress=False)
    assert report.counts["captions"] == 20 and "the first 2 captions of each image" in report.protocol
    with pytest.raises(ValueError, match="record 0 has 3 captions, 4 are asked for"):
        RetrievalSet(records(), captions_per_image=4)
    with pytest.raises(ValueError, match="must be positive"):
        RetrievalSet(records(), captions_per_image=0)


def test_kept_pictures_and_prompts():
    kept = RetrievalSet(records(), Processor())
    kept.records = None  # nothing is read again
    prompted = []

    def prompt(caption):
        prompted.append(caption)
        return f"a photo of {caption}"

    report = evaluate_retrieval(Model(), Processor(), kept, batch_size=3, prompt=prompt, progress=False)
    assert report.metrics["rsum"] == 600.0 and len(prompted) == 30 and report.captions[1] == "0"


class Regions:
    """A processor of regions: image i of the store has 1 + i % 3 rows, the real ones first, the last one telling i."""

    feature_extractor = "of regions"

    def __init__(self):
        self.asked = []

    def __call__(self, regions=None, text=None, return_tensors="pt", padding=True):
        if text is not None:
            return Processor()(text=text)
        self.asked += [str(key) for key in regions]
        numbers = [int(str(key).removeprefix("n")) for key in regions]
        counts = torch.tensor([1 + number % 3 for number in numbers])
        mask = (torch.arange(int(counts.max())) < counts[:, None]).long()
        features = torch.zeros(len(numbers), mask.shape[1], 2)
        for row, (number, count) in enumerate(zip(numbers, counts)):
            features[row, :count] = 1.0
            features[row, count - 1, 1] = number
        return {"region_features": features, "region_mask": mask}


class RegionModel(Model):
    """Counts regions where the mask says so; the length of a row of a batch is seen, too."""

    def __init__(self, scale=1.0, width=40):
        super().__init__(width)
        self.scale = scale
        self.lengths = []

    def get_image_features(self, region_features, region_mask):
        self.lengths.append(region_mask.shape[1])
        assert not region_features[region_mask == 0].any()
        last = region_mask.sum(dim=1) - 1
        numbers = region_features[torch.arange(len(last)), last, 1].long()
        # a batch that is filled up further gives other features: it must be the same when regions are kept
        return self.scale * self.table[numbers] * (1 + 0.1 * region_mask.shape[1])


def region_records(images=10):
    """No pictures; the store's key is `regions`, or `image_id` where there is no such column."""
    return [{"regions": f"n{i}", "captions": [f"it is {i}", f"{i}"], "image_id": 100 + i} for i in range(images)]


@pytest.mark.parametrize("batch_size", [1, 4, 128])
def test_regions_kept_and_read_anew_give_the_same(batch_size):
    processor, rows = Regions(), region_records()
    reports, lengths = [], []
    for records in (rows, RetrievalSet(rows, processor)):
        processor.asked.clear()
        model = RegionModel()
        reports.append(evaluate_retrieval(model, processor, records, batch_size=batch_size, progress=False))
        lengths.append(model.lengths)
    assert processor.asked == []  # kept
    assert lengths[0] == lengths[1] and set(lengths[0]) == ({1, 2, 3} if batch_size == 1 else {3})
    assert torch.equal(reports[0].image_features, reports[1].image_features)
    assert reports[0].to_dict() == reports[1].to_dict() and reports[0].metrics["rsum"] == 600.0
    kept = RetrievalSet(rows, processor).kept
    assert [row["region_features"].shape for row in kept[:3]] == [(1, 2), (2, 2), (3, 2)]


def test_which_column_names_the_regions():
    processor = Regions()
    by_id = [{"captions": row["captions"], "image_id": row["regions"]} for row in region_records(4)]
    evaluate_retrieval(RegionModel(), processor, by_id, progress=False)
    evaluate_retrieval(RegionModel(), processor, region_records(4), progress=False)
    assert processor.asked == ["n0", "n1", "n2", "n3"] * 2
    # without image_id two rows of one key are one image
    plain = [{"captions": [text], "regions": row["regions"]} for row in region_records(4) for text in row["captions"]]
    assert len(RetrievalSet(plain)) == 4 and RetrievalSet(plain).text_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    broken = region_records(4)
    broken[2] = broken[2] | {"regions": None}
    with pytest.raises(ValueError, match="record 2 names no regions: it has no `regions`"):
        evaluate_retrieval(RegionModel(), processor, broken, progress=False)
    with pytest.raises(ValueError, match="record 0 names no regions: it has no `image_id`"):
        evaluate_retrieval(RegionModel(), processor, [{"captions": ["a"]}], progress=False)
    with pytest.raises(PictureError, match="record 0 has no picture"):
        evaluate_retrieval(Model(), Processor(), region_records(), progress=False)


def test_reading_regions_decodes_no_picture():
    from datasets import Dataset, Image

    rows = [row | {"image": "absent.png"} for row in region_records(4)]
    data = Dataset.from_list(rows).cast_column("image", Image())
    report = evaluate_retrieval(RegionModel(), Regions(), data, progress=False)
    assert report.metrics["rsum"] == 600.0
    bare = evaluate_retrieval(RegionModel(), Regions(), data.remove_columns("image"), progress=False)
    assert bare.to_dict() == report.to_dict()
    with pytest.raises(PictureError, match="record 0 cannot be read"):
        evaluate_retrieval(Model(), Processor(), data, progress=False)


def test_only_rounded_unit_rows_are_made_unit():
    generator = torch.Generator().manual_seed(0)
    unit = normalize(torch.randn(50, 256, generator=generator), dim=1)
    for rounded in (unit, unit.bfloat16().float(), unit.half().float()):
        found, were_unit = exact_unit_rows(rounded)
        assert were_unit and (found.norm(dim=1) - 1).abs().max() < 1e-6
    assert (unit.bfloat16().float().norm(dim=1) - 1).abs().max() > 1e-5  # there was something to repair
    for raw in (unit * 1.02, torch.cat([unit, unit[:1] * 3]), torch.randn(50, 256, generator=generator)):
        found, were_unit = exact_unit_rows(raw)
        assert not were_unit and found is raw


def test_inner_products_stay_inner_products():
    class Longer(RegionModel):
        def get_image_features(self, region_features, region_mask):
            # image 3 is long and lies between the others' directions
            features = super().get_image_features(region_features, region_mask)
            return features + 5.0 * (features[:, 3:4] > 0) * torch.ones(40)

    raw = evaluate_retrieval(Longer(scale=2.0), Regions(), region_records(), progress=False)
    assert "inner product" in raw.protocol and "cosine" not in raw.protocol
    # every caption but its own finds image 3 first, by its length; the cosine would not
    assert raw.metrics["text_to_image/R@1"] == 10.0
    assert raw.image_features[3].norm() > 30
    cosine = retrieval_metrics(normalize(raw.image_features, dim=1), raw.text_features, raw.image_ids, raw.text_ids)
    assert cosine["text_to_image/R@1"] == 100.0
    assert torch.equal(raw.scores(), raw.image_features @ raw.text_features.T)
    plain = evaluate_retrieval(Model(), Processor(), records(), progress=False)
    assert ", cosine, best positive counts, ties count against it" in plain.protocol


def test_features_that_transformers_wraps_are_compared_by_cosine():
    class Wrapped(Model):
        def get_image_features(self, pixel_values):
            return BaseModelOutputWithPooling(pooler_output=7 * super().get_image_features(pixel_values))

    report = evaluate_retrieval(Wrapped(), Processor(), records(), progress=False)
    assert torch.equal(report.image_features.norm(dim=1), torch.ones(10)) and "cosine" in report.protocol


def test_fingerprints_tell_captions_and_their_images_apart():
    def of(rows):
        return evaluate_retrieval(Model(), Processor(), rows, progress=False).fingerprint()

    rows = records(3)
    assert of(rows) == of([row | {"image_id": f"another name, {row['image_id']}"} for row in rows])
    assert len({of(rows), of(rows[:3]), of([rows[1], rows[0], *rows[2:]]), of(records(2))}) == 4


def test_retrieval_on_bad_records_and_models():
    with pytest.raises(ValueError, match="record 4 has no caption"):
        evaluate_retrieval(Model(), Processor(), [*records(2), {"image": 0, "captions": [""], "image_id": "x"}])
    with pytest.raises(ValueError, match="no records"):
        evaluate_retrieval(Model(), Processor(), [])
    with pytest.raises(TypeError, match="Linear has no get_image_features.*score_pairs"):
        evaluate_retrieval(torch.nn.Linear(2, 2), Processor(), records(), progress=False)

    class Broken(list):
        def __getitem__(self, row):
            if row == 6:
                raise OSError("truncated")
            return super().__getitem__(row)

    with pytest.raises(PictureError, match="picture of record 6 cannot be read .truncated."):
        # rows 0 and 1 are one image: record 6 is the image at index 5
        doubled = Broken([records()[0], *records()[:10]])
        evaluate_retrieval(Model(), Processor(), doubled, batch_size=1, progress=False)


def test_encoding_keeps_the_examples_order():
    def prepare(rows):
        return {"x": torch.tensor(rows)[:, None].float()}

    options = {"batch_size": 3, "device": torch.device("cpu"), "progress": False}
    order = [4, 2, 0, 6, 5, 3, 1]
    found = encode(7, prepare, lambda x: x * 2, order=order, **options)
    assert found.flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]


WORKER = """
import sys, torch
from tests.objectives.test_ranks import Model, Processor, records
from hf_vlp.evaluation.retrieval import evaluate_retrieval
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
for images in (1, 7):
    model = Model(shift=1 if images == 7 else 0)
    report = evaluate_retrieval(model, Processor(), records(images), batch_size=2, progress=False)
    assert torch.equal(report.image_features.argmax(1), torch.arange(images))
    print(images, model.images, report.counts["captions"], round(report.metrics["text_to_image/mean_rank"], 9))
torch.distributed.destroy_process_group()
"""


def test_two_processes_count_each_example_once(tmp_path):
    one = evaluate_retrieval(Model(shift=1), Processor(), records(7), batch_size=2, progress=False)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(r), str(tmp_path / "store")], env=environment, stdout=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    outputs = [worker.communicate(timeout=60)[0].split() for worker in workers]
    mean = str(round(one.metrics["text_to_image/mean_rank"], 9))
    # one image and seven images: the first process encodes the odd one
    assert outputs == [["1", "1", "3", "1.0", "7", "4", "21", mean], ["1", "0", "3", "1.0", "7", "3", "21", mean]]
