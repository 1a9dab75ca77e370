"""ALBEF's pre-training step, re-ranking and ranking of answers as the specification reads, on our model's modules: the base of the ratios.

Every text has the length it is padded to, every pass all layers at all positions, keys and values of an image are made for each text that
it is read with, logits over the vocabulary for every word. A step is a `Formulation`, a function for each of its parts; `CHANGES` exchanges
them one after the other for what our model does. Paper: "Align before Fuse", https://arxiv.org/abs/2107.07651.

B pairs, L words, P patches, D width, Q queue, V vocabulary, K texts of an image or answers to a question.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from hf_vlp import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining, VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.modeling_albef import VlpAlbefFusionEncoder
from hf_vlp.objectives.masked_prediction import distilled_masked_prediction_loss
from hf_vlp.objectives.matching import draw_negatives, negative_weights

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100
MATCH = 1  # row of the matching head
Pair = tuple[torch.Tensor, torch.Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# Parts of a step, each plain and as our model has it


def move_one_by_one(model: VlpAlbefForPreTraining) -> None:
    """The momentum copy goes a step towards the model, parameter by parameter."""
    students, momentum = nn.ModuleDict(model.students()), model.teacher.momentum
    for own, other in zip(model.teacher.parameters(), students.parameters(), strict=True):
        own.data = own.data * momentum + other.data * (1.0 - momentum)


def move_at_once(model: VlpAlbefForPreTraining) -> None:
    model.move_teacher()


def contrast(
    model: VlpAlbefForPreTraining, image: torch.Tensor, text: torch.Tensor, keys: Pair
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, and similarities over temperature of images to texts and of texts to images [B, B + Q].

    `image` [B, 1 + P, D], `text` [B, L, D]; `keys`: the momentum copy's unit embeddings [B, E] of images and of texts.
    """
    embeds = [
        functional.normalize(model.albef.visual_projection(image[:, 0]).float(), dim=-1),
        functional.normalize(model.albef.text_projection(text[:, 0]).float(), dim=-1),
    ]
    temperature, alpha = model.temperature.weight, model.distillation_weight
    with torch.no_grad():
        images = torch.cat([keys[0].T, model.queue.image_features.clone().T], dim=1)  # [E, B + Q]
        texts = torch.cat([keys[1].T, model.queue.text_features.clone().T], dim=1)
        soft = [(keys[0] @ texts / temperature).softmax(dim=1), (keys[1] @ images / temperature).softmax(dim=1)]
        hard = torch.zeros_like(soft[0]).fill_diagonal_(1)
        targets = [alpha * one + (1 - alpha) * hard for one in soft]
    found = embeds[0] @ texts / temperature, embeds[1] @ images / temperature
    losses = [-(one.log_softmax(dim=1) * target).sum(dim=1).mean() for one, target in zip(found, targets, strict=True)]
    return (losses[0] + losses[1]) / 2, *found


def draw_one_by_one(image_to_text: torch.Tensor, text_to_image: torch.Tensor, draws: torch.Tensor) -> Pair:
    """A false image for each text and a false text for each image, [B] each, row by row.

    `image_to_text`, `text_to_image`: [B, B] over temperature. `draws`: [B, 2], for the image and for the text.
    """
    found = []
    for similarities, column in zip((text_to_image, image_to_text), draws.unbind(1), strict=True):
        weights = similarities.detach().softmax(dim=1).fill_diagonal_(0)
        rows = []
        for row in range(len(weights)):
            cumulative = weights[row].double().cumsum(dim=0)
            rows.append(int(torch.searchsorted(cumulative, column[row].double() * cumulative[-1], right=True)))
        found.append(torch.tensor(rows, device=similarities.device))
    return tuple(found)


def draw_at_once(image_to_text: torch.Tensor, text_to_image: torch.Tensor, draws: torch.Tensor) -> Pair:
    return tuple(
        draw_negatives(negative_weights(similarities.detach()), column)[0]
        for similarities, column in zip((text_to_image, image_to_text), draws.unbind(1), strict=True)
    )


def images_as_states(fusion: VlpAlbefFusionEncoder, image: torch.Tensor) -> torch.Tensor:
    """What the passes of a step take of the images: their states [B, 1 + P, D]."""
    return image


