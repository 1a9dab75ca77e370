"""Boxes ranked by a map, their overlap with the right one, and the share that is found."""

import pytest
import torch

from hf_vlp.evaluation.grounding import (
    best_boxes,
    box_scores,
    grounding_accuracy,
    intersection_over_union,
    map_at_size,
)


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


def test_accuracy_of_each_split():
    wanted = torch.tensor([[0, 0, 4, 4]] * 4)
    chosen = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 4], [9, 9, 4, 4]])
    found = grounding_accuracy(chosen, wanted, ["val", "testA", "testB", "val"])  # half an overlap is enough
    assert found == {"testA": 1.0, "testB": 1.0, "val": 0.5}
    chosen[1] = torch.tensor([0, 0, 4, 1])
    assert grounding_accuracy(chosen, wanted, ["val", "testA", "testB", "val"])["testA"] == 0.0


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
    with pytest.raises(ValueError, match="1 chosen boxes, 1 wanted ones, 2 splits"):
        grounding_accuracy(boxes, boxes, ["val", "val"])
    with pytest.raises(ValueError, match=r"others: \[0.0, 0.0, 0.0, 1.0\] is no box"):
        intersection_over_union(boxes, torch.tensor([0, 0, 0, 1]))
