"""Every block of code in the documents: Python is run, shell commands are run or parsed by the programs they name."""

import base64
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

import hf_vlp
from hf_vlp.data.tasks import ENTAILMENT
from hf_vlp.training.recipe import RecipeError, load_recipe
from tests.contract.documents import ROOT, Program, blocks, commands, header_commands, programs
from tests.contract.loopback_hub import Hub, environment
from tests.contract.tiny import save_tiny_albef, save_tiny_clip, save_tiny_vilt, save_tiny_vse

README, CARDS = ROOT / "README.md", ROOT / "MODEL_CARDS.md"
DOCUMENTS = (README, CARDS, ROOT / "examples" / "data" / "emoji" / "README.md")
LANGUAGES = ("", "python", "bash", "json", "yaml", "sh", "console", "text")
SCRIPTS = sorted(
    [*(ROOT / "examples").glob("*.py"), *(ROOT / "conversion").glob("*.py"), *(ROOT / "examples").glob("configs/*")]
)
ANSWERS = ("yes", "no", "two", "a boat")
NUMBERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A reader's working folder: the project's files, trained and converted models, own pictures, pairs and region features."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    save_tiny_clip(folder / "runs" / "clip_emoji", "resnet")
    save_tiny_clip(folder / "clip-vit-b-32")
    save_tiny_vse(folder / "runs" / "vse_emoji_grid")
    save_tiny_vse(folder / "runs" / "vse_emoji_region", region_size=32)
    save_tiny_vse(folder / "vse-coco-grid")
    save_tiny_vse(folder / "vse-coco-region", region_size=2048)
    save_tiny_vilt(folder / "runs" / "vilt_emoji", hf_vlp.VlpViltForPreTraining)
    for name in ("runs/vilt_retrieval_emoji", "vilt-retrieval"):
        save_tiny_vilt(folder / name, hf_vlp.VlpViltForImageTextRetrieval)
    answers = {"id2label": dict(enumerate(ANSWERS)), "label2id": {answer: place for place, answer in enumerate(ANSWERS)}}
    for name in ("runs/vilt_vqa_emoji", "vilt-vqa"):
        save_tiny_vilt(folder / name, hf_vlp.VlpViltForVisualQuestionAnswering, **answers)
    save_tiny_vilt(folder / "runs" / "vilt_nlvr2_emoji", hf_vlp.VlpViltForVisualReasoning)
    for name in ("runs/albef_grounding_emoji", "runs/albef_retrieval_emoji", "albef-coco"):
        save_tiny_albef(folder / name, hf_vlp.VlpAlbefForImageTextRetrieval)
    for name in ("runs/albef_vqa_emoji", "albef-vqa"):
        answering = save_tiny_albef(folder / name, hf_vlp.VlpAlbefForVisualQuestionAnswering, **answers)
        model = hf_vlp.VlpAlbefForVisualQuestionAnswering.from_pretrained(answering)
        model.set_answers(**AutoProcessor.from_pretrained(answering).encode_answers(list(ANSWERS)))
        model.save_pretrained(answering)
    save_tiny_albef(folder / "runs" / "albef_nlvr2_emoji", hf_vlp.VlpAlbefForVisualReasoning)
    judged = {"id2label": {number: label for label, number in ENTAILMENT.items()}, "label2id": ENTAILMENT}
    save_tiny_albef(folder / "runs" / "albef_ve_emoji", hf_vlp.VlpAlbefForVisualEntailment, **judged)
    done = [sys.executable, ROOT / "examples/data/scenes.py", "--output", folder / "scenes", "--scenes", "200"]
    subprocess.run([*done, "--tasks", "captions", "vqa", "nlvr2", "entailment", "referring"], check=True, capture_output=True)
    precomputed = folder / "data" / "coco" / "precomp"
    precomputed.mkdir(parents=True)
    np.save(precomputed / "testall_ims.npy", np.random.default_rng(0).random((6, 36, 2048), np.float32))
    (precomputed / "testall_ids.txt").write_text("".join(f"{39076 + image}\n" for image in range(6)))
    (precomputed / "testall_caps.txt").write_text("two dogs in the snow\n" * 30)
    (lines,) = blocks(README, "json")
    (folder / "pairs.jsonl").write_text(lines.text)
    for record in map(json.loads, lines.text.splitlines()):
        picture = folder / record["image"]
        picture.parent.mkdir(exist_ok=True)
        Image.effect_noise((60, 50), 80).convert("RGB").save(picture)
    boxes, features = np.array([[0, 0, 30, 20], [5, 8, 60, 50]], np.float32), np.ones((2, 12), np.float32)
    encoded = [base64.b64encode(array.tobytes()).decode() for array in (boxes, features)]
    (folder / "features.tsv").write_text("\t".join(["0001", "60", "50", "2", *encoded]) + "\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Hub:
    """The published towers and the detector that the documents name, in small."""
    folder, hub = tmp_path_factory.mktemp("towers"), Hub()
    ViTModel(ViTConfig(image_size=32, patch_size=8, **NUMBERS)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    yolos = YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=40, num_labels=3, **NUMBERS)
    YolosForObjectDetection(yolos).save_pretrained(folder / "yolos")
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder / "yolos")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只红色的船"]
    BertModel(BertConfig(vocab_size=len(words), **NUMBERS)).save_pretrained(folder / "bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder / "bert")
    published = {
        "google/vit-base-patch16-224": "vit",
        "google-bert/bert-base-chinese": "bert",
        "hustvl/yolos-tiny": "yolos",
    }
    for name, source in published.items():
        hub.files[name] = {file.name: file.read_bytes() for file in (folder / source).iterdir()}
        hub.commits[name] = 1
    return hub


@pytest.fixture(scope="module")
def ran(reader, hub) -> set[str]:
    """The blocks that ran, all documents in one process; each begins with no names."""
    with hub.serve() as address:
        variables = environment(address, reader / "home") | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.contract.documents", *map(str, DOCUMENTS)],
            cwd=reader,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return {line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_document_runs_from_top_to_bottom(document, ran):
    wanted = {
        block.name for block in blocks(document, "python", "bash") if block.language == "python" or programs(block)
    }
    assert wanted and wanted <= ran


def shell_commands() -> list:
    """Every command of the documents and of the heads of scripts and recipes."""
    found = [
        (block.name, words) for file in DOCUMENTS for block in blocks(file, "bash") for words in commands(block.text)
    ]
    found += [(str(file.relative_to(ROOT)), words) for file in SCRIPTS for words in header_commands(file)]
    return [pytest.param(words, id=f"{where}-{index}") for index, (where, words) in enumerate(found)]


def check(words: list[str]) -> None:
    """A command is one that its program accepts.

    Raises:
        SystemExit, RecipeError, AssertionError: it is not.
    """
    program = Program.of(words)
    if program is None:
        known = {"pytest": [[]], "bash": [[".ci/run"]], "pip": [["install", "-e", "."], ["install", "-e", ".[test]"]]}
        assert words[1:] in known[words[0]], words
        return
    options, rest = program.parse()
    if program.name in ("examples/pretrain.py", "examples/finetune.py"):
        load_recipe(options.config, rest)
    given = [word for word in program.arguments if word.startswith(("examples/", "tests/"))]
    assert all((ROOT / word).exists() for word in given), given


@pytest.mark.parametrize("words", shell_commands())
def test_a_shell_command_is_one_that_the_program_accepts(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(words)


@pytest.mark.parametrize(
    "command",
    [
        "python examples/evaluate.py runs/clip_emoji --task retrieval --data x.parquet --batchsize 3",
        "python examples/evaluate.py runs/clip_emoji --task retrieving --data x.parquet",
        "python examples/search.py query my_pictures --texts boat",
        "python -m conversion.from_clip --checkpoint x.pt",
        "python -m tests.parity clip vit",
        "accelerate launch --processes 2 examples/pretrain.py",
        "accelerate launch examples/pretrain.py --training.batch_sise 3",
        "accelerate launch examples/pretrain.py --config examples/configs/absent.yaml",
        "python -m tests.parity clip vit tests/golden/clip/absent",
        "pip install -e .[absent]",
    ],
)
def test_a_wrong_command_would_be_seen(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, RecipeError, AssertionError)):
        check(command.split())


def test_the_documents_have_code_and_the_heads_have_commands():
    assert len(blocks(README, "python")) >= 6 and len(blocks(README, "bash")) >= 8
    assert len(blocks(CARDS, "python")) >= 4
    assert sum(bool(header_commands(file)) for file in SCRIPTS) >= len(list((ROOT / "examples/configs").iterdir()))
    assert {block.language for file in DOCUMENTS for block in blocks(file, *LANGUAGES)} <= {
        "python",
        "bash",
        "json",
    }


def test_files_and_recipes_that_the_readme_names_are_there():
    text = README.read_text()
    for recipe in (ROOT / "examples" / "configs").glob("*.yaml"):
        assert f"`{recipe.name}`" in text, f"README.md does not list {recipe.name}"
    for name in ("MODEL_CARDS.md", "LICENSE", ".ci/run", "hf_vlp/auto.py", "examples/data/emoji"):
        assert name in text and (ROOT / name).exists()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert metadata.metadata("hf_vlp")["License"] == "Apache-2.0"


def test_the_extras_of_the_readme_are_declared():
    assert "test" in metadata.metadata("hf_vlp").get_all("Provides-Extra")
