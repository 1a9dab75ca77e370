"""Records: every source gives the same columns, every bad one a clear error with its position."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from hf_vlp.data.karpathy import read_karpathy
from hf_vlp.data.readers import parse_columns, read_records
from hf_vlp.data.record import RecordError, check_record, decode_image, identity
from hf_vlp.data.validate import main as validate

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / "cache")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (6, 4), color).save(folder / f"{name}.png")
    return folder


def png(width, height, data=b""):
    """A PNG file of any claimed size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(color, kind="PNG", size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def written(folder, kind):
    """The three pictures with captions and ids, as a file of this kind."""
    rows = [{"file": f"{name}.png", "caption": f"a {name} square", "id": f"x-{name}"} for name in COLORS]
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        path.write_text("\n".join(comma.join(line) for line in (rows[0].keys(), *(row.values() for row in rows))))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_records(pictures, kind, streaming):
    columns = {"image": "file", "image_id": "id", "captions": ["caption"]}
    rows = list(read_records(written(pictures, kind), columns=columns, streaming=streaming))
    assert [row["captions"] for row in rows] == [[f"a {name} square"] for name in COLORS]
    assert [row["image_id"] for row in rows] == [f"x-{name}" for name in COLORS]
    assert [row["image"].convert("RGB").getpixel((0, 0)) for row in rows] == list(COLORS.values())


def test_stored_pictures_and_lists_of_captions(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows = [{"image": {"bytes": encoded(c), "path": None}, "captions": [n, f"all {n}"]} for n, c in COLORS.items()]
    features = Features({"image": ImageFeature(), "captions": List(Value("string"))})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    records = read_records(tmp_path / "a.parquet")
    assert list(records["captions"]) == [["red", "all red"], ["green", "all green"], ["blue", "all blue"]]
    assert list(records["image_id"]) == [0, 1, 2]
    assert records[2]["image"].getpixel((0, 0)) == COLORS["blue"]


def test_several_caption_columns_and_lists_join_in_order(tmp_path, pictures):
    rows = [{"image": "red.png", "short": "red", "long": ["a red square", "a square, red"], "label": 3}]
    (pictures / "a.jsonl").write_text(json.dumps(rows[0]))
    record = read_records(pictures / "a.jsonl", columns={"captions": ["short", "long"]})[0]
    assert record["captions"] == ["red", "a red square", "a square, red"]
    assert record["label"] == 3  # what is not mapped stays
    swapped = read_records(pictures / "a.jsonl", columns={"captions": ["long", "short"]})[0]
    assert swapped["captions"] != record["captions"]


def test_one_path_twice_is_one_image_without_an_id_column(pictures):
    (pictures / "a.csv").write_text("image,caption\nred.png,one\ngreen.png,two\nred.png,three\n")
    ids = [identity(image_id) for image_id in read_records(pictures / "a.csv")["image_id"]]
    assert ids[0] == ids[2] != ids[1]


def test_words_for_missing_values_are_captions_in_csv(pictures):
    (pictures / "a.csv").write_text("image,caption\nred.png,None\ngreen.png,NA\nblue.png,7\n")
    assert list(read_records(pictures / "a.csv")["captions"]) == [["None"], ["NA"], ["7"]]


def test_image_root(pictures, tmp_path):
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (elsewhere / "a.csv").write_text("image,caption\nred.png,red\n")
    assert read_records(elsewhere / "a.csv", image_root=pictures)[0]["image"].size == (6, 4)
    with pytest.raises(FileNotFoundError):
        read_records(elsewhere / "a.csv")[0]


def test_picture_folder_with_metadata_class_folders_and_plain_names(pictures, tmp_path):
    names = read_records(pictures)
    assert sorted(caption for (caption,) in names["captions"]) == ["blue", "green", "red"]
    classes = tmp_path / "classes" / "red_square"
    classes.mkdir(parents=True)
    (pictures / "red.png").rename(classes / "0001.png")
    record = read_records(tmp_path / "classes")[0]
    assert (record["captions"], record["image_id"]) == (["red square"], os.path.join("red_square", "0001.png"))
    (pictures / "metadata.csv").write_text("file_name,text\ngreen.png,grass\n")
    assert [(row["captions"], row["image"].size) for row in read_records(pictures)] == [(["grass"], (6, 4))]


def test_splits_of_a_folder(tmp_path):
    from datasets import Dataset

    for split, caption in {"train": "one", "test": "two"}.items():
        Dataset.from_dict({"image": ["x.png"], "caption": [caption]}).to_parquet(str(tmp_path / f"{split}.parquet"))
    assert list(read_records(tmp_path, split="test")["captions"]) == [["two"]]
    assert list(read_records(str(tmp_path / "t*.parquet"))["captions"]) == [["two"], ["one"]]
    with pytest.raises(ValueError, match="train, test|test, train"):
        read_records(tmp_path)


def test_a_missing_column_names_the_nearest_and_the_available(pictures):
    path = written(pictures, "csv")
    with pytest.raises(RecordError, match="no column 'captoin'.*mean 'caption'.*file, caption, id"):
        read_records(path, columns={"captions": "captoin", "image": "file"})
    with pytest.raises(RecordError, match="no column 'image'.*Available columns: file, caption, id"):
        read_records(path)
    assert read_records(path, required=("captions",)).num_rows == 3
    with pytest.raises(ValueError, match="captions=caption"):
        parse_columns(["caption"])
    assert parse_columns(["captions=a,b", "image=c"]) == {"captions": ["a", "b"], "image": ["c"]}


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match="xlsx.*parquet"):
        read_records(tmp_path / "a.xlsx")
    (tmp_path / "a.jsonl").write_text('{"image": "x.png", "caption": "a"}\n{"image": "x.png", "caption": \n')
    with pytest.raises(RecordError, match="record 1.*not JSON"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"image": "x", "caption": {"a": 1}}\n{"image": "x", "caption": "b"}\n')
    with pytest.raises(RecordError, match="record 0, field 'captions'.*dict, not a text"):
        read_records(tmp_path / "b.jsonl")


def test_karpathy_split_file(tmp_path):
    def entry(number, split, captions, **more):
        Image.new("RGB", (5, 5), (number, 0, 0)).save(tmp_path / "val2014" / f"{number}.png")
        sentences = [{"raw": text} for text in captions]
        names = {"filename": f"{number}.png", "filepath": "val2014", "split": split}
        return {**names, "imgid": number, "sentences": sentences, **more}

    (tmp_path / "val2014").mkdir()
    images = [
        entry(0, "train", ["a", "b "], cocoid=900),
        entry(1, "restval", ["c"], cocoid=901),
        entry(2, "test", list("defghi")),
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    path = tmp_path / "dataset_coco.json"
    train = read_karpathy(path, tmp_path, "train")
    assert list(train["captions"]) == [["a", "b"], ["c"]] and list(train["image_id"]) == ["900", "901"]
    assert train[1]["image"].getpixel((0, 0)) == (1, 0, 0)
    assert len(read_karpathy(path, tmp_path, "train", restval=False)) == 1
    test = read_karpathy(path, tmp_path, "test", captions_per_image=5)
    assert list(test["captions"]) == [list("defgh")] and list(test["image_id"]) == ["2"]
    read = read_records(path, split="test")
    assert read[0]["captions"] == list("defghi") and read[0]["image"].getpixel((0, 0)) == (2, 0, 0)
    assert list(read_records(path, split="train", image_root=tmp_path)["image_id"]) == ["900", "901"]
    assert [row["image_id"] for row in read_records(path, split="train", streaming=True)] == ["900", "901"]
    with pytest.raises(ValueError, match="no split None.*'test': 1.*Choose one"):
        read_records(path)
    (tmp_path / "plain.json").write_text('{"image": "val2014/0.png", "caption": "images and sentences"}\n')
    assert list(read_records(tmp_path / "plain.json")["captions"]) == [["images and sentences"]]
    with pytest.raises(ValueError, match="no split 'dev'.*restval"):
        read_karpathy(path, tmp_path, "dev")
    with pytest.raises(RecordError, match="record 0.*2 captions, 5 asked"):
        read_karpathy(path, tmp_path, "train", captions_per_image=5)
    with pytest.raises(FileNotFoundError, match="image_root"):
        read_karpathy(path, tmp_path / "val2014", "test")
    # a model that sees regions needs no pictures, and is given those that are there
    bare = read_records(path, split="train", image_root=tmp_path / "val2014", required=("captions",))
    assert bare.column_names == ["captions", "image_id", "filename"] and list(bare["image_id"]) == ["900", "901"]
    streamed = read_records(
        path, split="train", image_root=tmp_path / "val2014", required=("captions",), streaming=True
    )
    assert [row["captions"] for row in streamed] == [["a", "b"], ["c"]]
    assert read_records(path, split="test", required=("captions",))[0]["image"].getpixel((0, 0)) == (2, 0, 0)
    with pytest.raises(FileNotFoundError, match="image_root"):
        read_records(path, split="train", image_root=tmp_path / "val2014")


def test_a_folder_of_precomputed_regions(tmp_path):
    for split, images, copies in (("train", 3, 1), ("dev", 2, 5)):
        features = np.arange(images * 12, dtype=np.float32).reshape(images, 3, 4)
        np.save(tmp_path / f"{split}_ims.npy", features.repeat(copies, axis=0))
        ids = [f"{split}{i // copies}" for i in range(images * copies)]
        (tmp_path / f"{split}_ids.txt").write_text("\n".join(ids) + "\n")
        (tmp_path / f"{split}_caps.txt").write_text("".join(f"{split} caption {i}\n" for i in range(images * 5)))
    for streaming in (False, True):
        options = {"required": ("captions",), "streaming": streaming}
        train, dev = (list(read_records(tmp_path, split=split, **options)) for split in ("train", "dev"))
        assert [row["image_id"] for row in train] == [row["regions"] for row in train] == ["train0", "train1", "train2"]
        assert train[1]["captions"] == [f"train caption {i}" for i in range(5, 10)]
        assert [row["image_id"] for row in dev] == ["dev0", "dev1"] and [len(row["captions"]) for row in dev] == [5, 5]
    for split in (None, "test"):
        with pytest.raises(ValueError, match=f"has the splits dev, train; split={split!r} is none of them. Choose one"):
            read_records(tmp_path, split=split, required=("captions",))
    with pytest.raises(RecordError, match="no column 'image'.*Available columns: captions, image_id, regions"):
        read_records(tmp_path, split="train")
    for path in tmp_path.glob("dev*"):
        path.unlink()
    assert len(read_records(tmp_path, required=("captions",))) == 3  # the only split there is
    (tmp_path / "train_ims.npy").unlink()
    with pytest.raises(FileNotFoundError, match="train_ims.npy"):
        read_records(tmp_path, split="train", required=("captions",))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_one_regions_key_are_of_one_image(tmp_path, streaming):
    def ids(rows, **columns):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"required": ("captions",), "streaming": streaming, "columns": columns}
        return [row["image_id"] for row in read_records(tmp_path / "rows.jsonl", **options)]

    assert ids([{"caption": "a", "regions": 7}, {"caption": "b", "regions": 0}, {"caption": "c", "regions": 7}]) == [
        7,
        0,
        7,
    ]
    assert ids([{"caption": "a", "key": "x"}, {"caption": "b", "key": "x"}], regions="key") == ["x", "x"]
    assert ids([{"caption": "a", "regions": "x", "image_id": 3}, {"caption": "b", "regions": "x", "image_id": 4}]) == [
        3,
        4,
    ]
    # without keys, or with lists of something else under that name, rows are images of their own
    assert ids([{"caption": "a"}, {"caption": "b"}]) == [0, 1]
    assert ids([{"caption": "a", "regions": [1, 2]}, {"caption": "b", "regions": [1, 2]}]) == [0, 1]


def test_identity_is_stable_and_the_same_for_a_number_and_its_text():
    ids = [identity(i) for i in range(2000)]
    assert len(set(ids)) == 2000 and min(ids) >= 0 and max(ids) < 2**63
    assert identity("7") == identity(7) == identity(7.0) == identity(np.int64(7)) != identity("07")
    command = "from hf_vlp.data.record import identity; print(identity('cat.png'))"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(other.stdout) == identity("cat.png")
    for missing in (None, "", float("nan")):
        with pytest.raises(ValueError, match="missing"):
            identity(missing)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (encoded((1, 2, 3), size=(64, 64))[:60], "does not decode"),
        (b"<html>404</html>", "not in a picture format"),
        (png(50_000, 50_000), "pixels"),
        (png(9_000, 10_000), "pixels"),
        (png(1, 5_000), "times the other"),
        (png(0, 4), "0 x 4|not in a picture format|does not decode"),
        (Image.new("RGB", (0, 3)), "0 x 3"),
        ({"bytes": None, "path": "no/such.png"}, "no file no/such.png"),
        ({"bytes": None, "path": None}, "no picture"),
        ("https://example.org/a.png", "URL"),
        (None, "no picture"),
        (3, "int is not a picture"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_picture_is_a_record_error_with_its_position(image, reason):
    with pytest.raises(RecordError, match=f"record 41, field 'image'.*({reason})") as caught:
        decode_image(image, 41)
    assert caught.value.position == 41 and caught.value.remedy
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


def test_good_pictures_decode_however_they_are_given(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded((9, 8, 7)))
    for image in (encoded((9, 8, 7)), tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": encoded((9, 8, 7))}):
        assert decode_image(image).getpixel((0, 0)) == (9, 8, 7)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (6, 4)).save(turned, "JPEG", exif=exif)
    assert decode_image(turned.getvalue()).size == (4, 6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"captions": []}, "expected a list of texts"),
        ({"captions": ["fine", "  "]}, "text 1 is empty"),
        ({"captions": [None]}, "text 0 is None"),
        ({"captions": "a text"}, "expected a list of texts"),
        ({"image_id": None}, "image id is missing"),
        ({"question": ""}, "the text is empty"),
        ({"label": None}, "the value is missing"),
    ],
)
def test_each_bad_field_is_named(change, reason):
    good = {"image": encoded((0, 0, 0)), "captions": ["a"], "image_id": 1, "question": "what?", "label": 0}
    check_record(good, 5, required=list(good))
    with pytest.raises(RecordError, match=reason) as caught:
        check_record({**good, **change}, 5, required=list(good))
    assert (caught.value.position, caught.value.field) == (5, next(iter(change)))
    with pytest.raises(RecordError, match="no such field"):
        check_record(good, 5, required=["answers"])


