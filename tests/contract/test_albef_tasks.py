"""ALBEF's tasks against the paper's formulas written out literally, on models of a few thousand random weights."""

import warnings

import pytest
import torch
from torch.nn.functional import log_softmax

from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForPreTraining
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForMaskedLM,
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
)

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
START, END = 2, 3


def config(**fields) -> VlpAlbefConfig:
    text = SIZES | NO_DROPOUT | {"vocab_size": 40, "hidden_size": 16, "max_position_embeddings": 12}
    return VlpAlbefConfig(
        vision_config=SIZES | {"hidden_size": 16, "image_size": 16, "patch_size": 8},
        text_config=text,
        multimodal_config=SIZES | NO_DROPOUT | {"hidden_size": 16},
        projection_dim=8,
        queue_size=6,
        initializer_range=0.3,
        **{"answer_layers": 2, "answer_length": 6, "answer_candidates": 4, "num_labels": 7} | fields,
    )


def build(model_class: type, **fields):
    torch.manual_seed(0)
    model = model_class(config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def batch(rows: int = 3, images: tuple[int, ...] = ()) -> dict:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6)[None] < torch.tensor([6, 3, 4, 5])[:rows, None]).long()
    return {
        "input_ids": torch.randint(4, 40, (rows, 6), generator=generator) * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(rows, *images, 3, 16, 16, generator=generator),
    }


def answers(lengths: list[int], seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Start token, words, end token, padding; half of them share the first word."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = START
    ids[::2, 1] = ids[0, 1]
    for row, length in enumerate(lengths):
        ids[row, length - 1] = END
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


# Soft labels of the classifiers


@pytest.mark.parametrize(
    ("model_class", "images"), [(VlpAlbefForVisualEntailment, ()), (VlpAlbefForVisualReasoning, (2,))]
)
def test_a_classifier_learns_from_labels_and_from_its_momentum_copy(model_class, images):
    model, inputs = build(model_class, num_labels=3, momentum=0.5), batch(images=images)
    labels = torch.tensor([0, 1, 1])
    fresh = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = "classifier.fc1.bias"
    assert not torch.equal(fresh[copied], own[copied])  # `build` changed the biases after the copy was made
    model.train()
    output = model(**inputs, labels=labels)
    assert torch.allclose(model.teacher.state_dict()[copied], (fresh[copied] + own[copied]) / 2)
    student = build(model_class, num_labels=3, momentum=0.5)
    student.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "teacher" not in name}, False
    )
    student.load_state_dict({name: tensor for name, tensor in model.teacher.state_dict().items()}, False)
    soft = student(**inputs).logits.softmax(-1)
    predicted = log_softmax(output.logits, -1)
    hard = -predicted[torch.arange(3), labels].mean()
    expected = 0.6 * hard - 0.4 * (soft * predicted).sum(-1).mean()
    assert torch.allclose(output.loss, expected, atol=1e-5)
    assert not torch.allclose(output.loss, hard, atol=1e-3)
    model.ramps()["distillation_weight"](0.0)
    assert torch.allclose(model(**inputs, labels=labels).loss, hard, atol=1e-5)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "teacher" not in name)
    plain = build(model_class, num_labels=3, momentum_teacher=False)
    assert not hasattr(plain, "teacher") and not plain.ramps()
    plain.load_state_dict(own, strict=False)
    assert torch.allclose(plain.train()(**inputs, labels=labels).loss, hard, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_class", "images"),
    [(VlpAlbefForVisualEntailment, ()), (VlpAlbefForVisualReasoning, (2,)), (VlpAlbefForMaskedLM, ())],
)
def test_padding_and_the_rows_beside_never_change_a_result(model_class, images):
    model, inputs = build(model_class), batch(images=images)
    whole = model(**inputs).logits
    noisy = inputs | {"input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 9)}
    changed = model(**noisy).logits
    for row, length in enumerate((6, 3, 4)):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}
        alone = model(**one).logits[0]
        seen = (row, slice(0, length)) if whole.ndim == 3 else (row,)
        assert torch.allclose(alone, whole[seen], atol=1e-5)
        assert torch.allclose(changed[seen], whole[seen], atol=1e-5)
    unmasked = model(**inputs | {"attention_mask": None}).logits
    assert not torch.allclose(unmasked[1, :3], whole[1, :3], atol=1e-3)


# Two images


def second_stack(model) -> dict:
    return dict(model.second_layers.state_dict())


