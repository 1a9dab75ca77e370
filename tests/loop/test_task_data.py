"""Questions, statements and hypotheses: items, labels, batches, and what bad records do."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.data.record import RecordError, identity
from hf_vlp.data.tasks import Hypotheses, Questions, Statements, TaskCollator

LABEL2ID = {"yes": 0, "no": 1, "red": 2}


def prepare(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def encoded(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def answer(text, score=1.0):
    return {"answer": text, "score": score}


def questions():
    given = [
        [answer("yes", 0.9), answer("no", 0.3)],
        [answer("blue")],  # none in the vocabulary
        [answer("red", 0.3), answer("blue", 1.0), answer("red", 0.6)],
        [],
    ]
    return [
        {
            "image": encoded(i),
            "question": f"question {i}?",
            "question_id": 100 + i,
            "answers": answers,
            "image_id": i // 2,
        }
        for i, answers in enumerate(given)
    ]


def statements(count=4):
    return [
        {
            "images": [encoded(2 * i), encoded(2 * i + 1, size=(4, 12))],
            "statement": f"statement {i}",
            "label": (True, False, 1, 0)[i % 4],
            "identifier": f"dev-{i}",
        }
        for i in range(count)
    ]


def hypotheses():
    labels = ("entailment", "neutral", "contradiction")
    return [{"image": encoded(i), "hypothesis": f"hypothesis {i}", "label": label} for i, label in enumerate(labels)]


def stored(records, images=False):
    """The same records as a `datasets.Dataset` with decoded pictures."""
    from datasets import Dataset, Image, List

    def held(value):
        return [{"bytes": one, "path": None} for one in value] if images else {"bytes": value, "path": None}

    field = "images" if images else "image"
    table = Dataset.from_list([{**row, field: held(row[field])} for row in records])
    return table.cast_column(field, List(Image()) if images else Image())


class Processor:
    """Words as numbers; pictures padded to one canvas."""

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True, max_length=99):
        if images is not None:
            height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
            values = torch.zeros(len(images), 3, height, width)
            mask = torch.zeros(len(images), height, width, dtype=torch.int64)
            for row, image in enumerate(images):
                values[row, :, : image.shape[1], : image.shape[2]] = image
                mask[row, : image.shape[1], : image.shape[2]] = 1
            return {"pixel_values": values, "pixel_mask": mask}
        lines = [[len(word) for word in line.split()][:max_length] for line in text]
        longest = max(map(len, lines))
        ids = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def noise(images, generator):
    return images.float() + torch.rand(images.shape, generator=generator)


# ------------------------------------------------------------------------------------------------ questions


@pytest.mark.parametrize("as_dataset", [False, True])
def test_questions_with_an_answer_of_the_vocabulary_and_its_scores(as_dataset):
    records = stored(questions()) if as_dataset else questions()
    data = Questions(records, prepare, LABEL2ID)
    assert len(data) == 2 and data.question_ids == [100, 102]
    items = [data[0], data[1]]
    assert [item["text"] for item in items] == ["question 0?", "question 2?"]
    assert [item["labels"].tolist() for item in items] == [
        pytest.approx([0.9, 0.3, 0]),
        pytest.approx([0, 0, 0.6]),
    ]
    assert [int(item["image"][0, 0, 0]) for item in items] == [0, 2]
    assert data.image_ids.tolist() == [identity(0), identity(1)]
    report = data.report()
    assert (report["rows"], report["skipped"], report["unanswered"]) == (4, 0, 2)
    assert report["answers"] == 6 and report["fraction_outside"] == pytest.approx(2 / 6)


def test_questions_without_an_answer_can_be_kept_and_answers_left_aside():
    kept = Questions(questions(), prepare, LABEL2ID, keep_unanswered=True)
    assert len(kept) == 4 and kept[1]["labels"].tolist() == kept[3]["labels"].tolist() == [0, 0, 0]
    assert kept.report()["unanswered"] == 2
    bare = [{name: row[name] for name in ("image", "question")} for row in questions()]
    test = Questions(bare, prepare)
    assert len(test) == 4 and "labels" not in test[0] and test.question_ids == [0, 1, 2, 3]
    batch = TaskCollator(Processor())([test[0], test[1]])
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "pixel_mask"}
    with pytest.raises(RecordError, match="record 0, field 'answers': the record has no such field"):
        Questions(bare, prepare, LABEL2ID)


def test_a_batch_of_questions():
    data = Questions(questions(), prepare, LABEL2ID)
    batch = TaskCollator(Processor())([data[1], data[0]])
    assert batch["labels"].shape == (2, 3) and batch["labels"].dtype == torch.float32
    assert torch.equal(batch["labels"], torch.stack([data[1]["labels"], data[0]["labels"]]))
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 0]
    assert batch["input_ids"].tolist() == [[8, 2], [8, 2]]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (None, "value is missing"),
        ("yes", "no list of answers"),
        (["yes"], "answer 0 is 'yes'"),
        ([answer("yes"), answer(3)], "answer 1 is"),
        ([answer("yes", None)], "score of answer 0 is None"),
        ([answer("yes", 1.5)], "score of answer 0 is 1.5"),
        ([answer("yes", float("nan"))], "score of answer 0 is nan"),
    ],
)
def test_answers_that_are_none(answers, reason):
    records = questions()
    records[2]["answers"] = answers
    with pytest.raises(RecordError, match=f"record 2, field 'answers': .*{reason}"):
        Questions(records, prepare, LABEL2ID)
    data = Questions(records, prepare, LABEL2ID, on_bad_record="skip")
    assert len(data) == 1 and data.report()["skipped"] == 1


def test_vocabularies_that_do_not_fit():
    with pytest.raises(ValueError, match="label2id must number its 2 answers"):
        Questions(questions(), prepare, {"yes": 1, "no": 2})
    with pytest.raises(RecordError, match="none of 4 questions has an answer of the vocabulary of 1"):
        Questions(questions(), prepare, {"maybe": 0})
    assert len(Questions(questions(), prepare, {"maybe": 0}, keep_unanswered=True)) == 4
    records = questions()
    records[1]["question"] = " "
    with pytest.raises(RecordError, match="record 1, field 'question': the text is empty"):
        Questions(records, prepare, LABEL2ID)


# ------------------------------------------------------------------------------------------------ statements


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("as_dataset", [False, True])
def test_statements_about_two_pictures(as_dataset, cache):
    records = [{**row, "label": int(row["label"])} for row in statements()]
    records = stored(records, images=True) if as_dataset else records
    data = Statements(records, prepare, cache=cache, progress=False)
    assert data.identifiers == [f"dev-{i}" for i in range(4)]
    for index in range(4):
        item = data[index]
        assert set(item) == {"images", "text", "labels", "image_id", "draw"}
        assert [int(picture[0, 0, 0]) for picture in item["images"]] == [2 * index, 2 * index + 1]
        assert [tuple(picture.shape) for picture in item["images"]] == [(3, 8, 8), (3, 12, 4)]
        assert item["text"] == f"statement {index}" and item["labels"] == (index + 1) % 2


def test_a_batch_of_statements():
    data = Statements(statements(), prepare)
    batch = TaskCollator(Processor())([data[i] for i in (0, 1, 2)])
    assert batch["pixel_values"].shape == (3, 2, 3, 12, 8) and batch["pixel_mask"].shape == (3, 2, 12, 8)
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch["pixel_mask"].sum(dim=(2, 3)).tolist() == [[64, 48]] * 3
    assert batch["labels"].tolist() == [1, 0, 1] and batch["labels"].dtype == torch.int64
    unlabelled = Statements([{**row, "label": None} for row in statements()], prepare, labelled=False)
    assert "labels" not in TaskCollator(Processor())([unlabelled[0]])


def test_the_canvas_of_two_pictures_is_that_of_the_batch():
    records = statements()
    records[3]["images"] = [encoded(1, size=(16, 4)), encoded(2, size=(4, 4))]
    data = Statements(records, prepare)
    alone, together = TaskCollator(Processor())([data[0]]), TaskCollator(Processor())([data[0], data[3]])
    assert alone["pixel_values"].shape[3:] == (12, 8) and together["pixel_values"].shape[3:] == (12, 16)
    assert torch.equal(together["pixel_values"][:1, ..., :8], alone["pixel_values"])
    assert not together["pixel_mask"][0, ..., 8:].any()


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([encoded(4)], "2 pictures are needed, and there is 1"),
        ([encoded(4)] * 3, "2 pictures are needed, and there are 3"),
        (encoded(4), "2 pictures are needed, and there is 1"),
        ([encoded(4), b"no picture"], "is not in a picture format"),
    ],
)
def test_a_statement_without_its_two_pictures(images, reason, cache):
    records = statements()
    records[2]["images"] = images
    with pytest.raises(RecordError, match=f"record 2, field 'images': .*{reason}") as caught:
        [Statements(records, prepare, cache=cache, progress=False)[index] for index in range(4)]
    assert caught.value.position == 2
    data = Statements(records, prepare, cache=cache, on_bad_record="skip", progress=False)
    assert [data[index]["text"][-1] for index in range(len(data))] == (
        ["0", "1", "3"] if cache else ["0", "1", "3", "3"]
    )
    assert data.report()["skipped"] == 1


def test_records_without_the_column_of_their_pictures():
    records = [{"image": row["images"][0], "statement": "a", "label": 1} for row in statements()]
    with pytest.raises(RecordError, match="record 0, field 'images': the record has no such field"):
        Statements(records, prepare)[0]
    with pytest.raises(RecordError, match="no column 'images'.*Did you mean 'image'"):
        Statements(stored(records), prepare)
    with pytest.raises(RecordError, match="record 0, field 'image': the record has no such field"):
        Hypotheses([{"hypothesis": "a", "label": "neutral"}], prepare)[0]


@pytest.mark.parametrize("label", ["True", 2, None])
def test_a_statement_is_true_or_false(label):
    records = statements()
    records[1]["label"] = label
    with pytest.raises(RecordError, match="record 1, field 'label'"):
        Statements(records, prepare)
    assert len(Statements(records, prepare, labelled=False)) == 4


# ------------------------------------------------------------------------------------------------ hypotheses


def test_hypotheses_and_their_classes():
    data = Hypotheses(hypotheses(), prepare)
    assert [data[index]["labels"] for index in range(3)] == [2, 1, 0]
    batch = TaskCollator(Processor())([data[index] for index in range(3)])
    assert batch["labels"].tolist() == [2, 1, 0] and batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]
    other = Hypotheses(hypotheses(), prepare, {"entailment": 0, "neutral": 1, "contradiction": 2})
    assert [other[index]["labels"] for index in range(3)] == [0, 1, 2]
    records = hypotheses()
    records[1]["label"] = "-"
    with pytest.raises(RecordError, match="record 1, field 'label': '-' is no class. The classes are: contradiction"):
        Hypotheses(records, prepare)
    assert len(Hypotheses(records, prepare, on_bad_record="skip")) == 2
    assert "labels" not in Hypotheses(records, prepare, labelled=False)[1]


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    ("kind", "records", "given"),
    [(Questions, questions, {"label2id": LABEL2ID}), (Statements, statements, {}), (Hypotheses, hypotheses, {})],
)
def test_cached_items_are_the_same_and_epochs_differ_in_their_draws(kind, records, given):
    plain = kind(records(), prepare, **given)
    cached = kind(records(), prepare, cache=True, progress=False, **given)
    for index in range(len(plain)):
        one, two = plain[index], cached[index]
        assert (one["text"], one["image_id"], one["draw"]) == (two["text"], two["image_id"], two["draw"])
        assert torch.equal(torch.as_tensor(one["labels"]), torch.as_tensor(two["labels"]))
        name = "images" if kind is Statements else "image"
        assert all(torch.equal(a, b) for a, b in zip(one[name], two[name], strict=True))
    draws = [plain[index]["draw"] for index in range(len(plain))]
    plain.set_epoch(1)
    assert not set(draws) & {plain[index]["draw"] for index in range(len(plain))} and len(set(draws)) == len(draws)
    plain.set_epoch(0)
    assert [plain[index]["draw"] for index in range(len(plain))] == draws
    assert kind(records(), prepare, seed=1, **given)[0]["draw"] != draws[0]


def test_a_batch_is_the_same_on_any_number_of_workers():
    def made(workers, seed=0, epoch=0):
        data = Hypotheses(hypotheses() * 2, prepare)
        data.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(
            data, batch_size=3, num_workers=workers, collate_fn=TaskCollator(Processor(), noise, seed)
        )
        return [batch["pixel_values"] for batch in loader]

    first, again = made(0), made(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    for other in (made(0, seed=1), made(0, epoch=1)):
        assert not any(torch.equal(one, two) for one, two in zip(first, other))


def too_wide(picture):
    if picture.width > 10:
        raise ValueError(f"a picture of {picture.width} x {picture.height} is too thin.")
    return prepare(picture)


@pytest.mark.parametrize("cache", [False, True])
def test_a_picture_that_the_transform_refuses_is_a_bad_record(cache):
    records = [{"image": encoded(i), "captions": ["a"], "image_id": i} for i in range(3)]
    records[1]["image"] = encoded(1, size=(12, 2))
    with pytest.raises(RecordError, match="record 1, field 'image': a picture of 12 x 2 is too thin. Repair"):
        ImageTextPairs(records, too_wide, cache=cache, progress=False)[1]
    pairs = ImageTextPairs(records, too_wide, cache=cache, on_bad_record="skip", progress=False)
    assert [int(pairs[index]["image"][0, 0, 0]) for index in range(len(pairs))] == ([0, 2] if cache else [0, 2, 2])
    assert pairs.report()["skipped"] == 1


def test_no_items_make_no_batch():
    with pytest.raises(ValueError, match="no items"):
        TaskCollator(Processor())([])
