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
        (
            "training",
            {"mixed_precision": "fp8"},
            "training.mixed_precision = 'fp8': expected one of no, bf16, fp16, auto",
        ),
        ("training", {"batch_size": 0}, "training.batch_size = 0: expected at least 2"),
        ("training", {"evaluate_records": 0}, "training.evaluate_records = 0: expected at least 1"),
        ("training", {"rank_records": 0}, "training.rank_records = 0: expected at least 1"),
        ("training", {"evaluate_candidates": 0}, "training.evaluate_candidates = 0: expected at least 1"),
        ("training", {"evaluate_candidates": 4}, "training.evaluate_candidates is for the task retrieval, and task = null"),
        ("data", {"masking": {"probability": 0}}, "data.masking.probability = 0.0: expected a share between 0 and 1"),
        ("data", {"masking": {"patches": 1}}, "data.masking.patches = 1.0: expected a share between 0 and 1"),
        ("data", {"masking": {"padded_to": 40}}, "data.masking.padded_to is for whole words"),
        ("data", {"masking": {"padded_to": 0, "whole_words": True}}, "data.masking.padded_to = 0: expected at least 1"),
        ("data", {"masking": {"whole_word": True}}, "'data.masking.whole_word' .*nearest valid key is 'data.masking.whole_words'"),
        ("data", {"false_texts": 0}, "data.false_texts = 0: expected at least 1"),
        ("data", {"max_tokens": 2}, "data.max_tokens = 2: expected at least 3"),
        ("data", {"false_texts": 3}, "data.false_texts is for the task retrieval, and task = null"),
        ("data", {"answers": {}}, "data.answers is for the task vqa, and task = null"),
        ("data", {"answers": {"top_k": 0}}, "data.answers.top_k = 0: expected at least 1"),
        ("data", {"answers": {"file": "x.json", "top_k": 3}}, "data.answers.file lists the answers: leave it out"),
        ("schedule", {"warmup_share": 1}, "schedule.warmup_share = 1.0: expected a part of the run from 0 to below 1"),
        ("schedule", {"warmup_share": float("nan")}, "schedule.warmup_share = nan: expected a part of the run"),
        ("schedule", {"warmup_share": 0.1, "warmup_steps": 5}, "schedule.warmup_share = 0.1: .*none beside schedule.warmup_steps"),
        ("optimizer", {"update": "adam"}, "optimizer.update = 'adam': expected one of torch, transformers"),
        ("training", {"clip_norm": 0}, "training.clip_norm = 0.0: expected more than 0"),
        ("training", {"clip_norm": -1}, "training.clip_norm = -1.0: expected more than 0"),
        ("processor", {"text_cleaning": "clp"}, "processor.text_cleaning = 'clp': expected one of clip, none"),
        ("processor", {"max_length": 2}, "processor.max_length = 2: expected at least 3"),
        ("processor", {"max_words": 0}, "processor.max_words = 0: expected at least 1"),
        ("training", {"epochs": 3}, "exactly one of training.steps and training.epochs"),
        ("optimizer", {"lr": "fast"}, "optimizer.lr = 'fast': expected float, got str"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr = nan: expected at least 0"),
        ("optimizer", {"betas": [0.9]}, r"optimizer.betas = \[0.9\]: expected two numbers"),
        ("optimizer", {"freeze": "vision"}, r"optimizer.freeze = 'vision': expected list\[str\], got str"),
        ("optimizer", {"lr_factors": {"x": "y"}}, "optimizer.lr_factors.x = 'y': expected float"),
        ("data", {"extra_text": "keywords"}, "data.extra_text = 'keywords': expected a section with keys columns"),
        ("data", {"train": None}, "data.train = None: expected str"),
        (
            "model",
            {"model_type": None, "from_pretrained": "x", "towers": {"text_model": "y"}},
            "model.towers: .*leave one",
        ),
        ("model", {"towers": {"text_model": 3}}, "model.towers.text_model = 3: expected str, got int"),
        (
            "processor",
            {"vocabulary": "letters"},
            "vocabulary = 'letters': expected one of byte_pairs, word_pieces, words",
        ),
        ("processor", {"minimum_count": 2}, "processor.minimum_count: only a vocabulary of words counts them"),
        ("processor", {"minimum_count": 0, "vocabulary": "words"}, "processor.minimum_count = 0: expected at least 1"),
        ("processor", {"vocabulary_size": 0}, "processor.vocabulary_size = 0: expected at least 1"),
        (
            "data",
            {"size_augmentation": {"regions": 0.2}},
            "size_augmentation.regions: .*no regions without data.regions",
        ),
        (
            "data",
            {"size_augmentation": {"captions": 1}},
            "data.size_augmentation.captions = 1.0: expected a share from 0 to",
        ),
        ("data", {"size_augmentation": {"grid": -0.1}}, "data.size_augmentation.grid = -0.1: expected a share"),
        ("data", {"size_augmentation": {"grid": float("nan")}}, "data.size_augmentation.grid = nan: expected a share"),
        ("data", {"size_augmentation": {"cells": 0.1}}, "'data.size_augmentation.cells' .*nearest valid key is"),
        (
            "data",
            {"regions": "x.regions", "cache": True},
            "data.cache is for pictures, and data.regions takes their place",
        ),
        ("data", {"regions": "x.regions", "augmentation": {"name": "x"}}, "data.augmentation is for pictures"),
        ("optimizer", {"decay": "norms"}, "optimizer.decay = 'norms': expected one of matrices, all"),
        (
            "schedule",
            {"name": "step"},
            r"schedule.milestones = \[\]: expected parts of the run .* with schedule.name = step",
        ),
        (
            "schedule",
            {"name": "step", "milestones": [15]},
            r"schedule.milestones = \[15.0\]: expected parts of the run",
        ),
        ("schedule", {"name": "step", "milestones": [0.5, 1]}, r"schedule.milestones = \[0.5, 1.0\]: expected parts"),
        ("schedule", {"milestones": [0.5]}, "expected parts of the run .*, and none with another"),
        ("schedule", {"name": "step", "milestones": [0.5], "gamma": -1}, "schedule.gamma = -1.0: expected at least 0"),
        (
            "ramps",
            {"dial": {"at": [0], "values": [1, 2]}},
            r"ramps: at = \[0.0\] and values = \[1.0, 2.0\]: expected as many",
        ),
        (
            "ramps",
            {"dial": {"at": [], "values": []}},
            "ramps: at = .*expected as many rising places, from 0 on, as values",
        ),
        ("ramps", {"dial": {"at": [2, 1], "values": [0, 1]}}, r"ramps: at = \[2.0, 1.0\].*rising places"),
        ("ramps", {"dial": {"at": [-1, 1], "values": [0, 1]}}, r"ramps: at = \[-1.0, 1.0\].*from 0 on"),
        ("ramps", {"dial": {"at": [0, float("nan")], "values": [0, 1]}}, r"ramps: at = \[0.0, nan\].*rising places"),
        ("ramps", {"dial": {"at": [0], "values": ["x"]}}, r"ramps.dial.values\[0\] = 'x': expected float, got str"),
        ("ramps", {"dial": {"values": [1]}}, "ramps.dial.at is required"),
        (
            "ramps",
            {"dial": {"at": [0], "values": [1], "unit": "batches"}},
            "ramps.dial.unit = 'batches': expected one of steps",
        ),
        (
            "ramps",
            {"dial": {"at": [0], "values": [1], "shape": "cubic"}},
            "ramps.dial.shape = 'cubic': expected one of step,",
        ),
        ("ramps", {"dial": {"at": [0], "values": [1], "form": "step"}}, "'ramps.dial.form' in the section ramps.dial"),
        ("ramps", {"dial": 3}, "ramps.dial = 3: expected a section with keys at, values, unit, shape"),
    ],
)
def test_a_wrong_value_names_key_value_and_type(recipe_file, section, entry, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(**{section: entry}))


