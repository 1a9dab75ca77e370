"""Cases of ALBEF's downstream tasks: states, logits, losses, gradients and what a training step leaves.

States at padding are not compared, see `tests/parity/albef_model.py`.
"""

from collections.abc import Mapping

import torch
from torch import nn

from hf_vlp.models.albef.tasks_albef import ASSIGNMENT_TEMPERATURE, VlpAlbefOfTwoImages, joint_with_two
from hf_vlp.objectives.matching import negative_weights
from tests.parity.albef_model import Checkpoint, checkpoints, gradients, left_behind
from tests.parity.harness import Case


def compare_training(case: Case, checkpoint: Checkpoint, model: nn.Module, loss: torch.Tensor, label: str) -> None:
    """The loss of a training forward, its gradients, and the momentum copy behind it."""
    losses = {"loss": loss}
    case.compare({"loss": loss.detach()}, label)
    case.compare(left_behind(checkpoint, model, case.outputs), label)
    for section in case.gradients:
        case.compare_gradients(section, gradients(checkpoint, model, losses[section]), label)


# ---------------------------------------------------------------------------------------------------------------------
# Visual entailment


def entailment(case: Case) -> None:
    """A forward in evaluation, then one in training, in which the momentum copy moves first."""
    inputs = case.inputs
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    batch = words | {"pixel_values": inputs["image"]}
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        with torch.no_grad():
            logits = model(**batch).logits
        correct = logits.argmax(dim=1).eq(inputs["targets"]).float().mean()
        case.compare({"prediction_eval": logits, "accuracy_eval": correct}, label)
        model.train()
        output = model(**batch, labels=inputs["targets"])
        with torch.no_grad():
            values = {"prediction": output.logits}
            for ending, parts in parts_of(model).items():
                states = parts.albef(**batch).last_hidden_state
                case.compare({f"multimodal_last_hidden{ending}": states}, label, inputs["attention_mask"])
                values[f"prediction{ending}"] = parts.classifier(states[:, 0])
        case.compare(values, label)
        compare_training(case, checkpoint, model, output.loss, label)


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """What holds the parts of a task: the model, and its momentum copy if it has one; by the endings of the stored names."""
    return {"": model, "_m": model.teacher} if hasattr(model, "teacher") else {"": model}


# ---------------------------------------------------------------------------------------------------------------------
# Two images


