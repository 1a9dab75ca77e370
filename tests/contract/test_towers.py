"""Towers of any make: taken over with their weights, frozen, saved, loaded alone; and the classifier on the image tower."""

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
from tests.contract.rows import ROWS, bert_config, text_config, vision_config

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ein", "roter", "kreis", "ball", "rouge", "un"]


def row(name):
    return next(row for row in ROWS if row.name == name)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys()) and bool(
        one.keys() & other.keys()
    )


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


# One tower out of a folder with both


@pytest.mark.parametrize(
    "whole",
    ["VlpClipModel-vit", "VlpClipForPreTraining-vit", "VlpClipForPreTraining-sigmoid", "VlpClipForPreTraining-resnet"],
)
def test_each_tower_loads_alone_out_of_a_whole_folder(whole, tmp_path):
    whole_row = row(whole)
    model = whole_row.build()
    model.save_pretrained(tmp_path / "whole")
    base = getattr(model, "clip", model)
    for tower, key in ((base.text_model, "input_ids"), (base.vision_model, "pixel_values")):
        alone, info = type(tower).from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values()), info
        assert same(alone, tower)
        main = whole_row.batch()[key]
        assert torch.allclose(alone(main).pooler_output, tower(main).pooler_output, atol=1e-6)
        alone.save_pretrained(tmp_path / key)
        assert type(AutoModel.from_pretrained(tmp_path / key)) is type(tower)
        assert same(AutoModel.from_pretrained(tmp_path / key), tower)


def test_a_pretrained_folder_loads_as_a_pair_and_back(tmp_path):
    model = row("VlpClipForPreTraining-vit").build()
    model.save_pretrained(tmp_path / "pretraining")
    pair, info = VlpClipModel.from_pretrained(tmp_path / "pretraining", output_loading_info=True)
    assert not any(info.values()) and same(pair, model.clip)
    pair.save_pretrained(tmp_path / "pair")
    back, info = VlpClipForPreTraining.from_pretrained(tmp_path / "pair", output_loading_info=True)
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
