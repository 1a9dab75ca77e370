"""examples/evaluate.py as a user runs it, and what it records of how a number was measured."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from PIL import Image

from hf_vlp import (
    VlpAlbefForImageTextRetrieval,
    VlpAlbefForPreTraining,
    VlpViltForImageTextRetrieval,
    VlpViltForPreTraining,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)
from hf_vlp.evaluation.ensemble import SavedScores, write_scores
from hf_vlp.evaluation.fusion_retrieval import Candidates, two_stage_metrics
from hf_vlp.evaluation.provenance import command, conditions, shortened
from hf_vlp.evaluation.retrieval import score_metrics
from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
from hf_vlp.inputs.region_store import write_region_store
from hf_vlp.inputs.regions import RegionFeatures
from tests.contract.tiny import save_tiny_albef, save_tiny_clip, save_tiny_vilt

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "evaluate.py"
COLOURS = ("red", "green", "blue", "black", "white", "gray")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, tmp_path_factory):
    """Runs the script in a folder with six pictures and returns what results.json holds then."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    save_tiny_clip(tmp_path / "tiny")
    for colour in COLOURS:
        Image.new("RGB", (9, 7), colour).save(f"{colour}.png")

    def run(*words) -> list[dict]:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "tiny", *words])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return json.loads(Path("tiny/results.json").read_text())

    return run


