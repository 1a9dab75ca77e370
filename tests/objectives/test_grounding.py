"""Boxes ranked by a map, their overlap with the right one, and the share that is found; of a model whose map is known, and of ALBEF."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.evaluation.encoding import PictureError
from hf_vlp.evaluation.grounding import (
    are_right,
    best_boxes,
    box_scores,
    evaluate_grounding,
    intersection_over_union,
    map_at_size,
)
from hf_vlp.explain.attention_maps import image_maps, pair_maps
from tests.objectives.test_attention_maps import tiny


def test_a_box_scores_the_sum_inside_it_over_the_root_of_its_area():
    map_ = torch.arange(12.0).reshape(3, 4)
    boxes = [[0, 0, 4, 3], [1.9, 0.2, 2, 2.5], [3, 2, 5, 5], [-1, 0, 2, 1]]
    found = box_scores(map_[None], [boxes], [(3, 4)])[0]  # a map of the image's own size stays as it is
    sums = torch.tensor([66.0, map_[0:2, 1:3].sum(), 11.0, 0.0])
    torch.testing.assert_close(found, sums / torch.tensor([12.0, 5.0, 25.0, 2.0]).sqrt())
    torch.testing.assert_close(
        box_scores(map_[None], [boxes], [(3, 4)], power=1.0)[0], sums / torch.tensor([12.0, 5, 25, 2])
    )
    assert best_boxes([found], [boxes]).tolist() == [boxes[0]]


def test_each_image_has_its_own_size_and_boxes():
    torch.manual_seed(0)
    maps, sizes = torch.rand(2, 3, 3), [(6, 9), (12, 5)]
    boxes = [[[0, 0, 9, 6], [2, 1, 3, 3]], [[0, 0, 5, 12]]]
    together = box_scores(maps, boxes, sizes)
    assert [len(own) for own in together] == [2, 1]
    for position in range(2):
        alone = box_scores(
            maps[position : position + 1], boxes[position : position + 1], sizes[position : position + 1]
        )
        assert torch.equal(alone[0], together[position])
    assert not torch.allclose(together[0][0], box_scores(maps.flip(0), boxes, sizes)[0][0])
    assert map_at_size(maps, (6, 9)).shape == (2, 6, 9)
    assert torch.equal(map_at_size(maps, (6, 9))[1], map_at_size(maps[1], (6, 9)))


def test_of_equal_scores_the_first_wins_and_no_score_need_be_positive():
    boxes = [[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    assert best_boxes([torch.tensor([1.0, 2.0, 2.0])], [boxes]).tolist() == [boxes[1]]
    assert best_boxes([torch.tensor([-3.0, -2.0, -1.0])], [boxes]).tolist() == [boxes[2]]
    assert best_boxes([torch.zeros(3)], [boxes]).tolist() == [boxes[0]]


@pytest.mark.parametrize(
    ("other", "share"),
    [
        ([0, 0, 4, 4], 1.0),
        ([2, 0, 4, 4], 8 / 24),
        ([3, 0, 4, 4], 0.0),  # one column is shared, which counts as none
        ([2, 2, 4, 4], 4 / 28),
        ([2, 3, 4, 4], 0.0),
        ([9, 9, 4, 4], 0.0),
        ([1, 1, 2, 2], 4 / 16),
        ([0.5, 0, 4, 4], 3.5 * 4 / 18),
    ],
)
def test_overlap_counts_whole_pixels(other, share):
    box = torch.tensor([0.0, 0, 4, 4])
    assert intersection_over_union(box, torch.tensor(other)).item() == pytest.approx(share)
    assert intersection_over_union(torch.tensor(other), box).item() == pytest.approx(share)


def test_half_an_overlap_is_enough():
    wanted = torch.tensor([[0, 0, 4, 4]] * 4)
    chosen = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 4], [9, 9, 4, 4]])
    assert are_right(chosen, wanted).tolist() == [True, True, True, False]
    chosen[1] = torch.tensor([0, 0, 4, 1])
    assert are_right(chosen, wanted).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"boxes": [[[0, 0, 1, 1]]]}, "found 1 and 2"),
        ({"maps": torch.zeros(2, 3)}, r"must be \[B, h, w\]"),
        ({"boxes": [[[0, 0, 1, 1]], []]}, r"boxes of sample 1 are \(0,\)"),
        ({"boxes": [[[0, 0, 1, 1]], [[0, 0, 1, 1], [2, 2, 0, 5]]]}, r"sample 1: \[2.0, 2.0, 0.0, 5.0\] is no box"),
        ({"maps": torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.nan)])}, "map of sample 1 is not finite"),
    ],
)
def test_what_cannot_be_scored_is_named(change, match):
    given = {"maps": torch.zeros(2, 3, 3), "boxes": [[[0, 0, 1, 1]]] * 2, "sizes": [(3, 3)] * 2}
    assert len(box_scores(**given)) == 2
    with pytest.raises(ValueError, match=match):
        box_scores(**given | change)


def test_numbers_that_do_not_fit():
    boxes = torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="2 scores and 1 boxes"):
        best_boxes([torch.zeros(2)], [boxes])
    with pytest.raises(ValueError, match=r"others: \[0.0, 0.0, 0.0, 1.0\] is no box"):
        intersection_over_union(boxes, torch.tensor([0, 0, 0, 1]))


# ------------------------------------------------------------------------------------------------ of a model


class Pointer(torch.nn.Module):
    """A model whose map of 4 x 4 is 1 in one cell, of the number that the text ends with and the picture's red add up to."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.shapes = []

    def maps(self, input_ids, attention_mask, pixel_values):
        assert not self.training and torch.equal(attention_mask, (input_ids > 0).long())
        self.shapes.append(tuple(input_ids.shape))
        last = input_ids[torch.arange(len(input_ids)), attention_mask.sum(dim=1) - 1] - 1
        cells = torch.nn.functional.one_hot((last + pixel_values[:, 0, 0, 0].long()) % 16, 16)
        return self.weight * cells.reshape(-1, 4, 4)


