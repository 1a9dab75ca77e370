"""Cases of fine-tuning models that begin from a pre-training checkpoint: which of its tensors they take, and what new ones begin as."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from conversion.from_vilt import load_model, read_original
from conversion.vilt_layouts import to_checkpoint
from hf_vlp.models.vilt.tasks_vilt import (
    VlpViltForImageTextRetrieval,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)
from tests.parity.harness import Case

CLASSES = {
    "nlvr2": VlpViltForVisualReasoning,
    "irtr": VlpViltForImageTextRetrieval,
    "vqa": VlpViltForVisualQuestionAnswering,
    "zeroshot": VlpViltForImageTextRetrieval,  # ours begins with the rank head that the original gets by sharing memory
}
TASKS = ("nlvr2", "irtr", "vqa")
SHARING = "irtr_rank_output_shares_storage_with_itm_score"


def init_from_pretrain(case: Case) -> None:
    """Each class from a saved folder of the checkpoint: key sets under the original's names, and tensors, bit for bit."""
    stored = case.json("expected_keys.json")
    case.expect({f"expected_keys.json: {name}": value for name, value in stored.items()})
    if SHARING in stored:
        case.listed(f"expected_keys.json: {SHARING}", "ours is a copy of the matching head's row, not the same memory")
    for path in case.weight_files():
        before = read_original(path).state
        models = fine_tuning_models(path, case.config)
        states = {name: to_checkpoint(model.config, model.state_dict())["state_dict"] for name, model in models.items()}
        found = {"irtr_trainable_itm": any(weight.requires_grad for weight in models["irtr"].itm_head.parameters())}
        for task in TASKS:
            found |= {
                f"{task}_keys": sorted(states[task]),
                f"{task}_new_keys": sorted(states[task].keys() - before.keys()),
                f"{task}_dropped_keys": sorted(before.keys() - states[task].keys()),
            }
            taken = [name for name in states[task] if name in before and states[task][name].shape == before[name].shape]
            differing = [name for name in taken if not torch.equal(states[task][name], before[name])]
            case.check(f"{task}: tensors that differ", torch.tensor(len(differing)), torch.tensor(0), 0.0)
        matching = before["itm_score.fc.weight"][1:], before["itm_score.fc.bias"][1:]
        ranking = [states["zeroshot"][f"rank_output.{part}"] for part in ("weight", "bias")]
        found["zeroshot_rank_output_equals_itm_row1"] = all(map(torch.equal, ranking, matching))
        case.compare({f"expected_keys.json: {name}": value for name, value in found.items()})
        case.compare({f"{name}.{key}": value for name, state in states.items() for key, value in state.items()})


def fine_tuning_models(path: Path, options: dict) -> dict[str, torch.nn.Module]:
    """A model of each of CLASSES, loaded out of a folder of the checkpoint."""
    with TemporaryDirectory() as folder:
        load_model(path, options=options).save_pretrained(folder)
        return {
            name: kind.from_pretrained(folder, **({"num_labels": options["vqav2_label_size"]} if name == "vqa" else {}))
            for name, kind in CLASSES.items()
        }
