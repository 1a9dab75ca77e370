"""The store of regions: what is written is read, by whoever opens it; what is damaged or missing says so. And its feature extractor."""

import json
import os
import pickle
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
from hf_vlp.inputs.region_store import HEADER_BYTES, INDEX, RegionStore, _checksum, store_key, write_region_store
from hf_vlp.inputs.regions import RegionError, RegionFeatures


def image(image_id, count=3, width=8, **changes):
    draw = np.random.default_rng(sum(str(image_id).encode()))
    corners = np.sort(draw.random((count, 2, 2)), axis=1).reshape(count, 4)
    fields = {"features": draw.normal(size=(count, width)).astype(np.float16), "boxes": corners}
    fields |= {"class_probs": draw.dirichlet(np.ones(5), count).astype(np.float16), "objectness": draw.random(count)}
    return RegionFeatures(**{**fields, "width": 60, "height": 40, "image_id": image_id, **changes})


IMAGES = [image(7, 3), image("cat.jpg", 1), image("8", 5), image("né/ü", 2)]


@pytest.fixture
def path(tmp_path):
    write_region_store(tmp_path / "a.regions", IMAGES)
    return tmp_path / "a.regions"


def same(read, written):
    for field in ("features", "boxes", "class_probs", "objectness"):
        found, wanted = getattr(read, field), getattr(written, field)
        assert (found is None) == (wanted is None) and (found is None or np.array_equal(found, wanted))
    return (read.width, read.height, read.image_id) == (written.width, written.height, store_key(written.image_id))


def test_what_is_written_is_read(path):
    store = RegionStore(path)
    assert len(store) == 4 and store.keys() == ["7", "cat.jpg", "8", "né/ü"]
    assert all(same(store.read(one.image_id), one) for one in IMAGES)
    assert not np.array_equal(store.read("7").features[:1], store.read("cat.jpg").features)
    regions = store.read("8")
    assert (regions.features.dtype, regions.boxes.dtype) == (np.float16, np.float32)
    regions.check(8)
    batch = store.read_batch(["8", 7, "8"])
    assert [len(one) for one in batch] == [5, 3, 5] and same(batch[1], IMAGES[0])
    store.verify()


def test_numbers_and_their_texts_are_one_key(path):
    store = RegionStore(path)
    for key in (7, "7", np.int64(7), 7.0):
        assert key in store and same(store.read(key), IMAGES[0])
    assert 8 in store and 9 not in store and "07" not in store
    for key in (None, True, 7.5, b"7", ["7"]):
        with pytest.raises(TypeError, match="no image id"):
            store.read(key)


def test_reading_copies_nothing_and_changes_nothing(path):
    features = RegionStore(path).read(7).features
    with pytest.raises(ValueError, match="read-only"):
        features[0, 0] = 1
    assert not features.flags.owndata


def test_features_alone_and_single_precision(tmp_path):
    draw = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    store = write_region_store(tmp_path / "a", (RegionFeatures(draw + i, image_id=i) for i in range(3)))
    read = store.read(2)
    assert np.array_equal(read.features, (draw + 2).astype(np.float16)) and not np.array_equal(read.features, draw + 2)
    assert (read.boxes, read.class_probs, read.objectness, read.width) == (None,) * 4