def test_the_second_stack_begins_as_the_first_where_a_checkpoint_lacks_it(tmp_path):
    pretrained = build(VlpAlbefForPreTraining)
    pretrained.save_pretrained(tmp_path / "pretrained")
    model = VlpAlbefForVisualReasoning.from_pretrained(tmp_path / "pretrained")
    firsts = pretrained.albef.fusion_model.layers.state_dict()
    shared = {name for name in firsts if "cross_attention.k_proj" in name or "cross_attention.v_proj" in name}
    assert second_stack(model).keys() == firsts.keys() - shared and shared
    assert all(torch.equal(tensor, firsts[name]) for name, tensor in second_stack(model).items())
    taught = pretrained.teacher.albef.fusion_model.layers.state_dict()  # the copy's second stack begins as its own first
    assert all(torch.equal(tensor, taught[name]) for name, tensor in second_stack(model.teacher).items())
    assert not all(torch.equal(tensor, firsts[name]) for name, tensor in second_stack(model.teacher).items())
    apart = VlpAlbefForVisualReasoning.from_pretrained(tmp_path / "pretrained", shared_image_keys=False)
    assert all(torch.equal(tensor, firsts[name]) for name, tensor in second_stack(apart).items())
    assert second_stack(apart).keys() == firsts.keys()
    with torch.no_grad():
        for parameter in model.second_layers.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path / "tuned")
    again = VlpAlbefForVisualReasoning.from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(tensor, second_stack(model)[name]) for name, tensor in second_stack(again).items())


@torch.no_grad()
def test_two_images_are_read_in_turns_by_the_layers_written_out():
    model, inputs = build(VlpAlbefForVisualReasoning), batch(images=(2,))
    apart = build(VlpAlbefForVisualReasoning, shared_image_keys=False)
    apart.load_state_dict(model.state_dict(), strict=False)
    for layer, other in zip(apart.second_layers, model.albef.fusion_model.layers, strict=True):
        layer.cross_attention.k_proj.load_state_dict(other.cross_attention.k_proj.state_dict())
        layer.cross_attention.v_proj.load_state_dict(other.cross_attention.v_proj.state_dict())
    logits = model(**inputs).logits
    assert torch.allclose(apart(**inputs).logits, logits, atol=1e-5)
    for row, length in enumerate((6, 3, 4)):  # one text at a time, without masks
        first, second = (
            model.albef.vision_model(inputs["pixel_values"][row : row + 1, image]).last_hidden_state for image in (0, 1)
        )
        states = model.albef.text_model(inputs["input_ids"][row : row + 1, :length]).last_hidden_state
        for i in range(2):
            layer, other = model.albef.fusion_model.layers[i], model.second_layers[i]
            states = layer(states, None, layer.cross_attention.keys_and_values(first))
            states = other(states, None, layer.cross_attention.keys_and_values(second))
        hidden = model.classifier.fc1(states[:, 0]).clamp(min=0)
        assert torch.allclose(model.classifier.fc2(hidden)[0], logits[row], atol=1e-5)
    swapped = model(**inputs | {"pixel_values": inputs["pixel_values"].flip(1)}).logits
    assert not torch.allclose(swapped, logits, atol=1e-3)
    apart.second_layers[0].cross_attention.k_proj.weight.normal_()
    assert not torch.allclose(apart(**inputs).logits, logits, atol=1e-4)


def test_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match=r"\[B, 2, 3, H, W\]"):
        build(VlpAlbefForVisualReasoning)(**batch(images=(3,)))
    with pytest.raises(ValueError, match="input_ids and pixel_values"):
        build(VlpAlbefForVisualEntailment)(**batch() | {"pixel_values": None})


# Masked words


def test_masked_words_are_predicted_as_in_pre_training(tmp_path):
    pretrained, inputs = build(VlpAlbefForPreTraining), batch()
    pretrained.save_pretrained(tmp_path)
    model = VlpAlbefForMaskedLM.from_pretrained(tmp_path)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 2], labels[2, 1] = 7, 9
    states = pretrained.albef(**inputs).last_hidden_state
    logits = pretrained.mlm_head(states)
    expected = -(log_softmax(logits[0, 2], -1)[7] + log_softmax(logits[2, 1], -1)[9]) / 2
    output = model(**inputs, labels=labels)
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(output.logits[seen], logits[seen], atol=1e-5)
    trained = model.train()(**inputs, labels=labels)
    assert trained.logits is None
    assert torch.allclose(output.loss, expected, atol=1e-5) and torch.allclose(trained.loss, expected, atol=1e-5)
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight
    assert model(**inputs, labels=torch.full_like(labels, -100)).loss == 0


