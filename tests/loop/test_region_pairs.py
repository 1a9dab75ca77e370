"""Pairs and batches of regions: a store in place of pictures, bad rows by their position, and draws that are functions of the items."""

import pickle

import numpy as np
import pytest
import torch

from hf_vlp.data.collate import PairCollator
from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.data.record import RecordError, identity
from hf_vlp.inputs.caption_augmentation import CaptionAugmentation
from hf_vlp.inputs.grid_augmentation import GridDropping
from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
from hf_vlp.inputs.region_store import write_region_store
from hf_vlp.inputs.regions import RegionDropping, RegionFeatures, pad_regions
from hf_vlp.inputs.vocabulary import train_wordpiece_tokenizer
from hf_vlp.inputs.word_tokenizer import train_word_tokenizer
from hf_vlp.models.vse.processing_vse import VlpVseProcessor

CAPTIONS = [[f"a picture of {number} boats on the lake", f"{number} boats"] for number in range(6)]


@pytest.fixture
def store(tmp_path):
    """Image `n<i>` has i + 3 regions, all of whose numbers are i."""
    regions = [RegionFeatures(np.full((i + 3, 4), i, np.float32), image_id=f"n{i}") for i in range(6)]
    return write_region_store(tmp_path / "a.regions", regions)


def rows(**columns):
    return [
        {"captions": CAPTIONS[i], "image_id": f"id{i}", **{name: give(i) for name, give in columns.items()}}
        for i in range(6)
    ]


def processor(store, tokenizer=None):
    tokenizer = tokenizer or train_wordpiece_tokenizer(sum(CAPTIONS, []), 200, 32)
    extractor = VlpRegionFeatureExtractor(feature_size=4, region_store=str(store.path))
    return VlpVseProcessor(tokenizer=tokenizer, feature_extractor=extractor)


def test_regions_are_found_by_their_key_or_the_image_id(store):
    by_key = ImageTextPairs(rows(regions=lambda i: f"n{i}"), regions=store)
    by_id = ImageTextPairs([row | {"image_id": f"n{i}"} for i, row in enumerate(rows())], regions=store)
    for pairs in (by_key, by_id):
        for index in range(6):
            item = pairs[index]
            assert set(item) == {"regions", "text", "image_id", "draw"} and item["text"] in CAPTIONS[index]
            assert item["regions"].features.tolist() == [[index] * 4] * (index + 3)
    # the identity is the image's, whatever the key is
    assert by_key.image_ids.tolist() == [identity(f"id{i}") for i in range(6)]
    again = pickle.loads(pickle.dumps(by_key))  # as a loader's workers get it
    assert again[2]["regions"].features[0, 0] == 2 and again[2]["text"] == by_key[2]["text"]


def test_a_key_without_an_image_id_is_the_identity(store):
    split = [{"captions": [text], "regions": f"n{i}"} for i in range(3) for text in CAPTIONS[i]]
    assert ImageTextPairs(split, regions=store).image_ids.tolist() == [identity(f"n{i // 2}") for i in range(6)]
    shown = [{"captions": [text], "image_id": i} for i, text in enumerate(sum(CAPTIONS[:3], []))]
    assert len(set(ImageTextPairs(shown, regions=store).image_ids.tolist())) == 6


@pytest.mark.parametrize(("key", "reason"), [("n7", "no such key"), (None, "None is no image id"), ("", "no such key")])
def test_a_missing_key_names_the_record_or_is_skipped(store, key, reason):
    records = rows(regions=lambda i: key if i == 4 else f"n{i}")
    message = f"record 4, field 'regions': .*{reason}.*[a-z]\\. Repair or remove.*on_bad_record='skip'"
    with pytest.raises(RecordError, match=message) as caught:
        [ImageTextPairs(records, regions=store)[index] for index in range(6)]
    assert caught.value.position == 4
    pairs = ImageTextPairs(records, regions=store, on_bad_record="skip")
    seen = [pairs[index] for index in range(6)]
    assert [int(item["regions"].features[0, 0]) for item in seen] == [0, 1, 2, 3, 5, 5]  # the next stands in, whole
    assert seen[4]["text"] in CAPTIONS[5] and seen[4]["image_id"] == identity("id5")
    report = pairs.report()
    assert report["skipped"] == 1 and "record 4, field 'regions'" in report["first_faults"][0]


def test_pictures_and_regions_are_not_both_given(store):
    for options in ({}, {"prepare": lambda picture: picture, "regions": store}, {"regions": store, "cache": True}):
        with pytest.raises(ValueError, match="give prepare=, for pictures, or regions="):
            ImageTextPairs(rows(), **options)


