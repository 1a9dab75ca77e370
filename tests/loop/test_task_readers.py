"""Readers of tasks: official files and Arrow tables give the same records, and what is broken is named by its position."""

import io
import json
import pickle

import pyarrow as pa
import pytest
from PIL import Image

import hf_vlp.data.vqav2 as vqav2
from hf_vlp.data.answers import rounded_rule
from hf_vlp.data.arrow_tables import ArrowRecords, answer_ids, read_arrow_tables, tables_of
from hf_vlp.data.nlvr2 import read_nlvr2
from hf_vlp.data.prepared import PreparedRecords
from hf_vlp.data.readers import read_records
from hf_vlp.data.record import RecordError
from hf_vlp.data.tasks import Statements
from hf_vlp.data.validate import bad_records
from hf_vlp.data.vqav2 import read_vqav2
from hf_vlp.evaluation.encoding import PictureError, picture_of, without_pictures
from hf_vlp.inputs.image_transforms import to_tensor


def encoded(number):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(picture):
    return picture.getpixel((0, 0))[0]


# -------------------------------------------------------------------------------------------------------------- VQA v2


@pytest.fixture
def vqa(tmp_path):
    """Three images of train with four questions, two of val with one each, one of test."""

    def write(part, questions, annotations=None):
        folder = part.replace("-dev", "")
        (tmp_path / folder).mkdir(exist_ok=True)
        for question in questions:
            number = question["image_id"]
            (tmp_path / folder / f"COCO_{folder}_{number:012}.jpg").write_bytes(encoded(number))
        (tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": questions}))
        if annotations is not None:
            content = {"annotations": annotations}
            (tmp_path / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps(content))

    def question(number, image):
        return {"question_id": number, "image_id": image, "question": f"question {number}?"}

    def annotation(number, majority, *answers):
        given = [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers)]
        return {
            "question_id": number,
            "multiple_choice_answer": majority,
            "answers": given,
            "answer_type": "other",
        }

    train = [
        annotation(12, "Two", "Two", "two", "2", "a dog"),
        annotation(11, "yes", *["yes"] * 9, "no"),
        annotation(10, "red", "red"),
    ]
    write("train2014", [question(10, 1), question(11, 2), question(12, 1)], train)
    val = [question(20, 5), question(21, 6), question(22, 5)]
    write("val2014", val, [annotation(one["question_id"], "yes", "yes", "no") for one in val])
    write("test2015", [question(30, 9)])
    write("test-dev2015", [question(30, 9)])
    return tmp_path


def test_questions_are_records_in_the_order_of_their_file(vqa):
    records = read_vqav2(vqa, vqa, "train")
    assert list(records["question"]) == ["question 10?", "question 11?", "question 12?"]
    assert list(records["image_id"]) == ["1", "2", "1"] and list(records["question_id"]) == [10, 11, 12]
    assert [shade(row["image"]) for row in records] == [1, 2, 1]
    assert list(records["majority_answer"]) == ["red", "yes", "2"] and set(records["answer_type"]) == {"other"}
    # normalised answers are one answer; as they are written they are several, scored as published models are trained
    assert records[2]["answers"] == [{"answer": "2", "score": 1.0}, {"answer": "dog", "score": 1 / 3}]
    raw = read_vqav2(vqa, vqa, "train", rule=rounded_rule, normalize=False)
    assert [one["answer"] for one in raw[2]["answers"]] == ["Two", "two", "2", "a dog"]
    assert raw[2]["answers"][0]["score"] == 0.3
    assert raw[1]["answers"] == [{"answer": "yes", "score": 1.0}, {"answer": "no", "score": 0.3}]
    test = read_vqav2(vqa, vqa, "test-dev")
    assert test[0]["answers"] == [] and test[0]["majority_answer"] is None and shade(test[0]["image"]) == 9


def test_the_last_images_of_val_are_held_out(vqa, monkeypatch):
    monkeypatch.setattr(vqav2, "HELD_OUT", 1)
    assert list(read_vqav2(vqa, vqa, "rest_val")["question_id"]) == [21]
    assert list(read_vqav2(vqa, vqa, "trainable_val")["question_id"]) == [20, 22]
    assert list(read_vqav2(vqa, vqa, "train+trainable_val")["question_id"]) == [10, 11, 12, 20, 22]
    monkeypatch.undo()
    assert list(read_vqav2(vqa, vqa, "rest_val")["question_id"]) == [20, 21, 22]
    with pytest.raises(RecordError, match="'trainable_val'.*is empty"):
        read_vqav2(vqa, vqa, "trainable_val")


