"""Cases of ViLT's texts: strings to ids, and the masks of both maskings from the draws that were recorded."""

import torch
from transformers import BertTokenizer

from hf_vlp.inputs.text_masking import RandomMasking, WholeWordMasking
from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessor
from hf_vlp.models.vilt.processing_vilt import VlpViltProcessor
from tests.parity.harness import Case

DEFAULT_LENGTH, DEFAULT_SHARE = 40, 0.15


def text_processing(case: Case) -> None:
    """`strings` of config.json to `text_ids` and `text_masks`; these and below them the same without padding, masked: `wwm.*` with the
    words in the order of wwm_shuffled_candidates.json, `plain.*` with the tokens of `plain.mask_draw`."""
    strings, length = case.config["strings"], case.config.get("max_text_len", DEFAULT_LENGTH)
    share = case.config.get("mlm_probability", DEFAULT_SHARE)
    tokenizer = BertTokenizer(vocab=str(case.path("vocab.txt")), model_max_length=length)
    processor = VlpViltProcessor(VlpViltImageProcessor(), tokenizer)
    encoded = processor(text=strings, padding="max_length")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    case.compare({"text_ids": ids, "text_masks": mask})
    if "tokens" in case.config:
        case.expect({"config.json: tokens": case.config["tokens"]})
        rows = [row[: int(count)].tolist() for row, count in zip(ids, mask.sum(dim=1))]
        case.compare({"config.json: tokens": [tokenizer.convert_ids_to_tokens(row) for row in rows]})
    for prefix, masking in (("wwm.", whole_words), ("plain.", single_tokens)):
        if f"{prefix}input_ids" in case.outputs:
            masked, labels = masking(case, tokenizer, share, ids, mask)
            case.compare({f"{prefix}input_ids": masked, f"{prefix}labels": labels})


def whole_words(case: Case, tokenizer, share: float, ids: torch.Tensor, mask: torch.Tensor):
    """Padded rows with the budget of their padded length, the others with that of their own."""
    groups = case.json("wwm_shuffled_candidates.json")
    order = torch.full((len(groups), ids.shape[1]), torch.inf)
    for row, words in enumerate(groups):
        for turn, word in enumerate(words):
            order[row, word[0]] = turn
    drawn = draws(case, "wwm.")
    results = []
    for start in range(0, len(groups), len(ids)):  # padded rows first
        masking = WholeWordMasking(tokenizer, share, padded_to=None if start else ids.shape[1])
        some = slice(start, start + len(ids))
        results.append(masking(ids, mask, order=order[some], **{name: values[some] for name, values in drawn.items()}))
    return [torch.cat(parts) for parts in zip(*results)]


def single_tokens(case: Case, tokenizer, share: float, ids: torch.Tensor, mask: torch.Tensor):
    """Each token by its draw."""
    drawn = draws(case, "plain.")
    times = len(drawn["replaced"]) // len(ids)
    chosen = case.inputs["plain.mask_draw"]
    return RandomMasking(tokenizer, share)(ids.repeat(times, 1), mask.repeat(times, 1), chosen=chosen, **drawn)


def draws(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    """What a masked token is shown as."""
    names = {"replaced": "replace_draw", "randomised": "random_draw", "random_ids": "random_words"}
    return {ours: case.inputs[prefix + name] for ours, name in names.items()}
