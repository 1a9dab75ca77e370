"""examples/pretrain.py and finetune.py of a model that reads words and image together, as a user runs them, on a dozen squares."""

import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from hf_vlp.auto import AutoModelForImageTextRetrieval, AutoModelForVisualReasoning
from hf_vlp.data.readers import read_records
from hf_vlp.evaluation.fusion_retrieval import evaluate_fusion_retrieval
from hf_vlp.evaluation.tasks import evaluate_nlvr2, evaluate_vqa
from hf_vlp.models.vilt.modeling_vilt import VlpViltForPreTraining
from hf_vlp.training.steps import choose_step

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = ("red", "green", "blue", "black", "white", "yellow", "orange", "purple", "pink", "brown", "gray", "cyan")
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "image_size": 32,
    "patch_size": 16,
    "max_image_length": 4,
}
TRAINING = {
    "steps": 4,
    "batch_size": 4,
    "evaluate_every": 2,
    "save_every": 2,
    "log_every": 1,
    "threads": 1,
}
PRETRAIN = {
    "model": {"model_type": "vlp_vilt", "config": TINY | {"mpp_weight": 0.5}},
    "processor": {"vocabulary": "word_pieces", "vocabulary_size": 150, "vocabulary_records": ["own/vqa.jsonl"]},
    "data": {
        "train": "own/captions.jsonl",
        "validation": "own/captions.jsonl",
        "test": "own/captions.jsonl",
        "augmentation": {"name": "pixelbert_randaugment"},
        "masking": {"whole_words": True, "probability": 0.3},
        "false_images": True,
    },
    "optimizer": {"lr": 0.01, "update": "transformers"},
    "schedule": {"name": "linear", "warmup_share": 0.5},
    "training": TRAINING | {"rank_records": 6},
}


def write_squares(folder: Path) -> None:
    """In a folder: squares and oblongs of a dozen colours, and records of them for every task."""
    folder.mkdir()
    records = {name: [] for name in ("captions", "vqa", "nlvr2", "entailment", "phrases")}
    for row, colour in enumerate(COLOURS):
        image = f"{colour}.png"
        shape = "square" if row % 2 else "oblong"
        Image.new("RGB", (40, 40) if row % 2 else (60, 40), colour).save(folder / image)
        records["captions"].append({"image": image, "captions": [f"a {colour} {shape}"], "image_id": colour})
        records["phrases"].append({"image": image, "phrase": colour, "boxes": [[0, 0, 1, 1]], "label": 0})
        one = {"answer": colour, "score": 1.0}
        rare = {"answer": f"rather {colour}", "score": 0.3}
        records["vqa"].append({"image": image, "question": "what colour is it?", "answers": [one, rare]})
        answers = [{"answer": "yes" if row % 2 else "no", "score": 1.0}]
        records["vqa"].append({"image": image, "question": "is it a square?", "answers": answers})
        pair = [image, f"{COLOURS[row - 1]}.png"]
        for label, said in ((1, shape), (0, colour)):
            told = {"images": pair, "statement": f"only the left one is {said}", "label": label}
            records["nlvr2"].append(told | {"identifier": f"dev-{row}-0-{label}"})
        for label, said in (("entailment", colour), ("contradiction", "striped"), ("neutral", "heavy")):
            records["entailment"].append({"image": image, "hypothesis": f"it is {said}", "label": label})
    records["half"] = records["vqa"][:12]
    records["one"] = [row | {"images": row["images"][:1]} for row in records["nlvr2"]]
    records["alone"] = [row | {"image_id": "the same"} for row in records["captions"]]
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of pre-training after a step, made once."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_squares(folder / "own")
    recipe = {key: dict(PRETRAIN[key]) for key in PRETRAIN}
    recipe["data"] |= {"validation": None, "test": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(patch, "pretrain.py", "fusion", recipe, "--steps", "1")
    return folder / "runs" / "fusion"


def call(monkeypatch, script, name, recipe, *words):
    """Runs a script in the working folder with a recipe of this name."""
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [f"examples/{script}", "--config", f"{name}.yaml", *words])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in a folder of its own with a recipe of this name; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    write_squares(tmp_path / "own")

    def run(script, name, recipe, *words):
        call(monkeypatch, script, name, recipe, *words)
        return capsys.readouterr().out

    return run