def states_of_two(
    model: VlpAlbefOfTwoImages,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    images: torch.Tensor,
    others: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """What every layer makes of texts [B, L] read with two images each, [B, L, D], those of the text encoder first.

    Args:
        images, others: [B, 3, H, W], the first image of each text and the second.
        index: [B] each, which images of `images` and `others`, one behind the other; None: those of the same row.
    """
    found: list[torch.Tensor] = []
    layers = [*model.albef.text_model.encoder.layers]
    for pair in zip(model.albef.fusion_model.layers, model.second_layers, strict=True):
        layers += pair
    masks: list[torch.Tensor | None] = []

    def whole(layer, given):
        """The last layer, which makes the first row only, makes all."""
        return (given[0], masks[-1], given[2])

    handles = [layer.register_forward_hook(lambda module, given, output: found.append(output)) for layer in layers]
    handles.append(layers[-2].register_forward_pre_hook(lambda module, given: masks.append(given[1])))
    handles.append(layers[-1].register_forward_pre_hook(whole))
    count = len(input_ids)
    first, second = index or (torch.arange(count), torch.arange(count) + len(images))
    try:
        embeds = model.encode_image(torch.cat([images, others]))["image_embeds"]
        joint_with_two(model, input_ids, attention_mask, embeds, first, second)
    finally:
        for handle in handles:
            handle.remove()
    return found


def reasoning(case: Case) -> None:
    """A forward in evaluation, then one in training, in which the momentum copy moves first; and every layer of the pair's reading."""
    inputs = case.inputs
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    batch = words | {"pixel_values": torch.stack([inputs["image0"], inputs["image1"]], dim=1)}
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        with torch.no_grad():
            case.compare({"prediction_eval": model(**batch).logits}, label)
            states = states_of_two(model, *words.values(), inputs["image0"], inputs["image1"])
        layers = {f"text_layer_{number}": layer for number, layer in enumerate(states)}
        case.compare(layers | {"last_hidden": states[-1]}, label, inputs["attention_mask"])
        model.train()
        output = model(**batch, labels=inputs["targets"])
        case.compare({"prediction": output.logits}, label)
        if hasattr(model, "teacher"):
            case.compare({"prediction_m": taught_logits(model, batch)}, label)
        compare_training(case, checkpoint, model, output.loss, label)


@torch.no_grad()
def taught_logits(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits [B, 2] of the momentum copy as it stands."""
    images = model.teacher.albef.encode_image(batch["pixel_values"].flatten(0, 1))["image_embeds"]
    first = 2 * torch.arange(len(batch["input_ids"]))
    words = batch["input_ids"], batch["attention_mask"]
    return model.teacher.classifier(joint_with_two(model.teacher, *words, images, first, first + 1))


def text_assignment(case: Case) -> None:
    """A training forward with given pairs, and by which weights others would be drawn."""
    inputs = case.inputs
    words = inputs["input_ids"], inputs["attention_mask"]
    pairs = {"first_image_index": inputs["first_image_idx"], "second_image_index": inputs["second_image_idx"]}
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config).train()
        with torch.no_grad():
            images = model.encode_image(inputs["image"])["image_embeds"]
            embeds = model.albef.project_image(images)
            nothing = inputs["image"][:0]
            *_, last = states_of_two(model, *words, inputs["image"], nothing, tuple(pairs.values()))
            values = {
                "image_embeds": images,
                "sampling_weights": negative_weights(embeds @ embeds.T / ASSIGNMENT_TEMPERATURE),
                "ta_logits": model.assignment_head(last[:, 0]),
            }
        case.compare(values, label)
        case.compare({"last_hidden": last}, label, inputs["attention_mask"])
        output = model(*words, pixel_values=inputs["image"], **pairs, labels=inputs["label"])
        compare_training(case, checkpoint, model, output.loss, label)


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def answering(case: Case) -> None:
    """A training forward on questions with several answers each; every answer's loss is that with all other weights 0."""
    inputs = case.inputs
    question = {"input_ids": inputs["question_input_ids"], "attention_mask": inputs["question_attention_mask"]}
    question["pixel_values"] = inputs["image"]
    rows = torch.arange(len(inputs["n_answers"])).repeat_interleave(inputs["n_answers"])
    ids, mask = inputs["answer_input_ids"], inputs["answer_attention_mask"]
    answers = {"answer_ids": ids, "answer_mask": mask, "answer_rows": rows}
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config).train()
        output = model(**question, **answers, answer_weights=inputs["weights"])
        with torch.no_grad():
            for ending, parts in parts_of(model).items():
                read = parts.albef(**question)
                case.compare({f"question_states{ending}": read.last_hidden_state}, label, question["attention_mask"])
                case.compare({f"image_embeds{ending}": read.image_hidden_states}, label)
                written = parts.answer_decoder(ids, read.last_hidden_state, question["attention_mask"], rows)
                case.compare({f"decoder_logits{ending}": parts.answer_decoder.head(written)}, label, mask)
            model.eval()  # the momentum copy stays where it is
            alone = [model(**question, **answers, answer_weights=weights).loss for weights in torch.eye(len(ids))]
        case.compare({"per_answer_loss": len(inputs["n_answers"]) * torch.stack(alone)}, label)
        compare_training(case, checkpoint, model, output.loss, label)


def ranking(case: Case) -> None:
    """Questions answered from a list: what is probable after the start token, the k answers compared, and in which order they come.

    Those of the k with the same first word may be stored in any order; ours are compared in theirs.
    """
    inputs, k = case.inputs, case.config["options"]["k_test"]
    question = {"input_ids": inputs["question_input_ids"], "attention_mask": inputs["question_attention_mask"]}
    question["pixel_values"] = inputs["image"]
    mask, ids, real = question["attention_mask"], inputs["answer_input_ids"], inputs["answer_attention_mask"]
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        with torch.no_grad():
            states = model.albef(**question).last_hidden_state
            case.compare({"question_states": states}, label, mask)
            decoder = model.answer_decoder
            start = decoder.head(decoder(ids[:1, :1].expand(len(states), 1), states, mask)[:, 0])
            first = start.log_softmax(dim=1)[:, ids[:, 1]]  # [B, K]
            case.compare({"start_logits": start, "first_token_probs": first.exp()}, label)
            chosen, scores = model.rank_answers(states, mask, ids, real, k)
            wanted = case.outputs.get("candidate_ids_by_first_token")
            if wanted is None:
                wanted = first.topk(chosen.shape[1], dim=1).indices
            by_first = first.gather(1, wanted)
            if "candidate_ids_by_first_token" in case.outputs:
                same = torch.equal(wanted.sort(dim=1).values, chosen.sort(dim=1).values)
                falling = bool((by_first.diff(dim=1) <= 1e-4).all())
                note = f"{label}the most probable first words"
                case.settle("candidate_ids_by_first_token", same and falling, note=note)
            written = decoder(ids[wanted].flatten(0, 1), states, mask)
            case.compare({"candidate_logits": decoder.head(written)}, label, real[wanted].flatten(0, 1))
        of_answer = torch.full_like(first, torch.nan).scatter(1, chosen, scores).gather(1, wanted)
        counted = 2 if model.config.count_first_token_twice else 1
        values = {
            "candidate_sequence_loss": (counted - 1) * by_first - of_answer,
            "topk_ids": chosen,
            "topk_probs": scores.softmax(dim=1),
            "predicted_answer_index": chosen[:, 0],
        }
        case.compare(values, label)
