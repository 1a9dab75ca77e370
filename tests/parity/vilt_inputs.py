"""Cases of ViLT's pictures: arrays as they stand in the folder, pixels, masks and sizes out."""

import random

import torch

from hf_vlp.inputs.image_transforms import HALF, picture_from_array, to_tensor, whole_patches_size
from hf_vlp.inputs.rand_augment import MOST, OPERATIONS, RandAugment
from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessor, VlpViltImageProcessorPil
from tests.parity.harness import Case

RESAMPLING = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers
FAST_BOUND = 2 * 2 / 255  # of the fast backend: two grey levels, normalised
SIGNS = {"pos": 0.0, "neg": 1.0}  # a draw above 0.5 turns the value round


def image_processing(case: Case) -> None:
    """`raw_N` to `processed_N`, all in one batch, by both backends; resize_table.json by the rule of sizes."""
    options = {"size": {"shortest_edge": case.config.get("image_size", 384)}}
    if case.config.get("longer"):
        options["size"]["longest_edge"] = case.config["longer"]
    options |= {
        "size_divisor": case.config.get("divisor", 32),
        "resample": RESAMPLING[case.config.get("resample", "bicubic")],
    }
    options |= {f"image_{name}": case.config.get(name, HALF) for name in ("mean", "std")}
    numbers = sorted(int(name.removeprefix("raw_")) for name in case.inputs if name.startswith("raw_"))
    pictures = [picture_from_array(case.inputs[f"raw_{number}"], channels_first=False) for number in numbers]
    if pictures:
        exact, fast = (
            backend(**options)(pictures, return_tensors="pt")
            for backend in (VlpViltImageProcessorPil, VlpViltImageProcessor)
        )
        mask = exact["pixel_mask"]
        case.compare({"pixel_mask": mask, "batch_shape": torch.tensor(exact["pixel_values"].shape)})
        case.check("pixel_mask of the fast backend", fast["pixel_mask"], mask, 0.0)
        for row, number in enumerate(numbers):
            height, width = int(mask[row, :, 0].sum()), int(mask[row, 0].sum())
            case.compare({f"processed_{number}": exact["pixel_values"][row, :, :height, :width]})
            case.check(
                f"row {row} of the fast backend", fast["pixel_values"][row], exact["pixel_values"][row], FAST_BOUND
            )
            case.check(
                f"padding of row {row}", exact["pixel_values"][row, :, mask[row] == 0].abs().sum(), torch.zeros(()), 0.0
            )
    resize_table(case, options["size_divisor"])


def resize_table(case: Case, divisor: int) -> None:
    """resize_table.json: widths and heights out; a zero is a picture that is refused."""
    for number, row in enumerate(case.json("resize_table.json") if "resize_table.json" in case.files else ()):
        names = ("out_width", "out_height")
        entries = {name: f"resize_table.json: {number}: {name}" for name in names}
        case.expect({entries[name]: row[name] for name in names})
        try:
            sizes = whole_patches_size(row["width"], row["height"], row["image_size"], divisor=divisor)
        except ValueError as error:
            for name in names:
                case.settle(entries[name], 0 in (row[n] for n in names), note=f"refused: {error}")
        else:
            case.compare({entries[name]: size for name, size in zip(names, sizes, strict=True)})


def randaugment(case: Case) -> None:
    """`raw` by each operation, `NAME_pos` and `NAME_neg`, and by whole calls, `randaug_seedN`; config.json's table of operations."""
    policy = RandAugment(case.config.get("n", 2), case.config.get("m", 9))
    picture = picture_from_array(case.inputs["raw"], channels_first=False)
    table(case, policy)
    for output in case.outputs:
        name, _, sign = output.rpartition("_")
        if name in OPERATIONS and sign in SIGNS:
            signs = [SIGNS[sign]] if OPERATIONS[name].signed else []
            case.compare({output: rows(policy(picture, [name], signs))})
    for number, sequence in enumerate(case.config.get("sequences", ())):
        python = random.Random(sequence["seed"])
        names = python.choices(list(OPERATIONS), k=policy.count)
        signs = [python.random() for name in names if OPERATIONS[name].signed]
        if "ops" in sequence:
            entry = f"config.json: sequences: {number}: ops"
            case.expect({entry: sequence["ops"]})
            case.compare({entry: names})
        case.compare({f"randaug_seed{number}": rows(policy(picture, names, signs))})


def table(case: Case, policy: RandAugment) -> None:
    """The operations of config.json, their order included, and the largest magnitude."""
    if "max_m" in case.config:
        case.expect({"config.json: max_m": case.config["max_m"]})
        case.compare({"config.json: max_m": MOST})
    if "ops" not in case.config:
        return
    case.expect({"config.json: ops": [entry["op"] for entry in case.config["ops"]]})
    case.compare({"config.json: ops": list(OPERATIONS)})
    for entry in case.config["ops"]:
        operation = OPERATIONS[entry["op"]]
        ours = {
            "low": operation.low,
            "high": operation.high,
            f"value_at_m{policy.magnitude}": operation.value(policy.magnitude),
        }
        for name in ("low", "high", *(name for name in entry if name.startswith("value_at"))):
            label = f"config.json: ops: {entry['op']}: {name}"
            case.expect({label: entry[name]})
            case.settle(label, ours.get(name) == entry[name])
        case.expect({f"config.json: ops: {entry['op']}: signed": entry["signed"]})
        case.compare({f"config.json: ops: {entry['op']}: signed": operation.signed})


def rows(picture) -> torch.Tensor:
    """uint8 [h, w, 3], as the original's arrays are."""
    return to_tensor(picture).permute(1, 2, 0)
