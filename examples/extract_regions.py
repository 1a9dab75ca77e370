"""Makes region features without Caffe: pictures to a region store, with boxes of a grid, of a column or of a detector.

    python examples/extract_regions.py pictures --boxes grid --grid 1 3 6 --backbone runs/clip_emoji --output pictures.regions
    python examples/extract_regions.py pairs.jsonl --boxes column --columns boxes=bbox --box-units pixels \
        --backbone timm/resnet50 --output pairs.regions
    python examples/extract_regions.py pairs.jsonl --detector hustvl/yolos-tiny --top 36 \
        --backbone google/vit-base-patch16-224 --output pairs.regions
    python examples/extract_regions.py pairs.jsonl --detector torchvision/fasterrcnn_resnet50_fpn \
        --weights fasterrcnn_resnet50_fpn_coco-258fb6c6.pth --backbone updown-resnet101 --size 512 --output pairs.regions

Records are a file, several files of one kind, a picture folder or a Hub id, as `hf_vlp.data.readers` reads them. Each image becomes one
entry of the store, whose key is its `image_id`: a path, or the row's number, where the records have none. Several files must have one.

A picture is squashed to --size x --size pixels, coloured as the backbone's own image processor says, and seen by the backbone: `timm/NAME`,
or a folder or Hub id of a model of hf_vlp or transformers, of which the image tower is taken. A region's features are the mean of the last
map over its box (ROI-align): over boxes of whole cells the mean of those cells. A transformer's map is its tokens but for class and
register tokens. Detectors see the picture as it is and are `torchvision/NAME`, or a folder or Hub id of a transformers model; objectness
is the score by which the --top best are kept. Class probabilities are stored where a detector says which class a box is, or none, in one
softmax; "none" is the last of them.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import hf_vlp  # noqa: F401 (registers the architectures)
from extraction.boxes import (
    Boxes,
    Detector,
    best_boxes,
    detect,
    given_boxes,
    grid_boxes,
    torchvision_detector,
    torchvision_network,
    transformers_detector,
    whole_picture,
    with_area,
)
from extraction.features import feature_map, load_backbone, region_features
from hf_vlp.data.readers import parse_columns, read_records
from hf_vlp.data.record import RecordError, decode_image
from hf_vlp.data.region_files import UNITS
from hf_vlp.inputs.image_transforms import to_rgb
from hf_vlp.inputs.pictures import as_wished
from hf_vlp.inputs.region_store import store_key, write_region_store
from hf_vlp.inputs.regions import RegionError, RegionFeatures

REPAIR = "Repair or remove the row, or pass over such rows with --on-bad-record skip."


class Sample(NamedTuple):
    """A picture made ready. size: width and height. pixels: [3, S, S]. boxes: those given, else the RGB picture for the detector."""

    key: str
    size: tuple[int, int]
    pixels: torch.Tensor
    boxes: Boxes | None
    picture: Image.Image | None


class Samples:
    """One `Sample` for each image of the records, or the error of its row, which a loader's worker hands over unharmed."""

    def __init__(self, records: Any, options: argparse.Namespace, processor: Any, size: int):
        from datasets import Image as Stored

        first_row: dict[str, int] = {}
        for row, image_id in enumerate(records["image_id"]):
            try:
                first_row.setdefault(store_key(image_id), row)
            except (TypeError, ValueError) as error:
                raise RecordError(row, "image_id", str(error), "Leave the column out to number the rows.") from None
        self.images, self.repeated = list(first_row.items()), len(records) - len(first_row)
        fields = ["image", "boxes"] if options.boxes == "column" else ["image"]
        self.records = records.select_columns(fields).cast_column("image", Stored(decode=False))
        self.options, self.processor, self.size = options, processor, size
        self.grid = Boxes(grid_boxes(options.grid)) if options.boxes == "grid" else None
        self.wishes = {"background": processor.background, "high_byte": processor.high_byte}
        if options.background is not None:
            self.wishes["background"] = options.background

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample | RecordError:
        key, row = self.images[index]
        record = self.records[row]
        try:
            picture = to_rgb(as_wished(decode_image(record["image"], row), **self.wishes))
            side = {"height": self.size, "width": self.size}
            pixels = self.processor(picture, size=side, return_tensors="pt")["pixel_values"][0]
            boxes = self.grid
            if self.options.boxes == "column":
                boxes = Boxes(given_boxes(record["boxes"], self.options.box_units, picture.size, key))
            return Sample(key, picture.size, pixels, boxes, picture if boxes is None else None)
        except RegionError as error:
            return RecordError(row, error.field, f"of image {key!r}, {error.reason}", REPAIR)
        except RecordError as error:
            return RecordError(row, error.field, error.reason, REPAIR)
        except ValueError as error:
            return RecordError(row, "image", str(error), REPAIR)