def images_as_keys(fusion: VlpAlbefFusionEncoder, image: torch.Tensor) -> list[Pair]:
    """What the passes of a step take of the images: keys and values of every layer."""
    return fusion.keys_and_values(image)


def fuse_everywhere(
    fusion: VlpAlbefFusionEncoder,
    text: torch.Tensor,
    mask: torch.Tensor,
    images: torch.Tensor,
    index: torch.Tensor,
    rows,
) -> torch.Tensor:
    """`text` [T, L, D], `mask` [T, L], text t read with image `index[t]` of `images` [B, 1 + P, D] -> the first `rows`, or all."""
    return fusion(text, mask, fusion.keys_and_values(images[index]))[:, :rows]


def fuse_what_is_read(fusion: VlpAlbefFusionEncoder, text, mask, images: torch.Tensor, index, rows) -> torch.Tensor:
    """The same, the last layer for those rows alone."""
    return fusion(text, mask, fusion.keys_and_values(images[index]), rows)


def fuse_with_keys(fusion: VlpAlbefFusionEncoder, text, mask, images: list[Pair], index, rows) -> torch.Tensor:
    """The same, of keys and values that are there."""
    return fusion(text, mask, [(key[index], value[index]) for key, value in images], rows)


def match_in_two_passes(
    way: "Formulation", model: VlpAlbefForPreTraining, text, mask, images, false: Pair
) -> torch.Tensor:
    """True pairs in one pass; each text with a false image and each image with a false text in another."""
    fusion, own = model.albef.fusion_model, torch.arange(len(text), device=text.device)
    true = way.fuse(fusion, text, mask, images, own, 1)
    others = torch.cat([text, text[false[1]]]), torch.cat([mask, mask[false[1]]])
    wrong = way.fuse(fusion, *others, images, torch.cat([false[0], own]), 1)
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    return functional.cross_entropy(model.itm_head(torch.cat([true, wrong])[:, 0]).float(), labels)


def match_in_one_pass(
    way: "Formulation", model: VlpAlbefForPreTraining, text, mask, images, false: Pair
) -> torch.Tensor:
    own = torch.arange(len(text), device=text.device)
    texts, pictures = torch.cat([own, own, false[1]]), torch.cat([own, false[0], own])
    states = way.fuse(model.albef.fusion_model, text[texts], mask[texts], images, pictures, 1)
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    return functional.cross_entropy(model.itm_head(states[:, 0]).float(), labels)


def predict_everywhere(model: VlpAlbefForPreTraining, states, labels, teacher_states) -> torch.Tensor:
    """Masked words: `states`, `teacher_states` [B, L, D], `labels` [B, L]; logits [B, L, V] by the model and by its momentum copy."""
    logits = model.mlm_head(states)
    with torch.no_grad():
        soft = model.teacher.mlm_head(teacher_states).softmax(dim=-1)
    hard = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
    distilled = -(logits.log_softmax(dim=-1) * soft).sum(dim=-1)[labels != IGNORED].mean()
    return (1 - model.distillation_weight) * hard + model.distillation_weight * distilled


def predict_masked(model: VlpAlbefForPreTraining, states, labels, teacher_states) -> torch.Tensor:
    heads = model.mlm_head, teacher_states, model.teacher.mlm_head
    return distilled_masked_prediction_loss(states, labels, *heads, model.distillation_weight)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The step


@dataclass(frozen=True)
class Formulation:
    """How the parts of a step are computed; the defaults are the plain ones."""

    move: Callable = move_one_by_one
    draw: Callable = draw_one_by_one
    predict: Callable = predict_everywhere
    match: Callable = match_in_two_passes
    fuse: Callable = fuse_everywhere
    images: Callable = images_as_states


PLAIN = Formulation()
CHANGES = {  # what our model does otherwise, to be made one on top of the other
    "copy moved at once": {"move": move_at_once},
    "false pairs drawn at once": {"draw": draw_at_once},
    "logits at masked words": {"predict": predict_masked},
    "pairs in one pass": {"match": match_in_one_pass},
    "last layer where read": {"fuse": fuse_what_is_read},
    "image keys once": {"images": images_as_keys, "fuse": fuse_with_keys},
}


def formulations() -> dict[str, Formulation]:
    """The formulation after each of `CHANGES`, each with those before."""
    found, way = {}, PLAIN
    for name, change in CHANGES.items():
        found[name] = way = replace(way, **change)
    return found