@pytest.fixture
def finetune(run, pretrained):
    """The same with a pre-trained folder in runs/fusion."""
    shutil.copytree(pretrained, "runs/fusion")
    return functools.partial(run, "finetune.py")


FILES = {"vqa": "vqa", "nlvr2": "nlvr2", "retrieval": "captions", "entailment": "entailment", "grounding": "phrases"}


def task_recipe(task, **sections):
    """Fine-tuning of what `PRETRAIN` leaves in runs/fusion; `sections` add to or replace keys."""
    recipe = {
        "task": task,
        "model": {"from_pretrained": "runs/fusion"},
        "data": {
            **dict.fromkeys(("train", "validation", "test"), f"own/{FILES[task]}.jsonl"),
            "augmentation": {"name": "pixelbert"},
            **({"false_texts": 3} if task == "retrieval" else {}),
        },
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "linear", "warmup_share": 0.25},
        "training": TRAINING,
    }
    return {key: recipe.get(key, {}) | sections[key] if key in sections else recipe[key] for key in recipe | sections}


def results_of(folder, split="test"):
    (found,) = [entry for entry in json.loads(Path(folder, "results.json").read_text()) if entry["split"] == split]
    return found


def losses_of(folder):
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


# ------------------------------------------------------------------------------------------------ pre-training


def test_pretraining_from_captions_to_a_folder_that_scores_pairs(run):
    shown = run("pretrain.py", "fusion", PRETRAIN)
    for step in (0, 2, 4):
        assert f"validation, step {step}\n" in shown
    folder = Path("runs/fusion")
    assert {"model.safetensors", "curves.png", "retrieval.png", "README.md"} <= {path.name for path in folder.iterdir()}
    assert [set(line) >= {"mlm", "itm", "wpa", "mim"} for line in losses_of(folder)] == [True] * 4
    assert [line["lr"] for line in losses_of(folder)] == pytest.approx(
        [0, 0.005, 0.01, 0.005]
    )  # warm for half of the run
    written = results_of(folder)
    names = {"mlm/accuracy", "itm/accuracy", "mim/accuracy", "accuracy", "wpa/loss", "rsum", "text_to_image/R@1"}
    assert written["task"] == "pre-training" and names <= set(written["metrics"])
    assert written["counts"]["examples"] == 12 == written["counts"]["itm predictions"]
    assert written["counts"]["images"] == 6 and "all draws made once" in written["protocol"]
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best["metric"] == "validation/accuracy"

    model, processor = AutoModelForPreTraining.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.image_processor.size["shortest_edge"] == 32 and processor.image_processor.size_divisor == 16
    assert "square" in processor.tokenizer.tokenize("is it a square")  # out of the questions
    records = read_records("own/captions.jsonl").select(range(6))
    found = evaluate_fusion_retrieval(model, processor, records, progress=False).metrics
    assert found == pytest.approx({name: written["metrics"][name] for name in found})


def test_pretraining_goes_on_as_if_it_had_never_stopped(run):
    recipe = PRETRAIN | {"training": {**PRETRAIN["training"], "accumulation": 2}}
    run("pretrain.py", "fusion", recipe, "--output", "whole")
    run("pretrain.py", "fusion", recipe, "--output", "parts")
    run("pretrain.py", "fusion", recipe, "--output", "parts", "--resume", "parts/checkpoints/step-00000002")
    whole, parts, earlier = (
        load_file(f"{name}/model.safetensors") for name in ("whole", "parts", "whole/checkpoints/step-00000002")
    )
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())
    assert any(not tensor.equal(earlier[name]) for name, tensor in whole.items())
    assert [line["mlm"] for line in losses_of("whole")] == [line["mlm"] for line in losses_of("parts")]
    assert results_of("whole")["metrics"] == results_of("parts")["metrics"]


