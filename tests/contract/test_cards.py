import ast
import gzip
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig

import hf_vlp
from hf_vlp.auto import TABLE
from hf_vlp.export.card import CardError
from hf_vlp.export.hub import push_to_hub, write_card
from tests.contract.tiny import save_tiny_clip, save_tiny_vse

ROOT = Path(__file__).parents[2]
MODELING = {
    "vlp_clip": "clip/modeling_clip.py",
    "vlp_vse": "vse/modeling_vse.py",
    "vlp_vilt": "vilt/modeling_vilt.py",
    "vlp_albef": "albef/modeling_albef.py",
}
RESULT = {
    "task": "retrieval",
    "data": "my_pairs/test.parquet",
    "split": "test",
    "counts": {"images": 371, "captions": 742},
    "metrics": {"image_to_text/R@1": 34.23180592991914, "text_to_image/R@1": 31.0, "rsum": 312.71875},
    "protocol": "all 742 captions against all 371 images",
    "command": "python examples/evaluate.py runs/tiny --task retrieval",
    "date": "2031-05-06",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The two folders that all tests here start from, never changed."""
    return {tower: save_tiny_clip(tmp_path_factory.mktemp("saved") / tower, tower) for tower in ("vit", "resnet")}


@pytest.fixture(params=["vit", "resnet"])
def folder(saved, request, tmp_path):
    return linked(saved[request.param], tmp_path / "tiny")


def linked(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder


def put_results(folder: Path, results) -> None:
    (folder / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))


def test_the_card_holds_the_measured_numbers_as_they_are(folder):
    put_results(folder, [RESULT])
    text = write_card(folder).read_text()
    (index,) = ModelCard(text).data.eval_results[:1]
    assert (index.metric_type, index.metric_value) == ("image_to_text/R@1", 34.23180592991914)
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == list(RESULT["metrics"].values())
    assert "| image to text | 34.23 |" in text and "312.72" in text
    for said in (RESULT["protocol"], RESULT["command"], RESULT["date"], RESULT["data"], "images 371, captions 742"):
        assert said in text
    assert "No results measured" not in text
    put_results(folder, [RESULT | {"metrics": {"rsum": 1.5}}])
    again = write_card(folder).read_text()
    assert "1.50" in again and "34.23" not in again


def test_without_results_the_card_says_so(folder):
    text = write_card(folder).read_text()
    assert "No results measured" in text
    assert not re.search(r"R@\d|rsum", text) and ModelCard(text).data.eval_results is None


def test_the_card_names_towers_parameters_and_differences(folder, saved):
    text = write_card(folder).read_text()
    weights = load_file(folder / "model.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    total = sum(tensor.numel() for name, tensor in weights.items() if not name.endswith(statistics))
    model = AutoModel.from_pretrained(folder)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert f"| all, stored as F32 | {total:,} |" in text
    assert f"`{model.config.vision_config.model_type}`" in text and "width 32" in text
    assert ("patch 8" in text) != ("blocks a stage [1, 1, 1, 1]" in text)
    assert "\n1. " in text and differences("vlp_clip") in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert data.tags == ["hf_vlp", "vlp_clip"]


def test_the_loading_lines_run_as_they_stand(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    text = write_card(folder.name).read_text()
    found = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec"), found)
    assert type(found["model"]).__name__ == "VlpClipModel" and type(found["processor"]).__name__ == "VlpClipProcessor"
    (folder / "processor_config.json").unlink()
    assert "AutoProcessor" not in write_card(folder.name).read_text()


def test_other_classes_get_other_cards(tmp_path, saved):
    whole = AutoModel.from_pretrained(saved["vit"])
    whole.vision_model.save_pretrained(tmp_path / "tower")
    text = write_card(tmp_path / "tower").read_text()
    assert "`VlpClipVisionModel`" in text and "no scores" in text and ModelCard(text).data.pipeline_tag is None
    classifier = hf_vlp.VlpClipForImageClassification.from_pretrained(saved["vit"])
    classifier.save_pretrained(tmp_path / "classifier")
    text = write_card(tmp_path / "classifier").read_text()
    assert "AutoModelForImageClassification.from_pretrained" in text and "id2label" in text
    assert ModelCard(text).data.pipeline_tag == "image-classification"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """VSE-infinity of regions, of pixels, and one whose captions are not normalised."""
    folder = tmp_path_factory.mktemp("sets")
    save_tiny_vse(folder / "regions", region_size=12)
    save_tiny_vse(folder / "pixels")
    model = hf_vlp.VlpVseForPreTraining.from_pretrained(folder / "regions")
    model.config.normalize_text, model.config.margin = False, 0.35
    model.save_pretrained(folder / "long")
    return folder


def test_a_card_says_what_a_model_sees(sets, monkeypatch):
    monkeypatch.chdir(sets)
    regions, pixels = (write_card(name).read_text() for name in ("regions", "pixels"))
    for text in (regions, pixels):
        data = ModelCard(text).data
        assert data.tags == ["hf_vlp", "vlp_vse"] and data.pipeline_tag is None
        assert differences("vlp_vse") in text and "margin of the loss 0.2" in text
        found = {}
        exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec"), found)
        assert type(found["model"]).__name__ == "VlpVseModel" and type(found["processor"]).__name__ == "VlpVseProcessor"
        extractor = found["processor"].feature_extractor
        assert getattr(extractor, "region_store", None) == ("my.regions" if text is regions else None)
    assert "numbers of a region 12" in regions and "rows of 12 numbers" in regions and "region store" in regions
    assert "numbers of a region" not in pixels and "region store" not in pixels
    for fact in ("blocks a stage [1, 1]", "widths of the stages [16, 32]", "graph caffe", "`vlp_vse_grid_model`"):
        assert fact in pixels and fact not in regions


def test_a_card_says_what_scores_are(sets, saved):
    """Cosines or not, and with a scale or without: what the folder's own model computes."""
    said = {}
    for name, folder in (("clip", saved["vit"]), ("regions", sets / "regions"), ("long", sets / "long")):
        text = write_card(folder).read_text()
        said[name] = re.search(r"## Reading the scores\n\n(.*?)\n\n## ", text, re.DOTALL)[1]
    assert "are cosines." in said["clip"] and "times the learned scale (here 14.29)" in said["clip"]
    assert "are cosines." in said["regions"] and "no scale is learned" in said["regions"]
    assert "true pairs stand 0.2 above others" in said["regions"] and "softmax is no probability" in said["regions"]
    assert "are inner products. Not all embeddings are of unit length" in said["long"] and "0.35 above" in said["long"]
    assert "learned scale" not in said["regions"] + said["long"] and "0.4" not in said["regions"] + said["long"]


def test_the_recipe_is_summed_up(folder):
    assert "no recipe.yaml" in write_card(folder).read_text()
    recipe = (ROOT / "examples" / "configs" / "clip_emoji.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe)
    text = write_card(folder).read_text()
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert shown["optimizer"] == yaml.safe_load(recipe)["optimizer"] and "model" not in shown
    assert "Weights at the start: random" in text and "no recipe.yaml" not in text


def test_facts_from_outside_stay_when_the_card_is_written_again(folder):
    assert ModelCard(write_card(folder).read_text()).data.license is None
    write_card(folder, license="mit", language="zh")
    data = ModelCard(write_card(folder, "me/tiny").read_text()).data
    assert (data.license, data.language) == ("mit", "zh")
    assert ModelCard(write_card(folder, license="apache-2.0").read_text()).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("[{", "results.json cannot be read as JSON"),
        ('{"task": "retrieval"}', "holds a dict, not a list"),
        ("[3]", "result 0 is a int"),
        ([RESULT, RESULT | {"metrics": {}}], "result 1: metrics is {}"),
        ([RESULT | {"task": None}], "result 0: task is None"),
        ([RESULT | {"metrics": {"rsum": "good"}}], "the metric rsum is 'good', not a finite number"),
        ([RESULT | {"metrics": {"rsum": float("nan")}}], "the metric rsum is nan"),
    ],
)
def test_broken_results_are_refused_and_the_card_stays(folder, results, message):
    before = write_card(folder).read_text()
    put_results(folder, results)
    with pytest.raises(CardError, match=message):
        write_card(folder)
    assert (folder / "README.md").read_text() == before
    assert not list(folder.glob(".*"))


