"""examples/extract_regions.py: boxes and features by hand, and the script as a user runs it, with backbones and detectors in small."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import models
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from hf_vlp import VlpVseGridConfig, VlpVseGridModel, VlpVseImageProcessor
from hf_vlp.inputs.region_store import RegionStore
from hf_vlp.inputs.regions import RegionError
from hf_vlp.models.vse.image_processing_vse import backbone_colours
from tests.contract.tiny import save_tiny_clip

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "extract_regions.py"
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QUERIES, CLASSES = 9, 4
NETWORK = "fasterrcnn_mobilenet_v3_large_320_fpn"
SIZES = {"a": (40, 30), "b": (24, 48), "c": (40, 30)}
QUADRANTS = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]


@pytest.fixture
def parts(monkeypatch):
    """The modules beside the script, which finds them because it lies in their folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("extraction.boxes"), importlib.import_module("extraction.features")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Tiny backbones and a tiny detector, as a user's folders."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    save_tiny_clip(folder / "clip_vit")
    save_tiny_clip(folder / "clip_resnet", "resnet")
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    stages = {"depths": [1, 1], "hidden_sizes": [16, 32], "bottleneck_sizes": [8, 8], "embedding_size": 8}
    VlpVseGridModel(VlpVseGridConfig(image_size=32, **stages)).save_pretrained(folder / "vse_grid")
    VlpVseImageProcessor(size=32, **backbone_colours("detector")).save_pretrained(folder / "vse_grid")
    BertModel(BertConfig(vocab_size=20, **SMALL)).save_pretrained(folder / "bert")
    yolos = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": QUERIES, "num_labels": CLASSES}
    YolosForObjectDetection(YolosConfig(**yolos, **SMALL)).save_pretrained(folder / "yolos")
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder / "yolos")
    return folder


