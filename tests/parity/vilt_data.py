"""Cases of ViLT's data and metrics: Arrow tables and annotation files as they stand in the folder, rows, items and scores out."""

import io
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import torch
from PIL import Image

from hf_vlp.data.answers import answer_vocabulary, has_known_answer, majority_answers, normalize_answer, rounded_rule
from hf_vlp.data.arrow_tables import answer_ids, read_arrow_tables, tables_of
from hf_vlp.data.karpathy import read_karpathy
from hf_vlp.data.nlvr2 import read_nlvr2
from hf_vlp.data.vqav2 import HELD_OUT, QUESTIONS, SPLITS, read_vqav2
from hf_vlp.evaluation.answers import hits, soft_scores, submission
from hf_vlp.evaluation.ranks import MISS, ranks_from_scores, recalls
from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessorPil
from tests.parity.harness import Case

Rows = dict[object, dict[str, object]]  # by the id of the image or of the pair
ROWS, ITEMS, DATASET = "expected_rows.json", "expected_items.json", "expected_dataset.json"
TRUTH = ("False", "True")


# --------------------------------------------------------------------------------------------------------------- data


def data_coco(case: Case) -> None:
    """Tables of captions and dataset_*.json to rows; what each split reads, its images and pairs."""
    names, expected = expected_rows(case)
    for name in names:
        records = undecoded(read_arrow_tables(case.path(name), unique_captions=False))
        rows = {}
        for record in records:
            row = {key: value for key, value in record.items() if key != "captions"}
            rows[record["image_id"]] = row | {"image": size_of(record["image"]), "caption": record["captions"]}
        compare_rows(case, name, expected[name], rows)
    for file in sorted(name for name in case.files if re.fullmatch(r"dataset_\w+\.json", name)):
        for name in expected:
            split = PurePath(name).stem.rpartition("_")[2]
            records = read_karpathy(case.path(file), case.folder, split, restval=False, pictures=False)
            rows = {
                row["filename"]: {"caption": row["captions"], "image_id": row["filename"], "split": split}
                for row in records
            }
            # white space around a caption means nothing to any tokenizer, and our reader takes it off
            stripped = [row | {"caption": [text.strip() for text in row["caption"]]} for row in expected[name]]
            compare_rows(case, name, stripped, rows, f"{file}: ")
    data_set = next(iter(expected), "").partition("_")[0]
    for split in case.json(DATASET) if DATASET in case.files else ():
        files = tables_of(case.folder, f"{data_set}/{split}")
        records = read_arrow_tables(files)
        counts = [[row["image_id"], len(row["captions"])] for row in records.remove_columns("image")]
        ours = {"files": [file.stem for file in files], "images": len(records), "image_only_length": len(records)}
        ours |= {"pairs": sum(count for _, count in counts), "unique_caption_counts_by_image": sorted(counts)}
        case.expect({f"{DATASET}: {split}: {key}": value for key, value in case.json(DATASET)[split].items()})
        case.compare({f"{DATASET}: {split}: {key}": value for key, value in ours.items()})


def data_vqa(case: Case) -> None:
    """Tables of questions, and the official files, to rows; the answers of the vocabulary that the tables use."""
    names, expected = expected_rows(case)
    seen: dict[str, int] = {}
    for name in names:
        records = undecoded(read_arrow_tables(case.path(name)))
        seen |= answer_ids(records)
        compare_rows(case, name, expected[name], question_rows(records))
    if "label_to_answer_seen" in case.config:
        case.expect({"config.json: label_to_answer_seen": case.config["label_to_answer_seen"]})
        found = {str(label): answer for answer, label in sorted(seen.items(), key=lambda pair: pair[1])}
        case.compare({"config.json: label_to_answer_seen": found})
    for file in case.files:
        if re.fullmatch(r"v2_.*\.json", PurePath(file).name):
            case.path(file)
    official = {match[1]: name for name in case.files if (match := QUESTIONS.fullmatch(PurePath(name).name))}
    if not official:
        return
    built = {}
    for split in ("train", "val", "test", "test-dev"):
        if SPLITS[split] in official:
            source = case.folder / official[SPLITS[split]]
            options = {"rule": rounded_rule, "normalize": False, "pictures": False}
            built[split] = read_vqav2(source, case.folder, split, **options)
    majority = itertools.chain.from_iterable(
        majority_answers(built[split]) for split in ("train", "val") if split in built
    )
    label2id = answer_vocabulary(majority)
    rows = {split: question_rows(known(records, label2id), split) for split, records in built.items()}
    for name in expected:
        split = PurePath(name).stem.removeprefix("vqav2_")
        if split in ("trainable_val", "rest_val") and "val" in rows:
            # which images are held out was drawn: how many there are is the rule
            count = min(HELD_OUT, len(rows["val"]))
            wanted = count if split == "rest_val" else len(rows["val"]) - count
            case.check(f"{name}: images", torch.tensor(len(expected[name])), torch.tensor(wanted), 0)
            there = {row["image_id"] for row in expected[name]}
            rows[split] = {key: row for key, row in rows["val"].items() if key in there}
        if split in rows:
            compare_rows(case, name, expected[name], rows[split], "annotations: ")


