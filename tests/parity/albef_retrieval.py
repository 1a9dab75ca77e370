"""Cases of ALBEF's evaluation by retrieval: embeddings propose candidates, matching puts them in order."""

from collections.abc import Sequence

import torch

from hf_vlp.evaluation.fusion_retrieval import Candidates
from hf_vlp.evaluation.pair_scoring import TokenizedTexts, score_wanted
from tests.parity.albef_data import recall_entries
from tests.parity.albef_model import checkpoints
from tests.parity.harness import Case

NOT_SCORED = -100.0  # what every process of the released code begins with; their matrices are added up
GROUPS = (1, 3)  # images encoded at a time


def rerank(case: Case) -> None:
    """`images` [N, 3, H, W] and texts [M, L], `txt2img` [M]: similarities, logits of the k candidates of each, and recalls."""
    ids, masks, images = (case.inputs[name] for name in ("input_ids", "attention_mask", "images"))
    k = case.config["options"]["k_test"]

    def texts_as_tokens(text: Sequence[str], **options) -> dict[str, torch.Tensor]:
        rows = [int(number) for number in text]
        return {"input_ids": ids[rows], "attention_mask": masks[rows]}

    def prepare(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": images[list(rows)]}

    texts = TokenizedTexts(texts_as_tokens, list(map(str, range(len(ids)))))
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        with torch.no_grad():
            image_embeds, text_embeds = model.get_image_features(images), model.get_text_features(ids, masks)
        similarities = image_embeds @ text_embeds.T
        values = {"image_embeds_proj": image_embeds, "text_embeds_proj": text_embeds, "sims_matrix": similarities}
        case.compare(values, label)
        candidates = Candidates(similarities, images=k, captions=k)
        for group in GROUPS:
            scores = score_wanted(
                model,
                prepare,
                texts,
                candidates.to_image | candidates.to_text,
                image_batch_size=group,
                pair_batch_size=64,
                device=torch.device("cpu"),
                progress=False,
            )
            several = label if group == 1 else f"{label}{group} images at a time: "
            compare_scores(case, scores, candidates, several)


def compare_scores(case: Case, scores: torch.Tensor, candidates: Candidates, label: str) -> None:
    """`scores` [N, M] as the released code has them, of one process and of several, and their recalls."""
    own = {
        "i2t": scores.masked_fill(~candidates.to_text, NOT_SCORED),
        "t2i": scores.masked_fill(~candidates.to_image, NOT_SCORED).T,
    }
    for ranks, ending, metric in ((1, "", "metric."), (2, "_sum_of_2_ranks", "metric_2_ranks.")):
        matrices = {way: matrix + (ranks - 1) * NOT_SCORED for way, matrix in own.items()}
        case.compare({f"score_matrix_{way}{ending}": matrix for way, matrix in matrices.items()}, label)
        found = {f"scores_{way}": matrix for way, matrix in matrices.items()} | {"txt2img": case.inputs["txt2img"]}
        case.compare({f"{metric}{name}": value for name, value in recall_entries(found).items()}, label)
