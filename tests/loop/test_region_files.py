"""Region features from the files that exist: each layout written here as its source writes it, and read back; nothing is executed."""

import base64
import io
import os
import pickle
import pickletools
import shutil
import tracemalloc
from pathlib import Path

import h5py
import lmdb
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_vlp.data import pickles, region_files
from hf_vlp.data.pickles import UnsafeGlobalError, read_npy, read_pickle
from hf_vlp.data.precomputed import PrecomputedSplit
from hf_vlp.data.record import RecordError
from hf_vlp.data.region_lmdb import read_msgpack
from hf_vlp.data.regions import KINDS, kind_of, main, read_regions
from hf_vlp.inputs.region_store import RegionStore, write_region_store

GOLDEN = Path(__file__).parents[1] / "golden"
VILBERT = {
    "lmdb of 12-in-1": GOLDEN / "vilbert" / "regions_12in1" / "features.lmdb",
    "lmdb of beta": GOLDEN / "vilbert" / "regions_beta" / "features.lmdb",
    "tsv of beta": GOLDEN / "vilbert" / "regions_beta" / "features.tsv",
}
WIDTH, HEIGHT = 80, 40
PIXELS = np.array([[8, 4, 40, 20], [0, 0, 80, 40], [16, 8, 24, 12]], np.float32)
FRACTIONS = PIXELS / [WIDTH, HEIGHT, WIDTH, HEIGHT]
FEATURES = {name: np.random.default_rng(i).random((3, 6)).astype(np.float32) for i, name in enumerate(("11", "22"))}
PROBS = np.full((3, 5), 0.2, np.float32)


def encoded(array):
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode()


def tsv_row(name, **changes):
    row = {"id": name, "w": WIDTH, "h": HEIGHT, "n": 3, "boxes": encoded(PIXELS), "features": encoded(FEATURES[name])}
    return [str(value) for value in {**row, "probs": encoded(PROBS), **changes}.values() if value is not None]