def test_read_records_knows_questions_by_their_names(vqa, tmp_path):
    required = ("image", "question", "answers")
    file = vqa / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert read_records(file, required=required)[1]["question"] == "question 11?"
    assert list(read_records(vqa, split="train+val", required=required)["question_id"]) == [10, 11, 12, 20, 21, 22]
    streamed = read_records(vqa, split="val", required=required, streaming=True)
    assert [shade(row["image"]) for row in streamed] == [5, 6, 5]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bare = read_records(file, image_root=elsewhere, required=("question", "answers"))
    assert "image" not in bare.column_names and len(bare) == 3
    with pytest.raises(FileNotFoundError, match="image_root must hold"):
        read_records(file, image_root=elsewhere, required=required)
    with pytest.raises(ValueError, match="has the split train, not 'val'"):
        read_records(file, split="val", required=required)
    with pytest.raises(ValueError, match="split='dev' is none of VQA v2.*trainable_val"):
        read_records(vqa, split="dev", required=required)
    with pytest.raises(ValueError, match="split='' is none"):
        read_records(vqa, required=required)


def test_broken_question_files_say_where(vqa):
    questions = vqa / "v2_OpenEnded_mscoco_train2014_questions.json"
    annotations = vqa / "v2_mscoco_train2014_annotations.json"
    good = annotations.read_text()
    annotations.write_text(good[:-5])
    with pytest.raises(RecordError, match="annotations.json is not JSON"):
        read_vqav2(vqa, vqa, "train")
    entries = json.loads(good)["annotations"]
    annotations.write_text(json.dumps({"annotations": entries[1:]}))
    with pytest.raises(RecordError, match="record 2, field 'question_id': question 12 has no annotation"):
        read_vqav2(vqa, vqa, "train")
    annotations.write_text(json.dumps({"annotations": [*entries[:2], {"question_id": 10}]}))
    with pytest.raises(RecordError, match="record 2, field 'multiple_choice_answer'"):
        read_vqav2(vqa, vqa, "train")
    annotations.unlink()
    with pytest.raises(FileNotFoundError):
        read_vqav2(vqa, vqa, "train")
    questions.write_text("[]")
    with pytest.raises(RecordError, match="holds no list"):
        read_vqav2(vqa, vqa, "train")
    with pytest.raises(ValueError, match="is no v2_OpenEnded.*train2014, val2014"):
        read_vqav2(questions.rename(vqa / "questions.json"), vqa)


# --------------------------------------------------------------------------------------------------------------- NLVR2


