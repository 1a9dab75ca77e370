"""What ALBEF promises beyond the contract of every class: the momentum copy, the queue, false pairs, pairs read with cached images."""

import pytest
import torch
from torch import nn

from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from tests.contract.rows import ROWS, albef_config, albef_text_config, bert_config

PRETRAINING = next(row for row in ROWS if row.model.endswith("VlpAlbefForPreTraining"))
RETRIEVAL = next(row for row in ROWS if row.model.endswith("VlpAlbefForImageTextRetrieval"))


def fresh(kind=VlpAlbefForPreTraining, seed: int = 0, **fields):
    torch.manual_seed(seed)
    return kind(albef_config(**fields)())


def parts(model) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every weight of the model that has a momentum copy, and the copy."""
    return [
        (name, weight, model.teacher.get_parameter(name))
        for part in model.students()
        for name, weight in model.named_parameters()
        if name.startswith(f"{part}.")
    ]


@pytest.mark.parametrize("row", [PRETRAINING, RETRIEVAL], ids=lambda row: row.name)
def test_the_momentum_copy_begins_equal_and_is_moved_by_a_training_forward_alone(row):
    model = fresh(row.model_class)
    assert parts(model) and all(torch.equal(weight, copied) for _, weight, copied in parts(model))
    assert not any(copied.requires_grad for _, _, copied in parts(model))
    before = {name: copied.clone() for name, _, copied in parts(model)}
    with torch.no_grad():
        for _, weight, _ in parts(model):
            weight.add_(1.0)
    model.eval()(**row.batch())
    assert all(torch.equal(copied, before[name]) for name, _, copied in parts(model))
    assert model.queue.position == 0
    model.train()(**row.batch())
    for name, weight, copied in parts(model):
        torch.testing.assert_close(copied, 0.995 * before[name] + 0.005 * weight)
        assert not torch.equal(copied, weight)
    assert model.queue.position == 4
    assert torch.equal(model.queue.image_ids[:4], row.batch()["image_ids"])
    lengths = model.queue.image_features.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_the_copy_moves_once_a_step_where_the_loop_says_when_one_begins():
    told, untold = fresh().train(), fresh().train()
    for model in (told, untold):
        with torch.no_grad():
            model.temperature.weight.fill_(0.2)
            model.albef.visual_projection.weight.add_(1.0)
    start = told.teacher.albef.visual_projection.weight.clone()
    told.before_step()
    for model in (told, untold):
        model(**PRETRAINING.batch())
        model(**PRETRAINING.batch(seed=2))
    target = told.albef.visual_projection.weight
    torch.testing.assert_close(told.teacher.albef.visual_projection.weight, target + 0.995 * (start - target))
    twice = untold.teacher.albef.visual_projection.weight
    torch.testing.assert_close(twice, target + 0.995**2 * (start - target))


def test_a_folder_without_the_copy_gets_one_of_its_weights(tmp_path):
    small = VlpAlbefForImageTextRetrieval(albef_config(momentum_teacher=False)())
    assert not hasattr(small, "teacher") and not hasattr(small, "queue")
    small.save_pretrained(tmp_path)
    loaded = VlpAlbefForImageTextRetrieval.from_pretrained(tmp_path, momentum_teacher=True)
    assert parts(loaded) and all(torch.equal(weight, copied) for _, weight, copied in parts(loaded))
    assert not any(parameter.requires_grad for parameter in loaded.teacher.parameters())
    for name, weight in small.named_parameters():
        assert torch.equal(weight, loaded.get_parameter(name)), name
    with pytest.raises(ValueError, match="momentum_teacher=True"):
        small(**RETRIEVAL.batch())


def test_a_copy_that_was_saved_is_not_replaced(tmp_path):
    model = PRETRAINING.build()
    model.save_pretrained(tmp_path)
    again = VlpAlbefForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(model.teacher.get_parameter(name), copied) for name, _, copied in parts(again))
    assert not all(torch.equal(weight, copied) for _, weight, copied in parts(again))
    assert torch.equal(model.queue.text_features, again.queue.text_features)


def test_a_queue_of_another_size_is_refused(tmp_path):
    PRETRAINING.build().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)queue\.image_features|mismatch"):
        VlpAlbefForPreTraining.from_pretrained(tmp_path, queue_size=12)
    changed = VlpAlbefForPreTraining.from_pretrained(tmp_path, queue_size=12, ignore_mismatched_sizes=True)
    assert changed.queue.image_features.shape == (12, 24)


@pytest.mark.parametrize("row", [PRETRAINING, RETRIEVAL], ids=lambda row: row.name)
def test_a_batch_of_one_image_teaches_by_its_true_pairs(row):
    model, batch = row.build(), row.batch()
    alone = model(**batch | {"image_ids": torch.full((4,), 5)})
    assert alone.counts["itm"] == 4 and alone.loss.isfinite()
    states = model.albef(*(batch[name] for name in ("input_ids", "attention_mask", "pixel_values"))).last_hidden_state
    expected = nn.functional.cross_entropy(model.itm_head(states[:, 0]), torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(alone.losses["itm"], expected)
    several = model(**batch)
    assert several.counts["itm"] == 12 and not torch.allclose(several.losses["itm"], expected, atol=1e-3)


def test_a_single_pair_has_a_loss():
    model, batch = PRETRAINING.build(), PRETRAINING.batch(rows=1)
    output = model.train()(**batch)
    assert output.loss.isfinite() and output.counts["itm"] == 1
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_false_pair_is_never_of_the_same_image():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    ids = batch["image_ids"]
    assert ids[0] == ids[1]
    similar = torch.randn(4, 14)
    for seed in range(20):
        draws = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
        (image, found), (text, _) = model.negatives(similar, similar, ids, draws, (None, None), None)
        assert found.all() and not (ids[image] == ids).any() and not (ids[text] == ids).any()
    plain = VlpAlbefForPreTraining(albef_config(contrastive_targets="plain")())
    seen = {
        int(plain.negatives(similar, similar, ids, torch.full((4, 2), draw), (None, None), None)[0][0][0])
        for draw in (0.0, 0.3, 0.6, 0.99)
    }
    assert 0 not in seen and 1 in seen


def test_given_rows_take_the_place_of_the_drawn_ones():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    image, text = torch.tensor([2, 3, 0, 1]), torch.tensor([3, 2, 1, 0])
    given = model(**batch, negative_image_index=image, negative_text_index=text).losses["itm"]
    pair = {name: batch[name] for name in ("input_ids", "attention_mask")}
    pixels, own = batch["pixel_values"], torch.arange(4)
    logits = []
    for texts, images in ((own, own), (own, image), (text, own)):  # the definition, a pass each
        states = model.albef(pixel_values=pixels[images], **{name: value[texts] for name, value in pair.items()})
        logits.append(model.itm_head(states.last_hidden_state[:, 0]))
    labels = torch.tensor([1] * 4 + [0] * 8)
    torch.testing.assert_close(given, nn.functional.cross_entropy(torch.cat(logits), labels))
    assert not torch.allclose(given, model(**batch).losses["itm"], atol=1e-4)


def test_masked_words_are_those_of_the_whole_model_with_soft_targets():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    whole = {"attention_mask": batch["attention_mask"], "pixel_values": batch["pixel_values"]}
    logits = model.mlm_head(model.albef(batch["mlm_input_ids"], **whole).last_hidden_state)
    soft = model.teacher.mlm_head(model.teacher.albef(batch["mlm_input_ids"], **whole).last_hidden_state)
    masked = batch["mlm_labels"] != -100
    hard = nn.functional.cross_entropy(logits[masked], batch["mlm_labels"][masked])
    soft = -(soft[masked].softmax(-1) * logits[masked].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(model(**batch).losses["mlm"], 0.6 * hard + 0.4 * soft)
    model.ramps()["distillation_weight"](0.0)
    torch.testing.assert_close(model(**batch).losses["mlm"], hard)
    with pytest.raises(ValueError, match="1.5"):
        model.ramps()["distillation_weight"](1.5)


def test_without_a_masked_word_the_term_is_zero():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    output = model(**batch | {"mlm_labels": torch.full_like(batch["mlm_labels"], -100)})
    assert output.losses["mlm"] == 0 and output.counts["mlm"] == 0 and output.loss.isfinite()


def test_a_text_of_marks_alone_is_read():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    batch["input_ids"][1, 1:], batch["attention_mask"][1, 1:] = 0, 0
    batch["mlm_input_ids"][1], batch["mlm_labels"][1] = batch["input_ids"][1], -100
    assert model(**batch).loss.isfinite()


def test_the_temperature_is_held_in_pre_training_alone():
    for kind, row, held in (
        (VlpAlbefForPreTraining, PRETRAINING, True),
        (VlpAlbefForImageTextRetrieval, RETRIEVAL, False),
    ):
        model = fresh(kind).train()
        with torch.no_grad():
            model.temperature.weight.fill_(0.9)
        model(**row.batch())
        assert model.temperature.weight.item() == pytest.approx(0.5 if held else 0.9)


def test_texts_of_an_image_read_together_score_as_one_by_one():
    model, batch = RETRIEVAL.build(), RETRIEVAL.batch()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    image = model.encode_image(batch["pixel_values"][:2])
    together = model.score_pairs(**text, **image)  # texts 0 and 1 with image 0, 2 and 3 with image 1
    rows = torch.tensor([0, 0, 1, 1])
    alone = model.score_pairs(**text, image_embeds=image["image_embeds"][rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    swapped = model.score_pairs(**text, image_embeds=image["image_embeds"][1 - rows])
    assert not torch.allclose(together, swapped, atol=1e-4)
    with pytest.raises(ValueError, match="4 texts cannot be dealt to 3 images"):
        model.score_pairs(**text, image_embeds=image["image_embeds"][torch.tensor([0, 1, 1])])


def test_a_text_and_an_image_encoded_before_score_as_they_do_at_once():
    model, batch = RETRIEVAL.build(), RETRIEVAL.batch()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    lengths = text["attention_mask"].sum(dim=1)
    assert len(lengths.unique()) > 1
    images = model.encode_image(batch["pixel_values"][:2])["image_embeds"]
    encoded = model.encode_text(**text)
    read = [model.score_pairs(**encoded, key_values=model.keys_and_values(images[row : row + 1])) for row in range(2)]
    for row, scores in enumerate(read):
        alone = [
            model.score_pairs(text["input_ids"][index : index + 1, :length], image_embeds=images[row : row + 1])
            for index, length in enumerate(lengths.tolist())
        ]
        torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=0)
        # what stands at padding does not count, and what stands before it does
        padding = text["attention_mask"][..., None] == 0
        keys = model.keys_and_values(images[row : row + 1])
        noise = encoded | {"text_embeds": encoded["text_embeds"].masked_fill(padding, 9.0)}
        torch.testing.assert_close(model.score_pairs(**noise, key_values=keys), scores, atol=1e-5, rtol=0)
        other = encoded | {"text_embeds": encoded["text_embeds"].masked_fill(~padding, 9.0)}
        assert not torch.allclose(model.score_pairs(**other, key_values=keys), scores, atol=1e-4)
    assert not torch.allclose(*read, atol=1e-4)


def test_text_then_fusion_is_the_whole_pass():
    model, batch = RETRIEVAL.build(), RETRIEVAL.batch()
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model.albef(**text, pixel_values=batch["pixel_values"])
    states = model.fuse(**model.encode_text(**text), **model.encode_image(batch["pixel_values"]))
    real = text["attention_mask"].bool()
    torch.testing.assert_close(states[real], whole.last_hidden_state[real], atol=1e-5, rtol=0)
    assert not torch.allclose(whole.text_hidden_states[real], whole.last_hidden_state[real], atol=1e-2)


def test_any_text_encoder_of_transformers():
    config = albef_config(text=bert_config)()
    torch.manual_seed(0)
    model = VlpAlbefForPreTraining(config).eval()
    assert type(model.albef.text_model).__name__ == "BertModel"
    assert model.mlm_head.decoder.weight is model.albef.text_model.embeddings.word_embeddings.weight
    assert model(**PRETRAINING.batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"image_size": 250}}, "nearest is 256"),
        ({"multimodal_config": {"hidden_size": 384}}, "384 is not that of the text encoder, 768"),
        ({"temperature_init_value": 0.7}, "0.7 must lie between"),
        ({"contrastive_targets": "both"}, "both"),
        ({"momentum": 1.5}, "momentum must lie between 0 and 1, got 1.5"),
        ({"queue_size": 0}, "queue_size must be 1 or more"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        VlpAlbefConfig(**fields)


def test_one_side_alone_is_told_what_to_call():
    model = VlpAlbefModel(albef_config(albef_text_config)())
    with pytest.raises(ValueError, match="get_text_features"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="mlm_input_ids and mlm_labels"):
        PRETRAINING.build()(**{k: v for k, v in PRETRAINING.batch().items() if not k.startswith("mlm")})


def test_positions_of_images_are_resized_in_both_models():
    model = fresh(VlpAlbefForImageTextRetrieval)
    model.resize_image_positions(48)
    for holder in (model.albef, model.teacher.albef):
        assert holder.vision_model.embeddings.position_embedding.shape == (37, 32)
    assert model.config.vision_config.image_size == 48
    assert not model.teacher.albef.vision_model.embeddings.position_embedding.requires_grad
    with pytest.raises(ValueError, match="image_size 50"):
        model.resize_image_positions(50)


def bert_for_masked_words(layers: int):
    from transformers import BertForMaskedLM

    config = bert_config()
    config.num_hidden_layers = layers
    torch.manual_seed(3)
    return BertForMaskedLM(config).eval()


def test_a_bert_is_cut_in_two():
    bert, model = bert_for_masked_words(4), fresh()
    before = model.albef.fusion_model.layers[0].cross_attention.q_proj.weight.clone()
    model.fill_tower("text_model", bert)
    ids = PRETRAINING.batch()["input_ids"]
    states = bert.bert(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.albef.text_model(ids).last_hidden_state, states[2], atol=1e-5, rtol=0)
    fused = states[2]
    for layer in model.albef.fusion_model.layers:
        fused = layer(fused)  # without an image
    torch.testing.assert_close(model.mlm_head(fused), bert(ids).logits, atol=1e-5, rtol=0)
    assert torch.equal(before, model.albef.fusion_model.layers[0].cross_attention.q_proj.weight)
    assert all(torch.equal(weight, copied) for _, weight, copied in parts(model))
    assert model.mlm_head.decoder.weight is model.albef.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"fusion_model\.layers\.1"):
        fresh().fill_tower("text_model", bert_for_masked_words(3))


def test_a_vision_transformer_of_timm_fills_the_image_encoder():
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
    theirs = timm.models.VisionTransformer(num_classes=0, global_pool="", **sizes).eval()
    model = fresh()
    model.fill_tower("vision_model", theirs)
    pixels = torch.randn(2, 3, 24, 24)
    model.resize_image_positions(24)
    states = model.encode_image(pixels)["image_embeds"]
    assert states.shape == (2, 10, 32) and model.teacher.albef.encode_image(pixels)["image_embeds"].equal(states)
    exact = fresh()
    exact.resize_image_positions(24)
    exact.fill_tower("vision_model", theirs)
    torch.testing.assert_close(exact.encode_image(pixels)["image_embeds"], theirs(pixels), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="other sizes"):
        fresh().fill_tower("vision_model", timm.models.VisionTransformer(num_classes=0, **sizes | {"embed_dim": 16}))