def write_tsv(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def write_lmdb(path, items, single=False, keys=(b"keys", pickle.dumps)):
    with (
        lmdb.open(str(path), subdir=not single, map_size=2**20) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in items.items():
            transaction.put(key, value)
        transaction.put(keys[0], keys[1](list(items)))
    return path


def packed(value):
    """As msgpack_numpy encodes arrays."""
    if isinstance(value, np.ndarray):
        return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}
    raise TypeError(value)


def captions_item(name, **changes):
    item = {
        "features": FEATURES[name],
        "cls_prob": PROBS,
        "boxes": PIXELS,
        "num_boxes": "3",
        "h": str(HEIGHT),
        "w": str(WIDTH),
    }
    item |= {"id": name, "caption": "a cat", **changes}
    return msgpack.packb(list(item.values()), default=packed, use_bin_type=True)


def check(regions, boxes=True, probs=False, objectness=False, names=("11", "22")):
    regions = list(regions)
    assert [one.image_id for one in regions] == list(names)
    for one, features in zip(regions, FEATURES.values()):
        assert np.array_equal(one.features, features)
        assert (one.boxes is None) != boxes and (one.class_probs is None) != probs
        assert (one.objectness is None) != objectness
        if boxes:
            np.testing.assert_allclose(one.boxes, FRACTIONS, atol=1e-6)
    return regions


# --------------------------------------------------------------------------------------------- the originals' own files


@pytest.mark.parametrize("which", VILBERT)
def test_the_originals_files_round_trip_through_a_store(which, tmp_path):
    path = VILBERT[which]
    inputs = load_file(path.parent / "inputs.safetensors")
    before = {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}
    store = write_region_store(tmp_path / "a", read_regions(path))
    names = sorted({name.partition(".")[0] for name in inputs})
    assert sorted(store.keys()) == names and len(names) == 2
    for name in names:
        read, features = store.read(int(name)), inputs[f"{name}.raw_features"]
        assert [read.width, read.height] == inputs[f"{name}.image_wh"].tolist()
        assert np.abs(read.features - features).max() <= 1e-3 * np.abs(features).max()
        pixels = read.boxes * np.array([read.width, read.height] * 2)
        np.testing.assert_allclose(pixels, inputs[f"{name}.raw_boxes"], rtol=1e-5)
        other = inputs[f"{names[names[0] == name]}.raw_features"]
        assert other.shape != features.shape
    assert before == {file: file.stat().st_mtime_ns for file in path.parent.rglob("*")}  # no lock file either


def test_tsv_and_lmdb_of_one_source_are_one_store(tmp_path):
    stores = [
        write_region_store(tmp_path / str(i), read_regions(VILBERT[f"{kind} of beta"]))
        for i, kind in enumerate(("tsv", "lmdb"))
    ]
    assert stores[0].header == stores[1].header and stores[0].header["class_size"] == 7


def test_vse_region_dataset_round_trips_through_a_store(tmp_path):
    precomp = GOLDEN / "vse" / "region_dataset" / "precomp"
    split = PrecomputedSplit(precomp, "test")
    store = write_region_store(tmp_path / "a", read_regions(precomp / "test_ims.npy"))
    records = split.records()
    assert len(store) == len(records) == 4 and len(split) == 20
    stored = np.load(precomp / "test_ims.npy")
    for row, record in enumerate(records):
        assert len(record["captions"]) == 5 and record["captions"][1] == split.captions[5 * row + 1]
        assert np.abs(store.read(record["regions"]).features - stored[row]).max() < 1e-2
        assert np.array_equal(split.regions(5 * row + 4).features, stored[row])
    assert not np.array_equal(split.regions(4).features, split.regions(5).features)


# --------------------------------------------------------------------------------------------------------------- layouts


def test_tsv_with_and_without_probabilities_and_of_lxmert(tmp_path):
    check(read_regions(write_tsv(tmp_path / "a.tsv", [tsv_row(name) for name in FEATURES])), probs=True)
    check(read_regions(write_tsv(tmp_path / "b.tsv", [tsv_row(name, probs=None) for name in FEATURES])))
    scores = np.array([0.9, 0.5, 0.1], np.float32)
    rows = [
        [n, "40", "80", "x", encoded(scores), "x", "x", "3", encoded(PIXELS), encoded(f)] for n, f in FEATURES.items()
    ]
    first, _ = check(read_regions(write_tsv(tmp_path / "c.tsv", rows)), objectness=True)
    assert first.objectness.tolist() == scores.tolist() and (first.width, first.height) == (80, 40)


def test_lmdbs_of_both_code_bases(tmp_path):
    beta = {
        "image_id": "x",
        "image_w": "80",
        "image_h": "40",
        "num_boxes": "3",
        "boxes": encoded(PIXELS),
        "cls_prob": encoded(PROBS),
    }
    items = {name.encode(): pickle.dumps({**beta, "features": encoded(f)}) for name, f in FEATURES.items()}
    check(read_regions(write_lmdb(tmp_path / "a", items)), probs=True)
    later = {
        "image_id": "x",
        "image_w": 80,
        "image_h": 40,
        "num_boxes": 100,
        "boxes": PIXELS,
    }  # its num_boxes is ignored
    for protocol in range(2, 6):
        items = {name.encode(): pickle.dumps({**later, "features": f}, protocol) for name, f in FEATURES.items()}
        check(read_regions(write_lmdb(tmp_path / f"b{protocol}.lmdb", items, single=True)))


def test_lmdb_of_conceptual_captions(tmp_path):
    items = {f"{i:08d}".encode(): captions_item(name) for i, name in enumerate(FEATURES)}
    path = write_lmdb(tmp_path / "a.lmdb", items, single=True, keys=(b"__keys__", msgpack.packb))
    assert kind_of(path) == "captions-lmdb"
    check(read_regions(path), probs=True)
    assert len(list(tmp_path.iterdir())) == 2  # the lock file is the writer's
    (tmp_path / "a.lmdb-lock").unlink()
    list(read_regions(path))
    assert len(list(tmp_path.iterdir())) == 1


def test_npy_and_npz_an_image(tmp_path):
    for kind in ("pickled", "plain", "npz"):
        (tmp_path / kind).mkdir()
    for name, features in FEATURES.items():
        told = {"bbox": PIXELS, "num_boxes": 3, "image_width": WIDTH, "image_height": HEIGHT, "cls_prob": PROBS}
        np.save(
            tmp_path / "pickled" / f"{name}.npy",
            {**told, "image_id": name, "objects": np.arange(3), "features": features},
        )
        np.save(tmp_path / "plain" / f"{name}.npy", features)
        np.save(tmp_path / "plain" / f"{name}_info.npy", {**told, "image_id": int(name)})
        more = {"x": features, "bbox": PIXELS, "image_w": WIDTH, "image_h": HEIGHT, "info": np.array({"a": 1}, object)}
        np.savez_compressed(tmp_path / "npz" / f"{name}.npz", **more)
    check(read_regions(tmp_path / "pickled"), probs=True)
    check(read_regions(tmp_path / "plain"), probs=True)
    check(read_regions(tmp_path / "npz"))
    shutil.copy(tmp_path / "plain" / "11.npy", tmp_path / "22.npy")
    np.save(tmp_path / "11.npy", FEATURES["11"])
    (alone,) = read_regions(tmp_path / "22.npy")
    assert alone.image_id == "22" and np.array_equal(alone.features, FEATURES["11"]) and alone.boxes is None
    shutil.rmtree(tmp_path / "plain")
    assert [one.image_id for one in read_regions(tmp_path)] == ["11", "22", "npz/11", "npz/22", "11", "22"]


def test_units_of_boxes_are_told_by_the_values_or_by_the_caller(tmp_path):
    told = {"image_width": WIDTH, "image_height": HEIGHT, "features": FEATURES["11"]}
    np.save(tmp_path / "11.npy", {**told, "boxes": FRACTIONS})
    for units in (None, "fractions"):
        (regions,) = read_regions(tmp_path, box_units=units)
        np.testing.assert_allclose(regions.boxes, FRACTIONS, atol=1e-6)
    with pytest.raises(RecordError, match="these are fractions"):
        list(read_regions(tmp_path, box_units="pixels"))
    np.save(tmp_path / "11.npy", {"features": FEATURES["11"], "boxes": PIXELS})
    with pytest.raises(RecordError, match="record 0, field 'boxes'.*'11'.*pixels, it seems.*from_pixels"):
        list(read_regions(tmp_path))
    with pytest.raises(RecordError, match="no image size to divide by"):
        list(read_regions(tmp_path, box_units="pixels"))


def test_matrix_of_a_split(tmp_path):
    rows = np.stack(list(FEATURES.values()))
    np.save(tmp_path / "test_ims.npy", rows)
    check(read_regions(tmp_path / "test_ims.npy"), boxes=False, names=("0", "1"))
    (tmp_path / "test_ids.txt").write_text("11\n22\n")
    check(read_regions(tmp_path / "test_ims.npy"), boxes=False)
    (tmp_path / "test_ids.txt").write_text("11\n" * 5 + "22\n" * 5)  # one a caption
    check(read_regions(tmp_path / "test_ims.npy"), boxes=False)
    np.save(tmp_path / "test_ims.npy", rows.repeat(5, axis=0))  # as for evaluation
    check(read_regions(tmp_path / "test_ims.npy"), boxes=False)
    for ids in ("11\n22\n33\n", "11\n22\n" * 5 + "33\n"):
        (tmp_path / "other.txt").write_text(ids)
        with pytest.raises(ValueError, match="ids for the 10 images"):
            list(read_regions(tmp_path / "test_ims.npy", ids=tmp_path / "other.txt"))
    (tmp_path / "other.txt").write_text("11\n22\n" * 5)
    with pytest.raises(RecordError, match="record 5, field 'features'.*'22', they differ from those of row 1"):
        list(read_regions(tmp_path / "test_ims.npy", ids=tmp_path / "other.txt"))


def h5_file(path, **entries):
    with h5py.File(path, "w") as file:
        for name, value in entries.items():
            file[name] = value
    return path


def test_h5_layouts(tmp_path):
    stacked = np.zeros((2, 5, 6), np.float32)
    stacked[:, :3] = list(FEATURES.values())
    boxes = np.zeros((2, 5, 4), np.float32)
    boxes[:, :3] = PIXELS
    sizes = {"image_w": [WIDTH] * 2, "image_h": [HEIGHT] * 2}
    ids, counts = [11, 22], [3, 3]
    flat = {"features": np.concatenate(list(FEATURES.values())), "boxes": np.concatenate([PIXELS] * 2)}
    check(
        read_regions(
            h5_file(tmp_path / "a.h5", image_ids=ids, num_boxes=counts, features=stacked, boxes=boxes, **sizes)
        )
    )
    check(read_regions(h5_file(tmp_path / "b.h5", image_ids=ids, num_boxes=counts, features=stacked)), boxes=False)
    check(read_regions(h5_file(tmp_path / "c.h5", image_ids=["11", "22"], num_boxes=counts, **flat, **sizes)))
    spans = np.array([[0, 3], [3, 6]])
    check(
        read_regions(h5_file(tmp_path / "d.h5", image_ids=np.array([b"11", b"22"]), pos_boxes=spans, **flat, **sizes))
    )
    check(read_regions(h5_file(tmp_path / "e.h5", **FEATURES)), boxes=False)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for name, features in FEATURES.items():
            file[f"{name}/features"], file[f"{name}/boxes"] = features, PIXELS
            file[name].attrs.update(image_w=WIDTH, image_h=HEIGHT)
    check(read_regions(tmp_path / "f.h5"))
    path = h5_file(tmp_path / "g.h5", image_ids=ids, num_boxes=[3, 9], features=stacked)
    with pytest.raises(RecordError, match="record 1, field 'num_boxes'.*'22'.*9 regions, from 0 on, of 5"):
        list(read_regions(path))
    with pytest.raises(ValueError, match="3 image_ids"):
        list(read_regions(h5_file(tmp_path / "h.h5", image_ids=[1, 2, 3], num_boxes=counts, features=stacked)))
    (tmp_path / "i.h5").write_bytes(b"not one")
    with pytest.raises(ValueError, match="cannot be read as HDF5"):
        list(read_regions(tmp_path / "i.h5"))


def test_the_precomp_folder(tmp_path):
    captions = [f"caption {i} \n" for i in range(10)]
    rows = np.stack(list(FEATURES.values()))
    for split, features in {"train": rows, "test": rows.repeat(5, axis=0), "single": np.random.rand(10, 3, 6)}.items():
        (tmp_path / f"{split}_caps.txt").write_text("".join(captions))
        np.save(tmp_path / f"{split}_ims.npy", features)
    train, test, single = (PrecomputedSplit(tmp_path, split) for split in ("train", "test", "single"))
    assert train.row_of_caption.tolist() == [0] * 5 + [1] * 5 and test.row_of_caption.tolist() == list(range(10))
    assert [len(split.records()) for split in (train, test, single)] == [2, 2, 10]
    assert test.records()["regions"][:] == ["0", "5"] and test.records()[1]["captions"] == [
        f"caption {i}" for i in range(5, 10)
    ]
    for split in (train, test):
        assert np.array_equal(split.regions(7).features, FEATURES["22"])
    (tmp_path / "test_ids.txt").write_text("11\n" * 5 + "22\n" * 5)
    test = PrecomputedSplit(tmp_path, "test")
    store = write_region_store(tmp_path / "store", read_regions(tmp_path / "test_ims.npy"))
    assert test.records()["image_id"][:] == store.keys() == ["11", "22"]
    assert [test.regions(i).image_id for i in (4, 5)] == ["11", "22"]
    (tmp_path / "train_caps.txt").write_text("".join(captions) + "one more\n")
    with pytest.raises(ValueError, match="11 captions.*2 images, so that caption 10 has none"):
        PrecomputedSplit(tmp_path, "train")
    assert len(PrecomputedSplit(tmp_path, "train", captions_per_image=6).records()[1]["captions"]) == 5
    (tmp_path / "test_caps.txt").write_text("".join(captions[:9]) + "\n")
    with pytest.raises(RecordError, match="record 9, field 'captions'.*empty"):
        PrecomputedSplit(tmp_path, "test").records()
    with pytest.raises(FileNotFoundError, match="dev_caps.txt.*single, test, train"):
        PrecomputedSplit(tmp_path, "dev")


# ----------------------------------------------------------------------------------------------------- broken records


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"n": 4}, "features", "72 bytes are not 4 rows of float32"),
        ({"n": 2}, "boxes", "48 bytes are not 2 rows of 4"),
        ({"n": 0}, "num_boxes", "it is 0: there are no regions"),
        ({"n": "x"}, "regions", "invalid literal"),
        ({"features": encoded(np.ones(17))}, "features", "68 bytes are not 3 rows"),
        ({"features": "%%%"}, "features", "not base64"),
        ({"features": encoded(np.full((3, 6), np.nan))}, "features", "nan in region 0"),
        ({"boxes": encoded(PIXELS * 2)}, "boxes", "outside the image"),
        ({"w": 0}, "width", "0' is no number of pixels"),
        ({"probs": None, "features": None}, "regions", "5 columns"),
        ({"boxes": encoded(PIXELS * 1.1)}, "boxes", "outside the image.*--on-bad-record skip"),
    ],
)
def test_a_broken_line_is_named_by_position_and_id(tmp_path, changes, field, reason):
    path = write_tsv(tmp_path / "a.tsv", [tsv_row("11"), tsv_row("22", **changes)])
    reader = read_regions(path)
    next(reader)
    with pytest.raises(RecordError, match=f"record 1, field '{field}': .*image '22'.*{reason}") as caught:
        next(reader)
    assert caught.value.position == 1
    faults = []
    assert [one.image_id for one in read_regions(path, faults=faults)] == ["11"] and len(faults) == 1


