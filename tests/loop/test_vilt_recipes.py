"""The recipes of ViLT: sizes, parameter groups, rates and inputs as the released configurations have them, and their twins run."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from hf_vlp.data.samplers import UniqueImageBatchSampler
from hf_vlp.inputs.image_augmentations import TrainingTransform, WholePatches, WholePatchesRandAugment
from hf_vlp.inputs.text_masking import WholeWordMasking
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessor
from hf_vlp.models.vilt.modeling_vilt import VlpViltForPreTraining
from hf_vlp.models.vilt.tasks_vilt import (
    VlpViltForImageTextRetrieval,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)
from hf_vlp.training.building import build_config
from hf_vlp.training.optim import TransformersAdamW, optimizer_of, rate_factor
from hf_vlp.training.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
PRETRAINING = ("vilt_mlm_itm", "vilt_mlm_itm_randaug", "vilt_mlm_itm_mpp")
TASKS = [
    f"vilt_{task}{randaug}"
    for task in ("vqa", "nlvr2", "retrieval_coco", "retrieval_f30k")
    for randaug in ("", "_randaug")
]
TWINS = ("vilt_emoji", "vilt_vqa_emoji", "vilt_nlvr2_emoji", "vilt_retrieval_emoji")
CLASSES = {
    None: VlpViltForPreTraining,
    "vqa": VlpViltForVisualQuestionAnswering,
    "nlvr2": VlpViltForVisualReasoning,
    "retrieval": VlpViltForImageTextRetrieval,
}
# published counts; that of NLVR2 holds three rows of the modality table, and every retrieval file both heads
SIZES = {None: 135_660_092, "vqa": 117_588_537, "nlvr2": 113_962_754, "retrieval": 111_597_315}
COLOURS = ("red", "green", "blue", "white")


def recipe_of(name):
    return load_recipe(CONFIGS / f"{name}.yaml", ["--data.train", "given.parquet"] if name in PRETRAINING else [])


def model_of(recipe):
    config = build_config(recipe) if recipe.task is None else VlpViltConfig(num_labels=3129)
    with torch.device("meta"):
        return CLASSES[recipe.task](config)


def test_there_is_a_recipe_for_every_released_configuration():
    assert {path.stem for path in CONFIGS.glob("vilt_*.yaml")} == {*PRETRAINING, *TASKS, *TWINS}
    named = {
        name: re.search("`(task_[a-z0-9_]+)`", (CONFIGS / f"{name}.yaml").read_text())[1]
        for name in (*PRETRAINING, *TASKS)
    }
    finetuned = {name.replace("vilt_", "task_finetune_").replace("retrieval", "irtr") for name in TASKS}
    assert set(named.values()) == {*(name.replace("vilt_", "task_") for name in PRETRAINING), *finetuned}


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_sizes_are_the_published_ones(name):
    recipe = recipe_of(name)
    model = model_of(recipe)
    size = sum(parameter.numel() for parameter in model.parameters())
    predicted = name.endswith("mpp")
    mask_token_and_head = 768 + (768 * 768 + 768) + 2 * 768 + (768 * 768 + 768)
    assert size == SIZES[recipe.task] + predicted * mask_token_and_head
    if recipe.task is None:
        config = model.config
        assert (config.mlm_weight, config.itm_weight, config.wpa_weight) == (1, 1, 0.1)
        assert (config.mpp_weight, config.max_image_length) == (float(predicted), 200)
        assert recipe.model.towers == {"image": "timm/vit_base_patch32_384.augreg_in21k_ft_in1k"}
        assert (recipe.processor.tokenizer, recipe.processor.max_length) == ("google-bert/bert-base-uncased", 40)
    else:
        assert recipe.model.from_pretrained == "runs/vilt_mlm_itm"


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_inputs_are_the_papers(name):
    recipe = recipe_of(name)
    transform = TrainingTransform(VlpViltImageProcessor(), **recipe.data.augmentation)
    assert type(transform.augment) is (WholePatchesRandAugment if name.endswith("randaug") else WholePatches)
    assert (transform.augment.size, transform.augment.longest, transform.augment.divisor) == (384, 639, 32)
    if name.endswith("randaug"):
        assert (transform.augment.count, transform.augment.magnitude) == (2, 9)
    masking = recipe.data.masking
    if recipe.task is None:
        assert (masking.probability, masking.whole_words, masking.padded_to, masking.patches) == (0.15, True, 40, 0.15)
    else:
        assert masking is None
    assert recipe.data.false_images == (recipe.task is None)
    assert recipe.data.false_texts == (15 if recipe.task == "retrieval" else None)
    if recipe.task == "vqa":
        answers = recipe.data.answers
        assert (answers.minimum_seen, answers.top_k, answers.count_validation) == (9, None, True)


UNDECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")  # parts of the original's names


def expected_group(name: str, task: str | None) -> tuple[float, float]:
    """Rate and decay of a parameter, as the released code sets them; it calls norms in task heads by numbers."""
    spared = any(part in name for part in UNDECAYED) and name != "classifier.norm.weight"
    return 1e-4 * (10 if task == "vqa" and name.startswith("classifier.") else 1), 0.0 if spared else 0.01


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_parameter_groups_are_the_papers(name):
    recipe = recipe_of(name)
    model = model_of(recipe)
    optimizer = optimizer_of(model, recipe.optimizer, recipe.training.batch_size)
    assert type(optimizer) is TransformersAdamW
    assert all((group["betas"], group["eps"]) == ((0.9, 0.98), 1e-8) for group in optimizer.param_groups)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["names"]
    }
    assert found == {
        parameter: pytest.approx(expected_group(parameter, recipe.task))
        for parameter, value in model.named_parameters()
        if value.requires_grad
    }
    frozen = {parameter for parameter, value in model.named_parameters() if not value.requires_grad}
    assert frozen == ({"itm_head.weight", "itm_head.bias"} if recipe.task == "retrieval" else set())
    assert {decay for _, decay in found.values()} == {0.0, 0.01}


@pytest.mark.parametrize("name", [*PRETRAINING, *TASKS])
def test_lengths_and_rates_are_the_papers(name):
    recipe = recipe_of(name)
    training = recipe.training
    batch = training.batch_size * training.accumulation
    assert batch == (4096 if recipe.task is None else 128 if recipe.task == "nlvr2" else 256)
    assert training.clip_norm is None
    if recipe.task is None:
        assert training.steps == 200_000 and recipe.schedule.numbers(training.steps)["warmup_steps"] == 2500
    else:
        # an epoch here shows one of a picture's five captions
        assert training.epochs == (50 if recipe.task == "retrieval" else 10) and training.final == "best"
        assert recipe.schedule.numbers(24_605)["warmup_steps"] == 2460
    numbers = recipe.schedule.numbers(200_000)
    warm = numbers["warmup_steps"]
    for step, wanted in ((0, 0), (warm // 2, 0.5), (warm, 1), ((warm + 200_000) // 2, 0.5), (200_000, 0), (200_001, 0)):
        assert rate_factor(step, total_steps=200_000, **numbers) == pytest.approx(wanted)


@pytest.mark.parametrize(("data", "pictures"), [("coco", 113_287), ("f30k", 29_000)])
def test_retrieval_is_evaluated_once_an_original_epoch(data, pictures):
    training = recipe_of(f"vilt_retrieval_{data}").training
    batches = len(UniqueImageBatchSampler(range(pictures), training.batch_size))
    assert training.evaluate_every == training.save_every == 5 * batches


# ------------------------------------------------------------------------------------------------ they run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A hundred scenes of each task that a recipe names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "data")
        made = runpy.run_path(str(EXAMPLES / "data" / "scenes.py"))
        folder = tmp_path_factory.mktemp("world") / "scenes"
        made["write_tasks"](folder, 100, tasks=("captions", "vqa", "nlvr2"))
    return folder


def test_the_twins_take_a_step_one_after_the_other(script, scenes):
    shutil.copytree(scenes, "scenes")
    quick = ["--training.steps", "1", "--batch_size", "4", "--mixed_precision", "no", "--threads", "1"]
    quick += ["--evaluate_records", "4"]
    for name in TWINS:
        small = ["--rank_records", "4", "--vocabulary_size", "400"] if name == "vilt_emoji" else []
        shown = script(name, *quick, *small)
        assert f"runs/{name} holds the model" in shown and "test, step 1\n" in shown
        moved = yaml.safe_load(Path(f"runs/{name}/recipe.yaml").read_text())
        assert moved["data"]["train"].startswith("scenes/")


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "max_image_length": 3,
}


def squares(folder: Path) -> None:
    """Records about one picture, with captions and a question, and records about two."""
    one, two = [], []
    for row, colour in enumerate(COLOURS):
        Image.new("RGB", (40 + 8 * row, 40), colour).save(folder / f"{colour}.png")
        asked = {"question": "which colour?", "answers": [{"answer": "red", "score": 1.0}]}
        one.append({"image": f"{colour}.png", "captions": [f"a {colour} square"], "image_id": colour, **asked})
        pair = [f"{colour}.png", f"{COLOURS[row - 1]}.png"]
        two.append({"images": pair, "statement": "the left one is red", "label": row % 2})
    for name, rows in (("one", one), ("two", two)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_papers_recipes_take_a_step_in_small(script, tmp_path):
    squares(tmp_path)
    files = {
        file: [word for split in ("train", "validation", "test") for word in (f"--data.{split}", file)]
        for file in ("one.jsonl", "two.jsonl")
    }
    own = [word for split in ("train", "validation") for word in (f"--{split}_split", "null")]
    own += ["--image_root", ".", "--workers", "0", "--batch_size", "2", "--mixed_precision", "no", "--threads", "1"]
    sizes = [word for key, value in TINY.items() for word in (f"--model.config.{key}", str(value))]
    vocabulary = [
        "--tokenizer",
        "null",
        "--vocabulary",
        "word_pieces",
        "--vocabulary_size",
        "80",
        "--accumulation",
        "2",
    ]
    for name in PRETRAINING:
        shown = script(
            name,
            *files["one.jsonl"],
            *own,
            *sizes,
            *vocabulary,
            "--towers",
            "{}",
            "--steps",
            "1",
            "--warmup_steps",
            "0",
        )
        assert f"runs/{name} holds the model" in shown
    for name in TASKS:
        words = ["--minimum_seen", "1"] if "vqa" in name else []
        words += files["two.jsonl" if "nlvr2" in name else "one.jsonl"]
        shown = script(name, *own, *words, "--epochs", "1", "--model.from_pretrained", "runs/vilt_mlm_itm")
        assert f"runs/{name} holds the model" in shown


def test_whole_words_are_masked_as_in_a_padded_row():
    """The budget of a short text is that of a row of 40, `padded_to` in the recipes."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    batch = tokenizer(["a red square"] * 400, return_tensors="pt")
    shares = {}
    for padded_to in (recipe_of("vilt_mlm_itm").data.masking.padded_to, None):
        mask = WholeWordMasking(tokenizer, 0.15, padded_to)
        _, labels = mask(batch["input_ids"], batch["attention_mask"], torch.Generator().manual_seed(0))
        shares[padded_to] = float(labels.ne(-100).sum()) / (3 * 400)
    assert shares[40] == pytest.approx(6 / 38, abs=0.03)  # of the row's 38 places between the marks 6 are taken
    assert shares[None] == pytest.approx(1 / 3)
