"""What models say to input they cannot use: a typed error with the value at fault and what to do."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForPreTraining, BertModel

from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining, VlpClipModel, VlpClipTextModel, VlpClipVisionModel
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining, VlpVseGridModel, VlpVseGruModel, VlpVseModel
from tests.contract.rows import END, REGION, ROWS, bert_config, text_config, vision_config


def row(name):
    return next(row for row in ROWS if row.name == name)


@pytest.fixture(scope="module")
def pair():
    return row("VlpClipModel-vit").build()


@pytest.fixture(scope="module")
def batch():
    return row("VlpClipModel-vit").batch()


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    pair.save_pretrained(path)
    return path


def test_texts_without_end_of_text(pair, batch):
    ids = batch["input_ids"].clone()
    ids[1][ids[1] == END] = 5
    ids[3][ids[3] == END] = 5
    for call in (lambda: pair(input_ids=ids, pixel_values=batch["pixel_values"]), lambda: pair.get_text_features(ids)):
        with pytest.raises(
            ValueError, match=r"row\(s\) \[1, 3\].*no end-of-text token \(eos_token_id 39\).*largest_id"
        ):
            call()


def test_texts_padded_on_the_left(pair, batch):
    ids = torch.tensor([[38, 5, 6, END, END, END], [END, END, 38, 5, 6, END], [38, 5, 6, 7, 8, END]])
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1] * 6])
    left = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6])
    pixels = batch["pixel_values"][:3]
    calls = (
        lambda mask: pair(input_ids=ids, pixel_values=pixels, attention_mask=mask),
        lambda mask: pair.get_text_features(ids, mask),
        lambda mask: pair.score_pairs(ids, pixels, mask),
        lambda mask: pair.text_model(ids, attention_mask=mask),
    )
    for call in calls:
        call(right)
        for mask in (left, left.bool()):
            with pytest.raises(
                ValueError, match=r"at or before the end of text in row\(s\) \[1\]: pad texts on the right"
            ):
                call(mask)
    assert torch.equal(pair.get_text_features(ids, right), pair.get_text_features(ids))


def test_the_original_rule_takes_texts_without_end_of_text(batch):
    config = text_config()
    config.pooling = "largest_id"
    ids = torch.tensor([[1, 7, 3, 7]])
    output = VlpClipTextModel(config).eval()(ids)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, 1])


def test_a_text_longer_than_the_table(pair):
    with pytest.raises(ValueError, match="texts of 17 tokens, but the position table has 16 rows: truncate"):
        pair.get_text_features(torch.full((1, 17), END))


def test_the_table_can_be_made_longer_or_shorter(folder, batch, tmp_path):
    model = VlpClipModel.from_pretrained(folder)
    before = model.get_text_features(batch["input_ids"])
    model.resize_position_embeddings(20)
    assert torch.equal(model.get_text_features(batch["input_ids"]), before)
    longer = torch.full((1, 20), 5)
    longer[0, -1] = END
    assert model.get_text_features(longer).shape == (1, 24)
    model.save_pretrained(tmp_path)
    assert VlpClipModel.from_pretrained(tmp_path).get_text_features(longer).isfinite().all()
    model.resize_position_embeddings(10)
    assert torch.equal(model.get_text_features(batch["input_ids"]), before)
    with pytest.raises(ValueError, match="texts of 11 tokens, but the position table has 10 rows"):
        model.get_text_features(longer[:, -11:])


def test_pixels_of_a_wrong_shape(pair):
    resnet = row("VlpClipModel-resnet").build()
    for model, shape, message in (
        (pair, (2, 1, 32, 32), r"must be \[B, 3, H, W\], got shape \(2, 1, 32, 32\)"),
        (pair, (3, 32, 32), r"must be \[B, 3, H, W\], got shape \(3, 32, 32\)"),
        (pair, (2, 3, 7, 32), r"\(7, 32\) pixels are smaller than one patch of 8"),
        (resnet, (2, 1, 64, 64), r"got shape \(2, 1, 64, 64\)"),
        (resnet, (2, 3, 64, 31), r"32 or more, got shape \(2, 3, 64, 31\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.get_image_features(torch.zeros(shape))


def test_a_missing_side(pair, batch):
    for given in ({"input_ids": batch["input_ids"]}, {"pixel_values": batch["pixel_values"]}, {}):
        with pytest.raises(
            ValueError, match="needs input_ids and pixel_values.*get_text_features or get_image_features"
        ):
            pair(**given)
        with pytest.raises(ValueError, match="needs input_ids and pixel_values"):
            row("VlpClipForPreTraining-vit").build()(**given)
    with pytest.raises(ValueError, match="needs pixel_values"):
        row("VlpClipForImageClassification-vit").build()()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        pair.text_model()


def test_sides_of_different_number(pair, batch):
    fewer = {"input_ids": batch["input_ids"][:3], "pixel_values": batch["pixel_values"]}
    with pytest.raises(ValueError, match="got 3 input_ids, 4 pixel_values"):
        row("VlpClipForPreTraining-vit").build()(**fewer)
    with pytest.raises(ValueError, match="got 3 input_ids, 4 pixel_values"):
        pair.score_pairs(**fewer)
    assert pair(**fewer).logits_per_image.shape == (4, 3)  # every text against every image needs no pairs


def test_identities_of_another_number(batch):
    with pytest.raises(ValueError, match="got 4 input_ids, 4 pixel_values, 3 image_ids"):
        row("VlpClipForPreTraining-vit").build()(**batch, image_ids=torch.tensor([1, 2, 3]))


def test_heads_that_do_not_fit():
    model = row("VlpClipForImageClassification-vit").build()
    with pytest.raises(ValueError, match="3 classes x 24 with 2 biases and 3 labels"):
        model.set_linear_head(torch.zeros(3, 24), torch.zeros(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 classes x 20"):
        model.set_zero_shot_head(torch.zeros(20, 3), ["a", "b", "c"])


def test_the_checkpoint_of_another_architecture(tmp_path):
    BertModel(bert_config()).save_pretrained(tmp_path)
    vse = (VlpVseModel, VlpVseForPreTraining, VlpVseGridModel, VlpVseGruModel)
    for model_class in (VlpClipModel, VlpClipForPreTraining, VlpClipTextModel, VlpClipVisionModel, *vse):
        with pytest.raises(ValueError, match=f"model_type 'bert', {model_class.config_class.__name__} describes"):
            model_class.from_pretrained(tmp_path)


def test_another_tower_than_the_folders(tmp_path):
    row("VlpClipModel-resnet").build().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="'vlp_clip_resnet_model', VlpClipVisionConfig describes 'vlp_clip_vision_model'"
    ):
        VlpClipVisionModel.from_pretrained(tmp_path)


def test_a_task_the_architecture_lacks(tmp_path):
    VlpClipVisionModel(vision_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForPreTraining.from_pretrained(tmp_path)


def test_a_truncated_checkpoint(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    for kept in (len(whole) // 2, 100, 4, 0):
        (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:kept])
        with pytest.raises((SafetensorError, OSError, ValueError)):
            AutoModel.from_pretrained(tmp_path / "cut")


def test_a_folder_without_weights_or_configuration(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError), match="nothing"):
        AutoModel.from_pretrained(tmp_path / "nothing")


def test_a_configuration_that_does_not_fit_the_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["projection_dim"] = 25
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(tmp_path / "other")


# VSE-infinity


@pytest.fixture(scope="module")
def regions():
    return row("VlpVseForPreTraining-region-gru").build()


@pytest.fixture(scope="module")
def grid():
    return row("VlpVseForPreTraining-grid-gru").build()


def calls_with_images(model, batch):
    """Everything that takes the image side."""
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    base = model.base_model
    images = (base.encode_image, base.get_image_features, model.get_image_features)
    pairs = (base, model, base.score_pairs, model.score_pairs)
    return [*images, *(partial(call, **texts) for call in pairs)]


def test_the_other_side_of_images_than_the_model_takes(regions, grid):
    batch = row("VlpVseForPreTraining-region-gru").batch()
    features, pixels = {"region_features": batch["region_features"]}, {"pixel_values": torch.zeros(4, 3, 32, 32)}
    for call in calls_with_images(regions, batch):
        call(**features)
        with pytest.raises(ValueError, match="this model sees regions: give region_features"):
            call(**pixels)
        with pytest.raises(ValueError, match="this model sees regions: give region_features alone"):
            call(**features, **pixels)
    for call in calls_with_images(grid, batch):
        call(**pixels)
        with pytest.raises(ValueError, match="this model sees pixels: give pixel_values"):
            call(**features)
        with pytest.raises(ValueError, match="this model sees pixels: give pixel_values alone"):
            call(**features, **pixels)


def test_region_features_of_a_wrong_shape(regions):
    batch = row("VlpVseForPreTraining-region-gru").batch()
    for shape in ((4, 6, REGION + 1), (4, REGION), (4, 1, 6, REGION)):
        for call in calls_with_images(regions, batch):
            with pytest.raises(ValueError, match=rf"must be \[B, R, {REGION}\] for this model, got \({shape[0]}, "):
                call(region_features=torch.zeros(shape))


@pytest.mark.parametrize("training", [False, True])
def test_masks_of_another_shape_or_without_an_element(training):
    for name, key in (("region-gru", "region_mask"), ("grid-gru", "grid_mask")):
        model, batch = (
            row(f"VlpVseForPreTraining-{name}").build().train(training),
            row(f"VlpVseForPreTraining-{name}").batch(),
        )
        for wrong in (batch[key][:, :-1], batch[key][:, :1], batch[key][:3], batch[key][0]):
            with pytest.raises(ValueError, match=r"mask.* got \["):
                model(**dict(batch, **{key: wrong}))
        empty = batch[key].clone()
        empty[2] = 0
        for mask, rows in ((empty, r"\[2\]"), (torch.zeros_like(empty), r"\[0, 1, 2, 3\]")):
            with pytest.raises(ValueError, match=rf"row\(s\) {rows} of the mask hold no element to pool"):
                model(**dict(batch, **{key: mask}))
        # nobody's statistics were spoilt by it
        assert model(**batch).loss.isfinite() and all(tensor.isfinite().all() for tensor in model.buffers())


def test_texts_without_a_token_or_padded_on_the_left(regions):
    batch = row("VlpVseForPreTraining-region-gru").batch()
    empty, left = batch["attention_mask"].clone(), batch["attention_mask"].clone()
    empty[1], left[3, 0] = 0, 0
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] of the mask hold no element"):
        regions.get_text_features(batch["input_ids"], empty)
    for mask in (left, left.flip(1), left.bool()):
        with pytest.raises(ValueError, match=r"in row\(s\) \[.*3\]: pad texts on the right"):
            regions.get_text_features(batch["input_ids"], mask)
    # positions of BERT count from the start too, but it knows what it does not see
    bert = row("VlpVseForPreTraining-region-bert").build()
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] of the mask hold no element"):
        bert.get_text_features(batch["input_ids"], empty)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        regions.vse.text_model()


def test_a_missing_side_and_sides_of_different_number(regions):
    batch = row("VlpVseForPreTraining-region-gru").batch()
    for given in ({"input_ids": batch["input_ids"]}, {"region_features": batch["region_features"]}, {}):
        with pytest.raises(ValueError, match="needs input_ids and .*get_text_features or get_image_features"):
            regions.vse(**given)
        with pytest.raises(ValueError, match="needs input_ids and pixel_values or region_features"):
            regions(**given)
    fewer = {**batch, "input_ids": batch["input_ids"][:3], "attention_mask": batch["attention_mask"][:3]}
    with pytest.raises(ValueError, match="got 3 input_ids, 4 images, 4 image_ids"):
        regions(**fewer)
    with pytest.raises(ValueError, match="got 4 input_ids, 4 images, 3 image_ids"):
        regions(**dict(batch, image_ids=batch["image_ids"][:3]))
    del fewer["image_ids"]
    with pytest.raises(ValueError, match="got 3 input_ids, 4 region_mask, 4 region_features"):
        regions.score_pairs(**fewer)
    assert regions.vse(**fewer).logits_per_image.shape == (4, 3)  # every text against every image needs no pairs


def test_a_grid_model_from_the_folder_of_a_region_model(tmp_path):
    row("VlpVseModel-region-bert").build().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="'vlp_vse' of this folder has no vision_config, which VlpVseGridConfig describes"
    ):
        VlpVseGridModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert', VlpVseGruConfig describes 'vlp_vse_gru_model'"):
        VlpVseGruModel.from_pretrained(tmp_path)