# Answers


def test_reading_answers_warns_of_nothing():
    model, inputs = build(VlpAlbefForVisualQuestionAnswering), batch(rows=1)
    ids, mask = answers([3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.answer_decoder(ids, read(model, inputs), inputs["attention_mask"])


def read(model, inputs: dict) -> torch.Tensor:
    return model.albef(**inputs).last_hidden_state


def word_losses(model, states: torch.Tensor, ids: torch.Tensor, soft=None) -> torch.Tensor:
    """Cross-entropy of every word of one answer [L] without padding, by one causal pass over all of it."""
    decoded = model.answer_decoder(ids[None], states, None)
    logits = model.answer_decoder.head(decoded)[0, :-1]
    hard = -log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
    if soft is None:
        return hard
    taught = soft.answer_decoder.head(soft.answer_decoder(ids[None], soft.states, None))[0, :-1].softmax(-1)
    return 0.6 * hard - 0.4 * (taught * log_softmax(logits, -1)).sum(-1)


def test_the_loss_of_answers_is_that_of_a_loop_over_them():
    model, inputs = build(VlpAlbefForVisualQuestionAnswering, momentum=1.0), batch(rows=2)
    ids, mask = answers([3, 6, 4])
    weights, rows = torch.tensor([0.25, 0.75, 1.5]), torch.tensor([0, 0, 1])
    learnt = {"answer_ids": ids, "answer_mask": mask, "answer_weights": weights, "answer_rows": rows}
    hard, mixed = 0.0, 0.0
    with torch.no_grad():
        for answer, (row, length) in enumerate(zip(rows.tolist(), (3, 6, 4))):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            one |= {name: one[name][:, : (6, 3)[row]] for name in ("input_ids", "attention_mask")}
            states = read(model, one)
            model.teacher.states = read(model.teacher, one)
            words = ids[answer, :length]
            hard += weights[answer] * word_losses(model, states, words).sum() / 2
            mixed += weights[answer] * word_losses(model, states, words, model.teacher).sum() / 2
    output = model.train()(**inputs, **learnt)
    assert output.logits is None
    assert torch.allclose(output.loss, mixed, atol=1e-4)
    assert not torch.allclose(hard, mixed, atol=1e-2)
    noisy = learnt | {"answer_ids": torch.where(mask.bool(), ids, 11)}
    assert torch.allclose(model(**inputs, **noisy).loss, mixed, atol=1e-4)
    assert not torch.allclose(model(**inputs, **learnt | {"answer_rows": rows.flip(0)}).loss, mixed, atol=1e-3)
    output.loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "teacher" not in name)
    model.ramps()["distillation_weight"](0.0)
    assert torch.allclose(model(**inputs, **learnt).loss, hard, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("twice", [True, False])
def test_ranking_scores_every_candidate_as_a_pass_of_its_own(twice):
    model, inputs = build(VlpAlbefForVisualQuestionAnswering, count_first_token_twice=twice), batch()
    lengths = [3, 6, 4, 2, 5, 3, 4]
    ids, mask = answers(lengths)
    states = read(model, inputs)
    first, score = torch.zeros(3, 7), torch.zeros(3, 7)
    for row, long in enumerate((6, 3, 4)):
        for answer, length in enumerate(lengths):
            losses = word_losses(model, states[row : row + 1, :long], ids[answer, :length])
            first[row, answer] = -losses[0]
            score[row, answer] = -losses.sum() - (losses[0] if twice else 0.0)
    question = states, inputs["attention_mask"]
    chosen, scores = model.rank_answers(*question, ids, mask, 20)  # cut to the list
    assert torch.equal(chosen, score.argsort(dim=1, descending=True))
    assert torch.allclose(scores, score.sort(dim=1, descending=True).values, atol=1e-4)
    noisy = torch.where(mask.bool(), ids, 11)
    assert torch.allclose(model.rank_answers(*question, noisy, mask, 20)[1], scores, atol=1e-5)
    for k in (1, 2):  # as long as no probabilities of first words are equal at the k-th place
        own = first[:, [0, 1, 3, 5]]  # those of one first word each
        some, found = model.rank_answers(*question, ids[[0, 1, 3, 5]], mask[[0, 1, 3, 5]], k)
        kept = own.topk(k, dim=1).indices
        assert torch.equal(some.sort(1).values, kept.sort(1).values)
        assert torch.allclose(found, score[:, [0, 1, 3, 5]].gather(1, some), atol=1e-4)
    model.set_answers(ids, mask)
    logits = model(**inputs).logits
    lowest = torch.finfo(logits.dtype).min
    assert logits.shape == (3, 7) and logits.ne(lowest).sum(dim=1).tolist() == [4, 4, 4]
    assert torch.allclose(logits[logits.ne(lowest)], score[logits.ne(lowest)], atol=1e-4)
    assert not torch.allclose(score, 2 * first, atol=1e-2)


def test_the_list_of_answers_is_saved_and_bad_lists_are_refused(tmp_path):
    model, inputs = build(VlpAlbefForVisualQuestionAnswering), batch()
    ids, mask = answers([3, 6, 4, 2, 5, 3, 4])
    with pytest.raises(ValueError, match="set_answers"):
        model(**inputs)
    for count in (6, 8):
        other = ids[torch.arange(count) % 7]
        with pytest.raises(ValueError, match=f"num_labels={count}"):
            model.set_answers(other)
    with pytest.raises(ValueError, match="answer_length=7"):
        model.set_answers(torch.cat([ids, ids[:, 1:2]], dim=1), torch.ones(7, 7))
    with pytest.raises(ValueError, match="start token"):
        model.set_answers(torch.where(torch.arange(7)[:, None] == 2, ids + 1, ids), mask)
    with pytest.raises(ValueError, match="at least one more"):
        model.set_answers(ids, mask * torch.tensor([1, 0, 0, 0, 0, 0]))
    assert model.answer_ids.eq(-100).all()
    with pytest.raises(ValueError, match="missing: answer_mask"):
        model(**inputs, answer_ids=ids, answer_weights=torch.ones(7), answer_rows=torch.zeros(7).long())
    model.set_answers(ids)
    model.save_pretrained(tmp_path)
    again = VlpAlbefForVisualQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(again.answer_ids, model.answer_ids) and again.answer_ids.eq(-100).any()
    assert torch.allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_the_decoder_begins_as_the_second_half_of_pre_training(tmp_path):
    pretrained = build(VlpAlbefForPreTraining)
    with torch.no_grad():
        for parameter in pretrained.teacher.parameters():
            parameter.add_(1.0)
    pretrained.save_pretrained(tmp_path)
    model = VlpAlbefForVisualQuestionAnswering.from_pretrained(tmp_path)
    for own, other in (
        (model.answer_decoder.layers, pretrained.albef.fusion_model.layers),
        (model.answer_decoder.embeddings, pretrained.albef.text_model.embeddings),
        (model.answer_decoder.head, pretrained.mlm_head),
        (model.teacher.answer_decoder.layers, pretrained.teacher.albef.fusion_model.layers),
        (model.teacher.answer_decoder.head, pretrained.teacher.mlm_head),
    ):
        other = other.state_dict()
        assert own.state_dict().keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.state_dict().items())
    words = model.answer_decoder.embeddings.word_embeddings.weight
    assert model.answer_decoder.head.decoder.weight is words and words is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "tuned")
    again = VlpAlbefForVisualQuestionAnswering.from_pretrained(tmp_path / "tuned").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    bare = VlpAlbefForVisualQuestionAnswering.from_pretrained(tmp_path / "tuned", momentum_teacher=False)
    with torch.no_grad():
        bare.answer_decoder.layers[0].mlp.fc1.weight.add_(1.0)
    bare.save_pretrained(tmp_path / "bare")
    taught = VlpAlbefForVisualQuestionAnswering.from_pretrained(tmp_path / "bare", momentum_teacher=True)
    assert torch.equal(
        taught.teacher.answer_decoder.layers[0].mlp.fc1.weight, bare.answer_decoder.layers[0].mlp.fc1.weight
    )


