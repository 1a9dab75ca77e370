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
BERT_FACTOR = 0.1
DECAY, DECAY_OF_BIGRU_REGIONS = 1e-4, 0.01
AFTER = "after."


def optimizer_of(training_model: VlpVseForPreTraining, checkpoint: Checkpoint) -> torch.optim.AdamW:
    """AdamW with the rates of the released code: BERT at a tenth, the CNN at `backbone_lr_factor`; everything decays.

    Raises:
        CaseError: another optimizer.
    """
    options, config = checkpoint.options, checkpoint.config
    if options.get("optim", "adam") != "adam":
        raise CaseError(f"opt.optim is {options['optim']!r}: the recipes have adam")
    words, regions = isinstance(config.text_config, VlpVseGruConfig), config.vision_config is None
    factors = {} if words else {r"text_model\.": BERT_FACTOR}
    if not regions:
        factors[r"vision_model\."] = options["backbone_lr_factor"]
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
        case.compare(values, label)
        if "params_after.json" in case.files:
            groups = zip(optimizer.param_groups, initial, strict=True)
            rates = {name.removeprefix("vse."): rate for group, rate in groups for name in group["names"]}
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


def compare_groups(case: Case, checkpoint: Checkpoint, optimizer, initial: list[float]) -> None:
    """config.json's `param_groups` against ours: tensors for each pair of rate and decay, betas and eps.

    Groups that differ in nothing count together. The tensors that ours does without are counted where the original has them: with
    BERT its pooler, with the image encoder its second batch norm; the CNN's classifier is in no group.
    """
    stored = case.config.get("param_groups")
    if stored is None:
        return
    entry = "config.json: param_groups"
    case.expect({entry: stored})
    wanted, found = Counter(), Counter()
    for group in stored:
        rate = group.get("lr_initial", group.get("lr"))
        wanted[round(rate, 12), group["weight_decay"]] += group["n_tensors"]
    for group, rate in zip(optimizer.param_groups, initial, strict=True):
        found[round(rate, 12), group["weight_decay"]] += len(group["params"])
    decay = optimizer.param_groups[0]["weight_decay"]
    for name in checkpoint.unused:
        if name.startswith("txt_enc.bert.pooler."):
            found[round(max(initial) * BERT_FACTOR, 12), decay] += 1
        elif name in ("img_enc.mlp.bns.1.weight", "img_enc.mlp.bns.1.bias"):
            found[round(max(initial), 12), decay] += 1
    rates = {round(group["lr"], 15) for group in optimizer.param_groups}
    now = {round(group.get("lr_now", group.get("lr")), 15) for group in stored}
    moments = {(tuple(group["betas"]), group["eps"]) for group in [*stored, *optimizer.param_groups]}
    same = found == wanted and rates == now and len(moments) == 1
    case.settle(entry, same, note="" if same else f"{dict(found)}, {rates}, {moments} instead of {dict(wanted)}, {now}")


def compare_parameters(
    case: Case, checkpoint: Checkpoint, ours: dict[str, nn.Parameter], rates: dict[str, float]
) -> None:
    """params_after.json: [L2 norm, sum] of every parameter of the original; `rates`: the first rate of each of ours.

    Within 1e-4 times (norm + 1); where the true gradient is zero AdamW turns rounding into whole steps, and each element may be off by
    twice the rate a step; what gets no gradient stays as in the file.
    """
    noisy = case.config.get("parameters_with_zero_gradient", [])
    steps = len(case.config["lr_factor_before_step"])
    for name, (norm, total) in case.json("params_after.json").items():
        entry = f"params_after.json: {name}"
        case.expect({entry: [norm, total]})
        value = after(checkpoint, name, ours).double()
        differences = [abs(value.norm().item() - norm), abs(value.sum().item() - total)]
        bounds = [1e-4 * (norm + 1)] * 2
        if plain(name) in checkpoint.unused:
            bounds = [1e-6 * norm] * 2
        elif any(fnmatchcase(name, pattern) for pattern in noisy):
            each = 2 * steps * rates[forward_names(plain(name), checkpoint.table)[0]]
            bounds = [bounds[0] + each * math.sqrt(value.numel()), bounds[1] + each * value.numel()]
        ok = all(difference <= bound for difference, bound in zip(differences, bounds))
        case.settle(entry, ok, max(differences), max(bounds))
