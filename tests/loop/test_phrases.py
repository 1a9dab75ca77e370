"""Phrases as items to train on: what they hold, which belong together, and what a bad one gets."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.data.phrases import Phrases
from hf_vlp.data.record import RecordError


def rows() -> list[dict]:
    """Three phrases about two pictures; one says what it means."""
    texts = (("left boat", "a"), ("right boat", "a"), ("boat", "b"))
    made = [
        {"image": Image.new("RGB", (4, 4), (9 * n, 0, 0)), "phrase": t, "image_id": i} for n, (t, i) in enumerate(texts)
    ]
    made[2] |= {"box": [0, 0, 2, 2], "proposals": [[0, 0, 2, 2]]}
    return made


def prepare(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_an_item_is_a_picture_with_its_phrase():
    items = Phrases(rows(), prepare)
    assert [items[place]["text"] for place in range(3)] == ["left boat", "right boat", "boat"]
    assert set(items[2]) == {"image", "text", "image_id", "draw"}  # boxes are not for training
    assert [int(items[place]["image"][0, 0, 0]) for place in range(3)] == [0, 9, 18]
    assert items.image_ids[0] == items.image_ids[1] != items.image_ids[2]
    assert items.caption_counts().tolist() == [1, 1, 1]


@pytest.mark.parametrize("phrase", [None, " ", ["boat"]])
def test_a_phrase_that_is_none_is_named_or_left_out(phrase):
    bad = [rows()[0], rows()[1] | {"phrase": phrase}, rows()[2]]
    with pytest.raises(RecordError, match="record 1, field 'phrase'"):
        Phrases(bad, prepare)
    left = Phrases(bad, prepare, on_bad_record="skip")
    assert len(left) == 2 and left[1]["text"] == "boat" and left.report()["skipped"] == 1
    with pytest.raises(RecordError, match="field 'phrase': the record has no such field"):
        Phrases([{"image": rows()[0]["image"], "captions": ["a boat"]}], prepare)