def test_describe(path, tmp_path):
    text = RegionStore(path).describe()
    for part in ("'7', 'cat.jpg', '8', ...", "R is 1 to 5", "11 in all", "[R, 8] float16", "[R, 5]", "4 images"):
        assert part in text
    assert "x1 y1 x2 y2 as fractions of width and height" in text and str(os.path.getsize(path)) in text.replace(
        ",", ""
    )
    plain = write_region_store(tmp_path / "b", [RegionFeatures(np.ones((2, 3)), image_id=1)]).describe()
    assert "boxes        none" in plain and "class_probs  none" in plain and "..." not in plain
    other = write_region_store(tmp_path / "c", [RegionFeatures(np.ones((2, 3)) * 2, image_id=1)]).describe()
    assert plain.splitlines()[-1] != other.splitlines()[-1]  # the checksum


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([image(1), image("1")], "image '1', field 'image_id'.*another image has this id"),
        ([image(1), image(None)], "without id, field 'image_id'"),
        ([image(1), image("")], "image '', field 'image_id'"),
        ([image(1), image(2, width=9)], "image 2, field 'features'.*9 wide, and 8 wide for image '1'"),
        ([image(1), image(2, boxes=None)], "image 2, field 'boxes'.*has none and image '1' has it"),
        ([image(1, objectness=None), image(2)], "image 2, field 'objectness'.*has it and image '1' has none"),
        ([image(1), image(2, class_probs=np.ones((3, 4)) / 4)], "image 2, field 'class_probs'.*4 wide, and 5"),
        ([image(2, features=np.full((3, 8), 65505.0))], "image 2, field 'features'.*65505 is beyond 65504"),
        ([], "no regions to write"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path, regions, message):
    with pytest.raises(ValueError, match=message):
        write_region_store(tmp_path / "a", regions)
    assert not list(tmp_path.iterdir())
    largest = write_region_store(tmp_path / "a", [image(2, features=np.full((3, 8), -65504.0))])
    assert (largest.read(2).features == -65504).all()


def test_what_cannot_be_written_is_left_out_when_told(tmp_path):
    large = np.full((3, 8), 65505.0)
    regions = [image(9, features=large), image(1), image("1"), image(2, width=9), image(3, boxes=None), image(None)]
    faults = []
    store = write_region_store(tmp_path / "a", [*regions, image(4, features=large), image(9), image(2)], faults=faults)
    assert store.keys() == ["1", "9", "2"] and same(store.read(2), image(2))  # a refused id is free for a good image
    assert [fault.field for fault in faults] == ["features", "image_id", "features", "boxes", "image_id", "features"]
    with pytest.raises(ValueError, match="no regions to write"):
        write_region_store(tmp_path / "b", regions[:1], faults=[])


def test_values_that_went_bad_after_they_were_made_are_found(tmp_path):
    bad = image(5)
    bad.features[2, 1] = np.nan
    with pytest.raises(RegionError, match="image 5, field 'features'.*nan in region 2, number 1"):
        write_region_store(tmp_path / "a", [image(4), bad])