def test_a_header_line_is_told_as_such(tmp_path):
    header = "image_id image_w image_h num_boxes boxes features cls_prob".split()
    path = write_tsv(tmp_path / "a.tsv", [header, tsv_row("11")])
    with pytest.raises(RecordError, match="record 0, .*has a header line, remove it"):
        list(read_regions(path))
    assert len(list(read_regions(write_tsv(tmp_path / "b.tsv", [tsv_row("11")])))) == 1


def test_an_npz_that_unpacks_to_more_than_an_image_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "11.npz", features=np.zeros((1000, 100), np.float32))
    assert os.path.getsize(tmp_path / "11.npz") < 10_000 and len(list(read_regions(tmp_path / "11.npz"))) == 1
    monkeypatch.setattr(region_files, "LARGEST_MEMBER", 400_000)
    with pytest.raises(RecordError, match="features.npy unpacks to 400,128 bytes, more than 400,000"):
        list(read_regions(tmp_path / "11.npz"))


def test_an_h5_reads_no_other_file(tmp_path):
    secret = h5_file(tmp_path / "secret.h5", features=FEATURES["11"])
    (tmp_path / "raw").write_bytes(FEATURES["11"].tobytes())
    layout = h5py.VirtualLayout((3, 6), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "features", (3, 6))
    for kind in ("link", "raw", "virtual"):
        for place in ("11", "11/features", "features"):
            path = tmp_path / f"{kind}.h5"
            with h5py.File(path, "w") as file:
                if kind == "link":
                    file[place] = h5py.ExternalLink(str(secret), "features")
                elif kind == "raw":
                    file.create_dataset(place, (3, 6), "f4", external=[(str(tmp_path / "raw"), 0, 72)])
                else:
                    file.create_virtual_dataset(place, layout)
                assert np.array_equal(file[place][:], FEATURES["11"])  # it would be read
            with pytest.raises(ValueError, match="features lies in another file|11 lies in another file"):
                list(read_regions(path))
    with h5py.File(tmp_path / "round.h5", "w") as file:
        file["g/elsewhere"] = h5py.ExternalLink(str(secret), "/")
        file["features"] = h5py.SoftLink("/g/elsewhere/features")
    with pytest.raises(ValueError, match="features lies in another file"):
        list(read_regions(tmp_path / "round.h5"))
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["other"], file["11"] = FEATURES["11"], h5py.SoftLink("/other")
    assert len(list(read_regions(tmp_path / "own.h5"))) == 2