def extract(
    samples: Any,
    tower: nn.Module,
    detector: Detector | None,
    options: argparse.Namespace,
    counts: Counter,
    faults: list,
) -> Iterator[RegionFeatures]:
    """The regions of every sample; `counts` and `faults` take what there is to report."""
    loader = DataLoader(samples, options.batch_size, num_workers=options.workers, collate_fn=list)
    device = next(tower.parameters()).device
    bar = tqdm(total=len(samples), desc="regions", unit="picture", disable=not sys.stderr.isatty())
    for batch in loader:
        bar.update(len(batch))
        bad = [one for one in batch if isinstance(one, RecordError)]
        if bad and options.on_bad_record == "raise":
            raise bad[0]
        faults.extend(bad)
        if not (batch := [one for one in batch if isinstance(one, Sample)]):
            continue
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            if detector is None:
                found = [one.boxes for one in batch]
                kept = [with_area(boxes) for boxes in found]
                counts["thin"] += sum(len(boxes.corners) for boxes in found) - sum(len(boxes.corners) for boxes in kept)
            else:
                found = detect(detector, [one.picture for one in batch])
                kept = [best_boxes(boxes, options.top, options.threshold or 0.0) for boxes in found]
            counts["whole"] += sum(not len(boxes.corners) for boxes in kept)
            kept = [boxes if len(boxes.corners) else whole_picture(boxes) for boxes in kept]
            maps = feature_map(tower, torch.stack([one.pixels for one in batch]).to(device))
            features = region_features(maps, [boxes.corners for boxes in kept], options.bins)
        for one, boxes, values in zip(batch, kept, features):
            fields = [None if value is None else value.numpy() for value in boxes]
            yield RegionFeatures(values.cpu().numpy(), fields[0], *one.size, fields[2], fields[1], one.key)
    bar.close()


def run(options: argparse.Namespace) -> None:
    """Everything, as the parsed command line says."""
    begin, random_weights = time.perf_counter(), options.random_weights
    torch.manual_seed(options.seed)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = options.records[0] if len(options.records) == 1 else options.records
    needed = ["image", "boxes"] if options.boxes == "column" else ["image"]
    needed += ["image_id"] if len(options.records) > 1 else []  # numbers of rows would begin anew in each file
    columns = parse_columns(options.columns)
    records = read_records(source, split=options.split, columns=columns, image_root=options.image_root, required=needed)
    tower, processor, size = load_backbone(options.backbone, options.size, random_weights)
    samples, detector = Samples(records, options, processor, size), None
    family, _, name = (options.detector or "").partition("/")
    if family == "torchvision":
        network = torchvision_network(name, options.weights, random_weights)
        detector = torchvision_detector(network, device, options.top, options.threshold)
    elif options.detector is not None:
        detector = transformers_detector(options.detector, device, random_weights)
    counts, faults = Counter(), []
    regions = extract(samples, tower.to(device), detector, options, counts, faults)
    store = write_region_store(options.output, regions, options.overwrite)
    print(store.describe())
    print(f"{'written':<12} {len(store):,} images in {time.perf_counter() - begin:.1f} s")
    if counts["whole"]:
        print(f"{'no box':<12} {counts['whole']:,} images had none; each is one region, the whole picture")
    if counts["thin"]:
        print(f"{'left out':<12} {counts['thin']:,} boxes without an area")
    if samples.repeated:
        print(f"{'left out':<12} {samples.repeated:,} rows whose image_id another row has")
    for fault in faults[:10]:
        print(fault)
    if faults:
        print(f"{'left out':<12} {len(faults):,} bad records of {len(samples):,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", help="file or files of records, a picture folder, or a Hub id")
    parser.add_argument("--output", required=True, metavar="STORE", help="region store to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that exists")
    parser.add_argument("--split", help="of the records, where there are several")
    parser.add_argument("--image-root", help="folder of relative picture paths (default: that of the file)")
    parser.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN", help="such as boxes=bbox")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--boxes", choices=("grid", "column"), help="cells of --grid, or the records' field `boxes`")
    where.add_argument("--detector", metavar="NAME", help="torchvision/NAME, or a folder or Hub id of transformers")
    parser.add_argument("--grid", nargs="+", type=int, default=[6], metavar="N", help="N x N cells; 1 is everything")
    parser.add_argument("--box-units", choices=UNITS, help="of the records' boxes, x1 y1 x2 y2")
    parser.add_argument("--top", type=int, default=36, metavar="N", help="boxes of a detector to keep, by their scores")
    parser.add_argument(
        "--threshold", type=float, help="least score of a detector's box (default: torchvision's own, 0)"
    )
    parser.add_argument("--weights", metavar="FILE", help="state dict of a torchvision detector")
    parser.add_argument("--backbone", required=True, metavar="NAME", help="timm/NAME, or a folder or Hub id of a model")
    parser.add_argument("--random-weights", action="store_true", help="of backbone and detector, to try things out")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--size", type=int, metavar="S", help="pixels along a side for the backbone (default: its own)")
    parser.add_argument("--bins", type=int, default=1, help="of ROI-align along a side; features are their mean")
    parser.add_argument("--background", nargs=3, type=int, metavar=("R", "G", "B"), help="under transparent pictures")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode pictures beside this one")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--bf16", action="store_true", help="run backbone and detector in bfloat16 autocast")
    parser.add_argument(
        "--on-bad-record", choices=("raise", "skip"), default="raise", help="stop, or leave out and count"
    )
    options = parser.parse_args()
    if (options.boxes == "column") != (options.box_units is not None):
        parser.error("--boxes column needs --box-units, pixels or fractions, and nothing else does")
    if options.weights is not None and not (options.detector or "").startswith("torchvision/"):
        parser.error("--weights are those of --detector torchvision/NAME")
    for name in ("top", "bins", "batch_size", "size", "grid"):
        value = getattr(options, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