def write_rows(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_karpathy_splits_and_their_first_captions(evaluate):
    def entry(number, colour, split):
        sentences = [{"raw": f"{colour} {word}"} for word in ("apple", "face", "ship", "boat")[: 2 + number % 3]]
        return {"filename": f"{colour}.png", "split": split, "cocoid": number, "sentences": sentences}

    images = [entry(i, colour, "train" if i < 2 else "test") for i, colour in enumerate(COLOURS)]
    Path("split").mkdir()
    Path("split/dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    shared = ["--task", "retrieval", "--data", "split/dataset_coco.json", "--image-root", ".", "--split", "test"]
    (result,) = evaluate(*shared, "--captions-per-image", "2")
    assert result["counts"]["images"] == 4 and result["counts"]["captions"] == 8
    assert "the first 2 captions of each image" in result["protocol"]
    first, whole = evaluate(*shared)
    assert first == result and whole["counts"]["captions"] == 4 + 2 + 3 + 4
    with pytest.raises(ValueError, match="5,000 images"):
        evaluate(*shared, "--five-fold")
    with pytest.raises(ValueError, match="captions, 5 are asked for"):
        evaluate(*shared, "--captions-per-image", "5")


def test_a_number_never_replaces_one_of_another_precision(evaluate):
    write_rows("pairs.jsonl", [{"image": f"{colour}.png", "caption": f"a {colour} ship"} for colour in COLOURS])
    words = ["--task", "retrieval", "--data", str(Path("pairs.jsonl").resolve())]
    evaluate(*words)
    evaluate(*words)  # in place of the first
    plain, low = evaluate(*words, "--bf16")
    assert plain["protocol"].endswith(", float32, torchvision pictures")
    assert low["protocol"].endswith(", bfloat16 autocast, torchvision pictures")
    assert plain["data"] == low["data"] == "pairs.jsonl"
    assert low["command"] == "python examples/evaluate.py tiny --task retrieval --data pairs.jsonl --bf16"


def test_a_probe_refuses_labels_that_it_never_saw(evaluate):
    def write(name, labels):
        write_rows(name, [{"image": f"{c}.png", "caption": c, "label": label} for c, label in zip(COLOURS, labels)])

    # as texts "10" stands before "2": the number 2 would be scored as the third class
    write("train.jsonl", [2, 10, 30, 2, 10, 30])
    write("same.jsonl", [30, 10, 2, 30, 10, 2])
    write("other.jsonl", [0, 1, 2, 0, 1, 2])
    words = ["--task", "linear-probe", "--train", "train.jsonl"]
    (result,) = evaluate(*words, "--data", "same.jsonl")
    assert result["counts"]["classes"] == 3
    with pytest.raises(SystemExit, match=r"the labels 0, 1 are none of the 3 classes \(10, 2, 30\)"):
        evaluate(*words, "--data", "other.jsonl")
    Path("names.txt").write_text("red apple\nface\nship\n")
    zero_shot = evaluate("--task", "zero-shot", "--data", "other.jsonl", "--classes", "names.txt")[-1]
    assert zero_shot["counts"]["classes"] == 3  # names in order: numbers count in it


def test_scores_are_saved_and_averaged(evaluate):
    write_rows("pairs.jsonl", [{"image": f"{colour}.png", "caption": f"a {colour} ship"} for colour in COLOURS])
    words = ["--task", "retrieval", "--data", "pairs.jsonl"]
    (alone,) = evaluate(*words, "--save-scores", "own.safetensors")
    own = SavedScores("own.safetensors")[0:6]
    assert own.shape == (6, 6)
    best = torch.eye(6)  # a perfect model, sure enough to decide
    write_scores("best.safetensors", best, torch.arange(6), SavedScores("own.safetensors").fingerprint)
    with_itself = evaluate(*words, "--ensemble", "own.safetensors")[-1]
    assert with_itself["metrics"] == alone["metrics"]
    assert "scores averaged with those of own.safetensors" in with_itself["protocol"]
    with_best = evaluate(*words, "--ensemble", "best.safetensors", "own.safetensors")[-1]
    assert with_best["metrics"] == score_metrics((best + 2 * own) / 3, torch.arange(6), torch.arange(6))
    assert len(evaluate(*words, "--ensemble", "best.safetensors", "own.safetensors")) == 3
    # the original's file: a pickled dict within a .npy
    np.save("theirs.npy", {"npts": 6, "sims": best.double().numpy()}, allow_pickle=True)
    theirs = evaluate(*words, "--ensemble", "theirs.npy")[-1]
    assert theirs["metrics"] == score_metrics((best + own) / 2, torch.arange(6), torch.arange(6))
    np.save("nothing.npy", {"npts": 6}, allow_pickle=True)
    with pytest.raises(SystemExit, match="nothing.npy holds no scores"):
        evaluate(*words, "--ensemble", "nothing.npy")
    write_rows("other.jsonl", [{"image": f"{colour}.png", "caption": f"one {colour} ship"} for colour in COLOURS])
    with pytest.raises(ValueError, match="own.safetensors holds scores of other captions"):
        evaluate(*words[:3], "other.jsonl", "--ensemble", "own.safetensors")


def test_crisscrossed_captions(evaluate):
    rows = [
        {"image": f"{c}.png", "captions": [f"a {c} ship", f"a {c} face"], "image_id": 7 + i}
        for i, c in enumerate(COLOURS)
    ]
    write_rows("pairs.jsonl", rows)
    images, captions = [str(7 + i) for i in range(6)], [str(90 + i) for i in range(12)]
    Path("cxc").mkdir()
    Path("cxc/testall_ids.txt").write_text("".join(f"{image}\n" * 2 for image in images))
    Path("cxc/testall_capids.txt").write_text("".join(f"{caption}\n" for caption in captions))
    inter = {"i2t": {image: [[90, 5.0]] for image in images}, "t2i": {caption: [[7, 5.0]] for caption in captions}}
    inter["t2i"]["93"] = [[4000, 5.0]]
    Path("cxc/cxc_it.json").write_text(json.dumps(inter))
    Path("cxc/cxc_t2t.json").write_text(json.dumps({caption: [] for caption in captions}))
    Path("cxc/cxc_i2i.json").write_text(json.dumps({"7": [[8, 2.5]], "8": [[7, 2.0]]}))
    words = ["--task", "cxc", "--data", "pairs.jsonl"]
    with pytest.raises(SystemExit, match="needs --annotations"):
        evaluate(*words)
    (result,) = evaluate(*words, "--annotations", "cxc")
    assert result["task"] == "cxc" and result["counts"]["image_to_image/queries"] == 1
    # six images: every caption finds image 7 among its first ten, but for the one whose image is not there
    assert result["metrics"]["text_to_image/R@10"] == pytest.approx(100 * 11 / 12)
    assert result["counts"]["text_to_image/without_positive"] == 1
    with pytest.raises(SystemExit, match="the model tiny sees pictures, not regions"):
        evaluate(*words, "--annotations", "cxc", "--region-store", "absent.regions")


def write_pairs() -> None:
    names = ("red apple", "sleeping face", "ship", "boat", "two dogs", "snow")  # words of the tiny vocabularies
    rows = [{"image": f"{c}.png", "captions": [f"a {n}", f"a picture of {n}"]} for c, n in zip(COLOURS, names)]
    write_rows("pairs.jsonl", rows)


def test_retrieval_by_a_model_that_scores_pairs(evaluate, capsys):
    write_pairs()
    save_tiny_clip(Path("towers"))
    save_tiny_vilt(Path("tiny"), VlpViltForPreTraining)
    words = ["--task", "retrieval", "--data", "pairs.jsonl"]
    (whole,) = evaluate(*words, "--pair-batch-size", "5", "--save-scores", "all.safetensors")
    printed = capsys.readouterr().out
    assert "72 pairs of 6 images and 12 captions to score" in printed and "pairs a second" in printed
    assert "every pair scored" in whole["protocol"] and whole["counts"]["captions"] == 12
    # pre-training's matching head has become the rank head
    model = VlpViltForPreTraining.from_pretrained("tiny").eval()
    batch = transformers.AutoProcessor.from_pretrained("tiny")(Image.open("red.png"), "a red apple")
    with torch.no_grad():
        assert SavedScores("all.safetensors")[0:1][0, 0].item() == pytest.approx(
            float(model.score_pairs(**batch)), abs=1e-5
        )
    two = ["--candidates", "towers", "--k", "2", "3"]
    fewer = evaluate(*words, *two)[-1]
    assert "towers proposes k = 2 images for each caption and 3 captions for each image" in fewer["protocol"]
    assert fewer["counts"]["pairs_scored"] < 72 and "the candidates of towers alone" in capsys.readouterr().out
    every = evaluate(*words, "--candidates", "all.safetensors", "--k", "6", "12", "--resume", "p.safetensors")[-1]
    assert every["metrics"].items() > whole["metrics"].items() and len(evaluate(*words)) == 3
    assert every["metrics"]["first_stage/rsum"] == whole["metrics"]["rsum"] != fewer["metrics"]["first_stage/rsum"]
    evaluate(*words, "--resume", "p.safetensors")
    assert "0 pairs of 6 images and 12 captions to score, 72 more are there already" in capsys.readouterr().out
    for options, message in (
        (["--candidates", "towers"], "give --k too"),
        (["--k", "2"], "--k 2: tiny embeds no side alone and proposes no pairs: name with --candidates what does"),
        ([*two, "--save-scores", "x.safetensors"], "--save-scores needs the scores of all pairs"),
        ([*two[:2], "--k", "1", "2", "3"], "--k 1 2 3: give one number"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate(*words, *options)
    with pytest.raises(ValueError, match="k = 7 images for each caption: there are 6"):
        evaluate(*words, "--candidates", "towers", "--k", "7")
    write_rows("other.jsonl", [{"image": "red.png", "captions": ["a ship"]}])
    with pytest.raises(ValueError, match="all.safetensors holds scores of other captions"):
        evaluate(*words[:3], "other.jsonl", "--candidates", "all.safetensors", "--k", "1")


def test_a_model_proposes_pairs_by_its_own_embedding(evaluate, capsys):
    """A folder of pre-training, whose matching head is there: no fine-tuning is needed."""
    write_pairs()
    save_tiny_albef(Path("tiny"), VlpAlbefForPreTraining)
    words = ["--task", "retrieval", "--data", "pairs.jsonl"]
    (whole,) = evaluate(*words, "--save-scores", "all.safetensors", "--pair-batch-size", "5")
    model = VlpAlbefForPreTraining.from_pretrained("tiny").eval()
    processor = transformers.AutoProcessor.from_pretrained("tiny")
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    captions = [text for row in rows for text in row["captions"]]
    with torch.no_grad():
        images = [processor(Image.open(row["image"])) for row in rows]
        texts = [processor(text=text) for text in captions]
        scores = torch.tensor([[float(model.score_pairs(**text, **image)) for text in texts] for image in images])
        pictures = processor([Image.open(row["image"]) for row in rows])
        near = model.get_image_features(**pictures) @ model.get_text_features(**processor(text=captions)).T
    torch.testing.assert_close(SavedScores("all.safetensors")[0:6], scores, atol=1e-5, rtol=0)
    assert not torch.allclose(scores, near, atol=1e-2)
    capsys.readouterr()
    two = evaluate(*words, "--k", "2", "3", "--resume", "p.safetensors")[-1]
    ids = torch.arange(6), torch.arange(6).repeat_interleave(2)
    candidates = Candidates(near, images=2, captions=3)
    first = {f"first_stage/{name}": value for name, value in score_metrics(near, *ids).items()}
    assert two["metrics"] == two_stage_metrics(scores, candidates, *ids) | first
    assert two["counts"]["pairs_scored"] == int((candidates.to_image | candidates.to_text).sum()) < 72
    assert "its own embedding proposes k = 2 images for each caption and 3 captions for each image" in two["protocol"]
    shown = capsys.readouterr().out
    assert "the candidates of its own embedding alone" in shown and shown.count("text to image") == 2
    every = evaluate(*words, "--k", "6", "12")[-1]
    assert {name: every["metrics"][name] for name in whole["metrics"]} == whole["metrics"] != every["metrics"]
    with pytest.raises(ValueError, match="k = 7 images for each caption: there are 6"):
        evaluate(*words, "--k", "7")
    cut = evaluate(*words, "--k", "6", "12", "--max-length", "3")[-1]
    assert "texts of at most 3 tokens" in cut["protocol"] and cut["metrics"] != every["metrics"]


def test_towers_need_no_candidates(evaluate):
    write_pairs()
    with pytest.raises(SystemExit, match="--k is for models that score pairs; tiny embeds each side alone"):
        evaluate("--task", "retrieval", "--data", "pairs.jsonl", "--k", "3")


def test_questions_and_their_submission(evaluate):
    labels = {"id2label": {0: "ship", 1: "face", 2: "boat"}, "label2id": {"ship": 0, "face": 1, "boat": 2}}
    save_tiny_vilt(Path("tiny"), VlpViltForVisualQuestionAnswering, **labels)
    rows = [
        {"image": f"{c}.png", "question": f"what is {c}", "question_id": n, "answer_type": ("other", "yes/no")[n % 2]}
        for n, c in enumerate(COLOURS)
    ]
    write_rows("test.jsonl", rows)
    words = ["--task", "vqa", "--data"]
    (bare,) = evaluate(*words, "test.jsonl", "--submission", "answers.json")
    answers = json.loads(Path("answers.json").read_text())
    assert bare["metrics"] == {} and [one["question_id"] for one in answers] == list(range(6))
    told = [row | {"answers": [{"answer": one["answer"], "score": 1.0}]} for row, one in zip(rows, answers)]
    told[0]["answers"] = [{"answer": "snow", "score": 1.0}]
    write_rows("told.jsonl", told)
    result = evaluate(*words, "told.jsonl", "--batch-size", "4")[-1]
    assert result["metrics"]["accuracy"] == pytest.approx(500 / 6)
    assert result["metrics"]["unanswerable"] == pytest.approx(100 / 6)
    assert result["metrics"]["yes/no/accuracy"] == 100.0 and result["metrics"]["other/accuracy"] == pytest.approx(
        200 / 3
    )
    with pytest.raises(SystemExit, match="tiny is a vlp_vilt, which has no model for --task entailment"):
        evaluate("--task", "entailment", "--data", "told.jsonl")


def test_statements_about_two_pictures(evaluate):
    save_tiny_vilt(Path("tiny"), VlpViltForVisualReasoning)
    rows = [
        {
            "images": ["red.png", f"{c}.png"],
            "statement": f"a {c} ship",
            "label": n % 2,
            "identifier": f"dev-{n}-{n % 3}-0",
        }
        for n, c in enumerate(COLOURS)
    ]
    write_rows("statements.jsonl", rows)
    words = ["--task", "nlvr2", "--data", "statements.jsonl"]
    (result,) = evaluate(*words)
    assert result["counts"] == {"records": 6, "statements": 6} and result["metrics"]["majority"] == 50.0
    assert result["metrics"]["consistency"] == result["metrics"]["accuracy"]
    write_rows("statements.jsonl", [row | {"label": 1 - row["label"]} for row in rows])
    opposite = evaluate(*words)[-1]
    assert opposite["metrics"]["accuracy"] == pytest.approx(100 - result["metrics"]["accuracy"])


def test_a_model_without_the_head_of_the_task_is_not_measured(evaluate):
    write_rows("questions.jsonl", [{"image": "red.png", "question": "a ship"}])
    words = ["--task", "vqa", "--data", "questions.jsonl"]
    with pytest.raises(SystemExit, match="tiny is a vlp_clip, which has no model for --task vqa"):
        evaluate(*words)
    save_tiny_vilt(Path("tiny"), VlpViltForImageTextRetrieval)
    with pytest.raises(SystemExit, match="tiny has no weights classifier.*Fine-tune it"):
        evaluate(*words)


class RegionModel(torch.nn.Module):
    """Regions and captions are numbers; the first feature of the last real region is the image's."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.eye(30))

    def get_image_features(self, region_features, region_mask):
        last = region_mask.sum(dim=1) - 1
        return self.table[region_features[torch.arange(len(last)), last, 0].long()]

    def get_text_features(self, input_ids, attention_mask):
        return self.table[input_ids[:, 0]]


class RegionProcessor:
    """Captions such as "number 7" over the real feature extractor."""

    def __init__(self, store):
        self.feature_extractor = VlpRegionFeatureExtractor(region_store=store)

    def __call__(self, regions=None, text=None, return_tensors="pt", padding=True):
        if regions is not None:
            return self.feature_extractor(regions, return_tensors=return_tensors)
        ids = torch.tensor([[int(line.split()[-1])] for line in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def regions_of(number: int, told: int) -> RegionFeatures:
    features = np.zeros((1 + number % 3, 4), np.float32)
    features[-1, 0] = told
    return RegionFeatures(features, image_id=f"n{number}")


@pytest.fixture
def evaluate_regions(evaluate, monkeypatch):
    """The script with a model of regions whose store is `own.regions`; `wrong.regions` holds each image's neighbour."""
    write_region_store("own.regions", [regions_of(i, i) for i in range(6)])
    write_region_store("wrong.regions", [regions_of(i, i + 1) for i in range(6)])
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name: RegionModel())
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: RegionProcessor("own.regions"))
    return evaluate


def test_a_model_that_sees_regions(evaluate_regions):
    captions = [[f"number {i}", f"again {i}"] for i in range(6)]
    write_rows("pairs.jsonl", [{"regions": f"n{i}", "captions": captions[i], "image_id": i} for i in range(6)])
    words = ["--task", "retrieval", "--data", "pairs.jsonl"]
    (own,) = evaluate_regions(*words)
    assert own["metrics"]["rsum"] == 600.0 and own["protocol"].endswith("float32, regions of own.regions")
    # the keys may stand in image_id
    write_rows("ids.jsonl", [{"captions": captions[i], "image_id": f"n{i}"} for i in range(6)])
    wrong = evaluate_regions(*words[:3], "ids.jsonl", "--region-store", "wrong.regions")[-1]
    assert wrong["metrics"]["text_to_image/R@1"] == 0.0 and wrong["protocol"].endswith("regions of wrong.regions")
    write_rows("absent.jsonl", [{"captions": ["number 1"], "image_id": "n77"}])
    with pytest.raises(ValueError, match="n77"):
        evaluate_regions(*words[:3], "absent.jsonl")


def test_a_folder_of_precomputed_features(evaluate_regions):
    Path("precomp").mkdir()
    features = np.zeros((6, 2, 4), np.float32)
    features[:, -1, 0] = np.arange(6) + 10
    np.save("precomp/test_ims.npy", features)
    Path("precomp/test_ids.txt").write_text("".join(f"n{i}\n" for i in range(6)))
    Path("precomp/test_caps.txt").write_text("".join(f"number {i // 5 + 10}\n" for i in range(30)))
    words = ["--task", "retrieval", "--data", "precomp"]
    (result,) = evaluate_regions(*words)
    assert result["metrics"]["rsum"] == 600.0 and result["counts"]["captions"] == 30
    assert result["protocol"].endswith("float32, regions")
    with_store = evaluate_regions(*words, "--split", "test", "--region-store", "own.regions")[-1]
    assert with_store["metrics"]["rsum"] < 600.0  # the store's numbers are 0 to 5, the captions' 10 to 15
    with pytest.raises(FileNotFoundError, match="the splits of this folder are: test"):
        evaluate_regions(*words, "--split", "dev")


def test_the_command_is_honest_and_without_paths_of_the_machine(tmp_path, monkeypatch):
    inside, outside = ROOT / "examples" / "data" / "emoji" / "test.parquet", tmp_path / "far" / "pairs.jsonl"
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "me/clip", "--data", str(inside), f"--train={outside}", "--prompt", "a {}"]
    )
    rest = (
        "examples/evaluate.py me/clip --data examples/data/emoji/test.parquet --train=.../pairs.jsonl --prompt 'a {}'"
    )
    assert command() == f"python {rest}"
    assert command(4) == f"accelerate launch --num_processes 4 {rest}"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command() == f"accelerate launch {rest}"
    monkeypatch.chdir(ROOT / "examples")
    assert shortened("data/emoji/test.parquet") == shortened(inside) == "examples/data/emoji/test.parquet"
    assert shortened("pairs.jsonl") == "pairs.jsonl" and shortened("../absent/x.jsonl") == "../absent/x.jsonl"
    monkeypatch.chdir(tmp_path)
    assert shortened(outside) == "far/pairs.jsonl"