class Reader:
    """Texts of numbers (one more, as 0 fills up); a picture is its first red pixel."""

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            reds = [float(picture.getpixel((0, 0))[0]) for picture in images]
            return {"pixel_values": torch.tensor(reds)[:, None, None, None].expand(-1, 3, 16, 16)}
        rows = [torch.tensor([int(word) + 1 for word in line.split()]) for line in text]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def picture(red: int = 0, width: int = 4, height: int = 4) -> Image.Image:
    return Image.new("RGB", (width, height), (red, 0, 0))


CORNERS = [[0, 0, 2, 2], [2, 2, 2, 2]]


def phrases() -> list[dict]:
    """Pictures of 4 x 4 pixels, so that a map is not changed: the cell that is meant has the score of its smallest box alone."""
    return [
        {
            "phrase": "9 0",
            "box": [0, 0, 2, 2],
            "proposals": [[0, 0, 4, 4], *CORNERS],
            "split": "val",
            "image": picture(),
        },
        {"phrase": "15", "box": [0, 0, 2, 2], "proposals": CORNERS, "split": "testA", "image": picture()},
        {"phrase": "5", "box": [3, 3, 1, 1], "proposals": [[0, 0, 1, 1]], "split": "val", "image": picture()},
        {
            "phrase": "7 7 3",
            "boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]],
            "label": 1,
            "split": "testA",
            "image": picture(7),
        },
    ]


def ground(records, model=None, **options):
    return evaluate_grounding(model or Pointer(), Reader(), records, Pointer.maps, progress=False, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_phrases_are_found_where_the_map_is(batch_size):
    model = Pointer().train()
    report = ground(phrases(), model, batch_size=batch_size)
    assert model.training and model.weight.grad is None
    # cell 0 in boxes of 16, 4 and 4 pixels; cell 15 in the second; cell 5 in none; cell 3 + 7 in the second
    assert [own.tolist() for own in report.scores] == [[0.25, 0.5, 0.0], [0.0, 0.5], [0.0], [0.0, 0.5]]
    assert report.chosen.tolist() == [[0, 0, 2, 2], [2, 2, 2, 2], [0, 0, 1, 1], [2, 2, 2, 2]]
    assert report.metrics == pytest.approx(
        {
            "accuracy": 50.0,
            "chance": 100 * (1 / 3 + 1 / 2 + 0 + 1 / 2) / 4,
            "reachable": 75.0,
            "testA/accuracy": 50.0,
            "testA/chance": 50.0,
            "testA/reachable": 100.0,
            "val/accuracy": 50.0,
            "val/chance": 100 / 6,
            "val/reachable": 50.0,
        }
    )
    assert report.counts == {"records": 4, "proposals": 8, "records/testA": 2, "records/val": 2}
    lines = report.table().splitlines()
    assert lines[0].split() == ["accuracy", "chance", "reachable"] and lines[-1] == report.protocol
    assert lines[1].split() == ["all", "50.0", "%", "33.3", "%", "75.0", "%"] and lines[3].startswith("val")
    assert "2.0 proposals for 4 phrases" in report.protocol and "scores" not in report.to_dict()


def test_another_order_of_the_records_changes_nothing():
    there, back = ground(phrases(), batch_size=2), ground(phrases()[::-1], batch_size=2)
    assert there.metrics == back.metrics and torch.equal(there.chosen, back.chosen.flip(0))
    moved = [row | {"image": picture(15 + row["image"].getpixel((0, 0))[0])} for row in phrases()]
    assert ground(moved).metrics["accuracy"] == 0.0
    assert not any("/" in name for name in ground([row | {"split": None} for row in phrases()]).metrics)


def test_fractions_become_whole_pixels_of_the_records_picture():
    """0.29 of 100 is a little less than 29 in binary numbers; the map's last column is that of the picture's right quarter."""
    record = {"phrase": "3", "image": picture(width=100, height=40), "boxes": [[0.29, 0, 0.5, 1], [0.78, 0, 1, 0.3]]}
    report = ground([record | {"label": 1}])
    assert report.chosen.tolist() == [[78.0, 0.0, 22.0, 12.0]] and report.metrics["accuracy"] == 100.0
    other = ground([record | {"label": 0, "phrase": "1"}])
    assert other.chosen.tolist() == [[29.0, 0.0, 21.0, 40.0]] and other.metrics["accuracy"] == 100.0
    assert ground([record | {"label": 0}]).metrics["accuracy"] == 0.0
    turned = ground([record | {"label": 1, "image": picture(width=40, height=100)}])
    assert turned.chosen.tolist() == [[31.2, 0.0, 8.8, 30.0]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"phrase": " "}, "record 1 has no phrase"),
        ({"box": None}, "record 1 does not say which box its phrase means. Give it `box`"),
        ({"box": [0, 0, 2]}, r"`box` of record 1 are \(1, 3\): each must be four numbers"),
        ({"proposals": []}, r"proposals of record 1 are \[\]: give at least one"),
        ({"proposals": [[0, 0, 2, 2], [1, 1, 2]]}, "proposals of record 1 are .*each must be four numbers"),
        ({"proposals": [[0, 0, 2, 0]]}, r"proposals of record 1: \[0.0, 0.0, 2.0, 0.0\] is no box"),
        ({"box": None, "boxes": [[0, 0, 1, 1]], "label": 1}, "record 1 has the label 1, no position in its 1 boxes"),
        ({"box": None, "boxes": [[0, 0, 0, 1]], "label": 0}, "boxes of record 1: .* is no box"),
        ({"box": None, "boxes": [], "label": 0}, "boxes of record 1 are"),
    ],
)
def test_a_phrase_that_cannot_be_measured_is_named(change, match):
    rows = phrases()
    with pytest.raises(ValueError, match=match):
        ground([rows[0], rows[1] | change, *rows[2:]])


