from pathlib import Path

import pytest
import yaml

from hf_vlp.training.recipe import RecipeError, differences, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
SMALL = {"model": {"model_type": "vlp_clip"}, "data": {"train": "pairs.jsonl"}, "training": {"steps": 10}}


@pytest.fixture
def recipe_file(tmp_path):
    def write(**sections):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({key: SMALL.get(key, {}) | sections.get(key, {}) for key in SMALL | sections}))
        return path

    return write


def test_values_defaults_and_name(recipe_file):
    recipe = load_recipe(recipe_file(optimizer={"lr": 0.01}))
    assert (recipe.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("small", 0.01, 0.2)


@pytest.mark.parametrize(
    "words", [["--training.batch_size", "64"], ["--training.batch_size=64"], ["--batch_size", "64"]]
)
def test_command_line_overrides(recipe_file, words):
    path = recipe_file(training={"batch_size": 32})
    assert load_recipe(path).training.batch_size == 32
    assert load_recipe(path, words).training.batch_size == 64


def test_overrides_reach_into_model_config_and_read_yaml(recipe_file):
    words = ["--model.config.vision_config.width", "16", "--lr", "3e-4", "--cache", "--freeze", "[vision_model]"]
    recipe = load_recipe(recipe_file(model={"config": {"vision_config": {"width": 8, "image_size": 64}}}), words)
    assert recipe.model.config == {"vision_config": {"width": 16, "image_size": 64}}
    assert (recipe.optimizer.lr, recipe.data.cache, recipe.optimizer.freeze) == (3e-4, True, ["vision_model"])


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("optimizer", "weight_deacy", "optimizer.weight_decay"),
        ("training", "batchsize", "training.batch_size"),
        ("training", "weight_decay", "optimizer.weight_decay"),
        ("data", "trian", "data.train"),
    ],
)
def test_an_unknown_key_names_section_and_nearest_key(recipe_file, section, key, nearest):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(**{section: {key: 1}}))
    assert f"'{section}.{key}' in the section {section}" in str(caught.value)
    assert f"nearest valid key is '{nearest}'" in str(caught.value)


def test_an_unknown_word_on_the_command_line(recipe_file):
    with pytest.raises(RecipeError, match="'batch_sise'; the nearest valid key is 'training.batch_size'"):
        load_recipe(recipe_file(), ["--batch_sise", "8"])
    with pytest.raises(RecipeError, match="expected --key value"):
        load_recipe(recipe_file(), ["batch_size", "8"])
    with pytest.raises(RecipeError, match="ambiguous: write --model.from_pretrained or --processor.from_pretrained"):
        load_recipe(recipe_file(), ["--from_pretrained", "folder"])


@pytest.mark.parametrize(
    ("section", "entry", "message"),
    [
        ("training", {"batch_size": "many"}, "training.batch_size = 'many': expected int, got str"),
        ("training", {"batch_size": 2.5}, "training.batch_size = 2.5: expected int, got float"),
        ("training", {"channels_last": 1}, "training.channels_last = 1: expected bool, got int"),
        ("training", {"mixed_precision": "fp8"}, "training.mixed_precision = 'fp8': expected one of no, bf16, fp16, auto"),
        ("training", {"batch_size": 0}, "training.batch_size = 0: expected at least 2"),
        ("training", {"clip_norm": 0}, "training.clip_norm = 0.0: expected more than 0"),
        ("training", {"clip_norm": -1}, "training.clip_norm = -1.0: expected more than 0"),
        ("processor", {"text_cleaning": "clp"}, "processor.text_cleaning = 'clp': expected one of clip, none"),
        ("processor", {"max_length": 2}, "processor.max_length = 2: expected at least 3"),
        ("training", {"epochs": 3}, "exactly one of training.steps and training.epochs"),
        ("optimizer", {"lr": "fast"}, "optimizer.lr = 'fast': expected float, got str"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr = nan: expected at least 0"),
        ("optimizer", {"betas": [0.9]}, r"optimizer.betas = \[0.9\]: expected two numbers"),
        ("optimizer", {"freeze": "vision"}, r"optimizer.freeze = 'vision': expected list\[str\], got str"),
        ("optimizer", {"lr_factors": {"x": "y"}}, "optimizer.lr_factors.x = 'y': expected float"),
        ("data", {"extra_text": "keywords"}, "data.extra_text = 'keywords': expected a section with keys columns"),
        ("data", {"train": None}, "data.train = None: expected str"),
    ],
)
def test_a_wrong_value_names_key_value_and_type(recipe_file, section, entry, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(**{section: entry}))


def test_a_missing_required_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"data": {}}))
    with pytest.raises(RecipeError, match="data.train is required.*--data.train VALUE"):
        load_recipe(path)
    assert load_recipe(path, ["--data.train", "x.jsonl"]).data.train == "x.jsonl"


@pytest.mark.parametrize("text", ["- a\n- b", "model: [", "just words"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="r.yaml"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_yaml_can_run_nothing(tmp_path):
    (tmp_path / "r.yaml").write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.yaml")


def test_the_file_written_back_is_the_same_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(optimizer={"lr_factors": {"vision_model": 0.1}}))
    again = load_recipe(recipe.to_yaml(tmp_path / "copy.yaml"))
    assert again == recipe
    assert differences(recipe, again) == []
    other = load_recipe(tmp_path / "copy.yaml", ["--lr", "0.5"])
    assert differences(recipe, other) == ["optimizer.lr: 0.0005 -> 0.5"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = load_recipe(path, ["--data.train", "given.parquet"])
    assert recipe.name == path.stem
