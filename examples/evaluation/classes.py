"""Classification by names of the classes, and by a probe that is fitted to the features."""

from pathlib import Path

import torch

from evaluation.inputs import read
from hf_vlp.data.record import missing_column
from hf_vlp.evaluation.encoding import encode_images, evaluating
from hf_vlp.evaluation.linear_probe import choose_c, fit_linear_probe
from hf_vlp.evaluation.zero_shot import evaluate_zero_shot


def zero_shot(options, model, processor, records, shared) -> dict:
    names = class_names(options, records)
    # the names in order, given or of the data set: numbers count in it
    labels = class_indices(records, names, by_position=True)
    templates = lines_of(options.templates) if options.templates else ["a photo of a {}."]
    report = evaluate_zero_shot(model, processor, records, labels, names, templates, **shared)
    options.accelerator.print(report.table())
    return report.to_dict()


def linear_probe(options, model, processor, records, shared) -> dict:
    if options.train is None:
        raise SystemExit("--task linear-probe needs --train, the records that the probe is fitted on")
    sets = {"train": read(options, options.train, processor), "test": records}
    if options.validation:
        sets["validation"] = read(options, options.validation, processor)
    names = sorted({str(label) for label in label_values(sets["train"])})
    features = {}
    with evaluating(model) as inner:
        encoding = {key: value for key, value in shared.items() if key != "accelerator"}
        for name, rows in sets.items():
            # as they come: the original probes use features that are not normalised
            found = encode_images(inner, processor, rows, "encode_image", name=f"{name} pictures", **encoding)
            features[name] = found, torch.tensor(class_indices(rows, names))
    C = choose_c(features["train"], features["validation"])[0] if options.validation else options.C
    probe = fit_linear_probe(*features["train"], C=C)
    metrics = {
        "top1": probe.accuracy(*features["test"]),
        "mean_per_class": probe.mean_per_class_accuracy(*features["test"]),
    }
    for name, value in metrics.items():
        options.accelerator.print(f"{name.replace('_', ' '):<16}{value:>8.1f} %")
    counts = {name: len(rows) for name, rows in sets.items()} | {"classes": len(names)}
    chosen = "chosen on the validation records" if options.validation else "given"
    return {
        "metrics": metrics,
        "counts": counts,
        "protocol": f"logistic regression on raw features, C = {C:g} ({chosen})",
    }


def lines_of(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def label_values(records) -> list:
    """The labels as names where the data set has them."""
    if "label" not in records.column_names:
        raise missing_column("label", records.column_names)
    named = getattr(records.features["label"], "names", None)
    return [named[label] if named else label for label in records["label"]]


def class_names(options, records) -> list:
    """From --classes (one class a line, several names separated by |), the data set's own names, or the labels."""
    if options.classes:
        return [[name.strip() for name in line.split("|")] for line in lines_of(options.classes)]
    if getattr(records.features["label"], "names", None):
        return list(records.features["label"].names)
    values = label_values(records)
    if not all(isinstance(value, str) for value in values):
        raise SystemExit(
            "the labels are numbers without names: give the names of the classes, in order, with --classes"
        )
    return sorted(set(values))


def class_indices(records, names, by_position: bool = False) -> list[int]:
    """The place of each label in `names`; by_position: labels that are numbers and no names are places themselves."""
    values = label_values(records)
    index = {name: i for i, entry in enumerate(names) for name in ([entry] if isinstance(entry, str) else entry)}
    if all(str(value) in index for value in values):
        return [index[str(value)] for value in values]
    if by_position and all(isinstance(value, int) for value in values):
        return values
    unknown = list(dict.fromkeys(repr(value) for value in values if str(value) not in index))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    known = ", ".join(map(str, index)) if len(index) <= 20 else f"{', '.join(list(map(str, index))[:20])}, ..."
    raise SystemExit(f"the labels {', '.join(unknown[:5])}{more} are none of the {len(names)} classes ({known})")
