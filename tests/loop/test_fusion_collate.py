"""Batches with masked words, false images and false texts: what they hold, how it is distributed, and that they can be made again."""

import collections
import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.data.fusion_collate import (
    FalseRows,
    FusionPretrainingCollator,
    FusionRetrievalCollator,
    TextAssignmentCollator,
)
from hf_vlp.data.pairs import ImageTextPairs, caption_with_keywords
from hf_vlp.data.record import RecordError, identity
from hf_vlp.inputs.text_masking import RandomMasking, WholeWordMasking
from hf_vlp.inputs.vocabulary import train_wordpiece_tokenizer

WORDS = [f"picture number {i} seen from the {side}" for i in range(12) for side in ("left", "right")]
TOKENIZER = train_wordpiece_tokenizer(WORDS, 200, 40)


def prepare(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def encoded(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value + 1, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count=8, captions=2, size=lambda i: (8, 8)):
    """Row i has pixels of i + 1 and texts that say i."""
    return [
        {
            "image": encoded(i, size(i)),
            "captions": [f"picture number {i} seen from the {side}" for side in ("left", "right")[:captions]],
            "image_id": f"id{i}",
            "keywords": "number",
        }
        for i in range(count)
    ]


def padded(images):
    """Pictures of several sizes on one canvas of whole patches of 4 pixels."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    values = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for row, image in enumerate(images):
        values[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": values, "pixel_mask": mask}


class Processor:
    def __call__(self, images=None, text=None, return_tensors="pt", padding=True, max_length=40):
        if images is not None:
            return padded(images)
        batch = TOKENIZER(
            list(text), padding=padding, truncation=True, max_length=max_length, return_tensors=return_tensors
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


class Noise:
    """Adds to each picture a number of its own."""

    takes_mixed_sizes = True

    def __call__(self, images, generator):
        batch = padded(images)
        batch["pixel_values"] += torch.rand(len(images), 1, 1, 1, generator=generator) * batch["pixel_mask"][:, None]
        return batch


def shown(pixel_values):
    """Which row of the records each picture is."""
    return [int(picture[0, 0, 0]) - 1 for picture in pixel_values]


def pretraining(pairs, augment=None, mask=None, **options):
    return FusionPretrainingCollator(Processor(), pairs, mask or WholeWordMasking(TOKENIZER), augment, **options)


def batches(pairs, collator, count, size=5, epochs=1):
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        for start in range(count):
            yield (
                [(start + step) % len(pairs) for step in range(size)],
                collator([pairs[(start + step) % len(pairs)] for step in range(size)]),
            )


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one
    )


def test_numbers_to_draw_false_pairs_by():
    pairs = ImageTextPairs(rows(), prepare)
    items = [pairs[row] for row in range(5)]
    plain, drawn, other = (
        FusionPretrainingCollator(Processor(), None, None, seed=seed, negative_draws=draws)(items)
        for seed, draws in ((0, False), (0, True), (1, True))
    )
    assert drawn.keys() - plain.keys() == {"negative_draws"} and same(plain, {name: drawn[name] for name in plain})
    numbers = drawn["negative_draws"]
    assert numbers.shape == (5, 2) and numbers.dtype == torch.float32 and len(numbers.unique()) == 10
    assert 0 <= numbers.min() and numbers.max() < 1
    again = FusionPretrainingCollator(Processor(), None, None, negative_draws=True)
    assert same(again(items), drawn) and not torch.equal(other["negative_draws"], numbers)
    assert not torch.equal(again(items[::-1])["negative_draws"].flip(0), numbers)


def test_a_batch_to_assign_texts():
    pairs = ImageTextPairs(rows(), prepare)
    items = [pairs[row] for row in range(5)]
    plain = FusionPretrainingCollator(Processor(), None, None)(items)
    batch, other = (TextAssignmentCollator(Processor(), seed=seed)(items) for seed in (0, 1))
    numbers = batch["assignment_draws"]
    assert batch.keys() == plain.keys() - {"image_ids"} | {"assignment_draws"}
    assert all(torch.equal(batch[name], plain[name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    assert numbers.shape == (5, 4) and len(numbers.unique()) == 20 and 0 <= numbers.min() and numbers.max() < 1
    assert same(TextAssignmentCollator(Processor())(items), batch)
    assert not torch.equal(other["assignment_draws"], numbers)
    with pytest.raises(ValueError, match="no items"):
        TextAssignmentCollator(Processor())([])


def test_a_batch_of_pretraining():
    pairs = ImageTextPairs(rows(), prepare)
    for indices, batch in batches(pairs, pretraining(pairs), 8):
        assert set(batch) == {
            *("input_ids", "attention_mask", "mlm_input_ids", "mlm_labels", "itm_labels", "image_ids"),
            *("pixel_values", "pixel_mask", "itm_pixel_values", "itm_pixel_mask"),
        }
        assert batch["itm_labels"].dtype == torch.int64 and batch["itm_labels"].sum() == 2  # of five
        assert shown(batch["pixel_values"]) == indices
        assert batch["image_ids"].tolist() == [identity(f"id{i}") for i in indices]
        for label, own, seen in zip(batch["itm_labels"], indices, shown(batch["itm_pixel_values"])):
            assert (seen == own) == bool(label)
        texts = TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert [int(text.split()[2]) for text in texts] == indices
        masked = batch["mlm_labels"].ne(-100)
        assert torch.equal(torch.where(masked, batch["mlm_labels"], batch["mlm_input_ids"]), batch["input_ids"])
        assert not masked[batch["attention_mask"].eq(0)].any()


@pytest.mark.parametrize(("size", "ones"), [(1, 0), (2, 1), (3, 1), (6, 3)])
def test_half_of_the_pairs_match_rounded_down(size, ones):
    pairs = ImageTextPairs(rows(), prepare)
    labels = torch.stack([b["itm_labels"] for _, b in batches(pairs, pretraining(pairs), 8, size, epochs=30)])
    assert labels.sum(dim=1).eq(ones).all()
    assert labels.double().mean(dim=0).tolist() == pytest.approx([ones / size] * size, abs=0.13)


def test_false_images_are_drawn_from_all_others_alike():
    pairs = ImageTextPairs(rows(), prepare)
    counts = collections.Counter()
    for indices, batch in batches(pairs, pretraining(pairs), 8, epochs=60):
        counts.update(
            (own, seen)
            for own, seen, label in zip(indices, shown(batch["itm_pixel_values"]), batch["itm_labels"])
            if not label
        )
    total = sum(counts.values())
    assert set(counts) == {(own, seen) for own in range(8) for seen in range(8) if own != seen}
    assert max(counts.values()) < 2 * total / 56 and min(counts.values()) > total / 56 / 2


def test_false_rows_pass_over_all_rows_of_the_image():
    ids = np.array([7, 3, 7, 7, 5, 3, 9])
    draw = FalseRows(ids)
    generator = torch.Generator().manual_seed(0)
    drawn = draw([7, 3, 5, 4], 8000, generator)
    for line, own in zip(drawn, (7, 3, 5, 4)):
        others = np.flatnonzero(ids != own)
        counts = np.bincount(line, minlength=len(ids))
        assert np.flatnonzero(counts).tolist() == others.tolist()
        assert counts[others] / 8000 == pytest.approx(1 / len(others), abs=0.03)
    anything = FalseRows(ids, allow_true=True)([7], 7000, generator)[0]
    assert np.bincount(anything, minlength=7) / 7000 == pytest.approx(1 / 7, abs=0.03)
    with pytest.raises(ValueError, match="3 pairs, all of one image"):
        FalseRows(np.array([2, 2, 2]))([2], 1, generator)
    assert FalseRows(np.array([2, 2, 2]), allow_true=True)([2], 1, generator).shape == (1, 1)


def test_two_rows_of_one_image_are_no_false_pair_unless_asked_for():
    records = rows()
    for row in records[:7]:
        row["image_id"] = "one"
    pairs = ImageTextPairs(records, prepare)
    own = {0: set(), 1: set()}
    for allowed in (False, True):
        for indices, batch in batches(pairs, pretraining(pairs, allow_true=allowed), 8, epochs=4):
            for index, seen, label in zip(indices, shown(batch["itm_pixel_values"]), batch["itm_labels"]):
                if index != 7 and not label:
                    own[allowed].add(seen)
    assert own[False] == {7} and own[True] == set(range(8))


def test_a_batch_is_the_same_whenever_and_wherever_it_is_made():
    def made(workers=0, epoch=0, seed=0, data_seed=0):
        pairs = ImageTextPairs(rows(), prepare, seed=data_seed)
        collator = pretraining(pairs, Noise(), seed=seed, patch_size=4, max_image_length=3, mask_patches=0.15)
        pairs.set_epoch(epoch)
        indices = [[0, 3, 5, 1], [2, 4, 6, 7]]
        return list(torch.utils.data.DataLoader(pairs, batch_sampler=indices, collate_fn=collator, num_workers=workers))

    first = made()
    torch.rand(3)  # the global generator plays no part
    for again in (made(), made(workers=2)):
        assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert same(first[1], made()[1]) and not same(first[0], first[1])
    for other in (made(epoch=1), made(seed=1), made(data_seed=1)):
        for name in ("itm_pixel_values", "pixel_values", "mlm_labels", "patch_index", "itm_patch_index", "mpp_mask"):
            assert any(
                one[name].shape != two[name].shape or not torch.equal(one[name], two[name])
                for one, two in zip(first, other)
            ), name


def test_only_the_false_images_are_decoded_besides():
    calls = []

    def counted(picture):
        calls.append(1)
        return prepare(picture)

    pairs = ImageTextPairs(rows(), counted)
    items = [pairs[index] for index in range(5)]
    calls.clear()
    pretraining(pairs)(items)
    assert len(calls) == 3  # of five pairs, three do not match
    cached = ImageTextPairs(rows(), counted, cache=True, progress=False)
    items = [cached[index] for index in range(5)]
    calls.clear()
    assert same(pretraining(cached)(items), pretraining(pairs)(items)) and len(calls) == 3


def test_true_and_false_images_share_a_canvas_and_the_true_ones_their_augmentation():
    sizes = [(8, 4), (4, 8), (12, 4), (8, 8), (4, 4), (4, 16), (8, 12), (4, 4)]
    pairs = ImageTextPairs(rows(size=lambda i: sizes[i]), prepare)
    canvases = set()
    for indices, batch in batches(pairs, pretraining(pairs, Noise()), 8, size=2, epochs=2):
        assert batch["pixel_values"].shape == batch["itm_pixel_values"].shape
        canvases.add(batch["pixel_values"].shape[2:])
        seen = indices + shown(batch["itm_pixel_values"])
        assert batch["pixel_values"].shape[2:] == (max(sizes[i][1] for i in seen), max(sizes[i][0] for i in seen))
        for row, index in enumerate(indices):
            width, height = sizes[index]
            real = batch["pixel_values"][row, :, :height, :width]
            assert real[0].eq(real[0, 0, 0]).all() and int(real[0, 0, 0]) == index + 1
            assert batch["pixel_mask"][row].sum() == width * height
            assert batch["pixel_mask"][row, :height, :width].all()
            matches = torch.equal(batch["pixel_values"][row], batch["itm_pixel_values"][row])
            assert matches == bool(batch["itm_labels"][row])
    assert len(canvases) > 2


def test_texts_are_as_long_as_the_longest_of_the_batch():
    records = rows()
    records[0]["captions"], records[1]["captions"] = ["picture"], ["number"]
    pairs = ImageTextPairs(records, prepare)
    short = pretraining(pairs)([pairs[0], pairs[1]])
    assert short["input_ids"].shape == short["mlm_labels"].shape == (2, 3)
    long = pretraining(pairs)([pairs[0], pairs[2]])
    assert long["input_ids"].shape == long["mlm_input_ids"].shape and long["input_ids"].shape[1] > 3
    assert pretraining(pairs, max_length=4)([pairs[2]])["input_ids"].shape == (1, 4)


def test_patches_kept_and_patches_to_be_predicted():
    sizes = [(8, 16) if i % 2 else (16, 16) for i in range(8)]
    pairs = ImageTextPairs(rows(size=lambda i: sizes[i]), prepare)
    collator = pretraining(pairs, patch_size=4, max_image_length=10, mask_patches=0.15)
    shares, hidden, kept = [], [], collections.Counter()
    for _, batch in batches(pairs, collator, 8, epochs=20):
        for name in ("", "itm_"):
            grid = batch[f"{name}pixel_mask"][:, ::4, ::4].flatten(1)
            index = batch[f"{name}patch_index"]
            count = min(10, int(grid.sum(dim=1).max()))  # as many as the fullest has, ten at most
            assert index.shape == (5, count) and index.dtype == torch.int64
            assert grid.gather(1, index).sum(dim=1).tolist() == grid.sum(dim=1).clamp(max=10).tolist()
            assert all(row.unique().numel() == count for row in index)
        kept.update(batch["patch_index"][grid.sum(dim=1) == 16].flatten().tolist())
        assert batch["mpp_mask"].shape == batch["mpp_replace"].shape == (5, 16)
        shares.append(batch["mpp_mask"].double().mean())
        hidden.append(batch["mpp_replace"].double().mean())
    assert torch.stack(shares).mean() == pytest.approx(0.15, abs=0.02)
    assert torch.stack(hidden).mean() == pytest.approx(0.8, abs=0.02)
    assert set(kept) == set(range(16))
    unlimited = pretraining(pairs)([pairs[0], pairs[1]])
    assert not {"patch_index", "itm_patch_index", "mpp_mask"} & set(unlimited)


def test_terms_can_be_left_out():
    pairs = ImageTextPairs(rows(), prepare)
    items = [pairs[0], pairs[1]]
    bare = FusionPretrainingCollator(Processor(), None, None)(items)
    assert set(bare) == {"input_ids", "attention_mask", "pixel_values", "pixel_mask", "image_ids"}
    words = FusionPretrainingCollator(Processor(), None, RandomMasking(TOKENIZER), patch_size=4, max_image_length=2)(
        items
    )
    assert set(words) - set(bare) == {"mlm_input_ids", "mlm_labels", "patch_index"}
    matching = FusionPretrainingCollator(Processor(), pairs, None)(items)
    assert set(matching) - set(bare) == {"itm_labels", "itm_pixel_values", "itm_pixel_mask"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_image_length": 4}, "patch_size"),
        ({"mask_patches": 0.1}, "patch_size"),
        ({"mask_patches": 1.5, "patch_size": 4}, "mask_patches=1.5"),
        ({"max_image_length": 0, "patch_size": 4}, "max_image_length=0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        pretraining(ImageTextPairs(rows(), prepare), **options)


def test_batches_that_cannot_be():
    pairs = ImageTextPairs(rows(1), prepare)
    with pytest.raises(ValueError, match="no items"):
        pretraining(pairs)([])
    with pytest.raises(ValueError, match="of one image"):
        pretraining(pairs)([pairs[0]])
    assert pretraining(pairs, allow_true=True)([pairs[0]])["itm_labels"].tolist() == [0]


def test_a_bad_false_image_stops_or_another_stands_in():
    records = rows(4)
    records[3]["image"] = b"no picture"
    strict = ImageTextPairs(records, prepare)
    items = [strict[index] for index in range(3)]
    with pytest.raises(RecordError, match="record 3, field 'image'"):
        for seed in range(20):
            pretraining(strict, seed=seed)(items)
    lenient = ImageTextPairs(records, prepare, on_bad_record="skip")
    seen = set()
    for seed in range(40):
        batch = pretraining(lenient, seed=seed)(items)
        for own, other, label in zip(range(3), shown(batch["itm_pixel_values"]), batch["itm_labels"]):
            assert (own == other) == bool(label)  # item 0 follows the bad one, and is never its own false image
            seen.add((own, other))
    assert lenient.report()["skipped"] == 1 and {(0, 1), (1, 0), (2, 0), (2, 1)} <= seen


def test_regions_in_place_of_pictures():
    from hf_vlp.inputs.regions import RegionFeatures, pad_regions

    class Store:
        def read(self, key):
            number = int(key[2:])
            return RegionFeatures(np.full((number + 2, 4), number, np.float32), image_id=key)

    class Regions(Processor):
        def __call__(self, regions=None, **options):
            return pad_regions(regions) if regions is not None else super().__call__(**options)

    pairs = ImageTextPairs([{**row, "image": None} for row in rows()], regions=Store())
    batch = FusionPretrainingCollator(Regions(), pairs, None)([pairs[index] for index in range(6)])
    own, other = (batch[f"{name}region_features"][:, 0, 0].long().tolist() for name in ("", "itm_"))
    assert own == list(range(6))
    assert [one == two for one, two in zip(own, other)] == batch["itm_labels"].bool().tolist()
    assert batch["itm_region_mask"].sum(dim=1).tolist() == [number + 2 for number in other]
    texts = FusionRetrievalCollator(Regions(), pairs, false_texts=2)([pairs[0], pairs[1]])
    assert texts["region_features"].shape[0] == 2 and texts["input_ids"].shape[:2] == (2, 3)


def texts_of(batch):
    return [[TOKENIZER.decode(row, skip_special_tokens=True) for row in rows] for rows in batch["input_ids"]]


def retrieval(pairs, **options):
    return FusionRetrievalCollator(Processor(), pairs, **options)


def test_a_batch_of_retrieval():
    pairs = ImageTextPairs(rows(), prepare)
    for indices, batch in batches(pairs, retrieval(pairs), 8, size=3):
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "pixel_mask", "labels"}
        assert batch["input_ids"].shape[:2] == (3, 16) and batch["input_ids"].shape == batch["attention_mask"].shape
        assert shown(batch["pixel_values"]) == indices and batch["labels"].tolist() == [0, 0, 0]
        for index, (own, *false) in zip(indices, texts_of(batch)):
            assert own == pairs[index]["text"]
            assert index not in {int(text.split()[2]) for text in false}


def test_false_texts_are_drawn_from_all_captions_alike():
    records = rows(5)
    for row in records[3:]:
        row["captions"] = row["captions"][:1]
    pairs = ImageTextPairs(records, prepare)
    counts = collections.Counter()
    for _, batch in batches(pairs, retrieval(pairs, false_texts=30), 1, size=1, epochs=40):
        counts.update(texts_of(batch)[0][1:])
    total = sum(counts.values())
    assert len(counts) == 6 and min(counts.values()) / total > 0.13 and max(counts.values()) / total < 0.2  # 1/6 each
    seen = set()
    for _, batch in batches(pairs, retrieval(pairs, allow_true=True), 1, size=1, epochs=10):
        seen |= set(texts_of(batch)[0][1:])
    assert len(seen) == 8


def test_false_texts_are_composed_as_the_true_one():
    pairs = ImageTextPairs(rows(), prepare, compose=caption_with_keywords("keywords"))
    texts = texts_of(retrieval(pairs, false_texts=4)([pairs[0]]))[0]
    assert len(texts) == 5 and all(text.split()[-1] == "number" for text in texts)
    plain = ImageTextPairs(rows(), prepare)
    assert not any(text.split()[-1] == "number" for text in texts_of(retrieval(plain)([plain[0]]))[0])


def test_a_retrieval_batch_is_the_same_whenever_and_wherever_it_is_made():
    def made(workers=0, epoch=0, seed=0):
        pairs = ImageTextPairs(rows(), prepare)
        pairs.set_epoch(epoch)
        collator = retrieval(pairs, seed=seed, false_texts=4, augment=Noise())
        indices = [[0, 3], [5, 1], [2, 4]]
        return list(torch.utils.data.DataLoader(pairs, batch_sampler=indices, collate_fn=collator, num_workers=workers))

    first = made()
    for again in (made(), made(workers=2)):
        assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert not any(same(one, other) for one, other in zip(first, made(seed=1)))
    assert not any(same(one, other) for one, other in zip(first, made(epoch=1)))


def test_retrieval_without_a_false_text_is_refused():
    pairs = ImageTextPairs(rows(1), prepare)
    with pytest.raises(ValueError, match="false_texts=0"):
        retrieval(pairs, false_texts=0)
    with pytest.raises(ValueError, match="of one image"):
        retrieval(pairs)([pairs[0]])
    with pytest.raises(ValueError, match="no items"):
        retrieval(pairs)([])