@pytest.fixture
def nlvr2(tmp_path):
    """Two files of statements and the pictures of their pairs."""
    lines = {
        "train": [("train-0-0-0", "one", "True"), ("train-0-0-1", "two", "False"), ("train-0-1-0", "one", "False")],
        "dev": [("dev-4-0-0", "three", "True")],
    }
    for split, rows in lines.items():
        folder = tmp_path / "images" / split / ("7" if split == "train" else "")
        folder.mkdir(parents=True)
        for place, (identifier, _, _) in enumerate(rows):
            for number in (0, 1):
                name = f"{identifier.rpartition('-')[0]}-img{number}.png"
                if not (folder / name).exists():
                    (folder / name).write_bytes(encoded(10 * place + number))
        entries = [dict(zip(("identifier", "sentence", "label"), row)) | {"directory": 7} for row in rows]
        (tmp_path / f"{split}.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def test_statements_are_records_of_two_pictures(nlvr2):
    records = read_nlvr2(nlvr2 / "train.json", nlvr2)
    assert list(records["statement"]) == ["one", "two", "one"] and list(records["label"]) == [1, 0, 0]
    assert list(records["image_id"]) == ["train-0-0", "train-0-0", "train-0-1"]
    assert [[shade(picture) for picture in row["images"]] for row in records] == [[0, 1], [0, 1], [20, 21]]
    required = ("images", "statement", "label")
    both = read_records([nlvr2 / "train.json", nlvr2 / "dev.json"], image_root=nlvr2 / "images", required=required)
    assert list(both["identifier"]) == ["train-0-0-0", "train-0-0-1", "train-0-1-0", "dev-4-0-0"]
    assert shade(both[3]["images"][1]) == 1
    with pytest.raises(FileNotFoundError, match="image_root must hold"):
        read_records(nlvr2 / "dev.json", image_root=nlvr2 / "images" / "dev", required=required)
    with pytest.raises(ValueError, match="without splits, split='dev'"):
        read_records(nlvr2 / "dev.json", split="dev", required=required)
    with pytest.raises(RecordError, match="no column 'image'"):
        read_records(nlvr2 / "dev.json")  # captions are what is read unless told otherwise


def test_broken_statements_say_where(nlvr2):
    file = nlvr2 / "dev.json"
    good = file.read_text()
    for bad, message in (
        ("{", "record 1, field 'line': not JSON"),
        ("[]", "record 1, field 'line': a list"),
        ('{"identifier": "dev-4-0-1", "sentence": "x"}', "record 1, field 'label'"),
        ('{"identifier": "dev-4-0-1", "sentence": "x", "label": "maybe"}', "record 1, field 'label': 'maybe'"),
        ('{"identifier": "train-4-0-1", "sentence": "x", "label": "True"}', "record 1, field 'directory'"),
    ):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(RecordError, match=message):
            read_nlvr2(file, nlvr2)
    file.write_text("")
    with pytest.raises(RecordError, match="no line"):
        read_nlvr2(file, nlvr2)


def test_a_missing_picture_of_a_pair_is_found_by_its_position(nlvr2):
    (nlvr2 / "images" / "train" / "7" / "train-0-1-img1.png").unlink()
    records = read_records(nlvr2 / "train.json", required=("images", "statement", "label"))
    assert [fault.position for fault in bad_records(records, ("images", "statement"), progress=False)] == [2]
    statements = Statements(records, to_tensor)
    assert len(statements[1]["images"]) == 2
    with pytest.raises(RecordError, match="record 2, field 'images': no file"):
        statements[2]
    lone = [{"images": [Image.new("RGB", (4, 4))], "statement": "s", "label": 1}]
    with pytest.raises(RecordError, match="record 0, field 'images': 2 pictures are needed, and there is 1"):
        Statements(lone, to_tensor)[0]


# -------------------------------------------------------------------------------------------------------- Arrow tables


def write_table(path, content, batch=None, rows=None):
    """A file of record batches as the released writers leave it; of the first rows if so many are given."""
    table = pa.Table.from_pylist(content).slice(0, rows)
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table, batch)
    return path


def captions(numbers, split="train"):
    return [
        {"image": encoded(n), "caption": [f"{n} a", f"{n} b", f"{n} a"], "image_id": f"{n}.jpg", "split": split}
        for n in numbers
    ]


