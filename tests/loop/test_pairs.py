"""Pairs and batches: reproducible draws, the cache changes nothing, bad records stop or are counted."""

import collections
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.data.collate import PairCollator
from hf_vlp.data.pairs import ImageTextPairs, caption_with_keywords, draw_caption, first_caption
from hf_vlp.data.record import RecordError, identity
from hf_vlp.data.samplers import UniqueImageBatchSampler


def prepare(picture):
    return torch.from_numpy(np.array(picture.convert("RGB").resize((4, 4)))).permute(2, 0, 1).contiguous()


def encoded(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count=6, captions=5):
    return [
        {
            "image": encoded(i),
            "captions": [f"{i} {j}" for j in range(captions)],
            "image_id": f"id{i}",
            "keywords": "a, b,c",
        }
        for i in range(count)
    ]


def stored(records):
    from datasets import Dataset, Image

    return Dataset.from_list([{**row, "image": {"bytes": row["image"], "path": None}} for row in records]).cast_column(
        "image", Image()
    )


def texts(pairs):
    return [pairs[i]["text"] for i in range(len(pairs))]


def test_the_text_is_a_function_of_seed_epoch_and_row():
    pairs, again = ImageTextPairs(rows(), prepare), ImageTextPairs(rows(), prepare)
    first = texts(pairs)
    assert [pairs[i]["text"] for i in reversed(range(6))] == first[::-1]  # whatever was asked before
    pairs.set_epoch(1)
    second = texts(pairs)
    assert second != first
    again.set_epoch(1)
    assert texts(again) == second
    pairs.set_epoch(0)
    assert texts(pairs) == first
    assert texts(ImageTextPairs(rows(), prepare, seed=1)) != first
    draws = [item["draw"] for item in (pairs[0], pairs[1], again[0])]
    assert len(set(draws)) == 3 and all(0 <= draw < 2**63 for draw in draws)


def test_every_caption_has_its_turn():
    pairs = ImageTextPairs(rows(1), prepare)
    counts = collections.Counter()
    for epoch in range(500):
        pairs.set_epoch(epoch)
        counts[pairs[0]["text"]] += 1
    assert len(counts) == 5 and min(counts.values()) > 60  # 100 expected, standard deviation 9


def test_cached_and_plain_pairs_are_the_same():
    plain, cached = ImageTextPairs(rows(), prepare), ImageTextPairs(stored(rows()), prepare, cache=True, progress=False)
    for index in range(6):
        a, b = plain[index], cached[index]
        assert torch.equal(a["image"], b["image"]) and a["image"].dtype == torch.uint8
        assert (a["text"], a["image_id"], a["draw"]) == (b["text"], b["image_id"], b["draw"])
        assert int(a["image"][0, 0, 0]) == index and a["image_id"] == identity(f"id{index}")
    assert plain.image_ids.tolist() == [identity(f"id{i}") for i in range(6)]


def test_cache_prepares_once():
    calls = []

    def counted(picture):
        calls.append(1)
        return prepare(picture)

    pairs = ImageTextPairs(rows(), counted, cache=True, progress=False)
    for _ in range(3):
        texts(pairs)
    assert len(calls) == 6
    plain = ImageTextPairs(rows(), counted)
    texts(plain)
    texts(plain)
    assert len(calls) == 6 + 12


def test_pictures_of_several_sizes_can_be_cached():
    def as_is(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    records = rows(2)
    records[1]["image"] = encoded(1, size=(5, 9))
    pairs = ImageTextPairs(records, as_is, cache=True, progress=False)
    assert [tuple(pairs[i]["image"].shape) for i in range(2)] == [(3, 8, 8), (3, 9, 5)]


@pytest.mark.parametrize("cache", [False, True])
def test_bad_records_stop_with_their_position(cache):
    records = rows()
    records[4]["image"] = records[4]["image"][:40]
    with pytest.raises(RecordError, match="record 4, field 'image'"):
        texts(ImageTextPairs(records, prepare, cache=cache, progress=False))
    records = rows()
    records[3]["captions"] = ["fine", ""]
    with pytest.raises(RecordError, match="record 3, field 'captions'"):
        ImageTextPairs(records, prepare, cache=cache, progress=False)
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        ImageTextPairs(rows(), prepare, on_bad_record="ignore")


@pytest.mark.parametrize("cache", [False, True])
def test_bad_records_are_skipped_and_counted_once(cache):
    records = rows()
    records[2]["captions"] = [" "]
    records[4]["image"] = b"no picture"
    pairs = ImageTextPairs(stored(records), prepare, cache=cache, on_bad_record="skip", progress=False)
    seen = [pairs[i]["image_id"] for _ in range(2) for i in range(len(pairs))]
    assert identity("id2") not in seen and identity("id4") not in seen
    assert len(pairs) == (4 if cache else 5)  # without a cache the next good row stands in
    if not cache:
        assert seen[:5] == [identity(f"id{i}") for i in (0, 1, 3, 5, 5)]
        assert pairs[3]["text"].startswith("5 ")
    report = pairs.report()
    assert (report["rows"], report["skipped"], report["fraction_kept"]) == (6, 2, 4 / 6)
    assert any("record 2" in fault for fault in report["first_faults"])
    assert ImageTextPairs(rows(), prepare, on_bad_record="skip").report()["skipped"] == 0


def test_a_stand_in_that_repeats_a_picture_carries_its_identity():
    records = rows(12)
    for row in range(0, 12, 3):
        records[row]["image"] = b"no picture"
    repeats = {}
    for cache in (False, True):
        pairs = ImageTextPairs(records, prepare, cache=cache, on_bad_record="skip", progress=False)
        repeats[cache] = 0
        for indices in UniqueImageBatchSampler(pairs.image_ids, 6):
            items = [pairs[index] for index in indices]
            shown, identities = ([int(item["image"][0, 0, 0]) for item in items], [i["image_id"] for i in items])
            assert identities == [identity(f"id{picture}") for picture in shown]
            assert [item["text"].split()[0] for item in items] == [str(picture) for picture in shown]
            repeats[cache] += len(shown) - len(set(shown))
    assert repeats[True] == 0 < repeats[False]


def test_nothing_usable_is_an_error():
    records = [{**row, "image": b"no picture"} for row in rows(2)]
    with pytest.raises(RecordError):
        ImageTextPairs(records, prepare, on_bad_record="skip", cache=True, progress=False)
    with pytest.raises(RecordError):
        ImageTextPairs(records, prepare, on_bad_record="skip")[0]


def test_workers_see_the_epoch_and_their_skips_are_counted():
    records = rows(8)
    records[1]["image"] = b"no picture"
    pairs = ImageTextPairs(records, prepare, on_bad_record="skip")
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=lambda items: [i["text"] for i in items]
    )
    epochs = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        epochs.append([text for batch in loader for text in batch])
        assert epochs[epoch] == texts(pairs)
    assert epochs[0] != epochs[1]
    assert pairs.report()["skipped"] == 1


