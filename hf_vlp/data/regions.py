"""Bring region features into one store, and look at a store.

    python -m hf_vlp.data.regions import SOURCE ... --output STORE [--kind tsv] [--ids FILE] [--box-units pixels] [--on-bad-record skip]
    python -m hf_vlp.data.regions describe STORE
    python -m hf_vlp.data.regions verify STORE

SOURCE is a detector's TSV, an LMDB of ViLBERT, an .npy or .npz an image (a folder of them), `<split>_ims.npy` of SCAN and
VSE-infinity, or an HDF5 file; which of them is guessed. Several go into one store.
"""

import argparse
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from hf_vlp.data.pickles import read_npy
from hf_vlp.data.region_files import (
    UNITS,
    Faults,
    array_files,
    read_region_arrays,
    read_region_h5,
    read_region_matrix,
    read_region_tsv,
)
from hf_vlp.data.region_lmdb import count_lmdb, is_captions_lmdb, read_captions_lmdb, read_vilbert_lmdb
from hf_vlp.inputs.region_store import RegionStore, write_region_store
from hf_vlp.inputs.regions import RegionFeatures

KINDS = {
    "tsv": "a detector's TSV: base64 in 6, 7 or LXMERT's 10 columns",
    "lmdb": "an LMDB of a ViLBERT task, of either code base",
    "captions-lmdb": "ViLBERT's LMDB of Conceptual Captions, by tensorpack",
    "arrays": "an .npy or .npz an image, or a folder of them",
    "matrix": "<split>_ims.npy of SCAN and VSE-infinity, with <split>_ids.txt",
    "h5": "HDF5 with image_ids, num_boxes and features, or an entry an image",
}


def kind_of(source: str | os.PathLike) -> str:
    """Which of `KINDS` a file or folder is.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of them, as far as can be told.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {source} (working folder: {Path.cwd()})")
    suffix = path.suffix.lower()
    if (path / "data.mdb").is_file() or (path.is_file() and suffix in (".lmdb", ".mdb")):
        return "captions-lmdb" if is_captions_lmdb(path) else "lmdb"
    if path.is_dir() and (splits := sorted(file.name for file in path.glob("*_ims.npy"))):
        raise ValueError(f"{path} holds several splits: give the file of one, {', '.join(splits)}")
    if path.is_dir() and any(path.rglob("*.np[yz]")):
        return "arrays"
    if suffix == ".npy":
        return "matrix" if getattr(read_npy(path), "ndim", 0) == 3 else "arrays"
    by_suffix = {".tsv": "tsv", ".npz": "arrays", ".h5": "h5", ".hdf5": "h5"}
    if path.is_dir() or suffix not in by_suffix:
        raise ValueError(f"what {path} holds cannot be told by its name: give the kind, one of {', '.join(KINDS)}")
    return by_suffix[suffix]


def read_regions(
    source: str | os.PathLike,
    kind: str | None = None,
    *,
    box_units: str | None = None,
    ids: str | os.PathLike | None = None,
    faults: Faults | None = None,
) -> Iterator[RegionFeatures]:
    """The regions of all images of a source.

    Args:
        source: file or folder.
        kind: one of `KINDS`; guessed if not given.
        box_units: "pixels" or "fractions", of arrays and HDF5; guessed of each image if not given. The others are in pixels.
        ids: text file with the id of each row, of a matrix.
        faults: takes the errors of bad records; None: the first is raised.

    Raises:
        RecordError: a bad record.
        ValueError, FileNotFoundError, ImportError: as the readers of `region_files` and `region_lmdb`; options of another kind.
    """
    kind = kind_of(source) if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if box_units is not None and (kind not in ("arrays", "h5") or box_units not in UNITS):
        raise ValueError(f"box_units={box_units!r} for the kind {kind}: give {' or '.join(UNITS)}, with arrays or h5")
    if ids is not None and kind != "matrix":
        raise ValueError(f"ids={str(ids)!r} for the kind {kind}, whose records name their images: leave it out")
    if kind == "matrix":
        return read_region_matrix(source, ids, faults)
    if kind == "arrays":
        return read_region_arrays(source, box_units, faults)
    if kind == "h5":
        return read_region_h5(source, box_units, faults)
    return {"tsv": read_region_tsv, "lmdb": read_vilbert_lmdb, "captions-lmdb": read_captions_lmdb}[kind](
        source, faults
    )


def count_of(source: str | os.PathLike, kind: str) -> int | None:
    """How many records a source has; None where only reading it would tell."""
    if kind in ("lmdb", "captions-lmdb"):
        return count_lmdb(source)
    return len(array_files(source)) if kind == "arrays" else None


def import_regions(options: argparse.Namespace) -> int:
    """The command `import`; returns the exit status."""
    begin = time.perf_counter()
    kinds = [options.kind or kind_of(source) for source in options.source]
    for source, kind in zip(options.source, kinds):
        print(f"{source}: {KINDS[kind]}")
    if options.ids is not None and len(kinds) > 1:
        raise ValueError("--ids is for one source: of several, each has the file of its ids beside it")
    faults: Faults | None = [] if options.on_bad_record == "skip" else None
    given = {"box_units": options.box_units, "ids": options.ids, "faults": faults}
    regions = chain.from_iterable(read_regions(source, kind, **given) for source, kind in zip(options.source, kinds))
    counts = [count_of(source, kind) for source, kind in zip(options.source, kinds)]
    total = None if None in counts else sum(counts)
    bar = tqdm(regions, "import", total, unit="image", disable=not sys.stderr.isatty())
    store = write_region_store(options.output, bar, options.overwrite, faults)
    print(store.describe())
    print(f"{'written':<12} {len(store):,} images in {time.perf_counter() - begin:.1f} s")
    for fault in (faults or [])[: options.first]:
        print(fault)
    if faults:
        print(f"{'left out':<12} {len(faults):,} bad records of {len(store) + len(faults):,}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """The command `verify`; returns the exit status."""
    store = RegionStore(options.store)
    store.verify(progress=sys.stderr.isatty())
    print(f"{options.store}: all {len(store):,} images have their checksums")
    return 0


def describe(options: argparse.Namespace) -> int:
    """The command `describe`; returns the exit status."""
    print(RegionStore(options.store).describe())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m hf_vlp.data.regions", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    kinds = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    command = commands.add_parser("import", help="write what a source holds into a store", epilog=kinds)
    command.add_argument(
        "source", metavar="SOURCE", nargs="+", help="file or folder with region features; several go into one store"
    )
    command.add_argument("--output", required=True, metavar="STORE", help="file to write")
    command.add_argument("--kind", choices=KINDS, help="what the source is (default: guessed)")
    command.add_argument(
        "--ids", metavar="FILE", help="ids of the rows of a matrix, one a line (default: the file beside it)"
    )
    command.add_argument("--box-units", choices=UNITS, help="of the boxes of arrays and h5 (default: guessed)")
    command.add_argument(
        "--on-bad-record", choices=("raise", "skip"), default="raise", help="stop, or leave out and count"
    )
    command.add_argument("--first", type=int, default=10, help="bad records to print")
    command.add_argument("--overwrite", action="store_true", help="replace a store that exists")
    command.set_defaults(run=import_regions)
    for run, about in ((describe, "print what a store holds"), (verify, "compare a store with its checksums")):
        command = commands.add_parser(run.__name__, help=about)
        command.add_argument("store", metavar="STORE", help="file of write_region_store")
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError, pickle.UnpicklingError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
