"""examples/pretrain.py as a user runs it, on a dozen coloured squares."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from hf_vlp.data.readers import read_records
from hf_vlp.data.regions import main as import_main
from hf_vlp.evaluation.retrieval import RetrievalSet, evaluate_retrieval
from hf_vlp.inputs.region_store import write_region_store
from hf_vlp.inputs.regions import RegionFeatures
from hf_vlp.models.vse.configuration_vse import VlpVseGridConfig
from hf_vlp.models.vse.modeling_vse import VlpVseGridModel

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
        "training": {"steps": 6, "batch_size": 6, "evaluate_every": 3, "save_every": 3, "log_every": 2, "threads": 1},
    }
    Path("squares.yaml").write_text(yaml.safe_dump(recipe))

    def run(*words):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", ["examples/pretrain.py", "--config", "squares.yaml", *words])
        monkeypatch.syspath_prepend(SCRIPT.parent)  # as Python does for a script
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


# ------------------------------------------------------------------------------------------------ VSE-infinity

BERT = TOWER | {"model_type": "bert", "max_position_embeddings": 24}
GRU = {"model_type": "vlp_vse_gru_model", "embedding_size": 6, "hidden_size": 8}
GRID = {
    "model_type": "vlp_vse_grid_model",
    "embedding_size": 4,
    "depths": [1, 1],
    "hidden_sizes": [8, 12],
    "bottleneck_sizes": [4, 4],
    "image_size": 32,
}
SQUASHED = {"augmentation": {"name": "random_crop_squash"}, "size_augmentation": {"captions": 0.2, "grid": 0.2}}
STORED = {"regions": "squares.regions", "size_augmentation": {"captions": 0.2, "regions": 0.2}}
PIECES, WORDS = {"vocabulary": "word_pieces", "vocabulary_size": 120}, {"vocabulary": "words", "minimum_count": 1}
KINDS = {
    "grid-gru": ({"text_config": GRU, "vision_config": GRID}, WORDS, SQUASHED),
    "grid-bert": ({"text_config": BERT, "vision_config": GRID}, PIECES, SQUASHED),
    "region-bert": ({"text_config": BERT, "region_size": 5}, PIECES, STORED),
}


@pytest.fixture
def vse(pretrain):
    """Writes the recipe of a kind, and the store of the squares; returns the script."""
    regions = [RegionFeatures(np.full((3 + i % 2, 5), i, np.float32), image_id=name) for i, name in enumerate(COLOURS)]
    write_region_store("squares.regions", regions)

    def write(kind, **changes):
        config, processor, data = KINDS[kind]
        config = {"projection_dim": 8, "contrastive_targets": "plain", **config}
        ramps = {
            "hardest_negatives": {"at": [1, 3], "values": [0, 1], "shape": "linear", "unit": "steps"},
            "loss_factor": {"at": [0, 1, 1, 2], "values": [1, 1, 0, 1], "shape": "linear"},
        }
        frozen = {"frozen_stages": {"at": [0, 1], "values": [2, 0]}} if "vision_config" in config else {}
        recipe = {
            "model": {"model_type": "vlp_vse", "config": config},
            "processor": processor,
            "data": {**dict.fromkeys(("train", "validation", "test"), "squares.jsonl"), **data},
            "optimizer": {"lr": 0.01, "decay": "all"},
            "schedule": {"name": "constant"},
            "ramps": ramps | frozen,
            "training": {
                "steps": 6,
                "batch_size": 6,
                "evaluate_every": 3,
                "save_every": 2,
                "clip_norm": 2.0,
                "threads": 1,
            },
        }
        for section, values in changes.items():
            recipe[section] = recipe[section] | values
        Path("vse.yaml").write_text(yaml.safe_dump(recipe))

    def run(kind, *words, **changes):
        write(kind, **changes)
        return pretrain("--config", "vse.yaml", *words)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_vse_from_data_to_a_folder_that_loads_and_evaluates(vse, kind):
    shown = vse(kind)
    folder = Path("runs/vse")
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    required = ("captions",) if kind == "region-bert" else ("image", "captions")
    records = read_records("squares.jsonl", required=required)
    report = evaluate_retrieval(model, processor, RetrievalSet(records), progress=False)
    (written,) = [entry for entry in json.loads((folder / "results.json").read_text()) if entry["split"] == "test"]
    assert report.metrics == pytest.approx(written["metrics"]) and written["counts"]["images"] == 12
    assert type(model).__name__ == "VlpVseModel" and len(processor.tokenizer) == model.config.text_config.vocab_size
    # the squares have pictures, also where regions stand for them
    assert (folder / "retrieval.png").exists() and "curves.png, retrieval.png, results.json" in shown
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "triplet" in line]
    assert [line["ramp/hardest_negatives"] for line in steps] == [0, 0, 0.5, 1, 1, 1]
    assert [line["ramp/loss_factor"] for line in steps] == [1, 1, 0, 0.5, 1, 1]
    assert [line["grad_norm"] == 0 for line in steps] == [False, False, True, False, False, False]
    frozen = [line.get("ramp/frozen_stages") for line in steps]
    assert frozen == ([None] * 6 if kind == "region-bert" else [2, 2, 0, 0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_vse_goes_on_as_if_it_had_never_stopped(vse, kind):
    vse(kind, "--output", "whole")
    vse(kind, "--output", "parts", "--steps", "1")  # while the tower is frozen and the ramps have all before them
    vse(kind, "--output", "parts", "--resume", "auto")
    whole, parts, earlier = (
        load_file(f"{name}/model.safetensors") for name in ("whole", "parts", "whole/checkpoints/step-00000004")
    )
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())
    assert any(not tensor.equal(earlier[name]) for name, tensor in whole.items())
    one, two = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts"))
    last = [json.loads(lines[-1])["evaluation"] for lines in (one, two)]
    assert last[0] == last[1]


def test_regions_without_pictures_from_a_folder_of_precomputed_features(vse, pretrain):
    for split, numbers in (("train", range(8)), ("dev", range(8, 12))):
        Path("precomp").mkdir(exist_ok=True)
        np.save(f"precomp/{split}_ims.npy", np.array([np.full((3, 5), i, np.float32) for i in numbers]))
        Path(f"precomp/{split}_ids.txt").write_text("".join(f"{100 + i}\n" for i in numbers))
        captions = [
            f"a {COLOURS[i]} square, {word}" for i in numbers for word in ("one", "two", "three", "four", "five")
        ]
        Path(f"precomp/{split}_caps.txt").write_text("\n".join(captions) + "\n")
    sources = ["precomp/train_ims.npy", "precomp/dev_ims.npy"]
    assert import_main(["import", *sources, "--output", "precomp.regions"]) == 0
    data = {"train_split": "train", "validation_split": "dev", "test_split": "dev", "regions": "precomp.regions"}
    data |= dict.fromkeys(("train", "validation", "test"), "precomp")
    words = ["--final", "best", "--batch_size", "4"]
    shown = vse("region-bert", *words, data=data, processor=PIECES | {"max_length": 24})
    assert not Path("runs/vse/retrieval.png").exists()
    assert "runs/vse holds the model, curves.png, results.json and README.md" in shown
    results = json.loads(Path("runs/vse/results.json").read_text())
    assert [(entry["split"], entry["counts"]["captions"]) for entry in results] == [("dev", 20), ("dev", 20)]
    with pytest.raises(SystemExit, match="data.validation = 'precomp': precomp has the splits dev, train; split='val'"):
        pretrain("--config", "vse.yaml", "--output", "elsewhere", "--validation_split", "val")


def saved_towers():
    torch.manual_seed(9)
    text = {name: value for name, value in BERT.items() if name != "model_type"}
    bert = BertModel(BertConfig(vocab_size=TOKENS, **text))
    grid = VlpVseGridModel(VlpVseGridConfig(**{name: value for name, value in GRID.items() if name != "model_type"}))
    bert.save_pretrained("bert"), grid.save_pretrained("grid")
    BertModel(BertConfig(vocab_size=TOKENS + 1, **text)).save_pretrained("larger")
    return bert.state_dict(), grid.state_dict()


TOKENS = 51  # of the word pieces of the squares' captions, as the next test makes sure


def test_towers_start_from_saved_encoders(vse):
    bert, grid = saved_towers()
    towers = {"text_model": "bert", "vision_model": "grid"}
    still = ["--lr", "0", "--steps", "1"]
    vse("grid-bert", *still, model={"towers": towers}, processor=PIECES | {"vocabulary_size": TOKENS})
    state = load_file("runs/vse/model.safetensors")
    for prefix, tower in (("vse.text_model.", bert), ("vse.vision_model.", grid)):
        names = [name for name in tower if not name.startswith("pooler.")]
        assert all(torch.equal(tower[name], state[prefix + name]) for name in names)
        assert len([name for name in state if name.startswith(prefix)]) == len(names)
    vse("grid-bert", *still, "--output", "fresh", processor=PIECES | {"vocabulary_size": TOKENS})
    fresh = load_file("fresh/model.safetensors")
    weight = "vse.text_model.embeddings.word_embeddings.weight"
    assert len(fresh[weight]) == TOKENS and not torch.equal(fresh[weight], state[weight])


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        (
            {"audio_model": "bert"},
            "model.towers.audio_model = 'bert': .*no tower 'audio_model'; it has text_model, vision_model",
        ),
        (
            {"text_model": "grid"},
            "model.towers.text_model = 'grid': .*VlpVseGridModel given as text_model does not fill a",
        ),
        (
            {"text_model": "larger"},
            r"model.towers.text_model = 'larger': .*other sizes than .*word_embeddings.weight.*\[52",
        ),
        ({"vision_model": "no/such/folder"}, "model.towers.vision_model = 'no/such/folder': "),
    ],
)
def test_a_tower_that_does_not_fit_is_one_line(vse, towers, message):
    saved_towers()
    with pytest.raises(SystemExit, match=message):
        vse("grid-bert", model={"towers": towers}, processor=PIECES | {"vocabulary_size": TOKENS})
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (
            "grid-gru",
            ["--data.regions", "squares.regions", "--augmentation", "{}"],
            "data.regions = .*this model sees pixels",
        ),
        (
            "region-bert",
            ["--data.regions", "null", "--data.size_augmentation.regions", "0"],
            "data.regions is required: .*regions",
        ),
        (
            "region-bert",
            ["--data.regions", "absent.regions"],
            "data.regions = .*there is no region store at absent.regions",
        ),
        ("region-bert", ["--data.regions", "squares.jsonl"], "data.regions = 'squares.jsonl': squares.jsonl"),
        ("region-bert", ["--model.config.region_size", "6"], "features are 5 wide, and model.config.region_size is 6"),
        ("region-bert", ["--grid", "0.2"], "data.size_augmentation.grid: this model pools no grid"),
        ("region-bert", ["--image_processor", "{do_rescale: false}"], "processor.image_processor is for pictures"),
        (
            "grid-gru",
            ["--text_cleaning", "none"],
            "processor.text_cleaning = 'none': the processor of vlp_vse has no such setting",
        ),
        (
            "grid-gru",
            ["--vocabulary", "byte_pairs", "--minimum_count", "null", "--vocabulary_size", "600"],
            "augmentation.captions",
        ),
        ("grid-gru", ["--ramps.frozen_stages.values", "[4, 0]"], r"ramps.frozen_stages: .*the tower has 2 stage"),
        (
            "grid-gru",
            ["--ramps.hardest", "{at: [0], values: [1]}"],
            "ramps.hardest: .*the nearest is 'hardest_negatives'",
        ),
        (
            "region-bert",
            ["--ramps.frozen_stages", "{at: [0], values: [1]}"],
            "ramps.frozen_stages: VlpVseForPreTraining has",
        ),
    ],
)
def test_bad_settings_of_vse_are_one_line_and_leave_nothing(vse, kind, words, message):
    with pytest.raises(SystemExit, match=message):
        vse(kind, *words)
    assert not Path("runs").exists()


def test_other_models_refuse_what_is_for_sets(pretrain):
    with pytest.raises(SystemExit, match="data.size_augmentation.grid: this model pools no grid of cells"):
        pretrain("--grid", "0.2")
    with pytest.raises(SystemExit, match="data.size_augmentation.captions = 0.2: .*"):
        pretrain("--captions", "0.2")
    with pytest.raises(SystemExit, match="ramps.hardest_negatives: VlpClipForPreTraining has loss_factor; the nearest"):
        pretrain("--ramps.hardest_negatives", "{at: [0], values: [1]}")
    assert not Path("runs").exists()
    shown = pretrain("--data.validation", "null", "--data.test", "null", "--steps", "2")
    assert "curves.png, results.json and README.md" in shown and not Path("runs/squares/retrieval.png").exists()


def test_captions_are_as_long_as_the_tokenizer_and_the_model_allow(vse, pretrain):
    from transformers import AutoProcessor, BertTokenizer

    def limit(*words, **changes):
        vse(*words, "--steps", "1", "--data.validation", "null", "--data.test", "null", "--output", "run", **changes)
        found = AutoProcessor.from_pretrained("run").tokenizer
        shutil.rmtree("run")
        return found.model_max_length

    assert limit("region-bert") == 24  # BERT's positions
    assert limit("region-bert", "--max_length", "12") == 12
    assert limit("grid-gru") > 10**6  # a BiGRU reads on and on
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "square", *COLOURS]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=90).save_pretrained(
        "bert"
    )
    config = {"text_config": BERT | {"max_position_embeddings": 200}}
    given = {
        "processor": {"tokenizer": "bert", "vocabulary": None, "vocabulary_size": None},
        "model": {"config": config},
    }
    given["model"]["config"] = KINDS["region-bert"][0] | {"projection_dim": 8} | config
    assert limit("region-bert", **given) == 90  # the tokenizer's own


def test_a_saved_model_of_regions_goes_on_with_another_store(vse, pretrain):
    vse("region-bert", "--steps", "2")
    other = [RegionFeatures(np.full((2, 5), -i, np.float32), image_id=name) for i, name in enumerate(COLOURS)]
    write_region_store("other.regions", other)
    recipe = yaml.safe_load(Path("vse.yaml").read_text())
    recipe |= {"model": {"from_pretrained": "runs/vse"}, "processor": {}}
    recipe["data"]["regions"] = "other.regions"
    Path("again.yaml").write_text(yaml.safe_dump(recipe))
    pretrain("--config", "again.yaml", "--steps", "2")
    from transformers import AutoProcessor

    first, again = (AutoProcessor.from_pretrained(f"runs/{name}") for name in ("vse", "again"))
    assert (first.feature_extractor.region_store, again.feature_extractor.region_store) == (
        "squares.regions",
        "other.regions",
    )
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert again(regions=["cyan"])["region_features"].tolist() == [[[-11.0] * 5] * 2]
    with pytest.raises(SystemExit, match="features are 5 wide, and model.config.region_size is 7"):
        pretrain("--config", "again.yaml", "--output", "x", "--model.config.region_size", "7")