def test_a_picture_that_is_missing_is_named_and_so_are_no_records():
    rows = phrases()
    with pytest.raises(PictureError, match="record 2 has no picture"):
        ground([*rows[:2], rows[2] | {"image": None}])
    with pytest.raises(ValueError, match="no phrases to encode"):
        ground([])


class Ids:
    """Texts of numbers as they are, and pictures of 2 x 3 patches, each as bright as the picture there."""

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            drawn = [torch.from_numpy(np.array(one.convert("L").resize((24, 16)))) for one in images]
            return {"pixel_values": torch.stack(drawn).unsqueeze(1).expand(-1, 3, -1, -1) / 255 - 0.5}
        return Reader()(text=text)


def scenes(seed: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in (3, 9, 5):
        words = torch.randint(5, 58, (length,), generator=draw).tolist()
        noise = torch.randint(0, 255, (4, 6, 3), dtype=torch.uint8, generator=draw).numpy()
        row = {"phrase": " ".join(map(str, words)), "image": Image.fromarray(noise).resize((30, 20))}
        row["proposals"] = [[x, y, 10, 10] for x in (0, 10, 20) for y in (0, 10)]
        rows.append(row | {"box": row["proposals"][0]})
    return rows


@pytest.mark.parametrize("maps", [pair_maps, partial(pair_maps, layer=2), partial(image_maps, block=1)])
def test_phrases_of_albef_stand_alone_in_a_batch(maps):
    """What a phrase is batched with, its padding and its place change no score; the model is left without gradients."""
    model, rows = tiny(), scenes()
    together = evaluate_grounding(model, Ids(), rows, maps, progress=False)
    for position, row in enumerate(rows):
        alone = evaluate_grounding(model, Ids(), [row], maps, progress=False)
        torch.testing.assert_close(alone.scores[0], together.scores[position], rtol=1e-4, atol=1e-7)
        assert alone.scores[0].std() > 0
    assert all(value.grad is None for value in model.parameters())
    other = evaluate_grounding(tiny(seed=1), Ids(), rows, maps, progress=False)
    assert not torch.allclose(other.scores[1], together.scores[1], rtol=1e-2)


def test_layers_look_elsewhere():
    found = [
        evaluate_grounding(tiny(), Ids(), scenes(), partial(pair_maps, layer=layer), progress=False) for layer in (2, 4)
    ]
    papers = evaluate_grounding(tiny(), Ids(), scenes(), pair_maps, progress=False)
    assert torch.equal(papers.scores[0], found[1].scores[0]) and not torch.allclose(
        papers.scores[0], found[0].scores[0]
    )
    with pytest.raises(ValueError, match="layer 9 has no attention to the image"):
        evaluate_grounding(tiny(), Ids(), scenes(), partial(pair_maps, layer=9), progress=False)