def test_broken_files_of_other_kinds(tmp_path):
    good = {"image_w": 80, "image_h": 40, "num_boxes": 3, "boxes": PIXELS, "features": FEATURES["11"]}
    items = {
        b"11": pickle.dumps(good),
        b"22": pickle.dumps(good)[:-20],
        b"33": pickle.dumps([1]),
        b"44": pickle.dumps({"a": 1}),
    }
    faults = []
    assert [one.image_id for one in read_regions(write_lmdb(tmp_path / "a", items), faults=faults)] == ["11"]
    for position, (fault, reason) in enumerate(
        zip(faults, ("damaged pickle|truncated", "pickled list", "no features among a")), 1
    ):
        assert fault.position == position
        with pytest.raises(RecordError, match=f"image '{position + 1}{position + 1}'.*({reason})"):
            raise fault
    items = {b"00": captions_item("11"), b"01": captions_item("22")[:-30], b"02": captions_item("22", num_boxes="2")}
    faults = []
    path = write_lmdb(tmp_path / "b", items, keys=(b"__keys__", msgpack.packb))
    assert len(list(read_regions(path, faults=faults))) == 1
    assert [fault.field for fault in faults] == ["regions", "num_boxes"] and "is 2, and there are 3 rows" in faults[
        1
    ].reason
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "11.npy", FEATURES["11"])
    content = (tmp_path / "c" / "11.npy").read_bytes()
    (tmp_path / "c" / "22.npy").write_bytes(content[:-8])
    (tmp_path / "c" / "33.npz").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "c" / "44.npy").write_bytes(b"\x93NUMPY")
    faults = []
    assert len(list(read_regions(tmp_path / "c", faults=faults))) == 1 and [fault.position for fault in faults] == [
        1,
        2,
        3,
    ]
    with pytest.raises(RecordError, match="record 1, .*'22' cannot be read .*truncated or damaged"):
        list(read_regions(tmp_path / "c"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data.mdb").write_bytes(b"no database at all" * 500)
    with pytest.raises(ValueError, match="cannot be read as an LMDB"):
        list(read_regions(tmp_path / "d", "lmdb"))
    np.save(tmp_path / "bad_ims.npy", np.array([[[1.0, 2]], [[np.inf, 2]]]))
    with pytest.raises(RecordError, match="record 1, field 'features': of image '1', inf in region 0"):
        list(read_regions(tmp_path / "bad_ims.npy"))


def test_what_kind_a_source_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        kind_of(tmp_path / "nowhere")
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match=f"give the kind, one of {', '.join(KINDS)}"):
        kind_of(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="several splits.*test_ims.npy"):
        kind_of(GOLDEN / "vse" / "region_dataset" / "precomp")
    for options in ({"kind": "csv"}, {"box_units": "pixels"}, {"ids": "a.txt"}):
        with pytest.raises(ValueError, match="kind"):
            read_regions(VILBERT["tsv of beta"], **options)


# ------------------------------------------------------------------------------------------------- malicious pickles


class Runs:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def npy(value):
    """Bytes of a .npy file with a pickled object."""
    file = io.BytesIO()
    np.save(file, np.array(value, dtype=object))
    return file.getvalue()


def nested_in_array(value):
    array = np.empty(2, object)
    array[:] = [1, {"features": [value]}]
    return array


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"features": value}, nested_in_array])
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_something_is_refused(tmp_path, wrap, protocol):
    mark = tmp_path / "ran"
    harmful = [
        Runs(os.system, f"touch {mark}"),
        Runs(eval, f"open({str(mark)!r}, 'w')"),
        Runs(open, str(mark), "w"),
        Runs(np.load, str(mark)),
        Runs(os.open, str(mark), os.O_CREAT),
    ]
    for value in harmful:
        data = pickle.dumps(wrap(value), protocol)
        with pytest.raises(UnsafeGlobalError, match="none of numbers, arrays") as caught:
            read_pickle(data)
        assert caught.value.name.rpartition(".")[2] in ("system", "eval", "open", "load")
        assert not mark.exists()
    pickle.loads(pickle.dumps(wrap(harmful[0]), protocol))
    assert mark.exists()  # it would have run