def test_precision_and_backend():
    from hf_vlp import VlpClipImageProcessor, VlpClipImageProcessorPil

    layer = torch.nn.Linear(2, 2)
    assert conditions(layer, VlpClipImageProcessor()) == "float32, torchvision pictures"
    assert conditions(layer, VlpClipImageProcessorPil(), torch.float16) == "float16 autocast, pil pictures"
    assert conditions(layer.bfloat16(), VlpClipImageProcessor()) == "bfloat16, torchvision pictures"
    store = ROOT / "examples" / "data" / "test.regions"
    assert conditions(layer, RegionProcessor(store)) == "bfloat16, regions of examples/data/test.regions"
    assert conditions(layer, RegionProcessor(None)) == "bfloat16, regions"


PHRASES = ("a red apple", "a ship", "two dogs in the snow", "a boat", "the snow", "a face")
WHOLE, CORNER = [0, 0, 9, 7], [0, 0, 3, 3]


def write_phrases(**change) -> None:
    rows = [
        {"image": f"{c}.png", "phrase": phrase, "box": WHOLE, "proposals": [CORNER, WHOLE], "split": ("val", "testA")[n % 2]}
        for n, (c, phrase) in enumerate(zip(COLOURS, PHRASES))
    ]
    write_rows("phrases.jsonl", [row | change for row in rows])


