"""Cases of VSE-infinity's training: some optimizer steps on one batch, with the project's parameter groups."""

import math
from collections import Counter
from fnmatch import fnmatchcase

import torch
from torch import nn

from conversion.tables import forward_names
from hf_vlp.models.vse.configuration_vse import VlpVseGruConfig
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
from hf_vlp.training.optim import adamw, parameter_groups
from tests.parity.harness import Case, CaseError
from tests.parity.vse_model import Checkpoint, batch_of, checkpoints, loss_of, plain

BETAS, EPS = (0.9, 0.999), 1e-8  # of torch's AdamW, which the released code leaves as they are
MOMENTUM = 0.9  # of SGD
BERT_FACTOR = 0.1
DECAY, DECAY_OF_BIGRU_REGIONS = 1e-4, 0.01
AFTER = "after."
AFTER_BOUND = 5e-5  # of each element: a tenth of one step of the recipes


def optimizer_of(training_model: VlpVseForPreTraining, checkpoint: Checkpoint) -> torch.optim.Optimizer:
    """AdamW or SGD with the rates of the released code: BERT at a tenth, the CNN at `backbone_lr_factor`.

    With AdamW everything decays; with SGD, which only the BERT branch has, the CNN alone.

    Raises:
        CaseError: another optimizer.
    """
    options, config = checkpoint.options, checkpoint.config
    name = options.get("optim", "adam")
    words, regions = isinstance(config.text_config, VlpVseGruConfig), config.vision_config is None
    if name not in (("adam",) if words else ("adam", "sgd")):
        raise CaseError(f"opt.optim is {name!r}: the recipes have adam" + ("" if words else " or sgd"))
    factors = {} if words else {r"text_model\.": BERT_FACTOR}
    if not regions:
        factors[r"vision_model\."] = options["backbone_lr_factor"]
    if name == "sgd":
        decay, spared = (0.0, ()) if regions else (DECAY, (r"^vse\.(?!vision_model\.)",))
        groups = parameter_groups(
            training_model, options["learning_rate"], decay, decay="all", no_decay=spared, lr_factors=factors
        )
        return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=not regions)
    decay = DECAY_OF_BIGRU_REGIONS if words and regions else DECAY
    groups = parameter_groups(training_model, options["learning_rate"], decay, decay="all", lr_factors=factors)
    return adamw(groups, betas=BETAS, eps=EPS)


def train_step(case: Case) -> None:
    """Losses, gradient norms and parameters of as many steps as config.json has factors for."""
    for checkpoint, label in checkpoints(case):
        training_model = checkpoint.model(train=True)
        optimizer = optimizer_of(training_model, checkpoint)
        initial = [group["lr"] for group in optimizer.param_groups]
        values = run_steps(case, checkpoint, training_model, optimizer)
        compare_groups(case, checkpoint, optimizer, initial)
        ours = dict(training_model.named_parameters())
        for name in [name for name in case.outputs if name.startswith(AFTER)]:
            values[name] = after(checkpoint, name.removeprefix(AFTER), ours)
        groups = zip(optimizer.param_groups, initial, strict=True)
        rates = {name.removeprefix("vse."): rate for group, rate in groups for name in group["names"]}
        for name in [name for name in values if name.startswith(AFTER)]:
            each = noise(case, checkpoint, name.removeprefix(AFTER), rates)
            if each and values[name].shape == case.outputs[name].shape:
                difference = (values.pop(name) - case.outputs[name]).abs().max().item()
                case.settle(name, difference <= AFTER_BOUND + each, difference, AFTER_BOUND + each)
        case.compare(values, label)
        if "params_after.json" in case.files:
            compare_parameters(case, checkpoint, ours, rates)


def run_steps(case: Case, checkpoint: Checkpoint, training_model, optimizer) -> dict[str, torch.Tensor]:
    """Trains; returns the loss of each step before its warm-up factor and the norm of all gradients before clipping."""
    form = "max_violation" if checkpoint.options["max_violation"] else "sum_of_hinges"
    factors = case.config["lr_factor_before_step"]
    alphas = case.config.get("warmup_alpha_per_step", [None] * len(factors))
    parameters, found, norms = list(training_model.parameters()), [], []
    for step, (factor, alpha) in enumerate(zip(factors, alphas, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] *= factor
        several = "rand_list_1" in case.inputs and case.inputs["rand_list_1"].ndim == 3
        loss = loss_of(training_model, batch_of(case, training_model.vse, "train", step if several else None), form)
        optimizer.zero_grad()
        (loss if alpha is None else loss * alpha).backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, checkpoint.options["grad_clip"] or math.inf))
        optimizer.step()
        found.append(loss.detach())
    return {"loss_per_step": torch.stack(found), "grad_norm_before_clip": torch.stack(norms)}


