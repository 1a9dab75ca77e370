"""What ViLT promises beyond the contract of every class: mixed sizes, encoded images, transfers between stages, bad input."""

import warnings

import pytest
import timm
import torch

from hf_vlp import (
    VlpViltConfig,
    VlpViltForImageTextRetrieval,
    VlpViltForMaskedLM,
    VlpViltForPreTraining,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
    VlpViltModel,
)
from hf_vlp.inputs.patch_selection import draw_patches, patch_mask
from tests.contract.rows import CLASSES, ROWS, VOCABULARY, vilt_config

ROW = {row.name: row for row in ROWS if row.reads_both and row.model.startswith("vilt.")}
MODEL, PRETRAINING = ROW["VlpViltModel-mixed-sizes"], ROW["VlpViltForPreTraining-all"]
RETRIEVAL, REASONING = ROW["VlpViltForImageTextRetrieval-three-texts"], ROW["VlpViltForVisualReasoning-two-images"]


def cropped(batch: dict, row: int) -> dict:
    """One row without its padding."""
    length = int(batch["attention_mask"][row].sum())
    height, width = (int(batch["pixel_mask"][row].amax(axis).sum()) for axis in (1, 0))
    one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}
    return one | {name: one[name][..., :height, :width] for name in ("pixel_values", "pixel_mask")}


# Images of mixed sizes


@torch.no_grad()
def test_a_batch_of_mixed_sizes_equals_one_image_at_a_time():
    model, batch = MODEL.build(), MODEL.batch(rows=6)
    whole = model(**batch)
    sizes = batch["pixel_mask"].flatten(1).sum(1)
    assert len(sizes.unique()) >= 4
    for row in range(6):
        one = cropped(batch, row)
        for mask in ({}, {"pixel_mask": None}):  # without padding no mask is needed
            alone = model(**one | mask)
            assert torch.allclose(alone.pooler_output[0], whole.pooler_output[row], atol=1e-5)
            patches = whole.image_mask[row].bool()
            assert torch.allclose(alone.image_hidden_states[0], whole.image_hidden_states[row][patches], atol=1e-5)
            words = batch["attention_mask"][row].bool()
            assert torch.allclose(alone.text_hidden_states[0], whole.text_hidden_states[row][words], atol=1e-5)
    unmasked = model(**batch | {"pixel_mask": None})  # padding taken for a black picture
    assert not torch.allclose(unmasked.pooler_output[1:4], whole.pooler_output[1:4], atol=1e-3)


@torch.no_grad()
def test_what_the_canvas_holds_beside_a_picture_does_not_matter():
    model, batch = MODEL.build(), MODEL.batch()
    noise = torch.randn_like(batch["pixel_values"]) * (1 - batch["pixel_mask"]).unsqueeze(1)
    other = dict(batch, pixel_values=batch["pixel_values"] + noise)
    assert torch.allclose(model(**batch).pooler_output, model(**other).pooler_output, atol=1e-5)
    inside = dict(batch, pixel_values=batch["pixel_values"] + 0.5 * batch["pixel_mask"].unsqueeze(1))
    assert not torch.allclose(model(**batch).pooler_output, model(**inside).pooler_output, atol=1e-3)


@torch.no_grad()
def test_nothing_is_drawn_and_patches_stay_in_order():
    model, batch = MODEL.build(), MODEL.batch()
    limited = MODEL.build()
    limited.config.max_image_length = 3
    for one in (model, limited):
        output = one.eval()(**batch)
        real = [index[mask.bool()].tolist() for index, mask in zip(output.patch_index, output.image_mask[:, 1:])]
        assert all(index == sorted(index) for index in real)
        assert [len(index) for index in real] == (batch["pixel_mask"][:, ::8, ::8].flatten(1).sum(1)).tolist()
        assert torch.equal(one(**batch).last_hidden_state, output.last_hidden_state)