@pytest.fixture
def tables(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    write_table(folder / "coco_caption_karpathy_train.arrow", captions([1, 2]), batch=1)
    write_table(folder / "coco_caption_karpathy_restval.arrow", captions([3], "restval"))
    write_table(folder / "coco_caption_karpathy_val.arrow", captions([4], "val"))
    write_table(folder / "coco_caption_karpathy_test.arrow", captions([5], "test"))
    return folder


def question_row(image, **changes):
    row = {
        "image": encoded(image),
        "image_id": image,
        "questions": ["q0", "q1"],
        "question_id": [10 * image, 10 * image + 1],
        "answers": [["yes", "no"], ["red"]],
        "answer_labels": [[1, 0], [5]],
        "answer_scores": [[1.0, 0.3], [0.6]],
    }
    return row | changes


def test_a_table_of_captions_is_read_as_it_was_published(tables):
    records = read_records(tables, split="train")
    assert records.column_names == ["image", "captions", "image_id", "split"]
    assert [shade(row["image"]) for row in records] == [1, 2, 3]
    assert list(records["captions"]) == [["1 a", "1 b"], ["2 a", "2 b"], ["3 a", "3 b"]]
    assert list(records["split"]) == ["train", "train", "restval"]
    files = tables_of(tables, "coco/train")
    assert list(read_arrow_tables(files, unique_captions=False)["captions"])[0] == ["1 a", "1 b", "1 a"]
    # the released code validates on test: another table must be named
    assert list(read_records(tables, split="val")["image_id"]) == ["5.jpg"]
    assert list(read_records(tables, split="coco_caption_karpathy_val")["image_id"]) == ["4.jpg"]
    both = read_records(tables, split="coco_caption_karpathy_val+coco/test")
    assert list(both["image_id"]) == ["4.jpg", "5.jpg"]
    assert list(read_records(tables / "coco_caption_karpathy_val.arrow")["image_id"]) == ["4.jpg"]
    assert list(read_records(tables / "*val.arrow")["image_id"]) == ["3.jpg", "4.jpg"]
    assert list(read_records(files[::-1])["image_id"]) == ["3.jpg", "1.jpg", "2.jpg"]


def test_sets_with_other_columns_are_read_as_one(tables):
    region = {"image": encoded(7), "caption": ["7 a"], "image_id": 7, "width": [3], "x": [1]}
    write_table(tables / "vg.arrow", [region])
    records = read_records(tables, split="vg/train+coco/test")
    assert records.remove_columns("image").to_list() == [
        {"captions": ["7 a"], "image_id": "7", "width": [3], "x": [1], "split": None},
        {"captions": ["5 a", "5 b"], "image_id": "5.jpg", "width": None, "x": None, "split": "test"},
    ]
    assert [shade(row["image"]) for row in records] == [7, 5]


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 0):
        write_table(tmp_path / f"conceptual_caption_train_{number}.arrow", captions([number]))
    assert list(read_records(tmp_path, split="train")["image_id"]) == ["0.jpg", "9.jpg", "10.jpg"]
    with pytest.raises(FileNotFoundError, match="no conceptual_caption_val_0.arrow"):
        read_records(tmp_path, split="val")