def test_the_limit_of_patches_is_the_models_and_holds_in_training_alone(run, monkeypatch):
    seen = {True: set(), False: set()}
    original = VlpViltForPreTraining.forward

    def watched(self, *args, patch_index=None, **kwargs):
        seen[self.training].add(None if patch_index is None else patch_index.shape[1])
        return original(self, *args, patch_index=patch_index, **kwargs)

    monkeypatch.setattr(VlpViltForPreTraining, "forward", watched)
    run("pretrain.py", "fusion", PRETRAIN, "--rank_records", "null")
    assert seen == {True: {4}, False: {None}}


# ------------------------------------------------------------------------------------------------ tasks

EVALUATE = {"vqa": evaluate_vqa, "nlvr2": evaluate_nlvr2, "retrieval": evaluate_fusion_retrieval}
CLASSES = {
    "vqa": AutoModelForVisualQuestionAnswering,
    "nlvr2": AutoModelForVisualReasoning,
    "retrieval": AutoModelForImageTextRetrieval,
}
NEEDED = {"vqa": ("image", "question"), "nlvr2": ("images", "statement"), "retrieval": ("image", "captions")}


@pytest.mark.parametrize("task", EVALUATE)
def test_a_task_from_records_to_a_folder_that_loads_and_evaluates(finetune, task):
    shown = finetune(task, task_recipe(task))
    folder = Path("runs", task)
    assert all(f"{split}, step {step}\n" in shown for split in ("validation", "test") for step in (0, 2, 4))
    assert f'model = {CLASSES[task].__name__}.from_pretrained("runs/{task}")' in shown
    model, processor = CLASSES[task].from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    records = read_records(f"own/{FILES[task]}.jsonl", required=NEEDED[task])
    found, written = EVALUATE[task](model, processor, records, progress=False).metrics, results_of(folder)
    assert written["task"] == task and found == pytest.approx(written["metrics"])
    assert (folder / "retrieval.png").exists() == (task == "retrieval") and (folder / "curves.png").exists()
    assert f"examples/finetune.py --config {task}.yaml" in (folder / "README.md").read_text()
    best = json.loads((folder / "checkpoints" / "best.json").read_text())["metric"]
    assert best == ("validation/rsum" if task == "retrieval" else "validation/accuracy")
    # it began where pre-training ended, and moved
    before, after = (load_file(Path(place, "model.safetensors")) for place in ("runs/fusion", folder))
    shared = "vilt.encoder.layers.0.mlp.fc1.weight"
    assert not before[shared].equal(after[shared])
    assert (before[shared] - after[shared]).abs().max() < 4 * 0.011 * 2
    assert not [name for name in after if name.startswith(("mlm_head", "mpp_head"))]
    if task == "retrieval":  # the rank head began as the row of a match, the matching head is still
        assert before["itm_head.weight"].equal(after["itm_head.weight"])


def test_answers_are_counted_in_the_training_records(finetune):

    def answers(*words):
        shown = finetune("vqa", task_recipe("vqa", training={"steps": 1}), "--output", "found", *words)
        config = AutoConfig.from_pretrained("found")
        shutil.rmtree("found")
        assert {label: number for number, label in config.id2label.items()} == config.label2id
        return [label for _, label in sorted(config.id2label.items())], shown

    own, shown = answers()
    assert own == ["red", "no", "green", "yes", *COLOURS[2:]] and "24 of 24 records to train on, 14 classes" in shown
    assert "33.3 % of the records' answers are none of these" in shown  # the rare ones, which no record has most of
    often, shown = answers("--minimum_seen", "6")
    assert often == ["no", "yes"] and "12 of 24 records to train on, 2 classes" in shown
    assert "66.7 % of the records' answers are none of these" in shown
    most, _ = answers("--top_k", "2", "--data.train", "own/half.jsonl")
    assert most == ["no", "yes"]
    both, _ = answers("--data.train", "own/half.jsonl", "--count_validation")
    assert set(both) == set(own) and set(answers("--data.train", "own/half.jsonl")[0]) < set(own)
    Path("given.json").write_text(json.dumps(["yes", "no", "perhaps"]))
    assert answers("--data.answers.file", "given.json")[0] == ["yes", "no", "perhaps"]