def test_phrases_found_by_where_a_model_looks(evaluate, capsys):
    save_tiny_albef(Path("tiny"), VlpAlbefForImageTextRetrieval)
    write_phrases()
    words = ["--task", "grounding", "--data", "phrases.jsonl"]
    (result,) = evaluate(*words, "--batch-size", "4")
    assert result["counts"] == {"records": 6, "proposals": 12, "records/testA": 3, "records/val": 3}
    assert result["metrics"]["chance"] == 50.0 and result["metrics"]["val/reachable"] == 100.0
    assert "Grad-CAM in the paper's choice of layer, float32" in result["protocol"]
    assert "val" in capsys.readouterr().out
    write_phrases(box=CORNER)
    opposite = evaluate(*words)[-1]
    assert opposite["metrics"]["accuracy"] == pytest.approx(100 - result["metrics"]["accuracy"])
    write_phrases(box=None, boxes=[[0, 0, 1 / 3, 3 / 7], [0, 0, 1, 1]], label=1)
    assert evaluate(*words)[-1]["metrics"] == result["metrics"]
    assert "in block 1 of the image encoder" in evaluate(*words, "--block", "1")[-1]["protocol"]
    assert "in layer 2, float32" in evaluate(*words, "--layer", "2")[-1]["protocol"]
    with pytest.raises(SystemExit, match="give one of them"):
        evaluate(*words, "--layer", "2", "--block", "1")
    with pytest.raises(ValueError, match="layer 1 has no attention to the image"):
        evaluate(*words, "--layer", "1")
    save_tiny_vilt(Path("tiny"), VlpViltForImageTextRetrieval)
    with pytest.raises(SystemExit, match="tiny has no attention of words to the image"):
        evaluate(*words)