def test_a_store_is_whole_or_as_it_was(path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        write_region_store(path, [image(1)])

    def stops():
        yield image(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_region_store(path, stops(), overwrite=True)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    old = RegionStore(path)
    assert write_region_store(path, [image(1)], overwrite=True).keys() == ["1"]
    assert same(old.read(7), IMAGES[0])  # one who has it open reads on


def test_a_missing_image_is_named(path):
    store = RegionStore(path)
    with pytest.raises(RegionError, match=r"image 99, field 'image_id'.*a.regions has no such key among its 4.*'7'"):
        store.read(99)
    with pytest.raises(RegionError, match="image 'dog', field 'image_id'"):
        store.read_batch([7, "dog"])


def test_truncated_and_foreign_files(path, tmp_path):
    content = path.read_bytes()
    cut = tmp_path / "cut"
    for length in (len(content) - 1, HEADER_BYTES + 100, HEADER_BYTES, HEADER_BYTES - 100):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"cut is truncated: it has {length:,} of {len(content):,} bytes"):
            RegionStore(cut)
    for other in (content[:100], b"", content + b"x", b"{}" + bytes(5000), b"\xff" * 5000, b"[1]".ljust(5000)):
        cut.write_bytes(other)
        with pytest.raises(ValueError, match="no region store|damaged"):
            RegionStore(cut)
    with pytest.raises(FileNotFoundError, match="no region store at.*nowhere.*import"):
        RegionStore(tmp_path / "nowhere")


def test_damage_is_found(path, tmp_path):
    content = bytearray(path.read_bytes())
    start = json.loads(content[:HEADER_BYTES])["index_start"]
    index = content.copy()
    index[start + 3] ^= 1
    header = content.copy()
    header[:HEADER_BYTES] = content[:HEADER_BYTES].replace(b'"feature_size": 8', b'"feature_size": 4')
    version = content.copy()
    version[:HEADER_BYTES] = content[:HEADER_BYTES].replace(b'"version": 1', b'"version": 2')
    for name, changed, message in (
        ("index", index, "damaged: its header or index"),
        ("header", header, "damaged: its header or index"),
        ("version", version, "version 2.*update"),
    ):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            RegionStore(tmp_path / name)
    first = (
        HEADER_BYTES + 3 * 64
    )  # behind the 3 x 8 halves, 3 x 4 singles and 3 x 5 halves of the first image: the second
    content[first + 64] ^= 1
    (tmp_path / "record").write_bytes(content)
    store = RegionStore(tmp_path / "record")  # opening reads no features
    with pytest.raises(RegionError, match="image 'cat.jpg', field 'features'.*do not have their checksum"):
        store.verify()


def forged(path, header=(), **columns):
    """The store with other numbers in header and index, and the checksum of these."""
    content = path.read_bytes()
    told = json.loads(content[:HEADER_BYTES])
    index, place, images = bytearray(content[told["index_start"] :]), 0, told["images"]
    for name, dtype in INDEX.items():
        values = np.frombuffer(index, dtype, images, place)
        for row, value in columns.get(name, {}).items():
            values[row] = value
        place += values.nbytes
    told |= dict(header)
    told["checksum"] = _checksum(told, bytes(index))
    path.write_bytes(json.dumps(told).encode().ljust(HEADER_BYTES) + content[HEADER_BYTES : -len(index)] + index)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"start": {1: -(1 << 44)}},
        {"start": {1: -64}},
        {"start": {0: 0}},
        {"start": {0: HEADER_BYTES + 1}},
        {"start": {3: 1 << 44}},
        {"start": {2: (1 << 63) - 64}},
        {"count": {1: 0}},
        {"count": {1: -1}},
        {"count": {3: 1000}},
        {"count": {3: (1 << 31) - 1}},
        {"key_end": {0: 0}},
        {"key_end": {1: 1}},
        {"key_end": {1: 1000}},
        {"key_end": {3: 14}},
        {"key_end": {0: -5}},
        {"header": {"feature_size": 0}},
        {"header": {"feature_size": -8}},
        {"header": {"feature_size": 1 << 62}},
        {"header": {"feature_size": 1 << 80}},
        {"header": {"class_size": -1}},
        {"header": {"class_size": 400}},
    ],
)
def test_a_store_forged_with_its_checksum_reads_nothing_outside_the_file(path, changes):
    assert same(RegionStore(forged(path)).read(7), IMAGES[0])
    with pytest.raises(ValueError, match="a.regions is damaged: its index"):
        RegionStore(forged(path, **changes))


class Reads(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, row):
        return torch.tensor(self.store.read(IMAGES[row].image_id).features.astype(np.float32).sum())


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_read(path, context):
    store = RegionStore(path)
    store.read(7)
    again = pickle.loads(pickle.dumps(store))
    assert same(again.read(7), IMAGES[0]) and len(pickle.dumps(store)) < 500
    if context == "forkserver":
        torch.multiprocessing.set_forkserver_preload(["hf_vlp.inputs.region_store"])
    loader = DataLoader(Reads(store), batch_size=2, num_workers=2, multiprocessing_context=context)
    sums = torch.cat(list(loader))
    assert torch.allclose(sums, torch.stack([torch.tensor(one.features.astype(np.float32).sum()) for one in IMAGES]))


def test_a_hundred_thousand_images_open_at_once(tmp_path):
    features = np.ones((1, 1), np.float16)
    path = tmp_path / "a"
    write_region_store(path, (RegionFeatures(features, image_id=i) for i in range(100_000)))
    begin = time.process_time()
    store = RegionStore(path)
    opened = time.process_time() - begin
    assert 99_999 in store and 100_000 not in store
    found = time.process_time() - begin
    assert opened < 0.5 and found < 1.5  # about 0.01 and 0.1


# ------------------------------------------------------------------------------------------------ feature extractor


