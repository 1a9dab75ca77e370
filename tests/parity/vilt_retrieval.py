"""Cases of ViLT's evaluation by retrieval: weights, images and texts in, scores of all pairs and recalls out."""

from collections.abc import Sequence

import torch

from hf_vlp.evaluation.encoding import together
from hf_vlp.evaluation.pair_scoring import TokenizedTexts, score_wanted
from hf_vlp.models.vilt.tasks_vilt import VlpViltForImageTextRetrieval
from tests.parity.harness import Case
from tests.parity.vilt_data import recall_entries
from tests.parity.vilt_model import checkpoints

GROUPS = (1, 4)  # images encoded at a time: one by one as in the released code, and filled up to the largest


def irtr_eval(case: Case) -> None:
    """`image` [N, 3, H, W] cut to `image_sizes` [N, 2], with every text [M, L]: `scores` [N, M], and their recalls."""
    ids, masks = case.inputs["text_ids"], case.inputs["text_masks"]
    images, sizes = case.inputs["image"], case.inputs["image_sizes"].tolist()

    def texts_as_tokens(text: Sequence[str], **options) -> dict[str, torch.Tensor]:
        rows = [int(number) for number in text]
        return {"input_ids": ids[rows], "attention_mask": masks[rows]}

    def prepare(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        cut = [images[row][:, : sizes[row][0], : sizes[row][1]] for row in rows]
        seen = [torch.ones(sizes[row], dtype=torch.int64) for row in rows]
        return together([{"pixel_values": picture, "pixel_mask": mask} for picture, mask in zip(cut, seen)])

    texts = TokenizedTexts(texts_as_tokens, list(map(str, range(len(ids)))))
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(VlpViltForImageTextRetrieval)
        for group in GROUPS:
            scores = score_wanted(
                model,
                prepare,
                texts,
                torch.ones(len(images), len(ids), dtype=torch.bool),
                image_batch_size=group,
                pair_batch_size=64,
                device=torch.device("cpu"),
                progress=False,
            )
            several = label if group == 1 else f"{label}{group} images at a time: "
            case.compare({"scores": scores}, several)
            found = recall_entries(scores, torch.arange(len(images)), case.inputs["text_image_index"])
            case.compare(found, several)