def test_a_model_that_answers_goes_on_with_its_answers_or_with_others(finetune):
    short = {"training": {"steps": 1}, "optimizer": {"lr": 0.0}}
    finetune("vqa", task_recipe("vqa", **short), "--minimum_seen", "6")
    again = {"model": {"from_pretrained": "runs/vqa"}, **short}
    finetune("again", task_recipe("vqa", **again))
    first, second = (load_file(f"runs/{name}/model.safetensors") for name in ("vqa", "again"))
    assert first.keys() == second.keys() and all(tensor.equal(second[name]) for name, tensor in first.items())
    finetune("others", task_recipe("vqa", **again), "--minimum_seen", "1")
    others = load_file("runs/others/model.safetensors")
    assert {name for name in first if not first[name].equal(others[name])} == {
        "classifier.fc2.weight",
        "classifier.fc2.bias",
    }
    assert others["classifier.fc2.bias"].shape == (14,)
    with pytest.raises(SystemExit, match="trained with another vocabulary"):
        finetune("others", task_recipe("vqa", **again), "--minimum_seen", "6", "--resume", "auto")
    with pytest.raises(SystemExit, match="model.config: .*word_embeddings.weight is .* in the saved model"):
        finetune("wide", task_recipe("vqa", **again), "--model.config.vocab_size", "999")
    assert not Path("runs/wide").exists()


def test_fine_tuning_goes_on_as_if_it_had_never_stopped(finetune):
    alone = {"validation": None, "test": None}
    recipe = task_recipe("retrieval", data={"augmentation": {"name": "pixelbert_randaugment"}, **alone})
    finetune("retrieval", recipe, "--output", "whole")
    finetune("retrieval", recipe, "--output", "parts")
    finetune("retrieval", recipe, "--output", "parts", "--resume", "parts/checkpoints/step-00000002")
    whole, parts, earlier = (
        load_file(f"{name}/model.safetensors") for name in ("whole", "parts", "whole/checkpoints/step-00000002")
    )
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())
    assert any(not tensor.equal(earlier[name]) for name, tensor in whole.items())


def test_evaluation_of_the_first_records_says_so(run, finetune):
    run("pretrain.py", "few", PRETRAIN, "--steps", "1", "--evaluate_records", "8")
    assert results_of("runs/few")["counts"]["examples"] == 8
    finetune("retrieval", task_recipe("retrieval"), "--evaluate_records", "5", "--steps", "1")
    written = results_of("runs/retrieval")
    assert written["counts"]["images"] == 5 and written["protocol"].endswith("the first 5 records at most")