def test_a_malicious_pickle_is_refused_in_every_file_that_holds_one(tmp_path):
    mark = tmp_path / "ran"
    value = {"features": Runs(os.system, f"touch {mark}")}
    write_lmdb(tmp_path / "a", {b"11": pickle.dumps(value)})
    for name, data in (("c", npy(value)), ("d", npy(nested_in_array(value["features"])))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "11.npy").write_bytes(data)
    (tmp_path / "e").mkdir()
    np.savez(tmp_path / "e" / "11.npz", features=nested_in_array(value))
    array = {b"nd": True, b"type": "O", b"kind": b"O", b"shape": (1,), b"data": pickle.dumps(value)}
    items = {b"0": captions_item("11", features=array)}
    write_lmdb(tmp_path / "f", items, keys=(b"__keys__", msgpack.packb))
    for name in "acdef":
        with pytest.raises(RecordError, match="record 0, .*(posix.system|no array of numbers)"):
            list(read_regions(tmp_path / name))
    assert not mark.exists()


def test_what_a_pickle_may_hold():
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(["a", "bc"]),
        np.ones(0),
    ]
    arrays += [np.array([1, 2], ">f4"), np.array([True]), np.zeros((2, 0), np.int8), np.arange(4)[::2]]
    content = {
        "a": arrays,
        "b": (1, 2.5, None, b"x", "y", True, {1, 2}, frozenset([3])),
        "c": {"d": np.float32(2), 3: np.int64(7)},
    }
    for protocol in range(6):
        read = read_pickle(pickle.dumps(content, protocol))
        assert read["b"] == content["b"] and read["c"] == {"d": 2.0, 3: 7}
        for found, wanted in zip(read["a"], arrays):
            assert found.dtype == wanted.dtype and np.array_equal(found, wanted)
    # numpy 1 under Python 2: short names, bytes in text strings
    old = b"(dp0\nS'a'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n(I1\n(I2\ntp8\n"
    old += b"cnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\n"
    old += b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@'\np15\ntp16\nbs."
    assert read_pickle(old)["a"].tolist() == [1.0, 2.0]
    assert read_pickle(pickle.dumps(nested_in_array(5))) == [1, {"features": [5]}]


