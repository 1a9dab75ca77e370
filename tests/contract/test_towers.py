"""Towers of any make: taken over with their weights, frozen, saved, loaded alone; and the classifier on the image tower."""

import warnings

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    TimmWrapperModel,
    pipeline,
)
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from hf_vlp.inputs.vocabulary import train_clip_tokenizer
from hf_vlp.models.clip.configuration_clip import VlpClipConfig
from hf_vlp.models.clip.image_processing_clip import VlpClipImageProcessorPil
from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining, VlpClipModel, VlpClipTextModel, VlpClipVisionModel
from hf_vlp.models.clip.processing_clip import VlpClipProcessor
from hf_vlp.models.clip.tasks_clip import VlpClipForImageClassification
from hf_vlp.models.vse.configuration_vse import VlpVseConfig
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining, VlpVseModel
from tests.contract.rows import REGION, ROWS, bert_config, text_config, vision_config

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ein", "roter", "kreis", "ball", "rouge", "un"]


def row(name):
    return next(row for row in ROWS if row.name == name)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys()) and bool(
        one.keys() & other.keys()
    )


def test_reading_texts_warns_of_nothing():
    model = VlpClipTextModel(text_config()).eval()
    ids = torch.full((1, 4), model.config.eos_token_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(model(ids).pooler_output, model.pooled_output(ids), atol=1e-5)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    config = bert_config()
    config.vocab_size = len(WORDS)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(2)
    TimmWrapperModel(TimmWrapperConfig(architecture="test_resnet")).save_pretrained(folder)
    return folder


# Towers by name


def test_two_pretrained_towers_keep_their_weights(bert_folder, timm_folder, tmp_path):
    model = VlpClipModel.from_towers(str(timm_folder), str(bert_folder), projection_dim=24)
    assert same(model.text_model, BertModel.from_pretrained(bert_folder, add_pooling_layer=False))
    assert same(model.vision_model, TimmWrapperModel.from_pretrained(timm_folder))
    other = VlpClipModel(model.config)
    assert not same(model.text_model, other.text_model)

    model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
    mask = (ids > 0).long()
    assert torch.allclose(loaded.score_pairs(ids, images, mask), model.score_pairs(ids, images, mask), atol=1e-6)


def test_towers_may_be_given_as_models():
    text, vision = VlpClipTextModel(text_config()), VlpClipVisionModel(vision_config())
    model = VlpClipModel.from_towers(vision, text, projection_dim=24)
    assert same(model.text_model, text) and same(model.vision_model, vision)
    assert model.config.projection_dim == 24


def test_towers_whose_weights_are_others(timm_folder, bert_folder):
    vision = VlpClipVisionModel(vision_config())
    with pytest.raises(ValueError, match=r"BertForMaskedLM given as text_model.*lacks embeddings\..*besides bert\."):
        VlpClipModel.from_towers(vision, BertForMaskedLM.from_pretrained(bert_folder))
    # a pooler that is wanted must be there, though the attribute alone is
    bare = BertModel.from_pretrained(bert_folder, add_pooling_layer=False)
    assert bare.pooler is None
    with pytest.raises(ValueError, match="lacks pooler.dense.weight"):
        VlpClipModel.from_towers(vision, bare, foreign_text_pooling="pooler")
    assert same(VlpClipModel.from_towers(vision, bare).text_model, bare)
    bare.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="lacks nothing and has besides extra.weight, extra.bias"):
        VlpClipModel.from_towers(vision, bare)


def test_a_tower_with_a_pooler_and_its_pooling(bert_folder, timm_folder):
    pooled = {}
    ids = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
    for pooling in ("mean", "first", "pooler"):
        torch.manual_seed(0)
        model = VlpClipModel.from_towers(
            str(timm_folder), str(bert_folder), projection_dim=24, foreign_text_pooling=pooling
        ).eval()
        outputs = model.text_model(input_ids=ids, attention_mask=(ids > 0).long())
        pooled[pooling] = model.pool_text(outputs, (ids > 0).long())
    states = outputs.last_hidden_state
    assert torch.allclose(pooled["first"], states[:, 0])
    assert torch.allclose(pooled["mean"][1], states[1, :3].mean(0), atol=1e-6)
    assert torch.allclose(pooled["pooler"], BertModel.from_pretrained(bert_folder).eval().pooler(states), atol=1e-6)


