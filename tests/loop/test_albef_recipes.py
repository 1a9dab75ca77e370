"""The recipes of ALBEF: sizes, parameter groups, rates and inputs as the released configurations have them, and their twins run."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, BertConfig, BertForMaskedLM

from hf_vlp import AutoModelForImageTextRetrieval
from hf_vlp.inputs.image_augmentations import RandomAugmentCrop, TrainingTransform
from hf_vlp.inputs.vocabulary import train_wordpiece_tokenizer
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.training.building import build_config, build_model
from hf_vlp.training.optim import optimizer_of, rate_factor
from hf_vlp.training.ramps import ramp_value
from hf_vlp.training.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
PRETRAINING = ("albef_pretrain_4m", "albef_pretrain_14m")
TASKS = ("albef_retrieval_coco", "albef_retrieval_f30k", "albef_refcoco")
TWINS = ("albef_emoji", "albef_retrieval_emoji")
SIZES = {None: 209_937_725, "retrieval": 209_560_835}  # published counts of what is trained
EPOCHS = dict(zip((*PRETRAINING, *TASKS), (30, 30, 5, 10, 5), strict=True))
COLOURS = ("red", "green", "blue", "white")


def recipe_of(name):
    return load_recipe(CONFIGS / f"{name}.yaml", ["--data.train", "given.json"] if name in PRETRAINING else [])


def model_of(recipe):
    config = build_config(recipe) if recipe.task is None else VlpAlbefConfig(**recipe.model.config)
    with torch.device("meta"):
        return (VlpAlbefForPreTraining if recipe.task is None else VlpAlbefForImageTextRetrieval)(config)


def test_there_is_a_recipe_for_every_released_run():
    assert {path.stem for path in CONFIGS.glob("albef_*.yaml")} >= {*PRETRAINING, *TASKS, *TWINS}


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_sizes_and_groups_are_the_papers(name):
    recipe = recipe_of(name)
    model = model_of(recipe)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == SIZES[recipe.task]
    config = model.config
    assert (config.momentum, config.queue_size, config.temperature_init_value) == (0.995, 65_536, 0.07)
    assert config.vision_config.image_size == (256 if recipe.task is None else 384)
    assert config.contrastive_targets == ("plain" if recipe.task is None else "identity")
    optimizer = optimizer_of(model, recipe.optimizer, recipe.training.batch_size)
    assert all((group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8) for group in optimizer.param_groups)
    found = {key: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for key in group["names"]}
    rate = 1e-4 if recipe.task is None else 1e-5
    # of the original's tensors those of one dimension, but the class token has three there
    spared = {key for key, value in trained.items() if value.ndim == 1 and not key.endswith("class_embedding")}
    assert found == {key: (rate, 0.0 if key in spared else 0.02) for key in trained}
    assert found["temperature.weight"][1] == 0.02 and {decay for _, decay in found.values()} == {0.0, 0.02}


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_inputs_are_the_papers(name):
    recipe = recipe_of(name)
    augment = TrainingTransform(VlpAlbefImageProcessor(), **recipe.data.augmentation).augment
    assert type(augment) is RandomAugmentCrop and (augment.count, augment.magnitude, augment.flip) == (2, 7, 0.5)
    window = [0.2, 1.0] if recipe.task is None else None if name == "albef_refcoco" else [0.5, 1.0]
    assert augment.scale == window
    processor, masking = recipe.processor, recipe.data.masking
    if recipe.task is None:
        assert (masking.probability, masking.whole_words) == (0.15, False)
        named = (processor.tokenizer, processor.end_mark, processor.max_length)
        assert named == ("google-bert/bert-base-uncased", False, 25)
        towers = {
            "vision_model": "timm/deit_base_patch16_224.fb_in1k",
            "text_model": "google-bert/bert-base-uncased",
        }
        assert recipe.model.towers == towers
    else:
        assert masking is None and recipe.data.false_texts is None and processor.max_length == 512
    assert not recipe.data.false_images


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_lengths_rates_and_distillation_are_the_papers(name):
    recipe = recipe_of(name)
    training, schedule, epochs = recipe.training, recipe.schedule, EPOCHS[name]
    assert (training.epochs, training.clip_norm, training.accumulation) == (epochs, None, 1)
    assert training.batch_size == (512 if recipe.task is None else 256)
    steps = 10_000 * epochs
    rates = [
        recipe.optimizer.lr * rate_factor(step, total_steps=steps, **schedule.numbers(steps, 10_000))
        for step in range(0, steps, 500)
    ]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(recipe.optimizer.lr)
    low = 1e-5 if recipe.task is None else 1e-6
    assert low < rates[-1] < 1.2 * low + 0.1 * recipe.optimizer.lr
    warmed = 2000 if recipe.task is None else 0
    assert rates[warmed // 500 + 1] == pytest.approx(recipe.optimizer.lr) and rates[19] > rates[20]
    ramp = recipe.ramps["distillation_weight"]
    assert [ramp_value(ramp, place) for place in (0, 0.5, 1, 4)] == pytest.approx([0, 0.2, 0.4, 0.4])
    assert ramp.unit == "epochs"


# ------------------------------------------------------------------------------------------------ they run


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs a script on a recipe of the repository in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script

    def run(name, *words):
        file = "finetune.py" if name in (*TASKS, TWINS[1]) else "pretrain.py"
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"examples/{file}", "--config", str(CONFIGS / f"{name}.yaml"), *words])
        try:
            runpy.run_path(str(EXAMPLES / file), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return run


def losses_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A hundred scenes with captions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "data")
        made = runpy.run_path(str(EXAMPLES / "data" / "scenes.py"))
        folder = tmp_path_factory.mktemp("world") / "scenes"
        made["write_tasks"](folder, 100, tasks=("captions",))
    return folder


def test_the_twins_take_two_steps_one_after_the_other(script, scenes):
    shutil.copytree(scenes, "scenes")
    quick = ["--training.steps", "2", "--batch_size", "4", "--mixed_precision", "no", "--threads", "1"]
    quick += ["--evaluate_records", "4", "--log_every", "1"]
    for name in TWINS:
        small = ["--rank_records", "4", "--vocabulary_size", "400"] if name == "albef_emoji" else []
        shown = script(name, *quick, *small)
        assert f"runs/{name} holds the model" in shown and "test, step 2\n" in shown
        moved = yaml.safe_load(Path(f"runs/{name}/recipe.yaml").read_text())
        assert moved["data"]["train"].startswith("scenes/")
        lines = losses_of(Path("runs") / name)
        terms = {"itc", "itm", "mlm"} if name == "albef_emoji" else {"itc", "itm"}
        assert len(lines) == 2 and all(
            {"itc", "itm", "mlm"} & line.keys() == terms and 0 < line["loss"] < 100 for line in lines
        )
    ids = AutoProcessor.from_pretrained(f"runs/{TWINS[1]}")(text="a red circle")["input_ids"][0].tolist()
    tokenizer = AutoProcessor.from_pretrained(f"runs/{TWINS[0]}").tokenizer
    assert ids[0] == tokenizer.cls_token_id and tokenizer.sep_token_id not in ids  # no mark behind a text
    saved = [load_file(f"runs/{name}/model.safetensors") for name in TWINS]
    assert int(saved[0]["queue.position"]) == 8
    assert int(saved[1]["queue.position"]) == 16  # it goes on where pre-training ended


PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = {
    "vision_config": {**PART, "image_size": 32, "patch_size": 16, "hidden_dropout": 0.1},
    "text_config": PART,
    "multimodal_config": PART,
    "projection_dim": 8,
    "queue_size": 6,
    "momentum": 0.9,
}
SMALL = ["--towers", "{}", "--tokenizer", "null", "--vocabulary", "word_pieces", "--vocabulary_size", "80"]
SMALL += [
    word
    for part, values in TINY.items()
    for key, value in (values.items() if isinstance(values, dict) else [(None, values)])
    for word in (f"--model.config.{part}{f'.{key}' if key else ''}", str(value))
]
QUICK = ["--workers", "0", "--batch_size", "2", "--mixed_precision", "no", "--threads", "1", "--warmup_steps", "0"]


def write_list(file: Path, name_text: str) -> None:
    """Two captions of each of four pictures, as the authors' lists have them."""
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (40, 48), colour).save(file.parent / f"{colour}.png")
        rows += [{"image": f"{colour}.png", name_text: f"{start} {colour} square"} for start in ("a", "the")]
    file.write_text(json.dumps(rows))