def test_folders_that_are_no_models_are_refused_before_anything_is_sent(folder, tmp_path):
    # the suite's guard against the network would turn any call into another error
    with pytest.raises(FileNotFoundError, match="absent has no config.json"):
        push_to_hub(tmp_path / "absent", "me/tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors: save the model"):
        push_to_hub(folder, "me/tiny")
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CardError, match="model.safetensors is damaged"):
        push_to_hub(folder, "me/tiny")
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(CardError, match="model_type is 'bert', none of this package's"):
        write_card(tmp_path / "bert")
    assert not (tmp_path / "bert" / "README.md").exists()


def test_a_damaged_recipe_or_head_is_named(folder):
    (folder / "recipe.yaml").write_text("model: [")
    with pytest.raises(CardError, match="recipe.yaml cannot be read as YAML"):
        write_card(folder)
    (folder / "recipe.yaml").unlink()
    (folder / "README.md").write_text("---\nlicense: [\n---\nmine\n")
    with pytest.raises(CardError, match="the head of .*README.md cannot be read"):
        write_card(folder)


# ---------------------------------------------------------------------------------------------------- MODEL_CARDS.md


def differences(model_type: str) -> str:
    """The numbered list at the head of an architecture's modeling file."""
    source = (ROOT / "hf_vlp" / "models" / MODELING[model_type]).read_text()
    doc = ast.get_docstring(ast.parse(source))
    return re.search(r"Differences from the released code:\n(.*?)(?:\n\n|\Z)", doc, re.DOTALL)[1]


