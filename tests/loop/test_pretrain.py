"""examples/pretrain.py as a user runs it, on a dozen coloured squares."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
COLOURS = ("red", "green", "blue", "black", "white", "yellow", "orange", "purple", "pink", "brown", "gray", "cyan")
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def pretrain(tmp_path, monkeypatch, capsys):
    """Runs the script in an empty folder with a small recipe; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    with open("squares.jsonl", "w") as file:
        for colour in COLOURS:
            Image.new("RGB", (40, 32), colour).save(f"{colour}.png")
            file.write(
                json.dumps({"image": f"{colour}.png", "caption": f"a {colour} square", "image_id": colour}) + "\n"
            )
    recipe = {
        "model": {
            "model_type": "vlp_clip",
            "config": {
                "projection_dim": 8,
                "text_config": TOWER | {"max_position_embeddings": 16},
                "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
            },
        },
        "processor": {"vocabulary_size": 600, "max_length": 16},
        "data": {"train": "squares.jsonl", "validation": "squares.jsonl", "test": "squares.jsonl", "cache": True}
        | {"augmentation": {"name": "random_resized_crop", "canvas": 18}},
        "optimizer": {"lr": 0.01},
        "training": {"steps": 6, "batch_size": 6, "evaluate_every": 3, "save_every": 3, "log_every": 2},
    }
    Path("squares.yaml").write_text(yaml.safe_dump(recipe))

    def run(*words):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", ["examples/pretrain.py", "--config", "squares.yaml", *words])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return run


def test_a_run_from_data_to_a_folder_that_loads(pretrain):
    shown = pretrain()
    folder = Path("runs/squares")
    wanted = {"recipe.yaml", "metrics.jsonl", "curves.png", "retrieval.png", "results.json", "README.md"}
    assert wanted | {"model.safetensors", "config.json"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    for step in (0, 3, 6):
        assert f"test, step {step}\n" in shown
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    results = json.loads((folder / "results.json").read_text())
    assert [(entry["split"], entry["counts"]["images"]) for entry in results] == [("validation", 12), ("test", 12)]
    assert all(entry["protocol"].endswith(", float32, torchvision pictures") for entry in results)
    assert {entry["command"] for entry in results} == {"python examples/pretrain.py --config squares.yaml"}
    # the lines it printed do load the model
    from transformers import AutoModel, AutoProcessor

    assert 'model = AutoModel.from_pretrained("runs/squares")' in shown
    assert 'processor = AutoProcessor.from_pretrained("runs/squares")' in shown
    model, processor = AutoModel.from_pretrained("runs/squares"), AutoProcessor.from_pretrained("runs/squares")
    batch = processor(images=[Image.new("RGB", (20, 20))], text=["a red square"], return_tensors="pt")
    assert model(**batch).logits_per_image.shape == (1, 1)


def test_a_run_goes_on_where_it_stopped(pretrain):
    pretrain()
    with pytest.raises(SystemExit, match="runs/squares already holds a run: go on with --resume auto"):
        pretrain()
    shown = pretrain("--resume", "auto", "--steps", "8")
    assert "resumed from runs/squares/checkpoints/step-00000006" in shown
    assert "training.steps: 6 -> 8" in shown
    lines = [json.loads(line) for line in Path("runs/squares/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_a_saved_model_is_fine_tuned_with_its_own_processor(pretrain):
    pretrain()
    finetune = yaml.safe_load(Path("squares.yaml").read_text())
    finetune |= {"model": {"from_pretrained": "runs/squares"}, "optimizer": {"lr": 1e-4, "freeze": ["vision_model"]}}
    finetune.pop("processor")
    Path("again.yaml").write_text(yaml.safe_dump(finetune))
    shown = pretrain("--config", "again.yaml", "--final", "best")
    assert "the best checkpoint becomes the model" in shown
    from safetensors.torch import load_file

    before, after = (load_file(f"runs/{name}/model.safetensors") for name in ("squares", "again"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not [name for name in moved if "vision_model" in name]


def test_settings_of_a_saved_processor_are_honoured_or_refused(pretrain):
    pretrain("--steps", "1")
    finetune = yaml.safe_load(Path("squares.yaml").read_text())
    finetune |= {"model": {"from_pretrained": "runs/squares"}, "processor": {"max_length": 12, "text_cleaning": "none"}}
    finetune["training"]["steps"] = 1
    Path("again.yaml").write_text(yaml.safe_dump(finetune))
    pretrain("--config", "again.yaml")
    from transformers import AutoProcessor

    first, again = (AutoProcessor.from_pretrained(f"runs/{name}") for name in ("squares", "again"))
    assert (first.tokenizer.model_max_length, first.text_cleaning) == (16, "clip")
    assert (again.tokenizer.model_max_length, again.text_cleaning) == (12, "none")
    with pytest.warns(UserWarning, match="more than 12 tokens"):
        assert again(text="a red square " * 5)["input_ids"].shape == (1, 12)
    for words in (["--vocabulary_size", "600"], ["--tokenizer", "runs/squares"]):
        with pytest.raises(SystemExit, match=f"processor.{words[0][2:]} = .* saved in runs/squares has its own"):
            pretrain("--config", "again.yaml", "--output", "elsewhere", *words)
    # and unknown fields of a saved model are named like those of a new one
    for words, message in (
        (["--model.config.text_config.hidden_sice", "8"], "text_config.hidden_sice: .*the nearest is 'hidden_size'"),
        (["--model.config.projection", "8"], "model.config.projection: .*the nearest is 'projection_dim'"),
        (["--model.config.to_dict", "8"], "model.config.to_dict: VlpClipConfig has no such field"),
        (["--model.config.vision_config.model_type", "bert"], "vision_config.model_type = 'bert': the saved model has"),
    ):
        with pytest.raises(SystemExit, match=message):
            pretrain("--config", "again.yaml", "--output", "elsewhere", *words)
    assert not Path("elsewhere").exists()


def test_captions_of_another_vocabulary_do_not_go_on(pretrain):
    pretrain("--steps", "3")
    lines = Path("squares.jsonl").read_text().replace(" square", " circle and a triangle")
    Path("squares.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match="step-00000003 was trained with another vocabulary"):
        pretrain("--resume", "auto")


def test_a_dry_run_writes_nothing(pretrain):
    before = set(Path().iterdir())
    shown = pretrain("--dry-run")
    assert "clip.text_model" in shown and "seconds a step" in shown and "peak memory" in shown
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.batchsize", "8"], "unknown recipe key 'training.batchsize'.*'training.batch_size'"),
        (["--model.model_type", "vlp_clap"], "model.model_type = 'vlp_clap' is unknown; the nearest is 'vlp_clip'"),
        (["--model.config.projecton_dim", "8"], "projecton_dim.*'projection_dim'"),
        (["--model.config.embedding_width", "8"], "model.config.embedding_width: VlpClipConfig has no such field"),
        (["--model.config.text_config.layers", "2"], "config.text_config.layers: .*no such field; the nearest is"),
        (
            ["--model.config.text_config", "{model_type: bert, hidden_size: 16, num_attention_heads: 2, n_layers: 1}"],
            "model.config.text_config.n_layers: BertConfig has no such field",
        ),
        (["--model.config.vision_config.hidden_size", "wide"], "model.config: .*hidden_size"),
        (["--data.columns", "{captions: captoin}"], "captoin.*caption"),
        (["--config", "absent.yaml"], "there is no recipe absent.yaml"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(pretrain, words, message):
    before = set(Path().iterdir())
    with pytest.raises(SystemExit, match=message):
        pretrain(*words)
    assert set(Path().iterdir()) == before
