"""The recipes of VSE-infinity's published models: sizes, parameter groups, ramps and rates as the paper's code has them."""

from pathlib import Path

import pytest
import torch

from conversion.vse_layouts import GRAPHS_OF_SOURCES
from hf_vlp.data.samplers import UniqueImageBatchSampler
from hf_vlp.inputs.image_augmentations import RandomCropSquash, TrainingTransform
from hf_vlp.models.vse.configuration_vse import VlpVseGruConfig
from hf_vlp.models.vse.image_processing_vse import VlpVseImageProcessor, backbone_colours
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining
from hf_vlp.training.building import build_config
from hf_vlp.training.optim import optimizer_of, rate_factor
from hf_vlp.training.ramps import ramp_value, ramped
from hf_vlp.training.recipe import load_recipe
from hf_vlp.training.steps import plain_step

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
VARIANTS = ("butd_region_bert", "butd_region_bigru", "butd_grid_bert", "butd_grid_bigru", "wsl_grid_bert")
NAMES = [f"vse_{data}_{variant}" for data in ("coco", "f30k") for variant in VARIANTS]
PICTURES = {"coco": 113_287, "f30k": 29_000}
EPOCHS, ONE = 125, 5  # ours, and how many of them show as many captions as one of the original's 25
# Published counts, of what is used: without BERT's pooler, the CNN's classifier and a batch norm that is never called.
POOLER, CLASSIFIER, UNUSED_NORM = 768 * 768 + 768, 2_049_000, 2 * 1024
IMAGE_SIDE = {
    "butd_region": 3_688_352 - UNUSED_NORM,
    "butd_grid": 46_660_040 - CLASSIFIER,
    "wsl_grid": 90_902_216 - CLASSIFIER,
}
TEXT_SIDE = {"bert": 110_282_400 - POOLER, "bigru": 8_159_648 + 300 * 11_354}


def recipe_of(name):
    return load_recipe(CONFIGS / f"{name}.yaml")


def model_of(recipe):
    config = build_config(recipe)
    if isinstance(config.text_config, VlpVseGruConfig):
        config.text_config.vocab_size = 11_354
    with torch.device("meta"):
        return VlpVseForPreTraining(config)


def test_there_is_a_recipe_for_every_published_model():
    assert {path.stem for path in CONFIGS.glob("vse_*.yaml") if "emoji" not in path.stem} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_published_ones(name):
    recipe, model = recipe_of(name), model_of(recipe_of(name))
    _, _, source, kind, text = name.split("_")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    text_side = sum(size for name, size in sizes.items() if name.startswith("vse.text_"))
    assert (sum(sizes.values()) - text_side, text_side) == (IMAGE_SIDE[f"{source}_{kind}"], TEXT_SIDE[text])
    config = model.config
    assert (config.margin, config.hardest_negatives, config.contrastive_targets) == (0.2, 1.0, "plain")
    assert config.normalize_image and config.normalize_text and (config.position_size, config.pooling_size) == (32, 32)
    assert recipe.processor.tokenizer == recipe.model.towers.get("text_model")
    if text == "bert":
        assert recipe.model.towers["text_model"] == "google-bert/bert-base-uncased"
        told = config.text_config
        assert (told.hidden_dropout_prob, told.attention_probs_dropout_prob, told.layer_norm_eps) == (0.1, 0.1, 1e-12)
    else:
        assert (recipe.processor.vocabulary, recipe.processor.minimum_count) == ("words", 4)
    assert ("vision_model" in recipe.model.towers) == (kind == "grid")


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_the_papers(name):
    recipe = recipe_of(name)
    _, data, source, kind, _ = name.split("_")
    shares = recipe.data.size_augmentation
    assert (shares.captions, shares.regions, shares.grid) == (0.2, 0.2 * (kind == "region"), 0.2 * (kind == "grid"))
    if kind == "region":
        assert recipe.data.regions == f"data/{data}/butd.regions" and recipe.data.train == f"data/{data}/precomp"
        splits = (recipe.data.train_split, recipe.data.validation_split, recipe.data.test_split)
        assert splits == ("train", "dev", "testall" if data == "coco" else "test")
        config = build_config(recipe)
        assert (config.vision_config, config.region_size, config.region_norm_rows) == (None, 2048, "all")
        return
    backbone = "detector" if source == "butd" else "wsl"
    vision = build_config(recipe).vision_config
    assert (vision.graph, vision.image_size, vision.freeze_norms) == (GRAPHS_OF_SOURCES[backbone], 512, True)
    processor = VlpVseImageProcessor(size=vision.image_size, **recipe.processor.image_processor)
    expected = VlpVseImageProcessor(size=512, **backbone_colours(backbone))
    for option in ("channel_order", "do_rescale", "image_mean", "image_std", "size"):
        assert getattr(processor, option) == getattr(expected, option), option
    transform = TrainingTransform(processor, **recipe.data.augmentation)
    assert isinstance(transform.augment, RandomCropSquash) and transform.canvas is None
    assert (transform.augment.size, transform.augment.smallest) == (512, 0.6)
    assert len(recipe.data.image_root) and recipe.data.train.endswith(".json")