def data_nlvr2(case: Case) -> None:
    """Tables of statements, and the JSON lines, to rows; the items of each split with the shapes of their pictures."""
    names, expected = expected_rows(case)
    for name in names:
        compare_rows(
            case, name, expected[name], pair_rows(undecoded(read_arrow_tables(case.path(name)))), key="identifier"
        )
    for file in sorted(name for name in case.files if name.startswith("annotations/")):
        name = f"nlvr2_{PurePath(file).stem}.arrow"
        if name in expected:
            rows = pair_rows(read_nlvr2(case.path(file), case.folder, pictures=False))
            compare_rows(case, name, expected[name], rows, f"{file}: ", "identifier")
    processor = VlpViltImageProcessorPil(size={"shortest_edge": case.config.get("image_size", 384)})
    for split, items in (case.json(ITEMS) if ITEMS in case.files else {}).items():
        ours = []
        for file in tables_of(case.folder, f"nlvr2/{split}"):
            for record in read_arrow_tables(file):
                item = {"text": record["statement"], "answer": record["label"], "table": file.stem}
                for number, picture in enumerate(record["images"]):
                    item[f"image_{number}"] = list(processor(picture, return_tensors="pt")["pixel_values"][0].shape)
                ours.append(item)
        case.expect({f"{ITEMS}: {split}: items": len(items)})
        case.expect({f"{ITEMS}: {split}: {number}": item for number, item in enumerate(items)})
        case.compare({f"{ITEMS}: {split}: items": len(ours)})
        case.compare({f"{ITEMS}: {split}: {number}": item for number, item in enumerate(ours)})


def expected_rows(case: Case) -> tuple[list[str], dict[str, list[dict]]]:
    """The tables of the folder, and the rows of all tables, all that these hold being expected."""
    expected = case.json(ROWS)
    for name, rows in expected.items():
        case.expect({f"{ROWS}: {name}: rows": len(rows)})
        for number, row in enumerate(rows):
            case.expect({f"{ROWS}: {name}: {number}: {column}": value for column, value in row.items()})
    return sorted(case.files & expected.keys()), expected


def compare_rows(
    case: Case, name: str, expected: list[dict], ours: Rows, label: str = "", key: str = "image_id"
) -> None:
    """The rows of a table in any order, each by the id in its column `key`."""
    case.compare({f"{ROWS}: {name}: rows": len(ours)}, label)
    for number, row in enumerate(expected):
        for column, value in ours.get(row[key], {}).items():
            entry = f"{ROWS}: {name}: {number}: {column}"
            if column == "caption":
                case.settle(entry, value == row[column], note=label)
            else:
                case.compare({entry: value}, label)


def undecoded(records):
    """The records with pictures as they are stored."""
    from datasets import Image as Stored

    return records.cast_column(records.field, Stored(decode=False))


def size_of(picture: Mapping[str, bytes]) -> dict[str, object]:
    """How expected_rows.json describes a picture."""
    return {"bytes": len(picture["bytes"]), "size": list(Image.open(io.BytesIO(picture["bytes"])).size)}


def question_rows(records: Iterable[Mapping], split: str | None = None) -> Rows:
    """Records of questions as rows of their images; `split` where the records do not say."""
    rows: Rows = {}
    for record in records:
        first = {"image": size_of(record["image"])} if "image" in record else {}
        first |= {"image_id": int(record["image_id"]), "split": record.get("split", split)}
        lists = ("questions", "question_id", "answers", "answer_labels", "answer_scores")
        row = rows.setdefault(first["image_id"], first | {name: [] for name in lists})
        row["questions"].append(record["question"])
        row["question_id"].append(record["question_id"])
        if record["answers"]:
            row["answers"].append([one["answer"] for one in record["answers"]])
            row["answer_labels"].append(record["answer_labels"])
            row["answer_scores"].append([one["score"] for one in record["answers"]])
    return rows


