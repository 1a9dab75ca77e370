"""Crisscrossed Captions: hand-worked ranks, brute force over random annotations, the files and what is wrong with them."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from hf_vlp.data.crisscrossed import read_crisscrossed
from hf_vlp.data.record import RecordError
from hf_vlp.evaluation.crisscrossed import crisscrossed_metrics, crisscrossed_ranks, evaluate_crisscrossed
from hf_vlp.evaluation.ranks import MISS, best_ranks_of_pairs, recalls

EMPTY = {"image_to_text": {}, "text_to_image": {}, "text_to_text": {}, "image_to_image": {}}


def by_hand(scores, positives):
    """The definition, with a plain sort, over scores without ties: the best place of any positive, None without one."""
    ranks = []
    for row, good in zip(scores.tolist(), positives):
        order = sorted(range(len(row)), key=lambda target: -row[target])
        ranks.append(min((order.index(target) for target in good), default=MISS))
    return ranks


@pytest.mark.parametrize("seed", range(12))
def test_pairs_by_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, targets = (int(number) for number in torch.randint(1, 15, (2,), generator=generator))
    x, y = torch.randn(queries, 6, generator=generator), torch.randn(targets, 6, generator=generator)
    pairs = torch.stack(
        [torch.randint(limit, (12,), generator=generator) for limit in (queries, targets)], dim=1
    )  # some of them twice, some queries without any
    positives = [{int(target) for query, target in pairs if query == row} for row in range(queries)]
    expected = by_hand(x @ y.T, positives)
    for block in (1, 4, None):
        assert best_ranks_of_pairs(x, y, pairs, block=block).tolist() == expected
    within = x @ x.T
    within.fill_diagonal_(0.0)
    pairs = pairs % queries
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    positives = [{int(target) for query, target in pairs if query == row} for row in range(queries)]
    for block in (1, 3, None):
        found = best_ranks_of_pairs(x, x, pairs, self_score=0.0, block=block)
        assert found.tolist() == by_hand(within, positives)


def test_a_tied_positive_that_is_listed_twice_is_taken_off_once():
    x, y = torch.ones(1, 1), torch.ones(4, 1)
    assert best_ranks_of_pairs(x, y, torch.tensor([[0, 1], [0, 1], [0, 2]])).tolist() == [2]
    assert best_ranks_of_pairs(x, y, torch.tensor([[0, 1]])).tolist() == [3]


def test_a_row_scores_nothing_with_itself():
    x = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.8, 0.6]])
    pairs = torch.tensor([[0, 1]])
    # -0.6 with the positive: the 0 of the row itself stands before it, and would not if left out
    assert best_ranks_of_pairs(x, x, pairs, self_score=0.0).tolist() == [1, MISS, MISS]
    assert best_ranks_of_pairs(x, x, pairs, self_score=-1.0).tolist() == [0, MISS, MISS]
    with pytest.raises(ValueError, match="are not the same rows"):
        best_ranks_of_pairs(x, x[:2], pairs, self_score=0.0)


def test_pairs_that_name_no_row():
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"pair 1 \[0, 3\] names no row of 3 queries, 3 targets"):
        best_ranks_of_pairs(x, x, torch.tensor([[0, 1], [0, 3]]))
    with pytest.raises(ValueError, match=r"\[Q, 2\]"):
        best_ranks_of_pairs(x, x, torch.tensor([0, 1]))
    assert best_ranks_of_pairs(x, x, torch.zeros(0, 2, dtype=torch.int64)).tolist() == [MISS] * 3


def test_a_miss_counts_at_no_k():
    ranks = torch.tensor([0, MISS])
    assert recalls(ranks, ks=(1, 10**9))["R@1000000000"] == 50.0


def worked():
    """Three images with two captions each, on a circle: angles in degrees."""

    def at(*degrees):
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    images, texts = at(0.0, 40.0, 100.0), at(45.0, 3.0, 1.0, 41.0, 99.0, 30.0)
    image_ids, text_ids = ["7", "8", "9"], ["70", "71", "80", "81", "90", "91"]
    annotations = {
        "image_to_text": {"7": [[70, 5.0], [71, 5.0]], "8": [[80, 1.0]], "9": [[555, 5.0]]},
        "text_to_image": {"70": [[7, 5.0], [8, 0.5]], "71": [["7", 5]], "80": [[8, 5.0]], "81": [], "90": [[9, 4.0]]},
        "text_to_text": {"70": [[81, 3.0], [91, 2.9]], "71": [[80, 2.9]]},
        "image_to_image": {"7": [[9, 2.5]], "8": [[9, 2.4]], "9": [[8, 5.0], [555, 5.0]]},
    }
    return images, texts, image_ids, text_ids, torch.arange(6) // 2, annotations


def test_a_worked_example():
    ranks = crisscrossed_ranks(*worked())
    # image 7 (0 deg): texts in order 80 (1), 71 (3), 91, 81, 70, 90; image 8: 81, 70, 91, 71, 80, 90; image 9 has none here
    assert ranks["image_to_text"].tolist() == [1, 4, MISS]
    # 70 (45 deg): image 8 is its positive whatever the score; 80 (1 deg): image 7 stands before 8; 81, 91: without any
    assert ranks["text_to_image"].tolist() == [0, 0, 1, MISS, 0, MISS]
    # 70 (45): 81 at 41 is annotated with 3.0, 91 with less; 71 (3): sibling 70 behind 80, 91, 81; 80 (1): sibling 81 behind 71, 91;
    # 81 (41): sibling 80 behind 70, 91, 71; 90 (99): sibling 91 behind 70, 81; 91 (30): sibling 90 behind all but itself
    assert ranks["text_to_text"].tolist() == [0, 3, 2, 3, 2, 4]
    # 7 (0): 9 at 100 scores below 0, so 8 and the image itself stand before; 8 has no pair of 2.5 or more
    assert ranks["image_to_image"].tolist() == [2, 0]
    metrics = crisscrossed_metrics(ranks, ks=(1, 2))
    assert metrics["image_to_text/R@2"] == pytest.approx(100 / 3) and metrics["image_to_image/R@1"] == 50.0
    assert set(metrics) == {f"{direction}/R@{k}" for direction in ranks for k in (1, 2)}


def test_without_the_marks_of_the_protocol_the_numbers_differ():
    images, texts, image_ids, text_ids, owners, annotations = worked()
    ranks = crisscrossed_ranks(images, texts, image_ids, text_ids, owners, annotations)
    lower = {name: dict(lists) for name, lists in annotations.items()}
    lower["text_to_text"] = {"70": [], "71": [[80, 3.0]]}
    lower["image_to_image"] = annotations["image_to_image"] | {"8": [[9, 2.5]]}
    changed = crisscrossed_ranks(images, texts, image_ids, text_ids, owners, lower)
    assert changed["text_to_text"].tolist()[:2] == [2, 0] and len(changed["image_to_image"]) == 3
    assert changed["image_to_text"].tolist() == ranks["image_to_text"].tolist()


def test_names_that_do_not_fit():
    images, texts, image_ids, text_ids, owners, annotations = worked()
    with pytest.raises(ValueError, match="image_to_text know none of the 3 queries, such as 1;"):
        crisscrossed_ranks(images, texts, ["1", "2", "3"], text_ids, owners, annotations)
    with pytest.raises(ValueError, match="3 image features need one name each; 3 are given, 2 of them different"):
        crisscrossed_ranks(images, texts, ["7", "7", "8"], text_ids, owners, annotations)
    with pytest.raises(ValueError, match="6 captions need one owner each"):
        crisscrossed_ranks(images, texts, image_ids, text_ids, owners[:5], annotations)
    assert crisscrossed_metrics({"image_to_image": torch.zeros(0, dtype=torch.int64)})["image_to_image/R@1"] == 0.0


def write_files(folder, **changes):
    _, _, image_ids, text_ids, _, annotations = worked()
    files = {
        "testall_ids.txt": "".join(f"{name}\n{name}\n" for name in image_ids),
        "testall_capids.txt": "\n".join(text_ids) + "\n",
        "cxc_it.json": json.dumps({"i2t": annotations["image_to_text"], "t2i": annotations["text_to_image"]}),
        "cxc_t2t.json": json.dumps(annotations["text_to_text"]),
        "cxc_i2i.json": json.dumps(annotations["image_to_image"]),
    }
    folder.mkdir(exist_ok=True)
    for name, text in (files | changes).items():
        (folder / name).write_text(text)
    return folder


def test_the_files(tmp_path):
    write_files(tmp_path / "cxc_annots")
    read = read_crisscrossed(tmp_path)
    assert read.captions_of == {"7": ["70", "71"], "8": ["80", "81"], "9": ["90", "91"]}
    assert read.annotations["text_to_image"]["70"] == [[7, 5.0], [8, 0.5]]
    assert read.annotations == read_crisscrossed(tmp_path / "cxc_annots").annotations
    images, texts, image_ids, text_ids, owners, annotations = worked()
    given = crisscrossed_ranks(images, texts, image_ids, text_ids, owners, annotations)
    found = crisscrossed_ranks(images, texts, image_ids, text_ids, owners, read.annotations)
    assert all(torch.equal(given[name], found[name]) for name in given)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("testall_ids.txt", "7\n7\n8\n", "3 lines, where testall_capids.txt has 6"),
        ("testall_ids.txt", "7\n8\n7\n8\n9\n9\n", "record 2, .*lines of image 7 do not stand together"),
        ("testall_capids.txt", "70\n71\n70\n81\n90\n91\n", "record 2, .*caption 70 stands twice"),
        ("testall_ids.txt", "", "the file is empty"),
        ("cxc_it.json", "{}", "no 'i2t'"),
        ("cxc_t2t.json", "[1", "cxc_t2t.json.*not JSON"),
        ("cxc_i2i.json", "[]", "cxc_i2i.json.*a list, not an object"),
        ("cxc_i2i.json", '{"7": [[8]]}', "entry of 7 is no list of .id, score. pairs"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(RecordError, match=message):
        read_crisscrossed(write_files(tmp_path / "files", **{name: text}))


def test_a_missing_file(tmp_path):
    (write_files(tmp_path / "files") / "cxc_i2i.json").unlink()
    with pytest.raises(FileNotFoundError, match="cxc_i2i.json"):
        read_crisscrossed(tmp_path / "files")


class Model(torch.nn.Module):
    """Pictures and captions are angles in degrees."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def get_image_features(self, pixel_values):
        angles = pixel_values.deg2rad() * self.one
        return normalize(torch.stack([angles.cos(), angles.sin()], dim=1))

    def get_text_features(self, input_ids, attention_mask):
        return self.get_image_features(input_ids[:, 0])


