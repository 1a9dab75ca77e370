"""What of ALBEF reaches what: gradients, copies that follow, masks of keys, rows that must fit."""

import itertools

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForMaskedLM,
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
)
from tests.contract.rows import ROWS
from tests.contract.test_albef import PRETRAINING, bert_for_masked_words, fresh, parts

ANSWERING = next(row for row in ROWS if row.model.endswith("VlpAlbefForVisualQuestionAnswering"))
TERMS = ("itc", "itm", "mlm")
SWITCHED = [weights for weights in itertools.product((1.0, 0.0), repeat=3) if any(weights)]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold equal tensors under the names that both have."""
    one, other = one.state_dict(), other.state_dict()
    return bool(one.keys() & other.keys()) and all(torch.equal(one[name], other[name]) for name in one.keys() & other)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("weights", SWITCHED, ids=lambda weights: "".join(map(str, map(int, weights))))
def test_every_trained_weight_has_a_gradient_whatever_is_weighed(weights, tmp_path):
    switched = dict(zip((f"{term}_weight" for term in TERMS), weights, strict=True))
    fresh().save_pretrained(tmp_path)
    for model in (fresh(**switched), VlpAlbefForPreTraining.from_pretrained(tmp_path, **switched)):
        before = model.queue.text_features.clone()
        output = model.train()(**PRETRAINING.batch())
        output.loss.backward()
        named = [(name, weight) for name, weight in model.named_parameters() if not name.startswith("teacher.")]
        assert [name for name, weight in named if (weight.grad is None) == weight.requires_grad] == []
        frozen = {name.split(".")[0 if "_head" in name else -2] for name, weight in named if not weight.requires_grad}
        assert bool(frozen) == (not all(weights)) and ("itm_head" in frozen) == (not weights[1])
        assert output.losses.keys() == {term for term, weight in zip(TERMS, weights, strict=True) if weight}
        # contrast is for itself and for false pairs
        contrasts = weights[0] > 0 or weights[1] > 0
        assert (output.image_embeds is not None) == contrasts
        assert torch.equal(model.queue.text_features, before) != contrasts


def test_masked_words_alone_learn_as_beside_the_rest():
    alone, beside = fresh(itc_weight=0, itm_weight=0).train(), fresh().train()
    batch = PRETRAINING.batch()
    for model in (alone, beside):
        with torch.no_grad():
            model.teacher.mlm_head.dense.weight.add_(0.5)
    torch.testing.assert_close(alone(**batch).losses["mlm"], beside(**batch).losses["mlm"])
    start = alone.teacher.mlm_head.dense.weight.clone()
    alone.distillation_weight = 0.0
    assert not torch.allclose(alone(**batch).losses["mlm"], beside(**batch).losses["mlm"])
    assert not torch.equal(alone.teacher.mlm_head.dense.weight, start)  # it moves where it does not teach


# ---------------------------------------------------------------------------------------------------------------------
# Copies


@pytest.mark.parametrize(
    "kind", [VlpAlbefForVisualReasoning, VlpAlbefForVisualQuestionAnswering, VlpAlbefForPreTraining]
)
def test_what_is_copied_follows_a_tower_filled_after_loading(kind, tmp_path):
    fresh(kind, seed=1, answer_layers=2).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    assert all(torch.equal(weight, copied) for _, weight, copied in parts(model))
    begun = model.albef.fusion_model.layers[0].mlp.fc1.weight.clone()
    model.fill_tower("text_model", bert_for_masked_words(4))
    assert not torch.equal(model.albef.fusion_model.layers[0].mlp.fc1.weight, begun)
    assert all(torch.equal(weight, copied) for _, weight, copied in parts(model))
    layers = model.albef.fusion_model.layers
    if kind is VlpAlbefForVisualReasoning:
        assert same(model.second_layers, layers)
    elif kind is VlpAlbefForVisualQuestionAnswering:
        assert same(model.answer_decoder.layers, layers)
        assert same(model.answer_decoder.embeddings, model.albef.text_model.embeddings)
        words = model.answer_decoder.embeddings.word_embeddings.weight
        assert words is model.answer_decoder.head.decoder.weight is not model.get_input_embeddings().weight


def test_a_filled_image_encoder_leaves_the_copies_of_the_text_half():
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
    model = fresh(VlpAlbefForVisualReasoning)
    with torch.no_grad():
        model.second_layers[0].mlp.fc1.weight.add_(1.0)
    model.fill_tower("vision_model", timm.models.VisionTransformer(num_classes=0, global_pool="", **sizes))
    assert not same(model.second_layers, model.albef.fusion_model.layers)
    model.fill_tower("text_model", bert_for_masked_words(4))
    assert same(model.second_layers, model.albef.fusion_model.layers)


@pytest.mark.parametrize("kind", [VlpAlbefForPreTraining, VlpAlbefForVisualQuestionAnswering, VlpAlbefForMaskedLM])
def test_positions_of_words_are_lengthened_in_every_part(kind, tmp_path):
    model = fresh(kind)
    if hasattr(model, "teacher"):
        with torch.no_grad():
            model.teacher.albef.text_model.embeddings.position_embeddings.weight.add_(1.0)
    old = {name: table.clone() for name, table in model.state_dict().items() if "position_embeddings" in name}
    model.resize_position_embeddings(20)
    found = {name: table for name, table in model.state_dict().items() if "position_embeddings" in name}
    assert found.keys() == old.keys() and {len(table) for table in found.values()} == {20}
    assert all(torch.equal(found[name][:16], table) for name, table in old.items())
    if hasattr(model, "teacher"):
        own, copied = (
            found[f"{part}albef.text_model.embeddings.position_embeddings.weight"] for part in ("", "teacher.")
        )
        assert torch.equal(own[16:], copied[16:]) and not torch.equal(own[:16], copied[:16])
        assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Masks and images


def flash(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """As transformers calls flash attention: a mask [B, L] of keys is one of as many queries, of which those at padding are dropped."""
    queries, keys = query.shape[2], key.shape[2]
    seen = None
    if attention_mask is not None:
        assert attention_mask.ndim == 2 and queries in (1, keys)
        seen = attention_mask.bool()[:, None, None]
    if module.is_causal and queries > 1:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling).transpose(1, 2)
    if attention_mask is not None and queries > 1:
        mixed = mixed.masked_fill(~attention_mask.bool()[:, :, None, None], 0.0)
    return mixed, None


def under_flash(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    return model


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 8])
def test_padding_of_a_question_is_unseen_under_flash_attention_too(length, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    generator = torch.Generator().manual_seed(0)
    states, ids = torch.randn(3, 8, 32, generator=generator), torch.randint(3, 30, (3, length), generator=generator)
    mask = (torch.arange(8) < torch.tensor([8, 3, 5])[:, None]).long()
    plain, other = (ANSWERING.build().eval() for _ in range(2))
    under_flash(other)
    wanted = plain.answer_decoder(ids, states, mask)
    torch.testing.assert_close(other.answer_decoder(ids, states, mask), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(other.answer_decoder(ids, states, None), wanted, atol=1e-2)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    images = plain.encode_image(pixels)["image_embeds"]
    for rows in (1, 2):
        fused = plain.albef.fuse(states, mask, images, rows)
        torch.testing.assert_close(other.albef.fuse(states, mask, images, rows), fused, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(other.albef.fuse(states, None, images, rows), fused, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("grouped", [True, False])
def test_texts_read_side_by_side_are_those_read_by_number(grouped, monkeypatch):
    model = fresh(VlpAlbefModel).eval()
    if not grouped:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    generator = torch.Generator().manual_seed(0)
    texts, images = torch.randn(6, 8, 32, generator=generator), torch.randn(3, 17, 32, generator=generator)
    mask = (torch.arange(8) < torch.tensor([8, 1, 8, 8, 2, 1])[:, None]).long()
    read, keys = model.fusion_model.read, model.fusion_model.keys_and_values(images)
    by_number = read(texts, mask, keys, torch.arange(3).repeat_interleave(2), rows=1)
    torch.testing.assert_close(read(texts, mask, keys, None, rows=1), by_number)
    assert not torch.allclose(read(texts, mask, keys, torch.arange(3).repeat(2), rows=1), by_number, atol=1e-3)
    one = read(texts[:3], mask[:3], keys, None, rows=1)
    torch.testing.assert_close(one, read(texts[:3], mask[:3], keys, torch.arange(3), rows=1))


@torch.no_grad()
def test_masks_with_holes_are_read_to_their_last_word(monkeypatch):
    model = fresh(VlpAlbefModel).eval()
    generator = torch.Generator().manual_seed(0)
    texts, images = torch.randn(2, 8, 32, generator=generator), torch.randn(2, 17, 32, generator=generator)
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    states = model.fuse(texts, mask, images, rows=1)
    whole = model.fusion_model(texts, mask, model.fusion_model.keys_and_values(images), rows=1)
    torch.testing.assert_close(states, whole)
    cut = mask.clone()
    cut[0, 7] = 0
    assert not torch.allclose(model.fuse(texts, cut, images, rows=1)[0], whole[0], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def cut(name: str, *where):
    return lambda batch: batch | {name: batch[name][where]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut("mlm_labels", slice(3)), r"mlm_labels must have the shape \[4, 10\].*got \[3, 10\]"),
        (cut("attention_mask", slice(None), slice(7)), r"attention_mask must have the shape \[4, 10\]"),
        (cut("negative_draws", slice(1)), r"negative_draws must have the shape \[4, 2\].*got \[1, 2\]"),
        (lambda batch: batch | {"negative_image_index": torch.tensor([1])}, r"negative_image_index .* \[4\]"),
    ],
)
def test_rows_that_do_not_fit_are_named(change, message):
    batch, model = PRETRAINING.batch(), fresh()
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match=message):
        model(**change(batch))


def test_leaving_out_needs_identities():
    batch = PRETRAINING.batch()
    del batch["mlm_input_ids"], batch["mlm_labels"]
    model = fresh(VlpAlbefForImageTextRetrieval, contrastive_targets="exclude")
    assert model(**batch).loss.isfinite()
    del batch["image_ids"]
    with pytest.raises(ValueError, match='contrastive_targets is "exclude".*image_ids'):
        model(**batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut("answer_mask", slice(None), slice(2)), "answer_mask must have the shape"),
        (lambda batch: batch | {"answer_rows": batch["answer_rows"] + 4}, "answer_rows go from 4 to"),
        (lambda batch: batch | {"answer_rows": batch["answer_rows"] - 1}, "answer_rows go from -1 to"),
    ],
)
def test_answers_that_do_not_fit_are_named(change, message):
    batch, model = ANSWERING.batch(), ANSWERING.build()
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match=message):
        model(**change(batch))


@pytest.mark.parametrize("kind", [VlpAlbefForMaskedLM, VlpAlbefForVisualEntailment])
def test_a_mask_of_another_length_is_named(kind):
    batch = {name: PRETRAINING.batch()[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert fresh(kind)(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        fresh(kind)(**cut("attention_mask", slice(None), slice(7))(batch))


@pytest.mark.parametrize("size", [(36, 32), (32, 36)])
def test_pixels_that_patches_do_not_cover_are_refused(size):
    model = fresh(VlpAlbefModel)
    assert model.get_image_features(torch.zeros(1, 3, 40, 32)).shape == (1, 24)
    with pytest.raises(ValueError, match="no multiple of patches of 8"):
        model.get_image_features(torch.zeros(1, 3, *size))


def test_a_model_without_a_projection_says_so():
    assignment = fresh(VlpAlbefForTextAssignment).albef
    batch = {name: PRETRAINING.batch()[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    output = assignment(**batch)
    assert output.last_hidden_state.shape == (4, 10, 32) and output.text_embeds is None
    assert fresh(VlpAlbefModel)(**batch).text_embeds is not None
    with pytest.raises(ValueError, match="no text_projection"):
        assignment.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert assignment.get_image_features(batch["pixel_values"]).shape == (4, 24)
