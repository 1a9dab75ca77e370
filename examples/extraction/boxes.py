"""Where the regions of a picture are: cells of a grid, given boxes, or what a detector finds. Fractions of width and height."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_convert
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from conversion.checkpoints import find_state_dict, read_content, strip_prefixes
from extraction.features import load
from hf_vlp.inputs.regions import RegionFeatures

# Of torchvision, published with frozen norms whose eps is 0; a network built without weights has 1e-5.
WITHOUT_EPS = {f"{name}_resnet50_fpn" for name in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")}


class Boxes(NamedTuple):
    """Boxes of one picture: corners [R, 4] as fractions; objectness [R] and class_probs [R, C], or None."""

    corners: torch.Tensor
    objectness: torch.Tensor | None = None
    class_probs: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> "Boxes":
        return Boxes(*(None if value is None else value[rows] for value in self))


Detector = Callable[[list[Image.Image]], list[Boxes]]  # of pictures of one size


def grid_boxes(sizes: Sequence[int]) -> torch.Tensor:
    """The cells of grids of n x n for each n of `sizes`, row by row -> [R, 4] fractions; n = 1 is the whole picture."""
    grids = []
    for n in sizes:
        edges = torch.arange(n + 1) / n
        top, left = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
        grids.append(torch.stack([edges[left], edges[top], edges[left + 1], edges[top + 1]], dim=1))
    return torch.cat(grids)


def given_boxes(value: Any, units: str, size: tuple[int, int], key: str) -> torch.Tensor:
    """The boxes of a record, x1 y1 x2 y2 in `units`, checked -> [R, 4] fractions; none or an empty list -> [0, 4].

    Raises:
        RegionError: no boxes but something else, outside the picture, or in other units than said.
    """
    if value is None or len(value) == 0:
        return torch.zeros(0, 4)
    no_features = np.zeros((len(value), 1), np.float32)
    if units == "pixels":
        checked = RegionFeatures.from_pixels(no_features, value, *size, image_id=key)
    else:
        checked = RegionFeatures(no_features, value, *size, image_id=key)
    return torch.from_numpy(checked.boxes)


def with_area(boxes: Boxes) -> Boxes:
    """Boxes clipped to the picture, without those of which nothing is left."""
    boxes = boxes._replace(corners=boxes.corners.clamp(0, 1))
    return boxes.select((boxes.corners[:, 2:] > boxes.corners[:, :2]).all(dim=1))


def best_boxes(boxes: Boxes, count: int, threshold: float = 0.0) -> Boxes:
    """The `count` boxes of the highest objectness, best first, of those with an area and with `threshold` or more."""
    boxes = with_area(boxes)
    boxes = boxes.select(boxes.objectness >= threshold)
    return boxes.select(boxes.objectness.argsort(descending=True, stable=True)[:count])


def whole_picture(like: Boxes) -> Boxes:
    """One box around everything, with the fields that others have: objectness 0, surely no object of any class."""
    objectness = None if like.objectness is None else torch.zeros(1)
    classes = None if like.class_probs is None else torch.eye(like.class_probs.shape[1])[-1:]
    return Boxes(grid_boxes([1]), objectness, classes)


def query_boxes(logits: torch.Tensor, centred: torch.Tensor, classes: int) -> Boxes:
    """Boxes of a DETR-like detector: `logits` [Q, classes or classes + 1], `centred` [Q, 4] cx cy w h as fractions.

    With a logit for no object there is one distribution a box, without it each class has a probability of its own.
    """
    corners, logits = box_convert(centred.float(), "cxcywh", "xyxy").cpu(), logits.float().cpu()
    if logits.shape[1] == classes:
        return Boxes(corners, logits.sigmoid().amax(dim=1))
    chances = logits.softmax(dim=1)
    return Boxes(corners, chances[:, :-1].amax(dim=1), chances)


def detect(detector: Detector, pictures: Sequence[Image.Image]) -> list[Boxes]:
    """Boxes of each picture; those of one size go together, so that none is padded and each is found alike in any batch."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, picture in enumerate(pictures):
        rows_of.setdefault(picture.size, []).append(row)
    found = {}
    for rows in rows_of.values():
        found |= zip(rows, detector([pictures[row] for row in rows]))
    return [found[row] for row in range(len(pictures))]


def transformers_detector(name: str, device: torch.device, random_weights: bool = False) -> Detector:
    """A detector that gives `logits` and `pred_boxes` of its queries."""
    model = load(AutoModelForObjectDetection, name, random_weights).to(device)
    processor, taken = AutoImageProcessor.from_pretrained(name), inspect.signature(model.forward).parameters

    def detector(pictures: list[Image.Image]) -> list[Boxes]:
        inputs = processor(images=pictures, return_tensors="pt")
        outputs = model(**{key: value.to(device) for key, value in inputs.items() if key in taken})
        return [query_boxes(*one, model.config.num_labels) for one in zip(outputs.logits, outputs.pred_boxes)]

    return detector


def torchvision_network(name: str, weights: str | None, random_weights: bool = False) -> nn.Module:
    """A detector of torchvision by its name there, with the state dict of the file `weights`.

    Raises:
        ValueError: an unknown name, neither weights nor consent to random ones, weights of another detector.
        CheckpointError: the file is no state dict, or asks for code.
    """
    from torchvision import models

    if name not in (known := models.list_models(models.detection)):
        raise ValueError(f"torchvision has no detector {name!r}, but {', '.join(known)}")
    if weights is None:
        if not random_weights:
            raise ValueError(f"torchvision/{name} needs --weights FILE, or --random-weights to try things out")
        return models.get_model(name, weights=None, weights_backbone=None).eval()
    state = strip_prefixes(find_state_dict(read_content(weights), weights))
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    classes = {} if scores is None else {"num_classes": len(scores)}
    network = models.get_model(name, weights=None, weights_backbone=None, **classes)
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit torchvision/{name}: {error}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # frozen norms count none
    if unexpected or missing:
        raise ValueError(
            f"{weights} does not fit torchvision/{name}: it lacks {', '.join(missing[:3]) or 'nothing'} and has "
            f"besides {', '.join(unexpected[:3]) or 'nothing'}"
        )
    if name in WITHOUT_EPS and not any(key.endswith("num_batches_tracked") for key in state):
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
    return network.eval()


def torchvision_detector(network: nn.Module, device: torch.device, count: int, threshold: float | None) -> Detector:
    """A network of torchvision, with its own suppression of overlapping boxes, made to give `count` boxes."""
    network, last = network.to(device), getattr(network, "roi_heads", network)
    last.detections_per_img = max(last.detections_per_img, count)
    last.score_thresh = last.score_thresh if threshold is None else threshold

    def detector(pictures: list[Image.Image]) -> list[Boxes]:
        pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device).float() / 255 for picture in pictures]
        sizes = torch.tensor([[*picture.size, *picture.size] for picture in pictures])
        return [
            Boxes(one["boxes"].cpu().float() / size, one["scores"].cpu().float())
            for one, size in zip(network(pixels), sizes)
        ]

    return detector
