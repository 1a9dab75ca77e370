"""Evaluates a saved model, prints a table and writes results.json, from which the model card takes its numbers.

    python examples/evaluate.py FOLDER --task retrieval --data test.parquet
    python examples/evaluate.py FOLDER --task zero-shot --data test.parquet --columns label=concept
    python examples/evaluate.py FOLDER --task linear-probe --data test.parquet --columns label=group \
        --train train.parquet --validation validation.parquet
    python examples/evaluate.py FOLDER --task retrieval --data dataset_coco.json --image-root coco --split test \
        --captions-per-image 5 --five-fold [--save-scores a.safetensors] [--ensemble b.safetensors c.safetensors]
    python examples/evaluate.py FOLDER --task retrieval --data captions.jsonl --region-store test.regions
    python examples/evaluate.py FOLDER --task retrieval --data coco_precomp --split testall --five-fold
    python examples/evaluate.py FOLDER --task cxc --data dataset_coco.json --image-root coco --split test \
        --annotations cxc_annots
    accelerate launch --num_processes N examples/evaluate.py ...    each process encodes its part

FOLDER: a folder or Hub id that `AutoModel.from_pretrained` loads. DATA: a file, picture folder or Hub id of records;
Karpathy's split files of COCO and Flickr30k (the fourth example: the published protocol) with --split and --image-root.
Retrieval and cxc need `image` and `captions`; the others `image` and `label` (a class index with names, or the name itself).
A model that sees regions needs no `image` but `regions` or `image_id`, the keys of its region store; or a folder with the
`<split>_caps.txt` and `<split>_ims.npy` of SCAN and VSE-infinity.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModel, AutoProcessor

import hf_vlp  # noqa: F401 (registers the architectures)
from hf_vlp.data.crisscrossed import read_crisscrossed
from hf_vlp.data.pickles import read_npy
from hf_vlp.data.precomputed import PrecomputedSplit
from hf_vlp.data.readers import missing_column, parse_columns, read_records
from hf_vlp.evaluation.crisscrossed import evaluate_crisscrossed
from hf_vlp.evaluation.encoding import encode_images, evaluating, takes_regions
from hf_vlp.evaluation.ensemble import SavedScores, check_fingerprint, mean_scores, write_scores
from hf_vlp.evaluation.linear_probe import choose_c, fit_linear_probe
from hf_vlp.evaluation.provenance import command, conditions, shortened
from hf_vlp.evaluation.retrieval import RetrievalSet, evaluate_retrieval, five_fold_scores, score_metrics
from hf_vlp.evaluation.zero_shot import evaluate_zero_shot, fill_template
from hf_vlp.files import write_text


def retrieval(options, model, processor, records, shared) -> dict:
    template = options.prompt
    prompt = (lambda caption: fill_template(template, caption)) if template else None
    pairs = RetrievalSet(records, captions_per_image=options.captions_per_image)
    report = evaluate_retrieval(model, processor, pairs, prompt=prompt, **shared)
    is_main = options.accelerator.is_main_process
    if is_main:
        print(report.table())
    if options.save_scores and is_main:
        written = write_scores(options.save_scores, report.scores(), report.text_ids, report.fingerprint())
        print(f"scores written to {written}")
    folds = report.five_fold_1k() if options.five_fold else {}
    if options.ensemble:
        members = [saved_scores(path, report.fingerprint()) for path in options.ensemble]
        scores = mean_scores([report.scores(), *members])
        ids = report.image_ids, report.text_ids
        report.metrics = score_metrics(scores, *ids)
        report.protocol += f", scores averaged with those of {', '.join(path.name for path in options.ensemble)}"
        folds = five_fold_scores(scores, *ids) if options.five_fold else {}
        if is_main:
            print(f"\nthe mean of {1 + len(members)} models\n{report.table()}")
    result = report.to_dict()
    if template:
        result["protocol"] += f", prompt '{template}'"
    if folds:
        result["metrics"] |= {f"1K/{name}": value for name, value in folds.items()}
        options.accelerator.print(f"five-fold 1K: rsum {result['metrics']['1K/rsum']:.1f}")
    return result


def saved_scores(path: Path, fingerprint: str):
    """Scores [N, M] of --save-scores; or of a .npy file, which says nothing of its captions: an array, or {npts, sims}
    as the original's evaluation saves them.
    """
    if path.suffix == ".npy":
        content = read_npy(path)
        scores = content.get("sims") if isinstance(content, dict) else content
        if getattr(scores, "ndim", None) != 2:
            raise SystemExit(f"{path} holds no scores [images, captions]")
        return scores
    saved = SavedScores(path)
    check_fingerprint(saved, fingerprint, "--data")
    return saved


def crisscrossed(options, model, processor, records, shared) -> dict:
    if options.annotations is None:
        raise SystemExit("--task cxc needs --annotations, the folder of cxc_it.json and its four companions")
    given = read_crisscrossed(options.annotations)
    report = evaluate_crisscrossed(model, processor, records, given.captions_of, given.annotations, **shared)
    options.accelerator.print(report.table())
    return report.to_dict()


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


TASKS = {"retrieval": retrieval, "cxc": crisscrossed, "zero-shot": zero_shot, "linear-probe": linear_probe}


def read(options, source, processor):
    needed = ["captions" if options.task in ("retrieval", "cxc") else "label"]
    if not takes_regions(processor):
        needed.insert(0, "image")
    elif any(Path(source).glob("*_ims.npy")):
        return precomputed(options, source, processor)
    columns = parse_columns(options.columns)
    return read_records(source, split=options.split, columns=columns, image_root=options.image_root, required=needed)


def precomputed(options, source, processor) -> list[dict]:
    """Records of a folder of SCAN and VSE-infinity; with its own features, or with keys of --region-store."""
    split = PrecomputedSplit(source, options.split or "test")
    records = split.records()
    if options.region_store is not None:
        return records
    processor.feature_extractor.region_store = None  # the folder's features count, not those of the training
    caption_of = {}
    for caption, image_id in enumerate(split.image_ids):
        caption_of.setdefault(image_id, caption)
    return [{**row, "regions": split.regions(caption_of[row["image_id"]])} for row in records]


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


def add_result(path: Path, result: dict) -> None:
    """Put a result into a results file, in place of an earlier one of the same task, data, split and protocol."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    same = ("task", "data", "split", "protocol")
    results = [old for old in results if any(old.get(key) != result[key] for key in same)]
    write_text(path, json.dumps([*results, result], indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", required=True, help="records to evaluate on")
    parser.add_argument("--split", help="of a source with several")
    parser.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN[,COLUMN]")
    parser.add_argument("--image-root", help="folder of relative picture paths")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="compute under bfloat16 autocast")
    parser.add_argument("--prompt", help="retrieval: a text around each caption, e.g. 'a photo of {}'")
    parser.add_argument("--captions-per-image", type=int, help="retrieval: only the first so many (COCO: 5)")
    parser.add_argument("--five-fold", action="store_true", help="retrieval: the 1K protocol on 5,000 images, too")
    parser.add_argument("--region-store", help="of a model that sees regions, in place of its processor's")
    parser.add_argument(
        "--save-scores", type=Path, metavar="FILE", help="retrieval: write all scores to a .safetensors file"
    )
    parser.add_argument(
        "--ensemble", type=Path, nargs="+", metavar="FILE", help="retrieval: the mean with these models' saved scores"
    )
    parser.add_argument(
        "--annotations", type=Path, help="cxc: folder of cxc_it.json, cxc_t2t.json, testall_ids.txt, ..."
    )
    parser.add_argument("--templates", type=Path, help="zero-shot: a file of prompts, {} for the name, one a line")
    parser.add_argument(
        "--classes", type=Path, help="zero-shot: a file of class names, one class a line, names split by |"
    )
    parser.add_argument("--train", help="linear-probe: records to fit on")
    parser.add_argument("--validation", help="linear-probe: records to choose C on")
    parser.add_argument("--C", type=float, default=0.316, help="linear-probe: inverse penalty")
    parser.add_argument("--output", type=Path, help="results file (default: results.json in a local model folder)")
    options = parser.parse_args()

    options.accelerator = accelerator = Accelerator()
    model = AutoModel.from_pretrained(options.model).to(accelerator.device)
    processor = AutoProcessor.from_pretrained(options.model)
    if options.region_store is not None:
        if not takes_regions(processor):
            raise SystemExit(
                f"--region-store {options.region_store}: the model {options.model} sees pictures, not regions"
            )
        processor.feature_extractor.region_store = options.region_store
    with accelerator.main_process_first():
        records = read(options, options.data, processor)
    shared = {
        "batch_size": options.batch_size,
        "device": accelerator.device,
        "autocast": torch.bfloat16 if options.bf16 else None,
    }
    result = TASKS[options.task](options, model, processor, records, shared)
    result["protocol"] += f", {conditions(model, processor, shared['autocast'])}"
    if options.columns:
        result["protocol"] += f", columns {' '.join(options.columns)}"
    result = {
        "task": options.task,
        "data": shortened(options.data),
        "split": options.split,
        **result,
        "command": command(accelerator.num_processes),
        "date": date.today().isoformat(),
    }
    output = options.output or (Path(options.model) / "results.json" if Path(options.model).is_dir() else None)
    if output is not None and accelerator.is_main_process:
        add_result(output, result)
        print(f"written to {output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