def test_records_of_regions_need_no_picture_column(store):
    from datasets import Dataset

    pairs = ImageTextPairs(Dataset.from_list(rows(regions=lambda i: f"n{i}")), regions=store)
    assert pairs[5]["regions"].features.shape == (8, 4)


def items_of(store, *indices, epoch=0, seed=0):
    pairs = ImageTextPairs(rows(regions=lambda i: f"n{i}"), regions=store, seed=seed)
    pairs.set_epoch(epoch)
    return [pairs[index] for index in indices]


def test_a_batch_of_regions(store):
    items = items_of(store, 0, 5, 2)
    batch = PairCollator(processor(store))(items)
    assert set(batch) == {"region_features", "region_mask", "input_ids", "attention_mask", "image_ids"}
    assert batch["region_features"].shape == (3, 8, 4) and batch["region_mask"].sum(dim=1).tolist() == [3, 8, 5]
    assert all(torch.equal(batch[name], tensor) for name, tensor in pad_regions([i["regions"] for i in items]).items())
    plain = processor(store)(text=[item["text"] for item in items])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert batch["image_ids"].tolist() == [identity(f"id{i}") for i in (0, 5, 2)]


def test_draws_are_functions_of_the_items_and_the_seed(store):
    def made(items, **options):
        words = CaptionAugmentation(processor(store).tokenizer, 0.4)
        return PairCollator(processor(store), RegionDropping(0.5), augment_text=words, **options)(items)

    def same(one, other):
        return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one)

    items = items_of(store, 0, 5, 2)
    batch = made(items)
    torch.rand(5)  # the global generator plays no part
    assert same(batch, made(items)) and same(batch, made(items_of(store, 0, 5, 2)))
    assert not same(batch, made(items, seed=1)) and not same(batch, made(items_of(store, 0, 5, 2, epoch=1)))
    assert not same(batch, made(items_of(store, 0, 5, 2, seed=1)))
    # fewer regions than there are, in their order, and at least one of each image
    counts = [made(items_of(store, 0, 5, 2, epoch=epoch))["region_mask"].sum(dim=1) for epoch in range(60)]
    assert torch.stack(counts).double().mean(dim=0).tolist() == pytest.approx([1.5, 4, 2.5], abs=0.5)
    assert min(int(one.min()) for one in counts) == 1


@pytest.mark.parametrize("kind", ["pieces", "words"])
def test_captions_are_augmented_with_the_generator_behind_the_regions(store, kind):
    texts = sum(CAPTIONS, [])
    tokenizer = train_wordpiece_tokenizer(texts, 200, 32) if kind == "pieces" else train_word_tokenizer(texts, 1)
    words = CaptionAugmentation(tokenizer, 0.5)
    items = items_of(store, 1, 3, 4)
    collator = PairCollator(processor(store, tokenizer), RegionDropping(0.5), augment_text=words, seed=3)
    batch, generator = collator(items), collator._generator(items)
    dropped = RegionDropping(0.5)([item["regions"] for item in items], generator)
    assert torch.equal(batch["region_features"], pad_regions(dropped)["region_features"])
    expected = words([item["text"] for item in items], generator)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    plain = PairCollator(processor(store, tokenizer))(items)["input_ids"]
    assert batch["input_ids"].tolist() != plain.tolist()


def test_grid_masks_come_with_pictures():
    class Pictures:
        def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
            if text is not None:
                return {"input_ids": torch.ones(len(text), 2, dtype=torch.int64)}
            return {"pixel_values": torch.stack(images).float()}

    items = [
        {"image": torch.full((3, 4, 4), i, dtype=torch.uint8), "text": "a", "image_id": i, "draw": 7 + i}
        for i in range(8)
    ]
    assert "grid_mask" not in PairCollator(Pictures())(items)
    collator = PairCollator(Pictures(), draw_cells=GridDropping(9, 0.5))
    batch, again = collator(items), collator(items)
    assert batch["grid_mask"].shape == (8, 9) and batch["grid_mask"].dtype == torch.int64
    assert torch.equal(batch["grid_mask"], again["grid_mask"]) and 0 < batch["grid_mask"].sum() < 72
    assert torch.equal(batch["grid_mask"], GridDropping(9, 0.5)(8, collator._generator(items)))
    assert not torch.equal(batch["grid_mask"], collator(items[::-1])["grid_mask"])