# Text assignment


def test_each_assignment_reads_the_images_that_it_names(tmp_path):
    model, inputs = build(VlpAlbefForTextAssignment), batch(rows=4)
    image = model.albef.encode_image(inputs["pixel_values"])["image_embeds"]
    draws = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.1, 0.5, 0.5], [0.2, 0.9, 0.9, 0.2], [0.3, 0.4, 0.99, 0.99]])
    first, second, labels = model.draw_pairs(image, draws)
    assert labels.tolist() == [0, 1, 2, 2]
    assert first[0] == 0 and second[1] == 1
    for row in range(4):
        named = {int(first[row]), int(second[row])}
        assert len(named) == 2 and (row in named) == (row < 2)
    output = model(**inputs, assignment_draws=draws)
    given = {"first_image_index": first, "second_image_index": second, "labels": labels}
    assert torch.equal(model(**inputs, **given).loss, output.loss)
    swapped = given | {"first_image_index": second, "second_image_index": first}
    assert not torch.allclose(model(**inputs, **swapped).loss, output.loss, atol=1e-3)
    reasoning = build(VlpAlbefForVisualReasoning)
    reasoning.load_state_dict(model.state_dict(), strict=False)
    reasoning.classifier = torch.nn.Sequential(model.assignment_head)
    pairs = torch.stack([inputs["pixel_values"][first], inputs["pixel_values"][second]], dim=1)
    logits = reasoning(**inputs | {"pixel_values": pairs}).logits
    expected = -log_softmax(logits, -1)[torch.arange(4), labels].mean()
    assert torch.allclose(output.loss, expected, atol=1e-5) and output.counts["assignment"] == 4
    output.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == ["albef.visual_projection.weight", "albef.visual_projection.bias"]
    model.save_pretrained(tmp_path)
    again = VlpAlbefForTextAssignment.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs, **given).loss, output.loss)
    assert [name for name, parameter in again.named_parameters() if not parameter.requires_grad] == missing
    tuned = VlpAlbefForVisualReasoning.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, second_stack(model)[name]) for name, tensor in second_stack(tuned).items())