def known(records: Iterable[Mapping], label2id: Mapping[str, int]) -> Iterable[dict]:
    """Records with the answers of the vocabulary alone, and their ids; without those that have none, but for tests."""
    for record in records:
        if has_known_answer(record["answers"], label2id) or record["majority_answer"] is None:
            answers = [one for one in record["answers"] if one["answer"] in label2id]
            yield record | {"answers": answers, "answer_labels": [label2id[one["answer"]] for one in answers]}


def pair_rows(records: Iterable[Mapping]) -> Rows:
    """Records of statements as rows of their pairs."""
    rows: Rows = {}
    for record in records:
        pictures = {f"image_{number}": size_of(one) for number, one in enumerate(record.get("images", ()))}
        first = pictures | {"identifier": record["image_id"], "questions": [], "answers": []}
        row = rows.setdefault(record["image_id"], first)
        row["questions"].append(record["statement"])
        row["answers"].append(TRUTH[record["label"]])
    return rows


# ------------------------------------------------------------------------------------------------- answers and metrics


def vqa_normalize(case: Case) -> None:
    """outputs.json: answers and their normal form; config.json: the score of a count of annotators."""
    for number, (answer, normal) in enumerate(case.json("outputs.json")):
        entry = f"outputs.json: {number}: {answer!r}"
        case.expect({entry: normal})
        case.compare({entry: normalize_answer(answer)})
    for count, score in case.config.get("score_by_count", {}).items():
        entry = f"config.json: score_by_count: {count}"
        case.expect({entry: score})
        case.compare({entry: rounded_rule(int(count))})


def metrics(case: Case) -> None:
    """`vqa_logits_N`, `vqa_targets_N`, `acc_logits_N`, `acc_labels_N` and `scalar_N` to the means of a batch and of all.

    vqa_submission.json: what the test server is given for all batches.
    """
    batches = range(max((int(name.rpartition("_")[2]) + 1 for name in case.inputs), default=0))
    inputs, scores, right, questions, logits = case.inputs, [], [], [], []
    for number in batches:
        if f"vqa_logits_{number}" in inputs:
            logits.append(inputs[f"vqa_logits_{number}"])
            scores.append(soft_scores(logits[-1], inputs[f"vqa_targets_{number}"]))
            questions += [1000 * number + row for row in range(len(logits[-1]))]
            case.compare({f"vqa_batch_score_{number}": scores[-1].mean()})
        if f"acc_logits_{number}" in inputs:
            right.append(hits(inputs[f"acc_logits_{number}"], inputs[f"acc_labels_{number}"]).float())
            case.compare({f"acc_batch_{number}": right[-1].mean()})
    if scores:
        case.compare({"vqa_score_epoch": torch.cat(scores).mean()})
    if right:
        case.compare({"accuracy_epoch": torch.cat(right).mean()})
    scalars = [inputs[f"scalar_{number}"] for number in batches if f"scalar_{number}" in inputs]
    if scalars:
        case.compare({"scalar_epoch": torch.stack(scalars).mean()})
    if "vqa_submission.json" in case.files:
        id2label = {label: f"ans{label}" for label in range(case.config["known_answers"])}
        ours = submission(questions, torch.cat(logits), id2label)
        stored = case.json("vqa_submission.json")
        case.expect({"vqa_submission.json: entries": len(stored)})
        case.expect({f"vqa_submission.json: {number}": entry for number, entry in enumerate(stored)})
        case.compare({"vqa_submission.json: entries": len(ours)})
        case.compare({f"vqa_submission.json: {number}": entry for number, entry in enumerate(ours)})


def irtr_recall(case: Case) -> None:
    """`scores` [N, M] with the image of each text to recalls of images (ir) and of texts (tr), as fractions."""
    scores, of_text = case.inputs["scores"], case.inputs["text_image_index"]
    images = case.inputs.get("image_index", torch.arange(len(scores)))
    case.compare(recall_entries(scores, images, of_text))


def recall_entries(scores: torch.Tensor, images: torch.Tensor, of_text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Recalls of images (ir) and of texts (tr) as fractions; an image without a text counts as missed.

    Args:
        scores: [N, M]. images: [N] numbers of the images. of_text: [M], the image of each text.
    """
    shown = torch.isin(images, of_text)
    to_text = torch.full((len(images),), MISS)
    to_text[shown] = ranks_from_scores(scores[shown], images[shown], of_text)
    found = {"ir": recalls(ranks_from_scores(scores.T, of_text, images)), "tr": recalls(to_text)}
    return {f"{way}_r{k}": torch.tensor(numbers[f"R@{k}"] / 100) for way, numbers in found.items() for k in (1, 5, 10)}