def test_an_unknown_split_of_tables_names_those_there(tables):
    with pytest.raises(ValueError, match="'dev' is none of its tables .*karpathy_val.* coco/train"):
        read_records(tables, split="dev")
    with pytest.raises(ValueError, match="split=None"):
        read_records(tables)
    write_table(tables / "vqav2_train.arrow", [question_row(1)])
    with pytest.raises(ValueError, match="'train' is none .*coco/train.*vqa/train"):
        read_records(tables, split="train")
    assert len(read_records(tables, split="coco/train")) == 3
    (tables / "coco_caption_karpathy_restval.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="no coco_caption_karpathy_restval.arrow"):
        read_records(tables, split="coco/train")
    with pytest.raises(ValueError, match="one table, split='val'"):
        read_records(tables / "vqav2_train.arrow", split="val", required=("question",))
    with pytest.raises(RecordError, match="no column 'captions'"):
        read_records(tables / "vqav2_train.arrow")
    with pytest.raises(ValueError, match="neither columns nor streaming"):
        read_records(tables, split="coco/train", streaming=True)
    with pytest.raises(RecordError, match="holds other records than"):
        read_records(tables, split="coco/test+vqav2_train")


def test_questions_share_the_picture_of_their_row(tmp_path):
    empty = {"answers": [], "answer_labels": [], "answer_scores": []}
    path = write_table(tmp_path / "vqav2_train.arrow", [question_row(3), question_row(4)])
    test = write_table(tmp_path / "vqav2_test.arrow", [question_row(5, **empty)])
    records = read_records(path, required=("image", "question", "answers"))
    assert isinstance(records, ArrowRecords) and len(records) == 4
    assert [(shade(row["image"]), row["question"], row["question_id"]) for row in records] == [
        (3, "q0", 30),
        (3, "q1", 31),
        (4, "q0", 40),
        (4, "q1", 41),
    ]
    assert records[0]["answers"] == [{"answer": "yes", "score": 1.0}, {"answer": "no", "score": 0.3}]
    assert answer_ids(records.remove_columns("image")) == {"no": 0, "yes": 1, "red": 5}
    assert read_arrow_tables(test)[1]["answers"] == []
    with pytest.raises(ValueError, match="id 1 is both 'yes' and 'no'"):
        other = question_row(6, answer_labels=[[1, 1], [5]])
        answer_ids(read_arrow_tables(write_table(tmp_path / "other.arrow", [other])).remove_columns("image"))
    with pytest.raises(RecordError, match="record 1, field 'questions': the lists of this row of broken.arrow"):
        rows = [question_row(1), question_row(2, question_id=[20])]
        read_arrow_tables(write_table(tmp_path / "broken.arrow", rows))
    with pytest.raises(RecordError, match="record 0, field 'questions'"):
        read_arrow_tables(write_table(tmp_path / "broken.arrow", [question_row(1, questions=None, answers=None)]))
    with pytest.raises(ValueError, match="no table is given"):
        read_arrow_tables([])


def test_statements_of_a_table(tmp_path):
    row = {"image_0": encoded(1), "image_1": encoded(2), "questions": ["a", "b"], "identifier": "dev-0-0"}
    path = write_table(tmp_path / "nlvr2_dev.arrow", [row | {"answers": ["True", "False"]}])
    records = read_records(path, required=("images", "statement", "label"))
    assert [(row["statement"], row["label"], row["image_id"]) for row in records] == [
        ("a", 1, "dev-0-0"),
        ("b", 0, "dev-0-0"),
    ]
    assert [shade(picture) for picture in records[1]["images"]] == [1, 2]
    assert len(Statements(records, to_tensor)[0]["images"]) == 2
    for answers in (["True"], ["True", "maybe"], None):
        with pytest.raises(RecordError, match="record 0, field 'answers'"):
            read_arrow_tables(write_table(path, [row | {"answers": answers}]))


def test_records_of_tables_serve_wherever_a_dataset_does(tables):
    records = read_records(tables, split="train")
    assert without_pictures(records).to_list() == records.select_columns(["captions", "image_id", "split"]).to_list()
    assert records.select_columns(["image", "image_id"]).column_names == ["image", "image_id"]
    assert records.remove_columns("split").column_names == ["image", "captions", "image_id"]
    assert [row["image_id"] for row in records.select([2, 0])] == ["3.jpg", "1.jpg"]
    assert shade(records.select([2, 0])[0]["image"]) == 3 and shade(records[-1]["image"]) == 3
    with pytest.raises(IndexError):
        records[3]
    from datasets import Image as Stored

    assert records.cast_column("image", Stored(decode=False))[1]["image"] == {"bytes": encoded(2), "path": None}
    copy = pickle.loads(pickle.dumps(records))
    assert shade(copy[1]["image"]) == 2 and len(pickle.dumps(records)) < 5000
    prepared = PreparedRecords(records, to_tensor)
    assert prepared[1]["image"][0, 0, 0] == to_tensor(records[1]["image"])[0, 0, 0]
    assert list(bad_records(records, progress=False)) == []


def test_a_bad_picture_of_a_table_is_found_by_its_position(tmp_path):
    rows = captions([1, 2, 3])
    rows[1]["image"], rows[2]["image"] = b"no picture", None
    records = read_records(write_table(tmp_path / "x.arrow", rows))
    assert [fault.position for fault in bad_records(records, progress=False)] == [1, 2]
    with pytest.raises(RecordError, match="record 1, field 'image'"):
        records[1]
    with pytest.raises(PictureError, match="record 2"):
        picture_of(records, 2)
    assert shade(picture_of(records, 0)) == 1


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "x.arrow"
    whole = write_table(path, captions([1])).read_bytes()
    for content in (b"", b"no arrow", pickle.dumps([1]), whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="x.arrow is no Arrow file"):
            read_records(path)
    with pytest.raises(RecordError, match="has the columns image, text, which are none"):
        read_records(write_table(path, [{"image": encoded(1), "text": "x"}]))
    with pytest.raises(RecordError, match="hold no row"):
        read_records(write_table(path, captions([1]), rows=0))
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "absent.arrow")


def test_karpathy_splits_can_be_joined(tmp_path):
    images = [
        {"filename": f"{n}.png", "split": split, "imgid": n, "sentences": [{"raw": f"caption {n}"}]}
        for n, split in enumerate(["train", "val", "test", "train"])
    ]
    path = tmp_path / "dataset_flickr30k.json"
    path.write_text(json.dumps({"images": images}))
    (tmp_path / "0.png").write_bytes(encoded(0))
    assert list(read_records(path, split="train+val")["image_id"]) == ["0", "1", "3"]
    assert list(read_records(path, split="train")["image_id"]) == ["0", "3"]
    with pytest.raises(ValueError, match=r"no split 'train\+dev'"):
        read_records(path, split="train+dev")
    path.write_text(path.read_text()[:-3])
    with pytest.raises(RecordError, match="not JSON"):
        read_records(path, split="train")