@torch.no_grad()
def test_chosen_patches_are_all_that_is_seen():
    model, batch = MODEL.build(), MODEL.batch()
    chosen = draw_patches(patch_mask(batch["pixel_mask"], 8), 5, torch.Generator().manual_seed(0))
    output = model(**batch, patch_index=chosen)
    assert output.image_hidden_states.shape[1] == 6
    hidden = batch["pixel_mask"].clone()
    seen = torch.zeros(len(chosen), 16, dtype=torch.bool).scatter(1, chosen, True).view(-1, 4, 4)
    seen = seen.repeat_interleave(8, 1).repeat_interleave(8, 2)
    junk = torch.where(seen.unsqueeze(1), batch["pixel_values"], torch.randn_like(batch["pixel_values"]))
    assert torch.allclose(
        model(**batch | {"pixel_values": junk}, patch_index=chosen).pooler_output, output.pooler_output, atol=1e-5
    )
    assert torch.equal(batch["pixel_mask"], hidden) and not torch.allclose(
        model(**batch).pooler_output, output.pooler_output, atol=1e-3
    )
    turned = model(**batch, patch_index=chosen.flip(1))
    assert torch.allclose(turned.pooler_output, output.pooler_output, atol=1e-5)


@torch.no_grad()
def test_positions_are_added_in_float32_under_autocast_and_in_half_where_weights_are():
    model, batch = MODEL.build(), MODEL.batch()
    pixels = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, patches = model.encode_image(**pixels), model.image_embeddings.patch_embedding(batch["pixel_values"])
    exact = model.image_embeddings.patch_embedding(batch["pixel_values"])
    lost = (patches - exact).flatten(2).abs().amax()  # of the product alone
    assert mixed["image_embeds"].dtype == torch.float32 and patches.dtype == torch.bfloat16 and lost > 0
    assert (mixed["image_embeds"] - model.encode_image(**pixels)["image_embeds"]).abs().max() <= lost + 1e-6
    assert model.to(torch.bfloat16).encode_image(**pixels)["image_embeds"].dtype == torch.bfloat16


# Encoded images and scores


@torch.no_grad()
def test_images_are_encoded_once_and_read_with_many_texts():
    model, batch = RETRIEVAL.build(), RETRIEVAL.batch()
    logits = model(**batch).logits
    image = model.encode_image(batch["pixel_values"], batch["pixel_mask"])
    for text in range(3):
        words = batch["input_ids"][:, text], batch["attention_mask"][:, text]
        scores = model.score_pairs(*words, **image)
        assert torch.allclose(scores, logits[:, text], atol=1e-5)
        pixels = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        assert torch.allclose(model.score_pairs(*words, **pixels), scores, atol=1e-5)
        mixed = {name: value.roll(1, 0) for name, value in image.items()}
        assert not torch.allclose(model.score_pairs(*words, **mixed), scores, atol=1e-3)
    cut = {name: value[1:2, : int(image["image_mask"][1].sum())] for name, value in image.items()}
    assert cut["image_mask"].shape[1] < image["image_mask"].shape[1]
    alone = model.score_pairs(batch["input_ids"][1:2, 0], batch["attention_mask"][1:2, 0], **cut)
    assert torch.allclose(alone, logits[1:2, 0], atol=1e-5)
    probability = model.match_probability(*words, **image)
    assert ((probability > 0) & (probability < 1)).all()


@torch.no_grad()
def test_pretraining_scores_by_the_row_of_a_match():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    pair = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "pixel_mask")}
    pooled = model.vilt(**pair).pooler_output
    assert torch.allclose(model.score_pairs(**pair), model.itm_head(pooled)[:, 1], atol=1e-5)
    assert not torch.allclose(model.score_pairs(**pair), model.itm_head(pooled)[:, 0], atol=1e-3)


@torch.no_grad()
def test_two_images_are_two_readings_of_the_statement():
    model, batch = REASONING.build(), REASONING.batch()
    rows = [model.vilt.modality_embeddings.weight[1], model.second_image_embedding[0]]
    pooled = [
        model.vilt(
            batch["input_ids"],
            batch["attention_mask"],
            batch["pixel_values"][:, image],
            batch["pixel_mask"][:, image],
            image_modality=row.expand(4, 1, -1),
        ).pooler_output
        for image, row in enumerate(rows)
    ]
    logits = model(**batch).logits
    assert torch.allclose(model.classifier(torch.cat(pooled, dim=1)), logits, atol=1e-5)
    assert not torch.allclose(model.classifier(torch.cat(pooled[::-1], dim=1)), logits, atol=1e-3)