@pytest.mark.parametrize(
    ("script", "task", "words", "message"),
    [
        ("pretrain.py", "vqa", [], "task = vqa: this recipe is for examples/finetune.py"),
        ("finetune.py", "vqa", ["--task", "null"], "task is required, one of vqa, nlvr2, .*pretrain.py"),
        ("finetune.py", "vqa", ["--task", "vqa2"], "task = 'vqa2': expected one of vqa, nlvr2"),
        ("finetune.py", "vqa", ["--data.answers.minimum", "3"], "the nearest valid key is 'data.answers.minimum_seen'"),
        ("finetune.py", "vqa", ["--minimum_seen", "99"], "data.answers.minimum_seen = 99: no answer is seen 99 times"),
        ("finetune.py", "vqa", ["--data.answers.file", "absent.json"], "data.answers.file = 'absent.json'"),
        ("finetune.py", "vqa", ["--data.answers.file", "own/vqa.jsonl"], "data.answers.file = 'own/vqa.jsonl'"),
        ("finetune.py", "vqa", ["--data.train", "own/captions.jsonl"], "there is no column 'question'"),
        ("finetune.py", "vqa", ["--false_texts", "3"], "data.false_texts is for the task retrieval, and task = vqa"),
        ("finetune.py", "vqa", ["--data.masking", "{}"], "data.masking is for pre-training, without a task"),
        ("finetune.py", "vqa", ["--augmentation", "{name: pixelbird}"], "data.augmentation = .*'pixelbird'"),
        (
            "finetune.py",
            "nlvr2",
            ["--data.train", "own/one.jsonl", "--cache"],
            r"record \d+, field 'images': 2 pictures are needed",
        ),
        ("finetune.py", "entailment", [], "vlp_vilt has no class for AutoModelForVisualEntailment"),
        ("finetune.py", "grounding", [], "task = grounding: a vlp_vilt model has no cross_attention"),
        ("finetune.py", "retrieval", ["--data.columns", "{captions: captoin}"], "captoin.*captions"),
        (
            "finetune.py",
            "retrieval",
            ["--data.train", "own/alone.jsonl", "--batch_size", "2"],
            "cannot fill a batch|of one image",
        ),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(run, finetune, script, task, words, message):
    with pytest.raises(SystemExit, match=message):
        run(script, task, task_recipe(task), *words, "--output", "bad")
    assert not Path("bad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocabulary_records", "[own/absent.jsonl]"], "processor.vocabulary_records: 'own/absent.jsonl'"),
        (["--padded_to", "40", "--whole_words", "false"], "data.masking.padded_to is for whole words"),
        (["--processor.vocabulary", "byte_pairs", "--vocabulary_size", "600"], "data.masking: .*no mask token"),
        (["--model.config.hidden_sice", "8"], "hidden_sice.*'hidden_size'"),
        (["--model.config.wpa_weight", "0.1", "--model.config.itm_weight", "0"], "model.config: .*wpa_weight"),
        (["--model.towers", "{text: x}"], "model.towers.text = 'x': .*no tower 'text'; it has image"),
        (["--model.towers", "{image: timm/vit_base_patch32_3840}"], "model.towers.image = .*timm has no model"),
        (["--data.regions", "x.regions", "--augmentation", "{}", "--image_processor", "{}"], "this model sees pixels"),
    ],
)
def test_bad_settings_of_pretraining_are_one_line_and_leave_nothing(run, words, message):
    with pytest.raises(SystemExit, match=message):
        run("pretrain.py", "fusion", PRETRAIN, *words)
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------ processes


def test_two_processes_evaluate_as_one(run, tmp_path):
    """Forty held-out examples are two batches, one for each of two processes."""
    rows = [json.loads(line) for line in Path("own/captions.jsonl").read_text().splitlines()]
    many = [row | {"image_id": f"{row['image_id']} {number // 2}"} for number in range(4) for row in rows][:40]
    Path("own/many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    recipe = PRETRAIN | {"data": PRETRAIN["data"] | {"validation": "own/many.jsonl", "test": None}}
    run("pretrain.py", "fusion", recipe, "--output", "one", "--steps", "1", "--rank_records", "4")
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["--config", "fusion.yaml", "--output", "two", "--steps", "1", "--rank_records", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*launched, str(EXAMPLES / "pretrain.py"), *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = ({name: evaluations(name)[step] for name in ("one", "two")} for step in (0, -1))
    assert first["two"] == pytest.approx(first["one"], rel=1e-5)
    assert first["one"]["validation/itm/accuracy"] == 50.0 and "validation/rsum" in first["one"]
    # processes make their batches of their own parts, so that the training is another one, but it is one
    assert last["two"] != pytest.approx(last["one"], rel=1e-6)
    assert len(evaluations("two")) == 2 and done.stdout.count("holds the model") == 1


def evaluations(folder):
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line]


def test_accumulation_is_no_larger_batch_where_a_batch_is_contrasted():
    with pytest.warns(UserWarning, match="each accumulated batch is contrasted with itself only"):
        choose_step(None, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_step(None, 2, contrasts=False)