def dtype_of(code):
    return b"cnumpy\ndtype\n(V" + code + b"\nI0\nI1\ntR"


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nndarray\n(I4\ntR" + b"}(Vfeatures\nI1\nub.",  # a state that is none
        b"cnumpy\ndtype\n.",  # the class itself
        b"cnumpy\ndtype\n}(Va\nI1\nub.",  # a state for a class
        b"c_codecs\nencode\n(Vx\nVhex\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(" + dtype_of(b"O8") + b"Vx\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(" + dtype_of(b"V8") + b"C\x0812345678tR.",
        b"cnumpy.core.multiarray\nscalar\n(" + dtype_of(b"f4,f4") + b"C\x0812345678tR.",
        b"cnumpy.core.multiarray\nscalar\n(" + dtype_of(b"f8") + b"C\x041234tR.",
        b"cnumpy.core.multiarray\nscalar\n(I1\nC\x041234tR.",
        b"cnumpy.core.numeric\n_frombuffer\n(C\x041234" + dtype_of(b"f4") + b"(I-1\nI-1\ntVC\ntR.",
        b"cnumpy.core.numeric\n_frombuffer\n(C\x00" + dtype_of(b"S0") + b"(I1000000000000\ntVC\ntR.",
        b"P42\n.",  # a persistent id
        b"\x82\x01.",  # the extension registry
        b"(lp0\ng0\na.",  # a list within itself
        b"]" + b"]" * 100 + b"a" * 100 + b".",  # nested too deep
        b"",
        b"\x80\x04\x95",
        b"garbage",
    ],
)
def test_crafted_and_damaged_pickles_are_refused(data):
    before = dict(pickles.HARMLESS)
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(data)
    assert before == pickles.HARMLESS and read_pickle(pickle.dumps(np.ones(2))).tolist() == [1, 1]


