"""Zero-shot classification with prompts (Radford et al. 2021, CLIP, https://arxiv.org/abs/2103.00020, section 3.1).

A class is the mean of the unit-length features of its prompts, made unit length again; an image belongs to the class
with the highest cosine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from hf_vlp.evaluation.encoding import encode_images, encode_texts, evaluating
from hf_vlp.evaluation.report import Report


def fill_template(template: str, name: str) -> str:
    """The template with the class name in place of `{}` or `{label}`.

    Raises:
        ValueError: the template has no place for a name.
    """
    # not str.format: templates come from files, and format reads attributes of what it is given
    for place in ("{}", "{label}"):
        if place in template:
            return template.replace(place, name)
    raise ValueError(f"the template {template!r} has no place for the class name. Write one as {{}} in it.")


def build_classifier(
    model: torch.nn.Module,
    processor: Any,
    class_names: Sequence[str | Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """The classifier of K classes from their names.

    Args:
        model, processor: as for `evaluate_retrieval`.
        class_names: K names, or lists of names for classes that have several.
        templates: texts with `{}` for the name; each is filled with each name of a class.

    Returns:
        [E, K], unit-length columns, float32.

    Raises:
        ValueError: no class, no template, a class without a name, or a template without a place for it.
    """
    if not class_names or not templates:
        raise ValueError(
            f"{len(class_names)} class names and {len(templates)} templates: at least one of each is needed."
        )
    prompts, classes = [], []
    for index, names in enumerate(class_names):
        names = [names] if isinstance(names, str) else list(names)
        if not names or not all(name.strip() for name in names):
            raise ValueError(f"class {index} has no name or an empty one: {names}.")
        prompts += [fill_template(template, name) for name in names for template in templates]
        classes += [index] * (len(names) * len(templates))
    with evaluating(model, accelerator) as inner:
        place = torch.device(device) if device is not None else next(inner.parameters()).device
        options = {"batch_size": batch_size, "device": place, "autocast": autocast, "progress": progress}
        features = encode_texts(inner, processor, prompts, name="prompts", **options)
    return _mean_by_class(features, torch.tensor(classes), len(class_names))


def classifier_from_features(prompt_features: torch.Tensor) -> torch.Tensor:
    """The classifier from prompt features that are already computed.

    Args:
        prompt_features: [K, T, E], T prompts a class, of any length.

    Returns:
        [E, K], unit-length columns, in the features' type.
    """
    if prompt_features.ndim != 3:
        raise ValueError(f"prompt features must be [K, T, E], not {tuple(prompt_features.shape)}.")
    classes, templates, width = prompt_features.shape
    index = torch.arange(classes, device=prompt_features.device).repeat_interleave(templates)
    return _mean_by_class(prompt_features.reshape(-1, width), index, classes)


def classify(image_features: torch.Tensor, classifier: torch.Tensor, scale: float = 100.0) -> torch.Tensor:
    """Logits of images for classes.

    Args:
        image_features: [N, E], of any length.
        classifier: [E, K].
        scale: factor of the cosine; 100 is what the released models' scale amounts to, and what their evaluation uses.

    Returns:
        [N, K]; softmax gives probabilities.
    """
    return scale * normalize(image_features, dim=-1) @ classifier


def top_k_accuracy(logits: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """Percent of images whose class is among the k highest logits.

    Args:
        logits: [N, K]. labels: [N] int64.
        k: at most K are taken.
    """
    _check_labels(logits, labels)
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100.0 * float((best == labels[:, None]).any(dim=1).double().mean())


def mean_per_class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent right, averaged over the classes that occur (each counts the same, however many images it has).

    Args:
        logits: [N, K]. labels: [N] int64.
    """
    _check_labels(logits, labels)
    right = (logits.argmax(dim=1) == labels).double()
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    return 100.0 * float((torch.zeros_like(counts, dtype=right.dtype).index_add_(0, index, right) / counts).mean())


@dataclass
class ZeroShotReport(Report):
    """metrics: `top1`, `top5`, `mean_per_class` in percent; counts: `images`, `classes`, `templates`; logits [N, K]."""

    logits: torch.Tensor

    def table(self) -> str:
        """The metrics as an aligned plain-text table."""
        lines = [f"{name.replace('_', ' '):<16}{value:>8.1f} %" for name, value in self.metrics.items()]
        return "\n".join([*lines, self.protocol])


def evaluate_zero_shot(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    labels: Sequence[int],
    class_names: Sequence[str | Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> ZeroShotReport:
    """Classify the pictures of records by the names of the classes.

    Args:
        model, processor, device, accelerator, autocast: as for `evaluate_retrieval`.
        records: rows with `image`.
        labels: [N] index of each row's class in `class_names`.
        class_names, templates: as for `build_classifier`.

    Raises:
        ValueError: as `build_classifier`; or labels that do not fit the rows or the classes.
    """
    labels = torch.as_tensor(labels)
    if labels.shape != (len(records),):
        raise ValueError(f"{len(records)} records need one label each; the labels have shape {tuple(labels.shape)}.")
    shared = {"device": device, "autocast": autocast, "progress": progress}
    classifier = build_classifier(model, processor, class_names, templates, accelerator=accelerator, **shared)
    with evaluating(model, accelerator) as inner:
        shared["device"] = torch.device(device) if device is not None else next(inner.parameters()).device
        features = encode_images(inner, processor, records, batch_size=batch_size, **shared)
    logits = classify(features, classifier)
    metrics = {
        "top1": top_k_accuracy(logits, labels, 1),
        "top5": top_k_accuracy(logits, labels, 5),
        "mean_per_class": mean_per_class_accuracy(logits, labels),
    }
    counts = {"images": len(labels), "classes": len(class_names), "templates": len(templates)}
    protocol = f"{counts['images']:,} images, {counts['classes']} classes, {counts['templates']} templates averaged"
    return ZeroShotReport(metrics, counts, protocol, logits)


def _mean_by_class(features: torch.Tensor, index: torch.Tensor, classes: int) -> torch.Tensor:
    features = normalize(features, dim=-1)
    # sum and mean have one direction
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, index, features)
    return normalize(sums, dim=-1).T.contiguous()


def _check_labels(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be [N, K] and [N], N > 0."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, classes from 0 to {logits.shape[1] - 1}."
        )
