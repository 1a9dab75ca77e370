"""Cases of ALBEF's annotation files and measures: lists of annotations to items, scores and maps to what is reported."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hf_vlp.data.annotation_lists import (
    read_caption_lists,
    read_entailment_list,
    read_phrase_list,
    read_question_lists,
    read_reasoning_list,
)
from hf_vlp.data.answers import compared_forms
from hf_vlp.data.tasks import ENTAILMENT
from hf_vlp.evaluation.answers import annotator_accuracy, means_by_kind
from hf_vlp.evaluation.grounding import are_right, best_boxes, box_scores, intersection_over_union, map_at_size
from hf_vlp.evaluation.ranks import MISS, ranks_from_scores, recalls
from hf_vlp.inputs.text_cleaning import clean_caption, clean_question
from tests.parity.harness import Case

END = "[SEP]"
CAPTION_WORDS = TRAINING_WORDS = 30
TEST_WORDS = 50

# --------------------------------------------------------------------------------------------------------------- data


def datasets(case: Case) -> None:
    """datasets.json: `annotations`, what each file holds, to `items`, what its data set returns but for the pictures."""
    stored = case.json("datasets.json")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.json") for name in stored["annotations"]}
        for name, file in files.items():
            file.write_text(json.dumps(stored["annotations"][name]))
        ours = {key: value for name, file in files.items() for key, value in ITEMS[name](file).items()}
    case.expect({f"items: {key}": value for key, value in flat(stored["items"])})
    for key, value in flat(ours):
        entry = f"items: {key}"
        if isinstance(value, float) and entry in case.stored:
            case.settle(entry, abs(value - case.stored[entry]) <= 1e-6, abs(value - case.stored[entry]), 1e-6)
        else:
            case.compare({entry: value})


def flat(value, name: str = "") -> Iterable[tuple[str, object]]:
    """The leaves of nested lists and objects by where they are; of a list also its length."""
    if isinstance(value, list | tuple):
        yield f"{name}: items", len(value)
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        yield name, value
        return
    for key, part in parts:
        yield from flat(part, f"{name}: {key}" if name else str(key))


def captions_of_train(file: Path) -> dict[str, object]:
    """Captions with their image's number."""
    records = read_caption_lists(file, pictures=False)
    return {"retrieval_train (caption, idx)": captions_with_numbers(records)}


def phrases_of_train(file: Path) -> dict[str, object]:
    """Phrases with their image's number."""
    records = read_caption_lists(file, text="text", pictures=False)
    return {"grounding_train (caption, idx)": captions_with_numbers(records)}