class Processor:
    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": torch.tensor(images)}
        ids = torch.tensor([[float(line)] for line in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_records_in_any_order(tmp_path):
    read = read_crisscrossed(write_files(tmp_path / "files"))
    rows = [
        {"image": 100.0, "captions": ["99.0", "30.0"], "image_id": 9},
        {"image": 0.0, "captions": ["45.0"], "image_id": "7"},
        {"image": 40.0, "captions": ["1.0", "41.0", "a third caption is not among the annotated"], "image_id": 8},
        {"image": 0.0, "captions": ["3.0"], "image_id": "7"},
    ]
    report = evaluate_crisscrossed(
        Model(), Processor(), rows, read.captions_of, read.annotations, batch_size=2, progress=False
    )
    assert report.metrics == crisscrossed_metrics(crisscrossed_ranks(*worked()))
    assert report.counts["images"] == 3 and report.counts["captions"] == 6
    assert report.counts["text_to_image/without_positive"] == 2 and report.counts["image_to_image/queries"] == 2
    table = report.table().splitlines()
    assert len({len(line) for line in table[:5]}) == 1 and table[3].startswith("text to text")
    assert set(report.to_dict()) == {"metrics", "counts", "protocol"}
    # the captions of an image in another order are other captions
    swapped = [rows[0], rows[3], rows[2], rows[1]]
    other = evaluate_crisscrossed(Model(), Processor(), swapped, read.captions_of, read.annotations, progress=False)
    assert other.metrics != report.metrics
    strange = [*rows, {"image": 1.0, "captions": ["5.0", "6.0"], "image_id": 10}]
    with pytest.raises(ValueError, match="record 4 has the image_id 10, which the annotations lack"):
        evaluate_crisscrossed(Model(), Processor(), strange, read.captions_of, read.annotations, progress=False)
    with pytest.raises(ValueError, match=r"\[1, 2\] annotated captions"):
        evaluate_crisscrossed(Model(), Processor(), rows, read.captions_of | {"7": ["70"]}, read.annotations)