def pretraining_loss(
    model: VlpAlbefForPreTraining, batch: dict[str, torch.Tensor], draws: torch.Tensor, way: Formulation = PLAIN
) -> torch.Tensor:
    """Contrast, matching and masked words; in training the momentum copy and the queue move.

    `batch`: of the model's forward, without identities of images. `draws` [B, 2] in [0, 1), of the false pairs.
    """
    albef, teacher, queue, mask = model.albef, model.teacher.albef, model.queue, batch["attention_mask"]
    if model.training:
        model.temperature.weight.data.clamp_(*model.temperature.limits)
    image = albef.vision_model(batch["pixel_values"]).last_hidden_state
    text = albef.text_model(batch["input_ids"], mask).last_hidden_state
    with torch.no_grad():
        if model.training:
            way.move(model)
        teacher_image = teacher.vision_model(batch["pixel_values"]).last_hidden_state
        teacher_text = teacher.text_model(batch["input_ids"], mask).last_hidden_state
        keys = (
            functional.normalize(teacher.visual_projection(teacher_image[:, 0]).float(), dim=-1),
            functional.normalize(teacher.text_projection(teacher_text[:, 0]).float(), dim=-1),
        )
    loss, *similar = contrast(model, image, text, keys)
    if model.training:
        enqueue(queue, keys)

    images, own = way.images(albef.fusion_model, image), torch.arange(len(text), device=text.device)
    false = way.draw(*(one[:, : len(text)] for one in similar), draws)
    loss = loss + way.match(way, model, text, mask, images, false)

    masked = albef.text_model(batch["mlm_input_ids"], mask).last_hidden_state
    states = way.fuse(albef.fusion_model, masked, mask, images, own, None)
    with torch.no_grad():
        masked = teacher.text_model(batch["mlm_input_ids"], mask).last_hidden_state
        teacher_images = way.images(teacher.fusion_model, teacher_image)
        teacher_states = way.fuse(teacher.fusion_model, masked, mask, teacher_images, own, None)
    return loss + way.predict(model, states, batch["mlm_labels"], teacher_states)


def enqueue(queue: nn.Module, keys: Pair) -> None:
    """Over the oldest rows, B of which must divide Q."""
    start, count = int(queue.position), len(keys[0])
    queue.image_features[start : start + count] = keys[0]
    queue.text_features[start : start + count] = keys[1]
    queue.position.fill_((start + count) % len(queue.image_features))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def rerank(
    model: VlpAlbefForImageTextRetrieval, text: torch.Tensor, mask: torch.Tensor, image: torch.Tensor
) -> torch.Tensor:
    """Matching logits [K] of encoded texts [K, L, D] with one encoded image [1, 1 + P, D], which is repeated K times."""
    fusion, repeated = model.albef.fusion_model, image.repeat(len(text), 1, 1)
    return model.itm_head(fusion(text, mask, fusion.keys_and_values(repeated))[:, 0])[:, MATCH]


def rank_answers(
    model: VlpAlbefForVisualQuestionAnswering, states: torch.Tensor, mask: torch.Tensor, answers: Pair, k: int
) -> Pair:
    """The k answers of a list most probable after questions, and their scores, [B, k] each, the best first.

    `states`, `mask`: [B, L, D] and [B, L], of questions read with their images. `answers`: ids and mask [K, La].
    """
    decoder, (ids, real) = model.answer_decoder, answers
    start = decoder.head(decoder(ids[:1, :1].expand(len(states), 1), states, mask))[:, 0].float()
    first, chosen = start.softmax(dim=-1)[:, ids[:, 1]].topk(k, dim=1)
    words = torch.cat([ids[row] for row in chosen])  # [B * k, La]
    targets = torch.cat([ids.masked_fill(~real.bool(), IGNORED)[row] for row in chosen])[:, 1:]
    states, mask = states.repeat_interleave(k, dim=0), mask.repeat_interleave(k, dim=0)
    logits = decoder.head(decoder(words, states, mask))[:, :-1]  # [B * k, La - 1, V]
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    scores = first.log() - losses.view(len(first), k, -1).sum(dim=-1)
    scores, order = scores.topk(k, dim=1)
    return chosen.gather(1, order), scores


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def transform(picture: Image.Image, size: int) -> torch.Tensor:
    """The whole RGB picture as a square of `size` pixels, normalised, [3, size, size]."""
    square = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