def captions_with_numbers(records) -> list[tuple[str, int]]:
    """The caption of each record and its image's number, in the order of the first appearance."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(records["image_id"]))}
    return [(clean_caption(row["captions"][0], CAPTION_WORDS), numbers[row["image_id"]]) for row in records.to_list()]


def captions_of_test(file: Path) -> dict[str, object]:
    """All texts one after the other, and which image each belongs to."""
    records = read_caption_lists(file, pictures=False)
    captions = [(number, caption) for number, row in enumerate(records.to_list()) for caption in row["captions"]]
    texts: dict[str, list[int]] = {str(number): [] for number in range(len(records))}
    for place, (number, _) in enumerate(captions):
        texts[str(number)].append(place)
    found = {"text": [clean_caption(caption, CAPTION_WORDS) for _, caption in captions]}
    found |= {"txt2img": {str(place): number for place, (number, _) in enumerate(captions)}, "img2txt": texts}
    return {"retrieval_eval": found | {"image": list(records["image_id"]), "items_index": list(range(len(records)))}}


def pretraining(file: Path) -> dict[str, object]:
    """The second of several captions, or the only one."""
    rows = read_caption_lists(file, pictures=False).to_list()
    chosen = [row["captions"][min(1, len(row["captions"]) - 1)] for row in rows]
    name = "pretrain (random.choice fixed to index 1 of a list)"
    return {name: [clean_caption(caption, CAPTION_WORDS) for caption in chosen]}


def reasoning(file: Path) -> dict[str, object]:
    """Statements and whether they are true."""
    rows = read_reasoning_list(file, "", pictures=False).to_list()
    return {"nlvr (sentence, label)": [(clean_caption(row["statement"], CAPTION_WORDS), row["label"]) for row in rows]}


def entailment(file: Path) -> dict[str, object]:
    """Hypotheses and the numbers of their classes."""
    rows = read_entailment_list(file, "", pictures=False).to_list()
    items = [(clean_caption(row["hypothesis"], CAPTION_WORDS), ENTAILMENT[row["label"]]) for row in rows]
    return {"ve (sentence, label)": items}


def questions_of_train(file: Path) -> dict[str, object]:
    """Questions with their answers and weights, alone and as a batch."""
    rows = read_question_lists(file, {}, pictures=False).to_list()
    questions = [clean_question(row["question"], TRAINING_WORDS) for row in rows]
    answers = [[one["answer"] + END for one in row["answers"]] for row in rows]
    weights = [[one["score"] for one in row["answers"]] for row in rows]
    batch = {"questions": questions, "answers": sum(answers, []), "weights": sum(weights, [])}
    return {
        "vqa_train (question, answers, weights)": list(zip(questions, answers, weights)),
        "vqa_train_collated": batch | {"n": [len(own) for own in answers]},
    }


def questions_of_test(file: Path) -> dict[str, object]:
    """Questions with their ids."""
    rows = read_question_lists(file, {}, pictures=False).to_list()
    items = [(clean_question(row["question"], TEST_WORDS), row["question_id"]) for row in rows]
    return {"vqa_test (question, question_id)": items}


def phrases_of_test(file: Path) -> dict[str, object]:
    """Phrases with the ids of what they refer to."""
    rows = read_phrase_list(file, "", pictures=False).to_list()
    items = [(clean_caption(row["phrase"], CAPTION_WORDS), row["ref_id"]) for row in rows]
    return {"grounding_test (caption, ref_id)": items}


ITEMS = {
    "retrieval_train": captions_of_train,
    "retrieval_eval": captions_of_test,
    "pretrain": pretraining,
    "nlvr": reasoning,
    "ve": entailment,
    "vqa_train": questions_of_train,
    "vqa_test": questions_of_test,
    "grounding_train": phrases_of_train,
    "grounding_test": phrases_of_test,
}


# ------------------------------------------------------------------------------------------------------------- metrics


def metrics(case: Case) -> None:
    """Score matrices to recalls, maps to boxes and how many are right, answers to accuracies."""
    stored = case.json("metrics.json")
    if "scores_i2t" in case.inputs:
        case.compare({f"itm.{name}": value for name, value in recall_entries(case.inputs).items()})
    if "refs" in stored:
        grounding(case, stored)
    if "vqa" in stored:
        answers(case, stored)


def recall_entries(inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """`scores_i2t` [N, M] and `scores_t2i` [M, N] to recalls in percent; an image without a text counts as missed."""
    image_scores, text_scores, of_text = (inputs[name] for name in ("scores_i2t", "scores_t2i", "txt2img"))
    images = torch.arange(len(image_scores))
    shown = torch.isin(images, of_text)
    to_text = torch.full((len(images),), MISS)
    to_text[shown] = ranks_from_scores(later_first(image_scores)[shown], images[shown], of_text)
    ways = {"txt": recalls(to_text), "img": recalls(ranks_from_scores(later_first(text_scores), of_text, images))}
    found = {f"{way}_r{k}": numbers[f"R@{k}"] for way, numbers in ways.items() for k in (1, 5, 10)}
    found |= {f"{way}_r_mean": sum(found[f"{way}_r{k}"] for k in (1, 5, 10)) / 3 for way in ways}
    return found | {"r_mean": (found["txt_r_mean"] + found["img_r_mean"]) / 2}


def later_first(scores: torch.Tensor) -> torch.Tensor:
    """Scores [N, M] as they are without ties; with ties their places in each row, of equal ones the later the higher.

    Ours let ties count against the query, whose ranks differ there from the original's by design.
    """
    places = scores.argsort(dim=1, stable=True).argsort(dim=1)
    tied = scores.sort(dim=1).values.diff(dim=1).eq(0).any()
    return places.float() if tied else scores


def grounding(case: Case, stored: Mapping) -> None:
    """`pred_map_N` with the proposals of its image to scores, the chosen box, and the share of right ones."""
    refs = stored["refs"]
    sizes = [tuple(stored["images"][str(ref["image_id"])][side] for side in ("height", "width")) for ref in refs]
    maps = torch.stack([case.inputs[f"pred_map_{ref['ref_id']}"] for ref in refs])
    boxes = [stored["dets"][str(ref["image_id"])] for ref in refs]
    scores = box_scores(maps, boxes, sizes, power=case.config["grounding_alpha"])
    chosen, wanted = best_boxes(scores, boxes), torch.tensor([ref["bbox"] for ref in refs], dtype=torch.float64)
    overlaps = intersection_over_union(chosen, wanted)
    for place, ref in enumerate(refs):
        number = ref["ref_id"]
        case.compare({f"upsampled_map_{number}": map_at_size(maps[place], sizes[place])})
        case.compare({f"proposal_scores_{number}": scores[place], f"iou_{number}": overlaps[place]})
        entry = f"metrics.json: refs: {number}: predicted_box"
        case.expect({entry: ref["predicted_box"]})
        case.compare({entry: chosen[place].tolist()})
    shares = means_by_kind(are_right(chosen, wanted), [ref["split"] for ref in refs])
    case.compare({f"grounding.{split}_d": share for split, share in shares.items()})


def answers(case: Case, stored: Mapping) -> None:
    """Results and annotators' answers to accuracies in percent with two decimals, overall and by type."""
    rows, expected = stored["vqa"], stored["vqa_expected"]
    scores = annotator_accuracy(*zip(*(compared_forms(row["result"], row["answers"]) for row in rows)))
    ours = {"overall": percent(scores.mean().item())}
    for name, kind in (("perAnswerType", "answer_type"), ("perQuestionType", "question_type")):
        ours[name] = {key: percent(mean) for key, mean in means_by_kind(scores, [row[kind] for row in rows]).items()}
    ours["per_question"] = {str(row["question_id"]): percent(score) for row, score in zip(rows, scores.tolist())}
    case.expect({f"metrics.json: vqa_expected: {key}": value for key, value in flat(expected)})
    case.compare({f"metrics.json: vqa_expected: {key}": value for key, value in flat(ours)})


def percent(share: float) -> float:
    """A share as the original prints it."""
    return round(100 * share, 2)