def test_phrases_of_the_official_files(evaluate):
    save_tiny_albef(Path("tiny"), VlpAlbefForImageTextRetrieval)
    entries = [{"image": f"{c}.png", "text": text, "ref_id": n} for n, (c, text) in enumerate(zip(COLOURS, PHRASES))]
    references = [
        {"ref_id": n, "ann_id": 50 + n, "image_id": n, "split": ("val", "testA")[n % 2]} for n in reversed(range(6))
    ]
    Path("list.json").write_text(json.dumps(entries))
    Path("refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    Path("instances.json").write_text(json.dumps({"annotations": [{"id": 50 + n, "bbox": WHOLE} for n in range(6)]}))
    Path("dets.json").write_text(json.dumps({str(n): [CORNER, WHOLE] for n in range(6)}))
    files = ["--references", "refs(unc).p", "--instances", "instances.json"]
    words = ["--task", "grounding", "--data", "list.json", "--image-root", ".", *files, "--proposals", "dets.json"]
    (found,) = evaluate(*words)
    write_phrases()
    assert found["metrics"] == evaluate("--task", "grounding", "--data", "phrases.jsonl")[-1]["metrics"]
    assert "--references 'refs(unc).p'" in found["command"]
    part = evaluate(*words, "--split", "testA")[-1]
    assert part["counts"] == {"records": 3, "proposals": 6, "records/testA": 3}
    assert part["metrics"]["accuracy"] == found["metrics"]["testA/accuracy"]
    with pytest.raises(SystemExit, match="--split testB is none of testA, val"):
        evaluate(*words, "--split", "testB")
    with pytest.raises(SystemExit, match="--proposals is missing"):
        evaluate(*words[:-2])