def test_the_papers_recipes_take_steps_in_small(script, tmp_path):
    for text in ("caption", "text"):
        write_list(tmp_path / f"{text}.json", text)
    for name in PRETRAINING:
        shown = script(name, "--data.train", "caption.json", *SMALL, *QUICK, "--epochs", "1")
        assert f"runs/{name} holds the model" in shown
    saved = ["--model.from_pretrained", "runs/albef_pretrain_14m", "--model.config.vision_config.image_size", "48"]
    for name in TASKS:
        held = [] if name == "albef_refcoco" else ["--data.validation", "caption.json", "--evaluate_every", "2"]
        source = "text.json" if name == "albef_refcoco" else "caption.json"
        shown = script(name, "--data.train", source, *held, *saved, *QUICK, "--image_root", ".", "--epochs", "1")
        assert f"runs/{name} holds the model" in shown
        tables = load_file(f"runs/{name}/model.safetensors")
        positions = {key for key, value in tables.items() if key.endswith("position_embedding") and len(value) == 10}
        assert len(positions) == 2  # of the model and of its momentum copy


def test_resumed_is_never_stopped_with_teacher_and_queue(script, tmp_path):
    write_list(tmp_path / "caption.json", "caption")
    words = [*SMALL, *QUICK, "--data.train", "caption.json", "--epochs", "null", "--lr", "0.01"]
    words += ["--schedule.name", "constant"]  # rates that know nothing of the length of the run

    def run(folder, steps, *more):
        script(PRETRAINING[0], *words, "--output", folder, "--training.steps", str(steps), *more)
        return load_file(f"{folder}/model.safetensors")

    whole, half = run("whole", 6), run("broken", 3)
    broken, other = run("broken", 6, "--resume", "auto"), run("other", 6, "--seed", "7")
    assert whole.keys() == broken.keys() >= {"queue.position", "queue.image_ids", "temperature.weight"}
    for name, value in whole.items():
        assert torch.equal(value, broken[name]), name
    moved = [name for name in whole if name.startswith(("teacher.", "queue.")) and not name.endswith("position")]
    assert len(moved) > 20 and not any(
        torch.equal(half[name], whole[name]) for name in moved if "mlm_head.decoder.bias" not in name
    )
    assert not any(torch.equal(whole[name], other[name]) for name in moved if name.endswith("features"))
    rows = [[line["loss"] for line in losses_of(tmp_path / folder)] for folder in ("whole", "broken", "other")]
    assert rows[0] == rows[1] != rows[2]