@torch.no_grad()
def test_a_filled_mask_is_the_pretraining_heads():
    pretraining, batch = PRETRAINING.build(), PRETRAINING.batch()
    model = VlpViltForMaskedLM(vilt_config()()).eval()
    missing, unexpected = model.load_state_dict(pretraining.state_dict(), strict=False)
    assert not missing and unexpected
    words = {"input_ids": batch["mlm_input_ids"], "attention_mask": batch["attention_mask"]}
    image = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    output = model(**words, **image, labels=batch["mlm_labels"])
    assert torch.allclose(output.loss, pretraining(**batch).losses["mlm"], atol=1e-5)
    assert (
        output.logits.shape == (4, 10, VOCABULARY)
        and model.train()(**words, **image, labels=batch["mlm_labels"]).logits is None
    )
    assert torch.equal(model.eval()(**words, **image).logits, output.logits)


# Transfers between stages


def test_tasks_begin_from_a_pretraining_folder(tmp_path):
    pretraining = PRETRAINING.build()
    pretraining.save_pretrained(tmp_path)
    trunk = {name: value for name, value in pretraining.vilt.state_dict().items() if "mask_token" not in name}
    new = {}
    for task in (
        VlpViltModel,
        VlpViltForMaskedLM,
        VlpViltForImageTextRetrieval,
        VlpViltForVisualReasoning,
        VlpViltForVisualQuestionAnswering,
    ):
        model, told = task.from_pretrained(tmp_path, output_loading_info=True)
        assert not told["unexpected_keys"], task
        new[task] = told["missing_keys"]
        held = model.base_model.state_dict()
        assert all(torch.equal(held[name], trunk[name]) for name in held if name in trunk), task
    assert not new[VlpViltModel] and not new[VlpViltForMaskedLM] and not new[VlpViltForImageTextRetrieval]
    assert all(name.startswith("classifier.") for name in new[VlpViltForVisualQuestionAnswering])
    assert new[VlpViltForVisualReasoning] - {"second_image_embedding"} == new[VlpViltForVisualQuestionAnswering]

    retrieval = VlpViltForImageTextRetrieval.from_pretrained(tmp_path)
    assert torch.equal(retrieval.rank_head.weight[0], pretraining.itm_head.weight[1])
    assert torch.equal(retrieval.rank_head.bias[0], pretraining.itm_head.bias[1])
    assert {name for name, p in retrieval.named_parameters() if not p.requires_grad} == {
        "itm_head.weight",
        "itm_head.bias",
    }
    reasoning = VlpViltForVisualReasoning.from_pretrained(tmp_path)
    assert torch.equal(reasoning.second_image_embedding[0], pretraining.vilt.modality_embeddings.weight[1])


def test_a_trained_rank_head_and_second_image_are_kept(tmp_path):
    retrieval, reasoning = RETRIEVAL.build(), REASONING.build()
    assert not torch.allclose(retrieval.rank_head.weight[0], retrieval.itm_head.weight[1], atol=1e-3)
    retrieval.save_pretrained(tmp_path / "retrieval")
    reasoning.save_pretrained(tmp_path / "reasoning")
    again = VlpViltForImageTextRetrieval.from_pretrained(tmp_path / "retrieval")
    assert torch.equal(again.rank_head.weight, retrieval.rank_head.weight)
    other = VlpViltForVisualReasoning.from_pretrained(tmp_path / "reasoning")
    assert torch.equal(other.second_image_embedding, reasoning.second_image_embedding)


