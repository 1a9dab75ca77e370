"""Which patches a word goes to: the transport plan between words and patches as maps over the picture.

ViLT (https://arxiv.org/abs/2102.03334), figure 4; scaled for display as in the released demo. For models that were trained
with word-patch alignment: the states of others have no reason to lie where their patches are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from hf_vlp.explain.words import WordMap, evaluating, real_ids, word_tokens
from hf_vlp.objectives.word_patch_alignment import cosine_cost, patches_to_align, transport_plan, words_to_align

NEEDED = ("text_hidden_states", "image_hidden_states", "image_mask", "patch_index", "patch_grid")


@torch.no_grad()
def word_maps(
    model: nn.Module,
    processor: Any,
    picture: Image.Image,
    text: str,
    *,
    solver: str = "ipot",
    beta: float = 0.1,
    iterations: int = 1000,
) -> list[WordMap]:
    """The map of every word of a text over one picture, in the order of the text; a word's pieces are one map.

    What counts as a word is the tokenizer's matter: for BERT's, punctuation is one too.

    Args:
        model: reads words and image together, and returns what `FusionOutput` of `hf_vlp.outputs` holds; of a model with a head, the
            model below it does.
        processor: makes the batch of the model, and has a fast `tokenizer`.
        solver, beta, iterations: see `hf_vlp.objectives.word_patch_alignment.transport_plan`.

    Raises:
        ValueError: a text without words; a model that returns no states of words and patches; a processor that makes other tokens of the
            text than its tokenizer alone does.
    """
    model = getattr(model, "base_model", model)
    batch = processor(images=picture, text=text, return_tensors="pt")
    words = word_tokens(processor.tokenizer, text, real_ids(batch))
    device = next(model.parameters()).device
    with evaluating(model):
        outputs = model(**{name: value.to(device) for name, value in batch.items()})
    plan = patch_masses(outputs, batch["attention_mask"].to(device), solver=solver, beta=beta, iterations=iterations)
    masses, real = plan[0].cpu(), real_patches(outputs)[0].cpu()
    masses = masses[:, real.any(dim=1)][:, :, real.any(dim=0)]  # the picture without its canvas, [L, h, w]

    maps = []
    for word, places in words:
        mass = masses[places].sum(dim=0)
        maps.append(WordMap(word, mass, heat_map(mass)))
    return maps


def patch_masses(
    outputs: Mapping[str, Any],
    attention_mask: torch.Tensor,
    *,
    solver: str = "ipot",
    beta: float = 0.1,
    iterations: int = 1000,
) -> torch.Tensor:
    """How much of each token goes to each patch of the canvas, [B, L, h, w]; 0 at special tokens and at padding.

    Args:
        outputs: `text_hidden_states` [B, L, D], `image_hidden_states` [B, 1 + P, D], `image_mask` [B, 1 + P], `patch_index` [B, P] and
            `patch_grid` (h, w), see `FusionOutput` of `hf_vlp.outputs`. attention_mask: [B, L].

    Raises:
        ValueError: one of them is missing.
    """
    missing = [name for name in NEEDED if outputs.get(name) is None]
    if missing:
        raise ValueError(
            f"the model returned no {', '.join(missing)}: a transport plan needs a model that reads words and image together, and the "
            "image as pixels"
        )
    cost = cosine_cost(outputs["text_hidden_states"], outputs["image_hidden_states"])
    used = words_to_align(attention_mask), patches_to_align(outputs["image_mask"])
    plan = transport_plan(cost.detach(), *used, solver=solver, beta=beta, iterations=iterations)[:, :, 1:]  # [B, L, P]
    index = outputs["patch_index"].unsqueeze(1).expand_as(plan)
    height, width = outputs["patch_grid"]
    return plan.new_zeros(*plan.shape[:2], height * width).scatter_add_(2, index, plan).unflatten(2, (height, width))


def real_patches(outputs: Mapping[str, Any]) -> torch.Tensor:
    """Which patches of the canvas the model saw of each picture, [B, h, w] bool."""
    height, width = outputs["patch_grid"]
    mask, index = outputs["image_mask"][:, 1:], outputs["patch_index"]
    return mask.new_zeros(len(mask), height * width).scatter_add_(1, index, mask).bool().unflatten(1, (height, width))


def heat_map(mass: torch.Tensor) -> torch.Tensor:
    """`mass` [h, w] for display: standardised, cut to 1..3 deviations above the mean, scaled to 0..1. Even masses are 0 everywhere."""
    mass = mass.double()
    deviation = mass.std(correction=0)
    if deviation <= 1e-9 * mass.abs().max():  # no more than the noise of the sums
        return torch.zeros(mass.shape)
    height = ((mass - mass.mean()) / deviation).clamp(1, 3)
    height = height - height.min()
    return (height / height.max().clamp(min=torch.finfo(height.dtype).tiny)).float()