def test_a_queue_goes_on_without_the_identities_of_another_data_set(tmp_path):
    recipe = load_recipe(CONFIGS / "albef_retrieval_emoji.yaml", ["--model.from_pretrained", str(tmp_path)])
    model = VlpAlbefForPreTraining(VlpAlbefConfig(**TINY))
    model.queue.image_ids.copy_(torch.arange(6))
    model.save_pretrained(tmp_path)
    found = build_model(recipe, build_config(recipe), None, AutoModelForImageTextRetrieval)
    assert found.queue.image_ids.tolist() == 6 * [-100]
    assert torch.equal(found.queue.image_features, model.queue.image_features)
    assert type(found).from_pretrained(tmp_path).queue.image_ids.tolist() == [0, 1, 2, 3, 4, 5]


def test_towers_fill_the_momentum_copy_and_the_head_as_well(tmp_path):
    sizes = PART | {"num_hidden_layers": 2, "vocab_size": 90, "max_position_embeddings": 512}
    bert = BertForMaskedLM(BertConfig(**sizes))
    bert.save_pretrained(tmp_path)
    words = ["--data.train", "x", *SMALL, "--model.towers", f"{{text_model: {tmp_path}}}"]
    recipe = load_recipe(CONFIGS / "albef_pretrain_4m.yaml", words)
    tokenizer = train_wordpiece_tokenizer(["a red square"], 90, 25)
    recipe.model.config["text_config"]["vocab_size"] = 90
    tokenizer.add_tokens([f"more{i}" for i in range(90 - len(tokenizer))])
    model = build_model(recipe, build_config(recipe), tokenizer)
    words = bert.bert.embeddings.word_embeddings.weight
    for part in (model, model.teacher):
        assert torch.equal(part.albef.text_model.embeddings.word_embeddings.weight, words)
        assert torch.equal(part.mlm_head.dense.weight, bert.cls.predictions.transform.dense.weight)
    recipe.model.towers = {}
    assert not torch.equal(build_model(recipe, build_config(recipe), tokenizer).mlm_head.decoder.weight, words)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("albef_emoji", ["--false_images"], "data.false_images = True: this model finds false images in its batch"),
        ("albef_retrieval_emoji", ["--false_texts", "3"], "data.false_texts = 3: this model finds false texts"),
        ("albef_retrieval_emoji", ["--end_mark", "false"], "processor.end_mark = False: the processor saved in"),
        (
            "albef_emoji",
            ["--vocabulary", "byte_pairs", "--vocabulary_size", "600"],
            "processor.end_mark = False: the tokenizer's marks are",
        ),
    ],
)
def test_what_does_not_fit_is_refused(script, scenes, name, words, message):
    shutil.copytree(scenes, "scenes")
    quick = ["--vocabulary_size", "400"]
    if name == "albef_retrieval_emoji":
        script("albef_emoji", *quick, "--training.steps", "1", "--evaluate_records", "2", "--rank_records", "2", *QUICK)
        quick = []
    with pytest.raises(SystemExit, match=message):
        script(name, *quick, *words)
