"""Cases of VSE-infinity's evaluation: scores and embeddings in, ranks and recalls out."""

import torch

from hf_vlp.evaluation.crisscrossed import crisscrossed_metrics, crisscrossed_ranks
from hf_vlp.evaluation.ensemble import mean_scores
from hf_vlp.evaluation.ranks import ranks_from_scores, recalls, rsum
from hf_vlp.evaluation.retrieval import five_fold_scores, folds_of
from tests.parity.harness import Case

NUMBERS = ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
CXC = {"i2t": "image_to_text", "t2i": "text_to_image", "t2t": "text_to_text", "i2i": "image_to_image"}


def eval_metrics(case: Case) -> None:
    """Scores `sims` [N, M] whole, in folds, with one caption an image and averaged with every other `sims_*`; and the
    embeddings `cxc_*` under the annotations of cxc.json.
    """
    if "sims" in case.inputs:
        scores = case.inputs["sims"]
        images, captions = scores.shape
        each = case.config.get("captions_per_image", captions // images)
        image_ids, text_ids = torch.arange(images), torch.arange(captions) // each
        compare_scores(case, "full", scores, image_ids, text_ids)
        folds = case.config.get("folds", 5)
        used = images // folds * folds  # whole folds, as the original cuts them
        image_ids, text_ids = image_ids[:used], text_ids[text_ids < used]
        for number, (rows, texts) in enumerate(folds_of(image_ids, text_ids, folds)):
            compare_scores(case, f"fold{number}", scores[rows][:, texts], image_ids[rows], text_ids[texts])
        compare_mean(case, five_fold_scores(scores[:used, : len(text_ids)], image_ids, text_ids, folds))
        one, pairs = scores[:, ::each], torch.arange(images)
        compare_scores(case, "one_caption", one, pairs, pairs)
        others = [case.inputs[name] for name in sorted(case.inputs) if name.startswith("sims_")]
        text_ids = torch.arange(captions) // each
        compare_scores(case, "ensemble", mean_scores([scores, *others]), torch.arange(images), text_ids)
    if "cxc.json" in case.files:
        names = case.json("cxc.json")
        images, texts = case.inputs["cxc_img_emb"], case.inputs["cxc_cap_emb"]
        owners = torch.arange(len(texts)) // (len(texts) // len(images))
        annotations = {direction: names[short] for short, direction in CXC.items()}
        ranks = crisscrossed_ranks(images, texts, names["img_ids"], names["cap_ids"], owners, annotations)
        metrics = crisscrossed_metrics(ranks)
        for short, direction in CXC.items():
            case.compare({f"cxc.{short}": torch.tensor([metrics[f"{direction}/{name}"] for name in NUMBERS[:3]])})


def compare_scores(
    case: Case, name: str, scores: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor
) -> None:
    """Ranks, the index found first, and recalls of scores [N, M] both ways."""
    ranks = {
        "i2t": ranks_from_scores(scores, image_ids, text_ids),
        "t2i": ranks_from_scores(scores.T, text_ids, image_ids),
    }
    found = {direction: recalls(values) for direction, values in ranks.items()}
    values = {f"{name}.{way}": torch.tensor([numbers[key] for key in NUMBERS]) for way, numbers in found.items()}
    values |= {f"{name}.ranks_{way}": numbers for way, numbers in ranks.items()}
    values |= {f"{name}.top1_i2t": scores.argmax(dim=1), f"{name}.top1_t2i": scores.argmax(dim=0)}
    case.compare(values | {f"{name}.rsum": torch.tensor(rsum(*found.values()))})


def compare_mean(case: Case, means: dict[str, float]) -> None:
    """The means over folds as one row: five numbers each way, the mean recall each way, the sum of recalls."""
    ways = [[means[f"{way}/{name}"] for name in NUMBERS] for way in ("image_to_text", "text_to_image")]
    mean_recalls = [sum(numbers[:3]) / 3 for numbers in ways]
    case.compare({"fold_mean": torch.tensor([*ways[0], *ways[1], *mean_recalls, means["rsum"]])})