def test_pictures_options_are_not_given_beside_regions(recipe_file):
    options, regions = {"image_processor": {"do_rescale": False}}, {"regions": "x.regions"}
    assert load_recipe(recipe_file(processor=options)).processor.image_processor == {"do_rescale": False}
    assert load_recipe(recipe_file(data=regions)).data.regions == "x.regions"
    with pytest.raises(
        RecipeError, match="processor.image_processor is for pictures, and data.regions takes their place"
    ):
        load_recipe(recipe_file(processor=options, data=regions))


def test_ramps_and_towers_are_read_and_overridden(recipe_file, tmp_path):
    jump = {"at": [0, 5, 5, 10], "values": [1, 1, 0, 1], "shape": "linear"}
    path = recipe_file(ramps={"loss_factor": jump}, model={"towers": {"text_model": "a/b"}})
    recipe = load_recipe(path)
    found = recipe.ramps["loss_factor"]
    assert (found.at, found.values, found.unit, found.shape) == ([0, 5, 5, 10], [1, 1, 0, 1], "epochs", "linear")
    other = load_recipe(path, ["--ramps.loss_factor.unit", "steps", "--model.towers.text_model", "c", "--grid", "0.2"])
    assert differences(recipe, other) == [
        "data.size_augmentation.grid: 0.0 -> 0.2",
        "model.towers.text_model: a/b -> c",
        "ramps.loss_factor.unit: epochs -> steps",
    ]
    assert load_recipe(recipe.to_yaml(tmp_path / "copy.yaml")) == recipe
    new = load_recipe(recipe_file(), ["--ramps.hardest_negatives", "{at: [0, 5], values: [0, 1]}"])
    assert new.ramps["hardest_negatives"].values == [0.0, 1.0] and new.ramps["hardest_negatives"].shape == "step"


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


@pytest.mark.parametrize(("task", "allowed"), [("vqa", "answers"), ("retrieval", "false_texts"), (None, "masking")])
def test_what_belongs_to_a_task_is_refused_beside_another(recipe_file, task, allowed):
    path = recipe_file()
    values = {"answers": "{top_k: 3}", "false_texts": "3", "masking": "{}", "false_images": "true"}
    for name, value in values.items():
        words = ["--task", str(task).replace("None", "null"), f"--data.{name}", value]
        if name == allowed or (task is None and name == "false_images"):
            assert getattr(load_recipe(path, words).data, name)
        else:
            with pytest.raises(RecipeError, match=f"data.{name} is for .*, and task = {task or 'null'}: leave one"):
                load_recipe(path, words)


def test_a_warm_up_in_parts_of_the_run(recipe_file):
    share = load_recipe(recipe_file(schedule={"warmup_share": 0.1})).schedule
    steps = load_recipe(recipe_file(schedule={"warmup_steps": 7})).schedule
    assert [share.numbers(total)["warmup_steps"] for total in (10, 99, 1000)] == [1, 9, 100]
    assert [steps.numbers(total)["warmup_steps"] for total in (10, 99, 1000)] == [7, 7, 7]
    assert share.numbers(10).keys() == steps.numbers(10).keys() and "warmup_share" not in steps.numbers(10)


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
