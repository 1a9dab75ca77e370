"""Cases of CLIP's loss and of its linear probe: features in, values and gradients out."""

import math
import re
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from hf_vlp.evaluation.linear_probe import fit_linear_probe
from hf_vlp.layers.logit_scale import LogitScale
from hf_vlp.layers.pooling import unit_rows
from hf_vlp.objectives import contrastive
from tests.parity.clip_rank import one_rank
from tests.parity.harness import Case, at_least

RANK_TENSOR = re.compile(r"(?P<group>\w+)_ranks\.rank(?P<rank>\d+)\..+")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


def contrastive_loss(case: Case) -> None:
    """Loss and gradients of raw `image_features` and `text_features` [N, E].

    With the scale as given and limited, and on several ranks.
    """
    initial = case.config.get("logit_scale", 2.6593)  # ln(1 / 0.07), rounded as the stored cases are
    limit = case.config.get("max_logit_scale", math.log(100))
    scales = {"given": LogitScale(initial, None), "clamped": LogitScale(initial, limit)}
    scales["clamped"].clamp_()
    features = {name: case.inputs[name] for name in ("image_features", "text_features")}
    for name, scale in scales.items():
        case.compare({f"{name}.{key}": value for key, value in loss_and_gradients(features, scale).items()})
    for group, ranks in rank_groups(case.outputs).items():
        for number, values in enumerate(on_ranks(features, initial, ranks)):
            case.compare({f"{group}_ranks.rank{number}.{key}": value for key, value in values.items()})
            check_rows(case, values, number, ranks, group)


def loss_and_gradients(features: dict[str, torch.Tensor], scale: LogitScale) -> dict[str, torch.Tensor]:
    """Logits [N, N], the loss with its two halves, and the gradients of the loss, on one process."""
    features = {name: value.clone().requires_grad_() for name, value in features.items()}
    images, texts = unit_rows(features["image_features"]), unit_rows(features["text_features"])
    loss = contrastive.contrastive_loss(images, texts, scale())
    loss.backward()
    logits = (scale() * images @ texts.T).detach()
    targets = torch.arange(len(logits))
    values = {"logits_per_image": logits, "logits_per_text": logits.T, "loss.total": loss.detach()}
    values |= {"loss.image": cross_entropy(logits, targets), "loss.text": cross_entropy(logits.T, targets)}
    values |= {f"grad.{name}": value.grad for name, value in features.items()}
    return values | {"grad.logit_scale": scale.weight.grad}


def rank_groups(names) -> dict[str, int]:
    """Group ("two") -> number of ranks, for tensors such as `two_ranks.rank1.loss`.

    As many as the word says, or as the highest rank needs if that is more.
    """
    groups = {}
    for match in filter(None, map(RANK_TENSOR.fullmatch, names)):
        word = match["group"]
        said = WORDS.index(word) if word in WORDS else 1
        groups[word] = max(groups.get(word, said), int(match["rank"]) + 1)
    return groups


def on_ranks(features: dict[str, torch.Tensor], logit_scale: float, ranks: int) -> list[dict[str, torch.Tensor]]:
    """Loss and gradients of each of N processes with consecutive rows of the features.

    Raises:
        ValueError: the rows cannot be dealt out evenly.
    """
    rows = len(features["image_features"])
    if rows % ranks:
        raise ValueError(f"{rows} rows cannot be dealt out to {ranks} ranks")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (ranks, folder, features, logit_scale), nprocs=ranks)
        return [load_file(Path(folder) / f"{number}.safetensors") for number in range(ranks)]


def check_rows(case: Case, values: dict[str, torch.Tensor], number: int, ranks: int, group: str) -> None:
    """A rank's rows of the gradient, averaged over ranks as DistributedDataParallel does, are the batch's."""
    for name in ("image_features", "text_features"):
        whole = case.outputs.get(f"given.grad.{name}")
        if whole is not None:
            rows = whole.chunk(ranks)[number]
            label = f"{group}_ranks.rank{number}: rows of given.grad.{name}"
            case.check(label, values[f"grad.{name}"] / ranks, rows, at_least(2e-5, 1e-5)(rows))


def linear_probe(case: Case) -> None:
    """Logistic regression on `train_features` [N, E] and `train_labels` [N], tried on the same named `test_*`."""
    options = {name: case.config[name] for name in ("C", "max_iter") if name in case.config}
    probe = fit_linear_probe(case.inputs["train_features"], case.inputs["train_labels"], **options)
    values = {"coef": probe.weight, "intercept": probe.bias}
    if "test_features" in case.inputs:
        values["predictions"] = probe.predict(case.inputs["test_features"])
    if "test_features" in case.inputs and "test_labels" in case.inputs:
        accuracy = probe.accuracy(case.inputs["test_features"], case.inputs["test_labels"])
        values["accuracy_percent"] = torch.tensor(accuracy)
    case.compare(values)