def test_compose_functions():
    generator = np.random.default_rng(0)
    record = {"captions": ["one", "two"], "keywords": "x, y,, z", "tags": ["p", "q"], "none": ""}
    assert first_caption(record, generator) == "one"
    assert {draw_caption(record, generator) for _ in range(30)} == {"one", "two"}
    joined = caption_with_keywords("keywords", "tags", caption=first_caption)
    assert joined(record, generator) == "one, x, y, z, p, q"
    assert pickle.loads(pickle.dumps(joined))(record, generator) == "one, x, y, z, p, q"
    assert caption_with_keywords("none", caption=first_caption)(record, generator) == "one"
    assert caption_with_keywords("keywords", keep=0.0, caption=first_caption)(record, generator) == "one"
    shuffled = caption_with_keywords("keywords", "tags", shuffle=True, separator=" | ", caption=first_caption)
    results = {shuffled(record, generator) for _ in range(10)}
    assert len(results) > 1 and {tuple(sorted(result.split(" | "))) for result in results} == {
        ("one", "p", "q", "x", "y", "z")
    }
    with pytest.raises(RecordError, match="no column 'keyword'.*mean 'keywords'"):
        caption_with_keywords("keyword")(record, generator)
    with pytest.raises(ValueError, match="at least one column"):
        caption_with_keywords()
    with pytest.raises(ValueError, match="keep=2"):
        caption_with_keywords("keywords", keep=2)
    with pytest.raises(ValueError, match="chance=-1"):
        caption_with_keywords("keywords", chance=-1)


def test_the_chance_of_keywords_is_a_captions_own_draw():
    record = {"captions": ["one"], "keywords": "a, b"}
    generator = np.random.default_rng(0)
    never, always, often = (caption_with_keywords("keywords", chance=chance) for chance in (0.0, 1.0, 0.75))
    assert {never(record, generator) for _ in range(20)} == {"one"}
    assert {always(record, generator) for _ in range(20)} == {"one, a, b"}
    texts = [often(record, generator) for _ in range(400)]
    assert set(texts) == {"one", "one, a, b"}
    assert 0.65 < texts.count("one, a, b") / 400 < 0.85
    pairs = ImageTextPairs(rows(1), prepare, compose=caption_with_keywords("keywords", caption=first_caption))
    assert pairs[0]["text"] == "0 0, a, b, c"


class Processor:
    """Words as numbers, pictures as they are."""

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True, max_length=99):
        assert return_tensors == "pt" and padding
        if images is not None:
            return {"pixel_values": torch.stack([image.float() for image in images])}
        lines = [[len(word) for word in line.split()][:max_length] for line in text]
        longest = max(map(len, lines))
        ids = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def noise(images, generator):
    return images.float() + torch.rand(images.shape, generator=generator)


def test_a_batch_is_a_function_of_its_items_and_the_seed():
    pairs = ImageTextPairs(rows(), prepare)
    items = [pairs[i] for i in (0, 3, 5)]
    batch = PairCollator(Processor(), noise)(items)
    assert batch["pixel_values"].shape == (3, 3, 4, 4) and batch["image_ids"].dtype == torch.int64
    assert batch["image_ids"].tolist() == [identity(f"id{i}") for i in (0, 3, 5)]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 2)
    torch.rand(3)  # the global generator plays no part
    again = PairCollator(Processor(), noise)(items)
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert not torch.equal(batch["pixel_values"], PairCollator(Processor(), noise, seed=1)(items)["pixel_values"])
    pairs.set_epoch(1)
    later = PairCollator(Processor(), noise)([pairs[i] for i in (0, 3, 5)])
    assert not torch.equal(batch["pixel_values"], later["pixel_values"])


def test_collating_without_augmentation_and_bad_batches():
    items = [
        {"image": torch.zeros(3, size, 4, dtype=torch.uint8), "text": "a b c", "image_id": 1, "draw": 0}
        for size in (4, 5)
    ]
    batch = PairCollator(Processor(), max_length=2)(items[:1])
    assert batch["pixel_values"].shape == (1, 3, 4, 4) and batch["input_ids"].shape == (1, 2)
    with pytest.raises(ValueError, match="sizes"):
        PairCollator(Processor(), noise)(items)
    with pytest.raises(ValueError, match="no items"):
        PairCollator(Processor(), noise)([])