def after(checkpoint: Checkpoint, name: str, ours: dict[str, nn.Parameter]) -> torch.Tensor:
    """A parameter under the original's name; one that ours does without is the file's, as nothing trains it."""
    value = checkpoint.original(name, ours)
    return checkpoint.unused[plain(name)] if value is None else value.detach()


def noise(case: Case, checkpoint: Checkpoint, name: str, rates: dict[str, float]) -> float:
    """How far rounding may take each element of a parameter whose true gradient is zero: twice the rate a step; 0 of any other.

    AdamW turns such a gradient's rounding into whole steps. `rates`: the first rate of each of our parameters.
    """
    patterns = case.config.get("parameters_with_zero_gradient", [])
    if plain(name) in checkpoint.unused or not any(fnmatchcase(name, pattern) for pattern in patterns):
        return 0.0
    return 2 * len(case.config["lr_factor_before_step"]) * rates[forward_names(plain(name), checkpoint.table)[0]]


def compare_groups(case: Case, checkpoint: Checkpoint, optimizer, initial: list[float]) -> None:
    """config.json's `param_groups` against ours: tensors for each pair of rate and decay, and the optimizer's constants.

    Groups have `lr_initial` and `lr_now`; where they have `lr` alone, it is the rate before the first step or after the last.

    Groups that differ in nothing count together. The tensors that ours does without are counted where the original has them: with
    BERT its pooler, with the image encoder its second batch norm; the CNN's classifier is in no group.
    """
    stored = case.config.get("param_groups")
    if stored is None:
        return
    entry = "config.json: param_groups"
    case.expect({entry: stored})
    agree, notes = [], []
    now = [group["lr"] for group in optimizer.param_groups]
    for key, rates in (("lr_initial", initial), ("lr_now", now)):
        wanted, found = Counter(), Counter(unused_tensors(checkpoint, optimizer, max(rates)))
        for group in stored:
            wanted[shown_rate(group.get(key, group.get("lr"))), group["weight_decay"]] += group["n_tensors"]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            found[shown_rate(rate), group["weight_decay"]] += len(group["params"])
        agree.append(found == wanted)
        notes.append(f"{key}: {dict(found)} instead of {dict(wanted)}")
    told = any("lr_initial" in group or "lr_now" in group for group in stored)
    constants = [name for name in ("betas", "eps", "momentum", "nesterov") if name in optimizer.param_groups[0]]
    ours = [optimizer.param_groups[0][name] for name in constants]
    others = [
        group
        for group in stored
        if any(tuple_of(group.get(name, value)) != tuple_of(value) for name, value in zip(constants, ours))
    ]
    same = (all(agree) if told else any(agree)) and not others
    case.settle(entry, same, note="" if same else "; ".join([*notes, f"{constants}: {ours}, unlike {others}"]))


def unused_tensors(checkpoint: Checkpoint, optimizer, rate: float) -> list[tuple[str, float]]:
    """Rate and decay of each tensor that only the original's optimizer has; `rate`: of the heads."""
    decay = min(group["weight_decay"] for group in optimizer.param_groups)
    found = []
    for name in checkpoint.unused:
        if name.startswith("txt_enc.bert.pooler."):
            found.append((shown_rate(rate * BERT_FACTOR), decay))
        elif name in ("img_enc.mlp.bns.1.weight", "img_enc.mlp.bns.1.bias"):
            found.append((shown_rate(rate), decay))
    return found


def shown_rate(rate: float | None) -> str:
    """A rate to seven digits: a product of factors is the same in whatever order they come."""
    return "none" if rate is None else f"{rate:.6e}"


def tuple_of(value):
    """A list of JSON as the tuple that torch has; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def compare_parameters(
    case: Case, checkpoint: Checkpoint, ours: dict[str, nn.Parameter], rates: dict[str, float]
) -> None:
    """params_after.json: [L2 norm, sum] of every parameter of the original; `rates`: the first rate of each of ours.

    Within 1e-4 times (norm + 1), and `noise` for each element; what gets no gradient stays as in the file.
    """
    for name, (norm, total) in case.json("params_after.json").items():
        entry = f"params_after.json: {name}"
        case.expect({entry: [norm, total]})
        value = after(checkpoint, name, ours).double()
        differences = [abs(value.norm().item() - norm), abs(value.sum().item() - total)]
        bounds = [1e-4 * (norm + 1)] * 2
        if plain(name) in checkpoint.unused:
            bounds = [1e-6 * norm] * 2
        elif each := noise(case, checkpoint, name, rates):
            bounds = [bounds[0] + each * math.sqrt(value.numel()), bounds[1] + each * value.numel()]
        ok = all(difference <= bound for difference, bound in zip(differences, bounds))
        case.settle(entry, ok, max(differences), max(bounds))