@pytest.fixture
def extract(tmp_path, monkeypatch, tmp_path_factory):
    """Runs the script in a folder with three pictures of two sizes in `pictures`, and returns its store."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    draw = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(f"pictures/{name}.png")

    def run(*words, source="pictures", output="regions.store") -> RegionStore:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), source, *map(str, words), "--output", output, "--device", "cpu"])
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return RegionStore(output)

    return run


def close(found, expected, share: float = 2e-3) -> bool:
    """Whether arrays differ by at most this share of the largest number."""
    found, expected = (np.asarray(values, np.float32) for values in (found, expected))
    return bool(np.abs(found - expected).max() <= share * np.abs(expected).max())


def write_rows(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------ boxes


def test_cells_of_grids_row_by_row(parts):
    boxes, _ = parts
    assert boxes.grid_boxes([1]).tolist() == [[0, 0, 1, 1]]
    assert boxes.grid_boxes([2]).tolist() == QUADRANTS
    assert boxes.grid_boxes([1, 2]).tolist() == [[0, 0, 1, 1], *QUADRANTS]
    cells = boxes.grid_boxes([6])
    assert cells.shape == (36, 4)
    assert torch.allclose((cells[:, 2:] - cells[:, :2]).prod(dim=1), torch.full((36,), 1 / 36))
    assert torch.allclose(cells[7], torch.tensor([1, 1, 2, 2]) / 6)


def test_given_boxes_in_both_units(parts):
    boxes, _ = parts
    pixels, fractions = [[0, 0, 20, 15], [10, 15, 40, 30]], [[0, 0, 0.5, 0.5], [0.25, 0.5, 1, 1]]
    assert boxes.given_boxes(pixels, "pixels", (40, 30), "a").tolist() == fractions
    assert boxes.given_boxes(fractions, "fractions", (40, 30), "a").tolist() == fractions
    assert boxes.given_boxes([], "pixels", (40, 30), "a").shape == (0, 4)
    assert boxes.given_boxes(None, "fractions", (40, 30), "a").shape == (0, 4)
    for value, units in (
        (pixels, "fractions"),
        (fractions, "pixels"),
        ([[9, 9, 2, 2]], "pixels"),
        ([[0, 1]], "pixels"),
    ):
        with pytest.raises(RegionError, match="image 'a', field 'boxes'"):
            boxes.given_boxes(value, units, (40, 30), "a")


def test_the_best_boxes_are_kept(parts):
    boxes, _ = parts
    corners = torch.tensor([[0, 0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.9], [-0.5, 0, 0.5, 2], [0, 0, 1, 1], [1.1, 0, 1.5, 1]])
    found = boxes.Boxes(corners, torch.tensor([0.3, 0.9, 0.4, 0.4, 0.8]), torch.arange(10).view(5, 2) / 10)
    best = boxes.best_boxes(found, 2)
    # without the second and the last, of which nothing lies within; clipped; equal scores in their order
    assert best.corners.tolist() == [[0, 0, 0.5, 1], [0, 0, 1, 1]]
    assert best.class_probs.tolist() == found.class_probs[[2, 3]].tolist()
    assert len(boxes.best_boxes(found, 9).corners) == 3
    assert len(boxes.best_boxes(found, 9, threshold=0.4).corners) == 2
    assert boxes.best_boxes(found, 9, threshold=0.95).class_probs.shape == (0, 2)


def test_queries_of_a_detector_by_hand(parts):
    boxes, _ = parts
    centred, logits = torch.tensor([[0.5, 0.5, 0.2, 0.4]]), torch.tensor([[1.0, 2.0, 4.0]]).log()
    with_none = boxes.query_boxes(logits, centred, classes=2)
    assert torch.allclose(with_none.corners, torch.tensor([[0.4, 0.3, 0.6, 0.7]]))
    assert torch.allclose(with_none.class_probs, torch.tensor([[1, 2, 4]]) / 7)
    assert torch.allclose(with_none.objectness, torch.tensor([2 / 7]))
    one_by_one = boxes.query_boxes(logits, centred, classes=3)
    assert one_by_one.class_probs is None and torch.allclose(one_by_one.objectness, torch.tensor([4 / 5]))


def test_nothing_found_is_the_whole_picture(parts):
    boxes, _ = parts
    none = boxes.Boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 3))
    whole = boxes.whole_picture(none)
    assert [value.tolist() for value in whole] == [[[0, 0, 1, 1]], [0], [[0, 0, 1]]]
    assert boxes.whole_picture(none._replace(class_probs=None, objectness=None))[1:] == (None, None)


# --------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("bins", [1, 2])
def test_boxes_of_whole_cells_are_the_means_of_those_cells(parts, bins):
    boxes, features = parts
    for n in (2, 3, 5, 6, 7):
        maps = torch.randn(2, 3, n * bins, n * bins)
        found = features.region_features(maps, [boxes.grid_boxes([n]), boxes.grid_boxes([1, n])], bins)
        cells = torch.nn.functional.avg_pool2d(maps, bins).flatten(2).transpose(1, 2)  # [2, n * n, 3]
        assert torch.allclose(found[0], cells[0], atol=1e-5)
        assert torch.allclose(found[1][1:], cells[1], atol=1e-5)
        assert torch.allclose(found[1][0], maps[1].mean(dim=(1, 2)), atol=1e-5)
        assert not torch.allclose(found[0], cells[1], atol=0.1)


def test_a_box_between_cells_and_a_hair_of_a_box(parts):
    _, features = parts
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    halfway, hair = [0.25, 0.25, 0.75, 0.75], [0.25, 0.75, 0.25 + 1e-7, 0.75 + 1e-7]
    (found,) = features.region_features(maps, [torch.tensor([halfway, hair])])
    assert torch.allclose(found.flatten(), torch.tensor([1.5, 2.0]), atol=1e-2)


def test_maps_of_towers(parts):
    _, features = parts
    pixels = torch.randn(2, 3, 48, 48)
    towers = [
        ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL)),
        CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **SMALL)),
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=32, patch_size=8, mlp_ratio=1, **SMALL)),
    ]
    with torch.no_grad():
        for tower in towers:
            tokens = tower.eval()(pixel_values=pixels, **interpolated(tower)).last_hidden_state
            found = features.feature_map(tower, pixels)
            assert found.shape == (2, 32, 6, 6)
            assert torch.equal(found[1, :, 2, 5], tokens[1, tokens.shape[1] - 36 + 2 * 6 + 5])
        swin = SwinModel(SwinConfig(image_size=48, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=3)).eval()
        found = features.feature_map(swin, pixels)
        assert found.shape == (2, 16, 6, 6)
        assert torch.equal(found[0, :, 1, 2], swin(pixels).last_hidden_state[0, 8])
        for name, width, side in (("test_vit", 64, 3), ("test_resnet", 96, 2), ("test_vit3", 96, 3)):
            tower, _, size = features.load_backbone(f"timm/{name}", 48, random_weights=True)
            assert size == 48 and features.feature_map(tower, pixels).shape == (2, width, side, side)
    with pytest.raises(ValueError, match="5 tokens of the backbone are no square grid"):
        features.as_map(torch.zeros(1, 6, 4), extra=1)


def interpolated(tower) -> dict:
    return {} if isinstance(tower, Dinov2WithRegistersModel) else {"interpolate_pos_encoding": True}


# ------------------------------------------------------------------------------------------------- the script


def test_a_grid_over_a_folder_with_a_model_of_timm(extract, capsys):
    store = extract(
        "--boxes", "grid", "--grid", 1, 2, "--backbone", "timm/test_resnet", "--random-weights", "--size", 64
    )
    assert store.keys() == ["a.png", "b.png", "c.png"]
    read = store.read("b.png")
    assert (read.width, read.height) == SIZES["b"] and read.features.shape == (5, 96)
    assert read.boxes.tolist() == [[0, 0, 1, 1], *QUADRANTS]
    assert read.objectness is None and read.class_probs is None
    # by hand: the same draws of weights, the picture squashed, and the cells of a 2 x 2 map
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).eval()
    picture = Image.open("pictures/b.png").resize((64, 64), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    with torch.no_grad():
        cells = model.forward_features(pixels[None])[0].flatten(1).T  # [4, 96]
    assert np.allclose(read.features[1:], cells, atol=2e-2)
    assert not np.allclose(store.read("a.png").features[1:], cells, atol=2e-2)
    printed = capsys.readouterr().out
    assert store.describe() in printed and "3 images in" in printed
    assert "no box" not in printed and "left out" not in printed


@pytest.mark.parametrize(("name", "width"), [("clip_vit", 32), ("clip_resnet", 256), ("vit", 32), ("vse_grid", 32)])
def test_backbones_of_folders(extract, saved, name, width):
    store = extract("--boxes", "grid", "--grid", 1, "--size", 64, "--backbone", saved / name)
    assert store.read("a.png").features.shape == (1, width)
    other = extract("--boxes", "grid", "--grid", 1, "--backbone", saved / name, output="own.store")  # 32 pixels
    assert not close(other.read("a.png").features, store.read("a.png").features)
    low = extract(
        "--boxes", "grid", "--grid", 1, "--size", 64, "--backbone", saved / name, "--bf16", output="low.store"
    )
    assert close(low.read("a.png").features, store.read("a.png").features, 0.1)
    assert not np.array_equal(low.read("a.png").features, store.read("a.png").features)


def test_the_whole_picture_is_the_mean_of_the_tower(extract, saved):
    store = extract("--boxes", "grid", "--grid", 1, "--backbone", saved / "clip_vit", "--size", 32)
    model, processor = AutoModel.from_pretrained(saved / "clip_vit"), AutoProcessor.from_pretrained(saved / "clip_vit")
    squashed = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = processor.image_processor(Image.open("pictures/a.png"), return_tensors="pt", **squashed)["pixel_values"]
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state[0, 1:]  # without the class token
    assert np.allclose(store.read("a.png").features[0], tokens.mean(dim=0), atol=2e-3)


def test_boxes_of_a_column_in_pixels_and_in_fractions(extract, saved, capsys):
    pixels = {"a": [[0, 0, 20, 15], [4, 6, 40, 30]], "b": [], "c": [[0, 0, 0, 30], [10, 3, 20, 27]]}
    rows = [{"image": f"pictures/{name}.png", "caption": "x", "image_id": name} for name in pixels]
    scale = {name: np.array(SIZES[name] * 2) for name in pixels}
    write_rows("pixels.jsonl", [{**row, "bbox": pixels[row["image_id"]]} for row in rows] + [{**rows[0], "bbox": []}])
    fractions = {name: (np.array(boxes or np.zeros((0, 4))) / scale[name]).tolist() for name, boxes in pixels.items()}
    write_rows("fractions.jsonl", [{**row, "boxes": fractions[row["image_id"]]} for row in rows])
    words = ["--boxes", "column", "--backbone", saved / "clip_resnet", "--size", 64]
    first = extract(*words, "--columns", "boxes=bbox", "--box-units", "pixels", source="pixels.jsonl")
    printed = capsys.readouterr().out
    assert "no box       1 images had none; each is one region, the whole picture" in printed
    assert "left out     1 boxes without an area" in printed
    assert "left out     1 rows whose image_id another row has" in printed
    second = extract(*words, "--box-units", "fractions", source="fractions.jsonl", output="second.store")
    assert "another row has" not in capsys.readouterr().out
    assert first.keys() == second.keys() == ["a", "b", "c"]
    assert first.read("b").boxes.tolist() == [[0, 0, 1, 1]] and len(first.read("c")) == 1
    for name in pixels:
        assert np.allclose(first.read(name).boxes, second.read(name).boxes, atol=1e-6)
        assert close(first.read(name).features, second.read(name).features)
    assert not close(first.read("a").features[0], first.read("a").features[1])
    with pytest.raises(SystemExit, match="record 0, field 'boxes': of image 'a', box 0 .*: pixels, it seems"):
        words = [*words, "--columns", "boxes=bbox", "--box-units", "fractions"]
        extract(*words, source="pixels.jsonl", output="third.store")
    assert not Path("third.store").exists()


def test_a_detector_of_transformers(extract, saved, capsys):
    words = ["--detector", saved / "yolos", "--backbone", saved / "clip_resnet", "--size", 64]
    store = extract(*words, "--top", 5)
    read = store.read("b.png")
    assert read.boxes.shape == (5, 4) and read.class_probs.shape == (5, CLASSES + 1)
    assert np.allclose(read.class_probs.sum(axis=1), 1, atol=1e-2)
    assert np.allclose(read.objectness, read.class_probs[:, :-1].max(axis=1), atol=1e-3)
    assert (np.diff(read.objectness) <= 0).all()
    processor = YolosImageProcessor.from_pretrained(saved / "yolos")
    detector = YolosForObjectDetection.from_pretrained(saved / "yolos")
    with torch.no_grad():
        outputs = detector(processor(Image.open("pictures/b.png"), return_tensors="pt")["pixel_values"])
    width, height = SIZES["b"]
    (theirs,) = processor.post_process_object_detection(outputs, 0.0, [(height, width)])
    order = theirs["scores"].argsort(descending=True)[:5]
    corners = (theirs["boxes"][order] / torch.tensor([width, height] * 2)).clamp(0, 1)
    assert np.allclose(read.boxes, corners, atol=1e-4)
    assert np.allclose(read.objectness, theirs["scores"][order], atol=1e-5)
    # in other company, whose sizes differ or not, it is found alike
    alone = extract(*words, "--top", 5, "--batch-size", 1, output="alone.store")
    assert np.allclose(alone.read("b.png").boxes, read.boxes, atol=1e-5)
    assert len(extract(*words, output="all.store").read("a.png")) == QUERIES
    capsys.readouterr()
    none = extract(*words, "--threshold", 0.99, output="none.store")
    assert none.read("a.png").boxes.tolist() == [[0, 0, 1, 1]] and none.read("a.png").objectness.tolist() == [0]
    assert "no box       3 images had none" in capsys.readouterr().out


def test_a_detector_of_torchvision(extract, saved, capsys):
    words = ["--detector", f"torchvision/{NETWORK}", "--backbone", saved / "clip_resnet", "--size", 64]
    network = models.get_model(NETWORK, weights=None, weights_backbone=None, num_classes=3)
    torch.save(network.state_dict(), "weights.pth")
    store = extract(*words, "--weights", "weights.pth", "--top", 7, "--threshold", 0.0)
    network.roi_heads.score_thresh = 0.0
    picture = torch.from_numpy(np.array(Image.open("pictures/b.png"))).permute(2, 0, 1) / 255
    with torch.no_grad():
        (theirs,) = network.eval()([picture])
    read = store.read("b.png")
    assert read.class_probs is None and read.features.shape == (7, 256)
    assert np.allclose(read.objectness, theirs["scores"][:7], atol=1e-4)
    assert np.allclose(read.boxes, theirs["boxes"][:7] / torch.tensor(SIZES["b"] * 2), atol=1e-3)
    with pytest.raises(SystemExit, match="needs --weights FILE, or --random-weights"):
        extract(*words, output="other.store")
    torch.save({"other.weight": torch.zeros(2)}, "other.pth")
    with pytest.raises(SystemExit, match=f"other.pth does not fit torchvision/{NETWORK}: it lacks .*other.weight"):
        extract(*words, "--weights", "other.pth", output="other.store")


def test_published_weights_of_torchvision_keep_their_eps(parts, monkeypatch):
    boxes, name = parts[0], "fasterrcnn_resnet50_fpn"
    published = models.get_model_weights(name).COCO_V1
    state = models.get_model(name, weights=None, weights_backbone=None).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}  # norms were frozen
    state["backbone.body.bn1.running_var"] *= 1e-5
    monkeypatch.setattr(type(published), "get_state_dict", lambda *_, **__: state)
    monkeypatch.setattr(boxes, "read_content", lambda path: state)
    theirs, ours = models.get_model(name, weights=published).eval(), boxes.torchvision_network(name, "file")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = theirs.backbone.body(pixels)["0"], ours.backbone.body(pixels)["0"]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        ours.backbone.body.bn1.eps = 1e-5
        assert not torch.allclose(ours.backbone.body(pixels)["0"], expected, rtol=0.1, atol=0.1 * expected.abs().max())


def test_transparent_pictures_lie_on_the_background(extract, saved):
    Path("emoji").mkdir()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save("emoji/clear.png")
    Image.new("RGB", (20, 20), "white").save("emoji/white.png")
    words = ["--boxes", "grid", "--grid", 1, "--backbone", saved / "clip_vit"]
    store = extract(*words, "--background", 255, 255, 255, source="emoji")
    assert np.array_equal(store.read("clear.png").features, store.read("white.png").features)
    store = extract(*words, source="emoji", output="hidden.store")  # alpha is dropped: red is seen
    assert not np.allclose(store.read("clear.png").features, store.read("white.png").features, atol=1e-2)


def test_bad_pictures_stop_the_script_or_are_counted(extract, saved, capsys):
    Path("pictures/bad.png").write_bytes(b"no picture")
    words = ["--boxes", "grid", "--grid", 2, "--backbone", saved / "clip_resnet"]
    with pytest.raises(SystemExit, match="record 2, field 'image': .*bad.png is not in a picture format"):
        extract(*words)
    assert not Path("regions.store").exists() and not list(Path().glob(".writing*"))
    store = extract(*words, "--on-bad-record", "skip", "--workers", 1)  # the error crosses a process
    assert store.keys() == ["a.png", "b.png", "c.png"]
    printed = capsys.readouterr().out
    assert "bad.png is not in a picture format" in printed and "left out     1 bad records of 4" in printed
    with pytest.raises(SystemExit, match="regions.store exists"):
        extract(*words, "--on-bad-record", "skip")
    extract(*words, "--on-bad-record", "skip", "--overwrite")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--boxes", "grid", "--backbone", "bert"], "is a BertModel without an image tower"),
        (["--boxes", "grid", "--backbone", "timm/no_such_net"], "timm has no model 'no_such_net'"),
        (
            ["--detector", "torchvision/resnet50", "--backbone", "clip_vit"],
            "torchvision has no detector 'resnet50', but",
        ),
        (["--boxes", "column", "--box-units", "pixels", "--backbone", "clip_vit"], "there is no column 'boxes'"),
        (["--boxes", "column", "--backbone", "clip_vit"], "needs --box-units"),
        (["--boxes", "grid", "--box-units", "pixels", "--backbone", "clip_vit"], "nothing else does"),
        (["--boxes", "grid", "--grid", "0", "--backbone", "clip_vit"], "--grid must be 1 or more"),
        (["--boxes", "grid", "--weights", "x.pth", "--backbone", "clip_vit"], "--weights are those of --detector"),
        (["--boxes", "grid", "--detector", "yolos", "--backbone", "clip_vit"], "not allowed with"),
        (["--backbone", "clip_vit"], "one of the arguments --boxes --detector is required"),
    ],
)
def test_what_is_refused(extract, saved, words, said, capsys):
    names = {file.name for file in saved.iterdir()}
    with pytest.raises(SystemExit) as end:
        extract(*[saved / word if word in names else word for word in words])
    assert said in f"{end.value} {capsys.readouterr().err}"
    assert not Path("regions.store").exists()


def test_several_files_need_ids(extract, saved):
    words = ["--boxes", "grid", "--backbone", saved / "clip_vit"]
    write_rows("one.jsonl", [{"image": "pictures/a.png", "id": 5}])
    write_rows("two.jsonl", [{"image": "pictures/b.png", "id": 6}])
    with pytest.raises(SystemExit, match="there is no column 'image_id'"):
        extract("two.jsonl", *words, source="one.jsonl")
    assert extract("two.jsonl", *words, "--columns", "image_id=id", source="one.jsonl").keys() == ["5", "6"]