def expected_group(name: str, kind: str, text: str) -> tuple[float, float]:
    """Rate and decay of a parameter, as the released training scripts set them."""
    rate = 5e-4
    if name.startswith("vse.vision_model."):
        rate *= 0.01
    if name.startswith("vse.text_model.") and text == "bert":
        rate *= 0.1
    return rate, 0.01 if (kind, text) == ("region", "bigru") else 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_are_the_papers(name):
    recipe, model = recipe_of(name), model_of(recipe_of(name))
    _, _, _, kind, text = name.split("_")
    optimizer = optimizer_of(model, recipe.optimizer, recipe.training.batch_size)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["names"]
    }
    assert found == {
        parameter: pytest.approx(expected_group(parameter, kind, text)) for parameter, _ in model.named_parameters()
    }
    assert len(optimizer.param_groups) == 1 + (text == "bert") + (kind == "grid")
    assert all((group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8) for group in optimizer.param_groups)
    assert type(optimizer) is torch.optim.AdamW and recipe.training.clip_norm == 2.0
    assert recipe.training.batch_size == 128 and recipe.training.mixed_precision == "no"


@pytest.mark.parametrize("name", NAMES)
def test_epochs_rates_and_ramps_are_the_papers_in_units_of_one_caption_a_picture(name):
    recipe = recipe_of(name)
    _, data, _, kind, _ = name.split("_")
    batches = len(UniqueImageBatchSampler(range(PICTURES[data]), 128))
    steps = EPOCHS * batches
    # what the original takes for its 25 epochs, but for the batches that do not get full
    assert recipe.training.epochs == EPOCHS and steps == pytest.approx(25 * (5 * PICTURES[data] // 128), rel=0.002)
    assert recipe.training.evaluate_every == recipe.training.save_every == ONE * batches
    assert (recipe.training.final, recipe.training.best_metric) == ("best", "validation/rsum")
    schedule = {key: getattr(recipe.schedule, key) for key in ("name", "warmup_steps", "milestones", "gamma")}
    for epoch, expected in ((0, 1), (14, 1), (15, 0.1), (24, 0.1)):
        assert rate_factor(epoch * ONE * batches, total_steps=steps, **schedule) == pytest.approx(expected)
    assert rate_factor(15 * ONE * batches - 1, total_steps=steps, **schedule) == 1

    def at(ramp, epoch):
        return ramp_value(recipe.ramps[ramp], epoch * ONE)

    assert [at("hardest_negatives", epoch) for epoch in (0, 0.5, 0.999, 1, 2, 24)] == [0, 0, 0, 1, 1, 1]
    if kind == "region":
        assert set(recipe.ramps) == {"hardest_negatives"}
    else:
        assert set(recipe.ramps) == {"hardest_negatives", "frozen_stages", "loss_factor"}
        assert [at("frozen_stages", epoch) for epoch in (0, 0.999, 1, 24)] == [4, 4, 0, 0]
        alpha = [at("loss_factor", epoch) for epoch in (0, 0.5, 0.999, 1, 1.25, 1.5, 2, 24)]
        assert alpha == pytest.approx([1, 1, 1, 0, 0.25, 0.5, 1, 1])
    assert all(ramp.unit == "epochs" for ramp in recipe.ramps.values())
    ramped(plain_step, recipe.ramps, model_of(recipe), stream=None)  # the model has them all, with these values
