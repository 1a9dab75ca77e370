"""Cases of ViLT's word-patch alignment: states in, costs, plans, distances and gradients out."""

import re

import torch

from hf_vlp.objectives.word_patch_alignment import alignment_loss, cosine_cost, transport_distance, transport_plan
from tests.parity.harness import Case, CaseError

OTHER_DISTANCE = re.compile(r"distance_beta(\d+)_it(\d+)")  # "beta01": 0.1
VISUALISATION = {"beta": 0.1, "iterations": 1000}
STORED_NAMES = {"txt": "grad_txt", "img": "grad_img"}


def wpa_ipot(case: Case) -> None:
    """`txt` [B, L, D], `img` [B, P, D] and their unused places `txt_pad`, `img_pad` with beta and iterations of the configuration.

    Raises:
        CaseError: more than one inner step, which the original cannot run either.
    """
    if case.config.get("k", 1) != 1:
        raise CaseError(f"k={case.config['k']}: only one inner step exists")
    settings = {"beta": case.config.get("beta", 0.5), "iterations": case.config.get("iteration", 50)}
    weight = case.config.get("weight", 0.1)
    states = {name: case.inputs[name].clone().requires_grad_() for name in STORED_NAMES}
    used = [case.inputs[f"{name}_pad"].eq(0) for name in STORED_NAMES]

    cost = cosine_cost(*states.values())
    plan = transport_plan(cost.detach(), *used, **settings)
    distance = transport_distance(cost, plan)
    masked = cost.detach() * used[0].unsqueeze(2) * used[1].unsqueeze(1)
    trace = (masked @ plan.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(dim=1)
    shown = transport_plan(cost.detach(), *used, **VISUALISATION)
    # the original keeps plans as [B, image, text]
    values = {"cost_unmasked": cost, "plan": plan.transpose(1, 2), "plan_visualisation": shown.transpose(1, 2)}
    values |= {"distance": distance, "trace": trace}
    for found in filter(None, map(OTHER_DISTANCE.fullmatch, case.outputs)):
        beta = int(found[1]) / 10 ** (len(found[1]) - 1)
        other = transport_plan(cost.detach(), *used, beta=beta, iterations=int(found[2]))
        values[found[0]] = transport_distance(cost, other)
    if "itm_labels" in case.inputs:
        loss = alignment_loss(distance, case.inputs["itm_labels"])
        gradients = torch.autograd.grad(weight * loss, states.values())
        values |= {"ot_loss": loss, "wpa_loss": weight * loss, **dict(zip(STORED_NAMES.values(), gradients))}
    case.compare(values)