def test_a_frozen_tower_gets_no_gradient_and_the_rest_does(bert_folder, timm_folder):
    pair = VlpClipModel.from_towers(str(timm_folder), str(bert_folder), projection_dim=24)
    model = VlpClipForPreTraining(pair.config)
    model.clip = pair
    model.clip.vision_model.requires_grad_(False)
    ids = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
    model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32), attention_mask=(ids > 0).long()).loss.backward()
    assert all(p.grad is None for p in model.clip.vision_model.parameters())
    rest = [p for name, p in model.named_parameters() if "vision_model" not in name]
    assert rest and all(p.grad is not None for p in rest)


def test_the_text_towers_tokenizer_travels_with_the_processor(bert_folder, timm_folder, tmp_path):
    from transformers import AutoTokenizer

    images = VlpClipImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = VlpClipProcessor(images, AutoTokenizer.from_pretrained(bert_folder))
    model = VlpClipModel.from_towers(str(timm_folder), str(bert_folder), projection_dim=24).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is VlpClipProcessor and again.text_cleaning == "none"
    batch = again(
        images=[Image.new("RGB", (40, 30), color) for color in ("red", "blue")],
        text=["ein roter kreis", "un ball rouge"],
    )
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 10, 8, 9, 3]]
    assert torch.allclose(loaded(**batch).logits_per_image, model(**batch).logits_per_image, atol=1e-5)


# VSE-infinity's towers


def test_pretrained_towers_fill_a_vse_and_nothing_else(bert_folder, timm_folder):
    model = VlpVseModel(
        VlpVseConfig(text_config=str(bert_folder), vision_config="timm/test_resnet", projection_dim=20)
    ).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bert, timm = BertModel.from_pretrained(bert_folder), TimmWrapperModel.from_pretrained(timm_folder)
    assert not same(model.text_model, bert) and not same(model.vision_model, timm)
    model.fill_tower("text_model", str(bert_folder))
    model.fill_tower("vision_model", timm)
    assert same(model.text_model, bert) and same(model.vision_model, timm)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("text_m", "vision_m"))}
    assert rest and all(torch.equal(tensor, before[name]) for name, tensor in rest.items())
    with pytest.raises(ValueError, match="VlpVseModel has no tower 'text_tower'; it has text_model, vision_model"):
        model.fill_tower("text_tower", str(bert_folder))
    with pytest.raises(ValueError, match=r"BertForMaskedLM given as text_model.*lacks embeddings\..*besides bert\."):
        model.fill_tower("text_model", BertForMaskedLM.from_pretrained(bert_folder))
    regions = VlpVseModel(VlpVseConfig(text_config=str(bert_folder), projection_dim=20, region_size=REGION))
    with pytest.raises(ValueError, match="no tower 'vision_model'; it has text_model"):
        regions.fill_tower("vision_model", timm)


@pytest.mark.parametrize("name", ["ResNetConfig", "ConvNextConfig", "ViTConfig", "Dinov2Config"])
def test_image_encoders_of_transformers_are_grids(name):
    import transformers

    if name in ("ResNetConfig", "ConvNextConfig"):
        config = getattr(transformers, name)(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1])
        width, cells = 24, 4
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
        config = getattr(transformers, name)(patch_size=32, **sizes)
        width, cells = 16, 5  # a class token among them
    model = VlpVseModel(VlpVseConfig(text_config=bert_config(), vision_config=config, projection_dim=20)).eval()
    assert model.visual_projection.in_features == width and model.count_cells(64, 64) == cells
    images = torch.randn(2, 3, 64, 64)
    whole, cut = model.encode_image(images), model.encode_image(images, grid_mask=torch.ones(2, cells).tril(cells - 2))
    assert whole.shape == (2, 20) and torch.allclose(whole[1], cut[1], atol=1e-5)
    assert not torch.allclose(whole[0], cut[0], atol=1e-4)