def doubled(times):
    """Protocol 2: a tuple of twice a tuple of twice ..., which takes two to the number of times to hash."""
    return b"\x80\x02)" + b"2\x86" * times


@pytest.mark.parametrize(
    "data",
    [
        doubled(60)[:2] + b"}" + doubled(60)[2:] + b"Ns.",  # as a key, one
        doubled(60)[:2] + b"}(" + doubled(60)[2:] + b"Nu.",  # and among several
        doubled(60)[:2] + b"(" + doubled(60)[2:] + b"Nd.",
        b"\x80\x04\x8f(" + doubled(60)[2:] + b"\x90.",  # in a set
        b"\x80\x04(" + doubled(60)[2:] + b"\x91.",
        *(b"cbuiltins\n" + name + b"\n](" + doubled(60)[2:] + b"e\x85R." for name in (b"set", b"frozenset")),
        b"ccollections\nOrderedDict\n](" + doubled(60)[2:] + b"N\x86e\x85R.",
        b"ccollections\nOrderedDict\n)R}(" + doubled(60)[2:] + b"Nub.",  # a state
        b"ccollections\nOrderedDict\n)R}(Vitems\nNub.",
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + doubled(60)[2:] + b"\x85RC\x041234\x86R.",
        b"c_codecs\nencode\nVx\n" + doubled(60)[2:] + b"\x86R.",
        b"\x80\x05\x96" + (1 << 46).to_bytes(8, "little") + b"x.",  # bytes that are not there
        b"}" + doubled(200_000)[2:] + b"Ns.",  # so deep that hashing would crash
    ],
)
def test_a_pickle_that_would_take_for_ever_or_all_memory_is_refused(data):
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(data)
    assert read_pickle(pickle.dumps({1: {"a", b"b", None}, np.int64(2): 3.5})) == {1: {"a", b"b", None}, 2: 3.5}


def test_a_pickle_takes_no_memory_for_references_it_only_tells_of():
    tracemalloc.start()
    assert read_pickle(b"\x80\x02K\x07r" + (1 << 27).to_bytes(4, "little") + b".") == 7
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # 1 GiB if each had its place


def test_shared_containers_are_read_once():
    value, few = [1], None
    for times in range(40):
        few = value if times == 20 else few
        value = [value, value]  # two to the fortieth if each is read on its own
    read = read_pickle(pickle.dumps(few))
    assert read[0] is read[1] and read[0][1][0][0] is not None
    for bomb in (value, {"image_id": value}, {"features": nested_in_array(value)}):  # to be printed, or made an array
        with pytest.raises(pickle.UnpicklingError, match="hold each other so often"):
            read_pickle(pickle.dumps(bomb))


