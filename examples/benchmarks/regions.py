"""Rows of the benchmark for region features on their way to the model: the store beside LMDB, TSV and .npy, on the same data.

36 regions of 2,048 numbers an image, as of bottom-up attention; the files lie in a temporary folder (0.3 to 0.8 GB each) and, having
just been written, in the system's page cache, so that it is readers that are measured and no disk. Every read ends with a look at the
first number of each region: a mapped file costs nothing before.
"""

import base64
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from benchmarks.measure import BASE, Contender, Settings, TimedRow
from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
from hf_vlp.inputs.region_store import RegionStore, write_region_store
from hf_vlp.inputs.regions import RegionFeatures

if TYPE_CHECKING:
    import lmdb

REGIONS, WIDTH, HEIGHT = 36, 640, 480
BATCH = 128

Reader = Callable[[str], np.ndarray]  # image id -> features [R, F]


class Files:
    """The same regions of `count` images in every layout, in `folder`."""

    def __init__(self, folder: Path, count: int, width: int):
        import lmdb

        self.folder, self.width = folder, width
        self.names = [str(number) for number in range(count)]
        self.order = np.random.default_rng(1).permutation(self.names).tolist()
        self.lines: dict[str, int] = {}  # id -> where its line begins
        size = 2 * count * REGIONS * (width * 4 + 1000) + 2**20
        path = str(folder / "lmdb")
        with lmdb.open(path, map_size=size, sync=False) as environment, open(folder / "tsv", "wb") as tsv:
            regions = (self._write(name, environment, tsv) for name in self.names)
            self.store = write_region_store(folder / "store", regions).path
        self.environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
        self.tsv = open(folder / "tsv", "rb")

    def _write(self, name: str, environment: "lmdb.Environment", tsv: BinaryIO) -> RegionFeatures:
        """One image to the LMDB, the TSV and its .npy; the regions are for the store."""
        draw = np.random.default_rng(int(name))
        # numbers that half precision holds, so that all readers can be held to the same result
        features = draw.random((REGIONS, self.width), np.float32).astype(np.float16).astype(np.float32)
        corners = np.sort(draw.random((REGIONS, 2, 2), np.float32), axis=1).reshape(REGIONS, 4)
        boxes = corners * np.array([WIDTH, HEIGHT] * 2, np.float32)
        item = {"image_id": name, "image_h": HEIGHT, "image_w": WIDTH, "num_boxes": REGIONS}
        with environment.begin(write=True) as transaction:
            transaction.put(name.encode(), pickle.dumps({**item, "boxes": boxes, "features": features}))
        self.lines[name] = tsv.tell()
        encoded = [base64.b64encode(array.tobytes()) for array in (boxes, features)]
        tsv.write(b"\t".join([name.encode(), b"%d\t%d\t%d" % (WIDTH, HEIGHT, REGIONS), *encoded]) + b"\n")
        np.save(self.folder / f"{name}.npy", features)
        return RegionFeatures.from_pixels(features, boxes, WIDTH, HEIGHT, image_id=name)

    def lmdb_item(self, name: str) -> dict:
        with self.environment.begin() as transaction:
            return pickle.loads(transaction.get(name.encode()))  # noqa: S301 - written above

    def vilbert(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """What ViLBERT's reader gives: features and location codes, each behind those of the whole image."""
        item = self.lmdb_item(name)
        features, boxes = item["features"], item["boxes"]
        features = np.concatenate([features.mean(axis=0, keepdims=True), features])
        code = np.zeros((len(boxes), 5), np.float32)
        code[:, :4] = boxes / np.array([WIDTH, HEIGHT] * 2, np.float32)
        code[:, 4] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (WIDTH * HEIGHT)
        return features, np.concatenate([np.array([[0, 0, 1, 1, 1]], np.float32), code])

    def tsv_line(self, name: str) -> np.ndarray:
        self.tsv.seek(self.lines[name])
        columns = self.tsv.readline().split(b"\t")
        return np.frombuffer(base64.b64decode(columns[5]), np.float32).reshape(int(columns[3]), -1)

    def npy(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")


def batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + BATCH] for start in range(0, len(names), BATCH))


def store_rows(settings: Settings) -> Iterator[TimedRow]:
    """One image after the other in random order, then batches as a model takes them."""
    count, width = (20, 16) if settings.small else (2048, 2048)
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), count, width)
        store, extractor = RegionStore(files.store), VlpRegionFeatureExtractor(width, files.store)

        def first_numbers(read: Reader) -> Contender:
            def work(_) -> torch.Tensor:
                found = np.empty((len(files.order), REGIONS), np.float32)
                for row, name in enumerate(files.order):
                    found[row] = read(name)[:, 0]
                return torch.from_numpy(found)

            return Contender(work, tolerance=0.0)

        def batched(_) -> torch.Tensor:
            found = [one.features[:, 0] for names in batches(files.order) for one in store.read_batch(names)]
            return torch.from_numpy(np.stack(found).astype(np.float32))

        contenders = {
            BASE: first_numbers(lambda name: files.vilbert(name)[0][1:]),
            "LMDB + pickle alone": first_numbers(lambda name: files.lmdb_item(name)["features"]),
            "TSV, its lines known": first_numbers(files.tsv_line),
            ".npy an image": first_numbers(files.npy),
            "ours one by one": first_numbers(lambda name: store.read(name).features),
            "ours in batches": Contender(batched, tolerance=0.0),
        }
        title = f"regions, random access {REGIONS} x {width}"
        yield TimedRow(title, "images", count, contenders, by_dtype=False)

        def stacked(read: Reader) -> Contender:
            def work(_) -> torch.Tensor:
                stacks = (np.stack([read(name) for name in names]) for names in batches(files.order))
                return torch.cat([torch.from_numpy(stack)[:, :, 0].clone() for stack in stacks])

            return Contender(work, tolerance=0.0)

        def extracted(_) -> torch.Tensor:
            return torch.cat([extractor(names)["region_features"][:, :, 0].clone() for names in batches(files.order)])

        contenders = {
            BASE: stacked(lambda name: files.vilbert(name)[0][1:]),
            "LMDB + pickle alone": stacked(lambda name: files.lmdb_item(name)["features"]),
            ".npy an image": stacked(files.npy),
            "ours": Contender(extracted, tolerance=0.0),
        }
        yield TimedRow(f"regions, batches of {BATCH} in float32", "images", count, contenders, by_dtype=False)