@pytest.mark.parametrize("tower", ["roberta", "distilbert", "xlm"])
def test_text_encoders_of_transformers_read_captions(tower):
    from transformers import DistilBertConfig, RobertaConfig, XLMConfig

    config = {
        "roberta": lambda: RobertaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        "distilbert": lambda: DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16),
        "xlm": lambda: XLMConfig(vocab_size=40, emb_dim=16, n_layers=1, n_heads=2),
    }[tower]()
    model = VlpVseModel(VlpVseConfig(text_config=config, projection_dim=20, region_size=REGION)).eval()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    ids, mask = torch.tensor([[3, 4, 5, 1], [3, 4, 1, 1]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    features = model.get_text_features(ids, mask)
    assert torch.allclose(features[1], model.get_text_features(ids[1:, :2], mask[1:, :2])[0], atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_a_word_replaced_by_padding_is_pooled_but_bert_does_not_attend_to_it():
    """As in the released code, where caption augmentation may draw the padding id for a word."""
    model = row("VlpVseModel-region-bert").build()
    mask, states = torch.ones(1, 5, dtype=torch.long), {}
    for replaced in (0, 9):
        ids = torch.tensor([[3, 7, replaced, 8, 4]])
        bert_mask = (ids != 0).long()
        states = model.text_model(input_ids=ids, attention_mask=bert_mask).last_hidden_state
        expected = model.text_pooling(model.text_projection(states), mask)[0]
        assert torch.allclose(model.encode_text(ids, mask), expected, atol=1e-6)
        assert torch.allclose(model.encode_text(ids), expected, atol=1e-6)  # without a mask every id is an element
        attended = model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        other = model.text_pooling(model.text_projection(attended), mask)[0]
        shorter = model.text_pooling(model.text_projection(states), bert_mask)[0]
        assert torch.allclose(other, expected, atol=1e-3) == (replaced == 9)
        assert torch.allclose(shorter, expected, atol=1e-3) == (replaced == 9)


@pytest.mark.parametrize("variant", ["region-bert", "grid-gru"])
def test_embeddings_are_divided_by_their_length_plus_a_little(variant):
    """eps is added to the norm, not a floor under it: a row of length 1e-8 comes out half as long."""
    model = row(f"VlpVseModel-{variant}").build()
    batch = row(f"VlpVseModel-{variant}").batch()
    image = {name: batch[name] for name in row(f"VlpVseModel-{variant}").image_inputs}
    raw = model.encode_image(**image)
    assert torch.allclose(model.get_image_features(**image), raw / (raw.norm(dim=1, keepdim=True) + 1e-8))
    model.visual_pooling.register_forward_hook(lambda module, args, output: (output[0] * 0, output[1]))
    model.text_pooling.register_forward_hook(
        lambda module, args, output: (1e-8 * torch.nn.functional.normalize(output[0], dim=1), output[1])
    )
    assert not model.get_image_features(**image).any()
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(text.norm(dim=1), torch.full((4,), 0.5), atol=1e-3)


def test_the_loss_of_a_collapsed_model_and_what_a_recipe_may_ramp():
    from hf_vlp.objectives.triplet import collapsed_loss

    regions, grid = row("VlpVseForPreTraining-region-gru").build(), row("VlpVseForPreTraining-grid-gru").build()
    assert isinstance(regions, VlpVseForPreTraining)
    batch = row("VlpVseForPreTraining-region-gru").batch()
    same_embeds = torch.ones(4, 24) / 24**0.5
    for model, share in ((regions, 1.0), (grid, 0.5), (regions, 0.25)):
        model.ramps()["hardest_negatives"](share)
        loss = model.objective(same_embeds, same_embeds)[0].item()
        assert (
            model.collapsed_loss(4) == pytest.approx(collapsed_loss(4, hardest=share)) == pytest.approx(loss, rel=1e-5)
        )
    assert "frozen_stages" not in regions.ramps()
    grid.ramps()["frozen_stages"](2.0)
    assert not grid.vse.vision_model.resnet.layer2[0].conv1.weight.requires_grad
    assert grid.vse.vision_model.resnet.layer3[0].conv1.weight.requires_grad
    # two captions of image 7: with identities they are no negatives of each other
    plain = {name: tensor for name, tensor in batch.items() if name != "image_ids"}
    assert regions(**plain).loss > regions(**batch).loss + 1e-3
    regions.config.contrastive_targets = "plain"
    assert torch.equal(regions(**plain).loss, regions(**batch).loss)


# One tower out of a folder with both


@pytest.mark.parametrize(
    "whole",
    [
        "VlpClipModel-vit",
        "VlpClipForPreTraining-vit",
        "VlpClipForPreTraining-sigmoid",
        "VlpClipForPreTraining-resnet",
        "VlpVseModel-grid-gru",
        "VlpVseForPreTraining-grid-gru",
    ],
)
def test_each_tower_loads_alone_out_of_a_whole_folder(whole, tmp_path):
    whole_row = row(whole)
    model = whole_row.build()
    model.save_pretrained(tmp_path / "whole")
    base = model.base_model
    for tower, key in ((base.text_model, "input_ids"), (base.vision_model, "pixel_values")):
        alone, info = type(tower).from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values()), info
        assert same(alone, tower)
        main = whole_row.batch()[key]
        assert torch.allclose(alone(main)[0], tower(main)[0], atol=1e-6)
        assert torch.allclose(alone(main)[-1], tower(main)[-1], atol=1e-6)
        alone.save_pretrained(tmp_path / key)
        assert type(AutoModel.from_pretrained(tmp_path / key)) is type(tower)
        assert same(AutoModel.from_pretrained(tmp_path / key), tower)


def test_the_text_tower_loads_alone_out_of_a_folder_of_regions(tmp_path):
    model = row("VlpVseForPreTraining-region-gru").build()
    model.save_pretrained(tmp_path)
    alone, info = type(model.vse.text_model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and same(alone, model.vse.text_model)


@pytest.mark.parametrize(
    ("name", "pair_class"),
    [("VlpClipForPreTraining-vit", VlpClipModel), ("VlpVseForPreTraining-region-bert", VlpVseModel)],
)
def test_a_pretrained_folder_loads_as_a_pair_and_back(name, pair_class, tmp_path):
    model = row(name).build()
    model.save_pretrained(tmp_path / "pretraining")
    pair, info = pair_class.from_pretrained(tmp_path / "pretraining", output_loading_info=True)
    assert not any(info.values()) and same(pair, model.base_model)
    pair.save_pretrained(tmp_path / "pair")
    back, info = type(model).from_pretrained(tmp_path / "pair", output_loading_info=True)
    assert not any(info.values()) and same(back, model)


# The classifier


@pytest.mark.parametrize("source", ["VlpClipModel", "VlpClipForPreTraining"])
def test_a_classifier_takes_the_image_side_of_a_pretrained_folder(source, tmp_path):
    model = row(f"{source}-vit").build()
    model.save_pretrained(tmp_path)
    base = getattr(model, "clip", model)
    classifier, info = VlpClipForImageClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(classifier.clip.encode_image(images), base.encode_image(images), atol=1e-6)


def test_a_linear_head_reads_raw_embeddings_and_a_zero_shot_head_unit_ones(tmp_path):
    model = row("VlpClipForImageClassification-vit").build()
    images = torch.randn(4, 3, 32, 32)
    raw = model.clip.encode_image(images)
    weight, bias = torch.randn(3, 24), torch.randn(3)
    model.set_linear_head(weight, bias, ["cat", "dog", "sun"])
    assert torch.allclose(model(images).logits, raw @ weight.T + bias, atol=1e-4)

    columns = nn.functional.normalize(torch.randn(24, 2), dim=0)
    model.set_zero_shot_head(columns, ["red", "blue"])
    expected = 100 * (raw / raw.norm(dim=1, keepdim=True)) @ columns
    assert torch.allclose(model(images).logits, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = VlpClipForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "red", 1: "blue"} and loaded.config.num_labels == 2
    assert torch.allclose(loaded(images).logits, expected, atol=1e-3)


def test_a_classifiers_loss_ignores_minus_one_hundred_and_its_states_are_recorded():
    model = row("VlpClipForImageClassification-vit").build()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, -100, 2, -100])
    output = model(images, labels=labels, output_hidden_states=True)
    log_probabilities = output.logits.log_softmax(1)
    assert torch.allclose(output.loss, -(log_probabilities[0, 0] + log_probabilities[2, 2]) / 2)
    assert len(output.hidden_states) == 3 and output.attentions is None
    assert model(images).hidden_states is None and torch.allclose(model(images).logits, output.logits, atol=1e-5)


def test_zero_shot_pipeline_of_transformers(tmp_path):
    tokenizer = train_clip_tokenizer(
        ["a red circle", "a blue square", "a green ball"] * 4, vocab_size=560, max_length=16
    )
    config = text_config()
    config.vocab_size, config.eos_token_id, config.pad_token_id = (
        len(tokenizer),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = VlpClipModel(VlpClipConfig(text_config=config, vision_config=vision_config(), projection_dim=24)).eval()
    model.save_pretrained(tmp_path)
    images = VlpClipImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = VlpClipProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)

    picture, labels = Image.effect_noise((40, 40), 80).convert("RGB"), ["red circle", "blue square", "green ball"]
    found = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        picture, candidate_labels=labels, hypothesis_template="a {}"
    )
    inputs = AutoProcessor.from_pretrained(tmp_path)(images=picture, text=[f"a {label}" for label in labels])
    expected = model(**inputs).logits_per_image.softmax(1)[0]
    scores = {entry["label"]: entry["score"] for entry in found}
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=2e-2)
    assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
