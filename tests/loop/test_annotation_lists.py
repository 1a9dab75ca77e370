"""Lists of annotations as records: what each entry becomes, and what is broken is named by its position."""

import json
import pickle

import pytest
import torch
from PIL import Image

from hf_vlp.data.annotation_lists import (
    read_answer_list,
    read_caption_lists,
    read_entailment_list,
    read_phrase_list,
    read_proposals,
    read_question_lists,
    read_reasoning_list,
    read_references,
)
from hf_vlp.data.pairs import ImageTextPairs
from hf_vlp.data.readers import read_records
from hf_vlp.data.record import RecordError
from hf_vlp.data.tasks import Hypotheses, Questions, Statements


def keep(picture):
    return picture


def as_tensor(picture):
    return torch.zeros(3, 4, 6, dtype=torch.uint8)


@pytest.fixture
def write(tmp_path):
    """Writes a list to a file, and the pictures that its entries are about."""
    for number, name in enumerate(("a.jpg", "b.jpg", "sub/c.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (40 * number, 0, 0)).save(tmp_path / name)

    def file(content, name="list.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return file


# ------------------------------------------------------------------------------------------------------------ captions


def test_captions_of_several_lists_follow_one_another(write, tmp_path):
    one = write(
        [{"image": "a.jpg", "caption": "One", "image_id": 7}, {"image": "a.jpg", "caption": "two", "image_id": 7}]
    )
    two = write([{"image": "sub/c.jpg", "caption": ["three", "four"]}], "two.json")
    records = read_caption_lists([one, two], tmp_path)
    assert records["captions"][:] == [["One"], ["two"], ["three", "four"]]
    assert records["image_id"][:] == ["7", "7", "sub/c.jpg"]
    assert records[2]["image"].size == (6, 4)
    assert records[2]["image"].getpixel((0, 0)) != records[0]["image"].getpixel((0, 0))
    assert read_caption_lists(two, tmp_path).to_list() == records.select([2]).to_list()
    assert "image" not in read_caption_lists([one, two], pictures=False).column_names
    globbed = read_records(str(tmp_path / "*.json"), image_root=tmp_path)
    assert globbed["captions"][:] == [["One"], ["two"], ["three", "four"]]
    assert read_records([one, two], image_root=tmp_path)["image_id"][:] == globbed["image_id"][:]


def test_whole_paths_need_no_folder_and_phrases_have_another_field(write, tmp_path):
    whole = write([{"image": str(tmp_path / "a.jpg"), "text": "left man"}])
    records = read_caption_lists(whole, text="text")
    assert records[0]["captions"] == ["left man"] and records[0]["image"].size == (6, 4)
    with pytest.raises(RecordError, match="records, field 'caption': no entry of .*list.json has such a field"):
        read_caption_lists(whole)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"image": "a.jpg", "caption": 3}, "record 1, field 'caption': 3 in .* is not a text or a list"),
        ({"image": "a.jpg", "caption": ["x", {}]}, "record 1, field 'caption'"),
        ("a.jpg", "record 1, field 'list': 'a.jpg' in .* is not an object"),
    ],
)
def test_a_broken_entry_is_named(write, tmp_path, entry, match):
    good = {"image": "a.jpg", "caption": "x"}
    assert len(read_caption_lists(write([good, good]), tmp_path)) == 2
    with pytest.raises(RecordError, match=match):
        read_caption_lists(write([good, entry]), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_file_that_is_no_list(write, content):
    with pytest.raises(RecordError, match="is not JSON|holds no list of entries"):
        read_caption_lists(write(content))


def test_a_wrong_folder_is_found_at_once(write, tmp_path):
    file = write([{"image": "a.jpg", "caption": "x"}])
    with pytest.raises(FileNotFoundError, match="no picture .*other"):
        read_caption_lists(file, tmp_path / "other")
    lacking, there = {"image": "gone.jpg", "caption": "x"}, {"image": "a.jpg", "caption": "x"}
    assert len(read_caption_lists(write([*99 * [lacking], there]), tmp_path)) == 100
    with pytest.raises(FileNotFoundError, match="no picture .*gone.jpg"):
        read_caption_lists(write([*100 * [lacking], there]), tmp_path)


BROKEN = [
    {"image": "gone.jpg", "caption": "x"},
    {"image": "a.jpg", "caption": []},
    {"image": "a.jpg", "caption": None},
    {"image": "a.jpg", "caption": " "},
    {"image": "a.jpg"},
    {"caption": "x"},
    {"image": "a.jpg", "caption": ["x", None]},
]


@pytest.mark.parametrize("cache", [False, True])
def test_broken_captions_are_skipped_and_counted(write, tmp_path, cache):
    good = {"image": "a.jpg", "caption": "good"}
    records = read_records(write([*BROKEN, good, good]), image_root=tmp_path)
    pairs = ImageTextPairs(records, as_tensor, on_bad_record="skip", cache=cache, progress=False)
    assert {pairs[place]["text"] for place in range(len(pairs))} == {"good"}
    report = pairs.report()
    assert (report["rows"], report["skipped"]) == (9, 7)
    assert sorted(fault.position for fault in pairs.faults) == list(range(7))
    for entry in BROKEN[1:]:
        records = read_records(write([good, entry]), image_root=tmp_path)
        with pytest.raises(RecordError, match="record 1, field '(captions|image_id)'"):
            ImageTextPairs(records, as_tensor)


# ----------------------------------------------------------------------------------------------------------- questions


def questions(*entries):
    common = {"dataset": "vqa", "image": "a.jpg", "question": "how many?"}
    return [common | {"question_id": number} | entry for number, entry in enumerate(entries)]


def test_answers_weigh_as_many_as_gave_them(write, tmp_path):
    given = [{"answer": ["Two", "2", "Two", "two"]}, {"dataset": "vg", "image": "c.jpg", "answer": "on it"}, {}]
    records = read_question_lists(write(questions(*given)), {"vqa": tmp_path, "vg": tmp_path / "sub"})
    assert [[(one["answer"], one["score"]) for one in row] for row in records["answers"]] == [
        [("Two", 0.5), ("2", 0.25), ("two", 0.25)],
        [("on it", 0.5)],
        [],
    ]
    assert records["question_id"][:] == [0, 1, 2] and records["image_id"][:] == ["a.jpg", "c.jpg", "a.jpg"]
    assert records[1]["image"].getpixel((0, 0)) != records[0]["image"].getpixel((0, 0))
    items = Questions(records.select([0]), keep, {"2": 0, "Two": 1, "blue": 2})
    assert items[0]["labels"].tolist() == [0.25, 0.5, 0.0]


def test_a_data_set_without_a_folder(write, tmp_path):
    file = write(questions({}, {"dataset": "vg"}))
    with pytest.raises(RecordError, match="record 1, field 'dataset': no folder for the pictures of 'vg' .*has: vqa"):
        read_question_lists(file, {"vqa": tmp_path})
    assert len(read_question_lists(file, {}, pictures=False)) == 2


@pytest.mark.parametrize(("wrong", "field"), [({"question_id": "x"}, "question_id"), ({"answer": [1]}, "answer")])
def test_a_broken_question_is_named(write, wrong, field):
    with pytest.raises(RecordError, match=f"record 1, field '{field}'"):
        read_question_lists(write(questions({}, wrong)), {}, pictures=False)


def test_a_list_of_answers(write):
    assert read_answer_list(write(["yes", "no"])) == ["yes", "no"]
    with pytest.raises(RecordError, match="record 2, field 'answer': 'yes' stood at 0"):
        read_answer_list(write(["yes", "no", "yes"]))
    with pytest.raises(RecordError, match="is not a list of texts"):
        read_answer_list(write({"yes": 1}))


# ------------------------------------------------------------------------------------------- statements and hypotheses


def test_statements_about_two_pictures(write, tmp_path):
    entry = {"images": ["a.jpg", "sub/c.jpg"], "sentence": "There is one.", "label": "True"}
    records = read_reasoning_list(write([entry, entry | {"label": "False"}]), tmp_path)
    assert records["label"][:] == [1, 0] and records["image_id"][0] == "a.jpg sub/c.jpg"
    assert Statements(records, keep)[1]["labels"] == 0
    shades = [picture.getpixel((0, 0)) for picture in records[0]["images"]]
    assert shades[0] != shades[1]
    for wrong, match in (
        ({"images": ["a.jpg"]}, "1 pictures in"),
        ({"label": "yes"}, "'yes' in .* is none of True, F"),
    ):
        with pytest.raises(RecordError, match=f"record 1, .*{match}"):
            read_reasoning_list(write([entry, entry | wrong]), tmp_path)
    with pytest.raises(FileNotFoundError, match="no picture .*missing"):
        read_reasoning_list(write([entry | {"images": ["a.jpg", "missing.jpg"]}]), tmp_path)


def test_hypotheses_name_their_pictures_without_the_ending(write, tmp_path):
    labels = ["entailment", "neutral", "contradiction"]
    entries = [{"image": "a", "sentence": "A man.", "label": label} for label in labels]
    records = read_entailment_list(write(entries), tmp_path)
    assert records["label"][:] == labels and records[0]["image"].size == (6, 4)
    items = Hypotheses(records, keep)
    assert [items[place]["labels"] for place in range(3)] == [2, 1, 0]
    with pytest.raises(
        RecordError, match="record 3, field 'label': '-' in .* is none of contradiction, neutral, entail"
    ):
        read_entailment_list(write([*entries, entries[0] | {"label": "-"}]), tmp_path)


def test_lists_of_statements_and_hypotheses_are_told_by_their_fields(write, tmp_path):
    two = {"images": ["a.jpg", "sub/c.jpg"], "sentence": "There is one.", "label": "True"}
    one = {"image": "a", "sentence": "A man.", "label": "neutral"}
    records = read_records(write([two]), image_root=tmp_path, required=("images", "statement", "label"))
    assert (
        records["statement"][:] == ["There is one."] and records["label"][:] == [1] and len(records[0]["images"]) == 2
    )
    records = read_records(write([one]), image_root=tmp_path, required=("image", "hypothesis", "label"))
    assert records["hypothesis"][:] == ["A man."] and records[0]["image"].size == (6, 4)
    with pytest.raises(ValueError, match="is one file without splits, split='dev'"):
        read_records(write([one]), image_root=tmp_path, split="dev", required=("image",))
    # a list of one's own, whose pictures have their whole names and whose columns are mapped
    own, columns = [one | {"image": "a.jpg"}], {"hypothesis": "sentence"}
    records = read_records(write(own), image_root=tmp_path, columns=columns, required=("image", "hypothesis"))
    assert records["hypothesis"][:] == ["A man."] and records[0]["image"].size == (6, 4)
    (tmp_path / "a").write_bytes((tmp_path / "a.jpg").read_bytes())
    records = read_records(
        write([one | {"label": "maybe"}]), image_root=tmp_path, columns=columns, required=("image", "hypothesis")
    )
    assert records["label"][:] == ["maybe"] and records[0]["image"].filename == str(tmp_path / "a")
    columns, needed = {"statement": "sentence"}, ("images", "statement", "label")
    records = read_records(write([two | {"label": 1}]), image_root=tmp_path, columns=columns, required=needed)
    assert (
        records["statement"][:] == ["There is one."] and records["label"][:] == [1] and len(records[0]["images"]) == 2
    )
    own = [{"dataset": "mine", "image": "a.jpg", "question": "how many?", "question_id": "q7", "said": "one"}]
    records = read_records(write(own), image_root=tmp_path, columns={"answer": "said"}, required=("image", "question"))
    assert records["question_id"][:] == ["q7"] and records["answer"][:] == ["one"]
    for unmapped in ([two | {"label": 1}], own):
        with pytest.raises(RecordError, match="record 0, field '(label|question_id)'"):
            read_records(write(unmapped), image_root=tmp_path, required=())


# ------------------------------------------------------------------------------------------------------------- phrases

PHRASES = [{"image": "a.jpg", "text": "left", "ref_id": 3}, {"image": "b.jpg", "text": "right", "ref_id": 9}]
REFERENCES = [
    {"ref_id": 9, "ann_id": 50, "image_id": 2, "split": "testA", "sentences": [{"raw": "right"}]},
    {"ref_id": 3, "ann_id": 40, "image_id": 1, "split": "val", "sentences": []},
]
INSTANCES = {"annotations": [{"id": 40, "bbox": [0, 1, 2.5, 3]}, {"id": 50, "bbox": [4, 0, 1, 1]}], "images": []}
PROPOSALS = {"1": [[0, 0, 1, 1]], "2": [[0, 0, 1, 1], [4, 0, 1.5, 1]]}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_references_are_read_from_a_pickle_or_json(write, tmp_path, protocol):
    instances, as_json = write(INSTANCES, "instances.json"), write(REFERENCES, "refs.json")
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFERENCES, protocol=protocol))
    found = read_references(tmp_path / "refs(unc).p", instances)
    assert found == read_references(as_json, instances)
    assert found[3] == {"image_id": 1, "split": "val", "box": [0.0, 1.0, 2.5, 3.0]}
    assert found[9]["box"] == [4.0, 0.0, 1.0, 1.0] and len(found) == 2


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_of_a_pickle_is_executed(write, tmp_path, capsys):
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Harmful()]))
    with pytest.raises(RecordError, match="refs.p cannot be read .*print"):
        read_references(tmp_path / "refs.p", write(INSTANCES, "instances.json"))
    assert "executed" not in capsys.readouterr().out