def sections() -> dict[str, str]:
    parts = re.split(r"^## ", (ROOT / "MODEL_CARDS.md").read_text(), flags=re.MULTILINE)[1:]
    return {re.match(r".*\(`(\w+)`\)\n", part)[1]: part for part in parts}


def test_every_architecture_has_its_section():
    assert sorted(sections()) == sorted(model_type for model_type, row in TABLE.items() if row.processor)


def test_the_published_files_are_those_of_the_manifests():
    table = re.findall(r"^\| \S+ \| `(\S+\.pt)` \| ([\d,]+) .*`(\w{64})` \|$", sections()["vlp_clip"], re.MULTILINE)
    manifests = [
        json.loads(gzip.decompress(path.read_bytes())) for path in (ROOT / "tests/golden/manifests").glob("clip_*")
    ]
    facts = {(facts["file"], f"{facts['parameters']['total']:,}", facts["sha256"]) for facts in manifests}
    assert set(table) == facts and len(table) == 9


def test_the_published_sets_are_those_of_the_manifests():
    """Folder and parameters of each side: of a file's tensors those that are trained, copies counted once."""
    number = r"([\d,]+(?: \+ 300 V)?)"
    row = rf"^\| `(\w+)` \| (regions|pixels)\b.* \| (BERT|BiGRU) \| {number} \| {number} \| {number} \|$"
    table = re.findall(row, sections()["vlp_vse"], re.MULTILINE)
    expected = []
    for path in (ROOT / "tests/golden/manifests").glob("vse_*_*_*_*"):
        manifest = json.loads(gzip.decompress(path.read_bytes()))
        images, texts = (of_side(manifest, side) for side in range(2))
        name = path.name.removeprefix("vse_").removesuffix(".json.gz")
        assert name in manifest["source"] and images == manifest["parameters"]["image_encoder_unique"]
        words = " + 300 V" if name.endswith("bigru") else ""
        sizes = (f"{images:,}", f"{texts:,}{words}", f"{images + texts:,}{words}")
        seen = "regions" if "region" in name else "pixels"
        expected.append((name, seen, "BiGRU" if words else "BERT", *sizes))
    assert sorted(table) == sorted(expected) and len(table) == 10


def of_side(manifest: dict, side: int) -> int:
    """Parameters of one encoder; the rows of the BiGRU's word table, which no manifest tells, left out."""
    not_counted = (".base.", ".top.", "running_", "num_batches_tracked")
    shapes = [
        shape
        for name, (_, shape) in manifest["tensors"].items()
        if name.startswith(f"model[{side}]/") and not any(part in name for part in not_counted)
    ]
    return sum(math.prod(shape) for shape in shapes if -1 not in shape)


def test_what_nothing_calls_has_the_stated_size():
    manifests = {
        name: json.loads(gzip.decompress((ROOT / f"tests/golden/manifests/vse_coco_{name}.json.gz").read_bytes()))
        for name in ("butd_region_bert", "wsl_grid_bert")
    }
    text = sections()["vlp_vse"]
    for name, part in (
        ("butd_region_bert", ".bns.1."),
        ("wsl_grid_bert", ".resnet.fc."),
        ("wsl_grid_bert", ".pooler."),
    ):
        tensors = {key: value for key, value in manifests[name]["tensors"].items() if part in key}
        size = sum(of_side({"tensors": tensors}, side) for side in range(2))
        assert f"{size:,}" in re.search(r"What nothing calls.*?\n\n", text, re.DOTALL)[0]


def test_quoted_recalls_add_up():
    """Each row's sum is that of its six recalls, which a slip of the pen would not survive; they are rounded to a tenth."""
    cell = r"(\d+\.\d) (\d+\.\d) (\d+\.\d) / (\d+\.\d) (\d+\.\d) (\d+\.\d) / (\d+\.\d)"
    cells = [[float(number) for number in found] for found in re.findall(cell, sections()["vlp_vse"])]
    assert len(cells) == 8 * 3
    assert all(abs(sum(recalls) - total) < 0.35 for *recalls, total in cells)


@pytest.mark.parametrize("model_type", MODELING)
def test_the_differences_are_those_of_the_modeling_file(model_type):
    assert differences(model_type) in sections()[model_type]
    others = [text for name, text in sections().items() if name != model_type]
    assert not any(differences(model_type) in text for text in others)