def test_the_names_of_this_numpy_are_known():
    for protocol in range(6):
        data = pickle.dumps([np.ones(2), np.float64(1)], protocol)
        assert any("numpy" in str(argument) for _, argument, _ in pickletools.genops(data))
        assert read_pickle(data)[0].tolist() == [1, 1]
        renamed = data.replace(b"numpy._core.", b"numpy.core.") if protocol < 4 else None
        if renamed:
            assert renamed != data and read_pickle(renamed)[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "content",
    [
        {b"nd": True, b"type": "<f4", b"kind": b"V", b"shape": (1,), b"data": b"1234"},
        {b"nd": True, b"type": "O", b"kind": b"", b"shape": (1,), b"data": b"12345678"},
        {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": (2,), b"data": b"1234"},
        {b"nd": True, b"type": ["<f4"], b"kind": b"", b"shape": (1,), b"data": b"1234"},
        {b"complex": True, b"data": "1j"},
        msgpack.ExtType(1, b"x"),
    ],
)
def test_msgpack_holds_arrays_of_numbers_alone(content):
    good = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": (1,), b"data": b"\0\0\x80?"}
    assert read_msgpack(msgpack.packb([good, {"a": 1}]))[0].tolist() == [1.0]
    with pytest.raises(ValueError):
        read_msgpack(msgpack.packb([content]))


def test_npy_of_numbers_stays_on_disk(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6))
    assert isinstance(read_npy(tmp_path / "a.npy"), np.memmap)
    (tmp_path / "b.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="no .npy file"):
        read_npy(tmp_path / "b.npy")


# -------------------------------------------------------------------------------------------------------- command line


def test_import_describe_verify(tmp_path, capsys):
    store = tmp_path / "a.regions"
    assert main(["import", str(VILBERT["tsv of beta"]), "--output", str(store)]) == 0
    printed = capsys.readouterr().out
    assert "a detector's TSV" in printed and "'910', '911'" in printed and "2 images in" in printed
    assert main(["import", str(VILBERT["tsv of beta"]), "--output", str(store)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["describe", str(store)]) == 0
    assert capsys.readouterr().out.strip() == RegionStore(store).describe()
    assert main(["verify", str(store)]) == 0 and "all 2 images" in capsys.readouterr().out
    content = bytearray(store.read_bytes())
    content[5000] ^= 255
    store.write_bytes(content)
    assert main(["verify", str(store)]) == 1 and "'910'" in capsys.readouterr().err
    store.write_bytes(content[:6000])
    assert main(["describe", str(store)]) == 1 and "truncated" in capsys.readouterr().err


def test_several_sources_go_into_one_store(tmp_path, capsys):
    for split, first in (("train", 10), ("dev", 20)):
        np.save(tmp_path / f"{split}_ims.npy", np.full((2, 3, 4), first, np.float32))
        (tmp_path / f"{split}_ids.txt").write_text(f"{first}\n{first + 1}\n")
    sources = [str(tmp_path / f"{split}_ims.npy") for split in ("train", "dev")]
    assert main(["import", *sources, "--output", str(tmp_path / "both.regions")]) == 0
    store, printed = RegionStore(tmp_path / "both.regions"), capsys.readouterr().out
    assert store.keys() == ["10", "11", "20", "21"] and store.read(21).features[0, 0] == 20
    assert all(f"{source}: <split>_ims.npy" in printed for source in sources)
    # an id of both is refused, and so is one list of ids for the two
    assert main(["import", *sources, sources[0], "--output", str(tmp_path / "twice.regions")]) == 1
    assert "'10'" in capsys.readouterr().err and not (tmp_path / "twice.regions").exists()
    words = [*sources, "--ids", str(tmp_path / "dev_ids.txt"), "--output", str(tmp_path / "ids.regions")]
    assert main(["import", *words]) == 1 and "--ids is for one source" in capsys.readouterr().err


def test_import_skips_bad_records_when_told_and_counts_them(tmp_path, capsys):
    path = write_tsv(tmp_path / "a.tsv", [tsv_row("11"), tsv_row("22", n=4)])
    command = ["import", str(path), "--output", str(tmp_path / "a.regions")]
    assert main(command) == 1 and "record 1" in capsys.readouterr().err and not (tmp_path / "a.regions").exists()
    assert main([*command, "--on-bad-record", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "1 bad records of 2" in printed and "record 1, field 'features'" in printed
    assert RegionStore(tmp_path / "a.regions").keys() == ["11"]


def test_import_skips_what_a_store_refuses_and_counts_it(tmp_path, capsys):
    wide = {"boxes": encoded(PIXELS), "features": encoded(np.ones((3, 7)))}
    rows = [tsv_row("11"), tsv_row("11"), tsv_row("22", **wide), tsv_row("22", features=encoded(np.full((3, 6), 7e4)))]
    path = write_tsv(tmp_path / "a.tsv", [*rows, tsv_row("22", n=4), tsv_row("22")])
    command = ["import", str(path), "--output", str(tmp_path / "a.regions")]
    assert main(command) == 1 and "another image has this id" in capsys.readouterr().err
    assert main([*command, "--on-bad-record", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "4 bad records of 6" in printed and "another image" in printed and "7 wide" in printed
    assert RegionStore(tmp_path / "a.regions").keys() == ["11", "22"]


def test_numbered_rows_of_two_matrices_say_where_ids_go(tmp_path, capsys):
    for split in ("train", "dev"):
        np.save(tmp_path / f"{split}_ims.npy", np.ones((2, 3, 4), np.float32))
    sources = [str(tmp_path / f"{split}_ims.npy") for split in ("train", "dev")]
    assert main(["import", *sources, "--output", str(tmp_path / "a.regions")]) == 1
    assert "image '0'" in (said := capsys.readouterr().err) and "_ids.txt" in said and "--ids" in said


def test_the_table_of_kinds_is_what_the_command_offers(capsys):
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