def test_phrases_with_their_boxes(write, tmp_path):
    references = read_references(write(REFERENCES, "refs.json"), write(INSTANCES, "instances.json"))
    proposals = read_proposals(write(PROPOSALS, "dets.json"))
    given = {"references": references, "proposals": proposals}
    records = read_phrase_list(write(PHRASES), tmp_path, **given)
    assert records["phrase"][:] == ["left", "right"] and records["split"][:] == ["val", "testA"]
    assert records["box"][:] == [[0, 1, 2.5, 3], [4, 0, 1, 1]]
    assert records["proposals"][:] == [[[0, 0, 1, 1]], [[0, 0, 1, 1], [4, 0, 1.5, 1]]]
    assert read_phrase_list(write(PHRASES), tmp_path).column_names == ["image", "image_id", "phrase", "ref_id"]
    with pytest.raises(RecordError, match="record 0, field 'ref_id': no reference 4"):
        read_phrase_list(write([PHRASES[0] | {"ref_id": 4}]), tmp_path, **given)
    with pytest.raises(RecordError, match="record 1, field 'proposals': no proposals for the image 2"):
        read_phrase_list(write(PHRASES), tmp_path, **given | {"proposals": {1: proposals[1]}})
    with pytest.raises(ValueError, match="give references too"):
        read_phrase_list(write(PHRASES), tmp_path, proposals=proposals)


def test_broken_boxes_are_named(write):
    instances = write(INSTANCES, "instances.json")
    with pytest.raises(RecordError, match=r"record 1, field 'ann_id': .* has no annotation 51"):
        read_references(write([REFERENCES[1], REFERENCES[0] | {"ann_id": 51}], "refs.json"), instances)
    for box in ([1, 2, 3], [1, 2, 0, 4], [1, 2, 3, "4"], None):
        with pytest.raises(RecordError, match=r"record 1, field '(box|proposals)': .* in .*dets.json is no"):
            read_proposals(write({"1": [[0, 0, 1, 1]], "2": box and [box]}, "dets.json"))
    with pytest.raises(RecordError, match="holds no object of image ids"):
        read_proposals(write([[0, 0, 1, 1]], "dets.json"))