def test_keys_regions_and_arrays_become_one_batch(path):
    extractor = VlpRegionFeatureExtractor(8, path, with_boxes=True, with_class_probs=True)
    batch = extractor([7, "cat.jpg", IMAGES[2]])
    assert list(batch) == extractor.model_input_names
    assert batch["region_features"].shape == (3, 5, 8) and batch["region_mask"].sum(dim=1).tolist() == [3, 1, 5]
    assert np.array_equal(batch["region_features"][2].numpy(), IMAGES[2].features.astype(np.float32))
    assert np.array_equal(batch["region_boxes"][0, :3].numpy(), IMAGES[0].boxes)
    plain = VlpRegionFeatureExtractor(region_store=path)
    array = np.random.rand(2, 8).astype(np.float32)
    mixed = plain(["8", array, torch.from_numpy(array), array.tolist()])
    assert mixed["region_mask"].sum(dim=1).tolist() == [5, 2, 2, 2]
    for row in mixed["region_features"][1:, :2]:
        assert np.array_equal(row.numpy(), array)
    for one in (array, torch.from_numpy(array), array.tolist(), list(array), RegionFeatures(array)):
        assert plain(one)["region_features"].shape == (1, 2, 8)
    for keys in (
        [7, "8"],
        np.array([7, 8]),
        torch.tensor([7, 8]),
        ("7", 8),
        list(torch.tensor([7, 8])),
        np.array(["7", "8"]),
    ):
        assert plain(keys)["region_mask"].sum(dim=1).tolist() == [3, 5]
    for key in (7, "7", np.int64(7), torch.tensor(7)):
        assert plain(key)["region_features"].shape == (1, 3, 8)
    assert plain(np.stack([array] * 3))["region_features"].shape == (3, 2, 8)
    assert isinstance(plain(7, return_tensors="np")["region_features"], np.ndarray)


def test_most_regions(path):
    extractor = VlpRegionFeatureExtractor(region_store=path, max_regions=2)
    batch = extractor(["8", "cat.jpg"])
    assert batch["region_mask"].tolist() == [[1, 1], [1, 0]]
    assert np.array_equal(batch["region_features"][0].numpy(), IMAGES[2].features[:2].astype(np.float32))


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("dog", "image 'dog', field 'image_id'"),
        ([7, np.ones((2, 9))], "image 'at position 1', field 'features'.*9 wide, 8 is expected"),
        (RegionFeatures(np.ones((2, 9)), image_id="x"), "image 'x', field 'features'.*9 wide, 8"),
        ([np.full((2, 8), np.nan)], "'at position 0', field 'features'.*nan"),
        ([np.ones((0, 8))], "'at position 0', field 'features'.*no regions"),
        (np.ones(8), "'at position 0', field 'features'.*shape"),
        ([], "no regions"),
        ([None], "position 0 are a NoneType"),
        ({"a": 1}, "regions is a dict"),
    ],
)
def test_bad_regions_are_named(path, regions, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VlpRegionFeatureExtractor(8, path)(regions)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="no region store.*region_store="):
        VlpRegionFeatureExtractor()("7")
    with pytest.raises(FileNotFoundError, match="no region store at nowhere"):
        VlpRegionFeatureExtractor(region_store="nowhere")("7")
    with pytest.raises(ValueError, match="max_regions=0"):
        VlpRegionFeatureExtractor(max_regions=0)
    with pytest.raises(ValueError, match="'tf'"):
        VlpRegionFeatureExtractor()(np.ones((1, 2)), return_tensors="tf")


def test_the_extractor_saves_its_settings_and_travels(path, tmp_path):
    extractor = VlpRegionFeatureExtractor(8, path, max_regions=4, with_boxes=True)
    expected = extractor(["8", 7])
    extractor.save_pretrained(tmp_path / "saved")
    loaded = VlpRegionFeatureExtractor.from_pretrained(tmp_path / "saved")
    for copy in (loaded, pickle.loads(pickle.dumps(extractor))):
        assert copy.to_dict() == extractor.to_dict() and copy.model_input_names == extractor.model_input_names
        batch = copy(["8", 7])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert "_store" not in extractor.to_dict() and extractor.store is extractor.store
    moved = VlpRegionFeatureExtractor.from_pretrained(tmp_path / "saved", region_store="elsewhere")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        moved(7)