@torch.no_grad()
def test_assignments_are_drawn_as_often_as_the_paper_says():
    model = build(VlpAlbefForTextAssignment)
    image = model.albef.encode_image(batch(rows=4)["pixel_values"])["image_embeds"]
    model.albef.visual_projection.weight.mul_(0.02)  # images almost alike, so that none is drawn all the time
    generator = torch.Generator().manual_seed(3)
    drawn = [model.draw_pairs(image, torch.rand(4, 4, generator=generator)) for _ in range(1500)]
    first, second, labels = (torch.cat(part) for part in zip(*drawn, strict=True))
    shares = labels.bincount().double() / len(labels)
    assert torch.allclose(shares, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03)
    embeds = model.albef.project_image(image)
    weights = (embeds @ embeds.T / 0.07).softmax(1).fill_diagonal_(0)
    own = torch.arange(4).repeat(1500)
    others = torch.where(labels == 0, second, first)[own == 0].bincount(minlength=4).double() / 1500
    assert torch.allclose(others.float(), weights[0] / weights[0].sum(), atol=0.05)


def test_text_assignment_needs_three_pairs_and_all_of_what_replaces_drawing():
    model = build(VlpAlbefForTextAssignment)
    with pytest.raises(ValueError, match="3 or more pairs; got 2"):
        model(**batch(rows=2))
    with pytest.raises(ValueError, match="or none of them"):
        model(**batch(), labels=torch.zeros(3).long())
    one, other = (model(**batch(), generator=torch.Generator().manual_seed(5)).loss for _ in range(2))
    assert torch.equal(one, other)


def test_new_words_of_a_model_that_answers_are_words_of_its_answers_too(tmp_path):
    model, inputs = build(VlpAlbefForVisualQuestionAnswering), batch()
    ids, mask = answers([4, 3, 5, 3, 4, 5, 3])
    learnt = {"answer_ids": ids[:3], "answer_mask": mask[:3], "answer_weights": torch.ones(3)}
    learnt["answer_rows"] = torch.arange(3)
    seen = inputs["attention_mask"]
    with torch.no_grad():
        states = read(model, inputs)
        before = model.answer_decoder(ids[:3], states, seen)
        model.resize_token_embeddings(43)
        assert torch.allclose(model.answer_decoder(ids[:3], states, seen), before, atol=1e-6)
        assert model.answer_decoder.head(before).shape[-1] == 43
    new = learnt | {"answer_ids": torch.where(ids[:3] == ids[0, 1], 42, ids[:3])}
    loss = model.train()(**inputs, **new).loss
    loss.backward()
    assert loss.isfinite() and not torch.allclose(model(**inputs, **learnt).loss, loss, atol=1e-4)
    table = model.answer_decoder.embeddings.word_embeddings.weight
    assert table.grad[42].any() and model.answer_decoder.head.decoder.weight is table
    assert all(not parameter.requires_grad for parameter in model.teacher.parameters())
    model.eval().save_pretrained(tmp_path)
    again = VlpAlbefForVisualQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs, **new).loss, model(**inputs, **new).loss)
    model.resize_token_embeddings(40)
    assert model.answer_decoder.head(before).shape[-1] == 40