def test_validate_prints_the_first_bad_records_and_their_number(pictures, capsys):
    (pictures / "broken.png").write_bytes(encoded((0, 0, 0), size=(64, 64))[:70])
    path = pictures / "a.csv"
    rows = ["red.png,red", "broken.png,broken", "green.png,", "gone.png,gone", "blue.png,blue"]
    path.write_text("\n".join(["image,caption", *rows]))
    assert validate([str(path), "--first", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2] == "3 bad of 5 records"
    assert lines[0].startswith("record 1, field 'image'") and "does not decode" in lines[0]
    assert lines[1].startswith("record 2, field 'captions'") and "empty" in lines[1]
    path.write_text("\n".join(["image,caption", rows[0], rows[4]]))
    assert validate([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["all 2 records are good"]
    assert validate([str(path), "--columns", "captions=word"]) == 1
    assert "no column 'word'" in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [False, True])
def test_two_pictures_a_row(tmp_path, streaming):
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (3, 2), colour).save(tmp_path / "pictures" / f"{name}.png")
    row = {"images": ["pictures/a.png", "pictures/b.png"], "statement": "red, then blue", "label": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (record,) = read_records(tmp_path / "rows.jsonl", required=("images", "statement"), streaming=streaming)
    assert [picture.getpixel((0, 0)) for picture in record["images"]] == [(255, 0, 0), (0, 0, 255)]
    assert record["statement"] == row["statement"]
    if not streaming:
        path = tmp_path / "rows.parquet"
        read_records(tmp_path / "rows.jsonl", required=("images",)).to_parquet(path)
        (stored,) = read_records(path, required=("images", "statement"))
        assert stored["images"][1].getpixel((2, 1)) == (0, 0, 255)