@torch.no_grad()
def test_the_transformer_begins_as_timms():
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5, "img_size": 48, "patch_size": 8}
    theirs = timm.create_model("vit_base_patch32_224", num_classes=0, class_token=True, **sizes).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = VlpViltModel(VlpViltConfig(**{**vilt_config()().to_dict(), "image_size": 48})).eval()
    before = ours.text_embeddings.word_embeddings.weight.clone()
    ours.fill_tower("image", theirs)
    assert torch.equal(ours.text_embeddings.word_embeddings.weight, before)
    pixels = torch.randn(2, 3, 48, 48)
    embeds, _, _, _ = ours.image_embeddings(pixels)
    assert torch.allclose(ours.norm(ours.encoder(embeds)), theirs.forward_features(pixels), atol=1e-4)

    smaller = VlpViltModel(vilt_config()())  # another size of images: the table is interpolated
    smaller.fill_tower("image", theirs)
    assert torch.equal(smaller.image_embeddings.position_embedding[0], theirs.pos_embed[0, 0])
    assert smaller.image_embeddings.position_embedding.shape == (17, 32)
    deeper = VlpViltModel(VlpViltConfig(**{**vilt_config()().to_dict(), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"other sizes.*encoder.layers.2"):
        deeper.fill_tower("image", theirs)
    with pytest.raises(ValueError, match="no tower 'text'; it has image"):
        ours.fill_tower("text", theirs)
    with pytest.raises(ValueError, match="timm has no model 'vit_bse_patch32_384'"):
        ours.fill_tower("image", "timm/vit_bse_patch32_384")
    with pytest.raises(ValueError, match="write timm/<architecture>"):
        ours.fill_tower("image", "vit_base_patch32_384")


def test_new_words_grow_the_vocabulary_on_both_ends(tmp_path):
    model = ROW["VlpViltForMaskedLM-mixed-sizes"].build()
    batch = ROW["VlpViltForMaskedLM-mixed-sizes"].batch()
    with torch.no_grad():
        before = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(VOCABULARY + 3)
    with torch.no_grad():
        after = model(**batch).logits
    assert after.shape[-1] == VOCABULARY + 3 and torch.allclose(after[..., :VOCABULARY], before, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = VlpViltForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, after, atol=1e-5)
    assert again.mlm_head.decoder.weight is not again.vilt.text_embeddings.word_embeddings.weight


def test_tables_of_positions_change_size():
    model = MODEL.build()
    old = model.text_embeddings.position_embeddings.weight.clone()
    model.resize_position_embeddings(20)
    assert model.config.max_position_embeddings == 20
    assert torch.equal(model.text_embeddings.position_embeddings.weight[:16], old)
    model(torch.ones(1, 20, dtype=torch.long), pixel_values=torch.randn(1, 3, 32, 32))
    model.resize_image_positions(64)
    assert model.config.image_size == 64 and model.image_embeddings.position_embedding.shape[0] == 65
    with pytest.raises(ValueError, match="image_size 7 is smaller than one patch of 8"):
        model.resize_image_positions(7)


# Bad input


def test_one_side_alone_is_refused_with_the_way_out():
    for row in ROW.values():
        for verb in ("get_image_features", "get_text_features"):
            with pytest.raises(ValueError, match="score_pairs"):
                getattr(row.build(), verb)(torch.zeros(1, 3, 32, 32))
    model, batch = MODEL.build(), MODEL.batch()
    for name in ("input_ids", "pixel_values"):
        with pytest.raises(ValueError, match="input_ids and either pixel_values or image_embeds"):
            model(**{key: value for key, value in batch.items() if key != name})
    vqa = ROW["VlpViltForVisualQuestionAnswering-soft-scores"]
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        vqa.build()(input_ids=vqa.batch()["input_ids"])
    with pytest.raises(ValueError, match="give input_ids"):
        vqa.build()(pixel_values=vqa.batch()["pixel_values"])


def test_masks_that_hide_everything_or_do_not_fit_are_named():
    model, batch = MODEL.build(), MODEL.batch()
    hidden = batch["pixel_mask"].clone()
    hidden[2] = 0
    with pytest.raises(ValueError, match=r"row\(s\) \[2\] of pixel_mask are 0 at every patch"):
        model(**batch | {"pixel_mask": hidden})
    with pytest.raises(ValueError, match=r"pixel_mask must be \[4, 32, 32\].*got \[4, 16, 32\]"):
        model(**batch | {"pixel_mask": hidden[:, :16]})
    with pytest.raises(ValueError, match="smaller than one patch of 8"):
        model(batch["input_ids"], pixel_values=torch.randn(4, 3, 7, 32))
    with pytest.raises(ValueError, match="position table has 16 rows"):
        model(torch.ones(1, 17, dtype=torch.long), pixel_values=torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="4 input_ids, 2 image"):
        model(batch["input_ids"], pixel_values=batch["pixel_values"][:2])


def test_a_batch_without_masked_words_and_texts_without_words():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    batch["mlm_labels"] = torch.full_like(batch["mlm_labels"], -100)
    batch["attention_mask"] = torch.ones(4, 2, dtype=torch.long)  # [CLS] and [SEP] alone
    for name in ("input_ids", "mlm_input_ids", "mlm_labels"):
        batch[name] = batch[name][:, :2]
    output = model(**batch)
    assert output.losses["mlm"] == output.counts["mlm"] == 0 and output.losses["wpa"] == 0
    assert output.losses["itm"] > 0 and output.counts["itm"] == 4
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    wpa = model(**batch).losses["wpa"]
    model.zero_grad()
    wpa.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    whole = PRETRAINING.batch()
    assert model(**whole).losses["wpa"] != 0 and model(**whole).losses["mlm"] > 0


def test_what_a_term_lacks_is_named():
    model, batch = PRETRAINING.build(), PRETRAINING.batch()
    for name in ("pixel_values", "mlm_labels", "itm_labels", "mpp_replace"):
        with pytest.raises(ValueError, match=f"pre-training needs {name} in the batch"):
            model(**{key: value for key, value in batch.items() if key != name})
    with pytest.raises(ValueError, match="4 input_ids.*3 itm_labels"):
        model(**batch | {"itm_labels": batch["itm_labels"][:3]})
    with pytest.raises(ValueError, match="itm_weight is 0"):
        VlpViltForPreTraining(vilt_config(itm_weight=0, wpa_weight=0)()).score_pairs(
            batch["input_ids"], pixel_values=batch["pixel_values"]
        )
    nothing = VlpViltForPreTraining(vilt_config(mlm_weight=0, itm_weight=0, wpa_weight=0)())
    with pytest.raises(ValueError, match="every term of pre-training has weight 0"):
        nothing(**batch)


def test_labels_that_do_not_fit_are_named():
    row = ROW["VlpViltForVisualQuestionAnswering-soft-scores"]
    with pytest.raises(ValueError, match=rf"labels must be scores of every answer \[4, {CLASSES}\]"):
        row.build()(**row.batch() | {"labels": torch.zeros(4, dtype=torch.long)})
    batch = REASONING.batch()
    for pixels in (batch["pixel_values"][:, :1], batch["pixel_values"][:, 0]):
        with pytest.raises(ValueError, match="two images for each statement"):
            REASONING.build()(**batch | {"pixel_values": pixels, "pixel_mask": None})
    batch = RETRIEVAL.batch()
    with pytest.raises(ValueError, match="several texts an image"):
        RETRIEVAL.build()(
            **{**batch, "input_ids": batch["input_ids"][:, 0], "attention_mask": batch["attention_mask"][:, 0]}
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 is not a multiple"),
        ({"image_size": 16}, "image_size 16 is smaller than one patch of 32"),
        ({"wpa_weight": 0.1, "itm_weight": 0}, "computed on the pass of matching"),
        ({"mlm_weight": -1}, "mlm_weight must be 0 or more, got -1"),
        ({"wpa_solver": "sinkhorm"}, "wpa_solver must be one of"),
        ({"wpa_beta": 0}, "wpa_beta must be above 0"),
        ({"max_image_length": 0}, "max_image_length must be 1 or more"),
        ({"num_hidden_layer": 3}, "did you mean 'num_hidden_layers'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        VlpViltConfig(**fields)
