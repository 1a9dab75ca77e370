"""VSE-infinity's processor and image processors: what they take, give and refuse, with either image side, and that a folder keeps them."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
)

import hf_vlp  # noqa: F401 (registers the classes)
from hf_vlp.inputs.image_transforms import IMAGENET_MEAN, IMAGENET_STD, squashed, to_rgb, to_tensor
from hf_vlp.inputs.region_feature_extractor import VlpRegionFeatureExtractor
from hf_vlp.inputs.region_store import write_region_store
from hf_vlp.inputs.regions import RegionFeatures
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer
from hf_vlp.models.vse.image_processing_vse import VlpVseImageProcessor, VlpVseImageProcessorPil, backbone_colours
from hf_vlp.models.vse.processing_vse import VlpVseProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "vse" / "image_processing"
BACKENDS = (VlpVseImageProcessor, VlpVseImageProcessorPil)
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])
LIMIT = 7


def picture(width: int = 30, height: int = 20, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bert(**options) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "cat", "[", "mask", "]"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **options)


def words(**options) -> VlpWordTokenizer:
    entries = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "cat"]
    return VlpWordTokenizer(vocab={word: index for index, word in enumerate(entries)}, **options)


both_tokenizers = pytest.mark.parametrize("tokenizer", [bert, words], ids=["bert", "words"])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("regions") / "store"
    counts = {"x": 3, "y": 5, "7": 1}
    write_region_store(
        path,
        [RegionFeatures(draw.random((count, 8), dtype=np.float32), image_id=key) for key, count in counts.items()],
    )
    return str(path)


@pytest.fixture
def of_regions(store) -> VlpVseProcessor:
    extractor = VlpRegionFeatureExtractor(feature_size=8, region_store=store)
    return VlpVseProcessor(tokenizer=bert(model_max_length=LIMIT), feature_extractor=extractor)


@pytest.fixture
def of_pixels() -> VlpVseProcessor:
    return VlpVseProcessor(VlpVseImageProcessor(size=16), bert(model_max_length=LIMIT))


# Image processors


@both_backends
@pytest.mark.parametrize("source", ["detector", "wsl"])
def test_pixels_of_the_original(backend, source):
    raw, stored = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    process = backend(size={"height": 32, "width": 32}, **backbone_colours(source))
    numbers = range(sum(name.startswith("raw.") for name in raw))
    images = [Image.fromarray(raw[f"raw.{number}"].to(torch.uint8).numpy()) for number in numbers]  # colour and grey
    pixels = process(images, return_tensors="pt")["pixel_values"]
    expected = torch.stack([stored[f"eval.{source}.{number}"] for number in numbers])
    assert pixels.dtype == torch.float32 and (pixels - expected).abs().max() <= (5e-4 if source == "detector" else 2e-5)
    other = process(images, return_tensors="pt", channel_order={"detector": "rgb", "wsl": "bgr"}[source])
    assert (other["pixel_values"][0] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_rgb_before_they_are_squashed(mode):
    image = picture().convert("L") if mode == "I;16" else picture().convert(mode)
    image = Image.fromarray(np.array(image).astype(np.uint16)) if mode == "I;16" else image
    assert image.mode == mode
    one, other = (backend(size=16)(image, return_tensors="pt")["pixel_values"] for backend in BACKENDS)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (squashed(to_tensor(to_rgb(image)), 16, 16) / 255 - mean) / std
    assert one.shape == (1, 3, 16, 16) and torch.equal(one, other)
    assert torch.allclose(one[0], expected, atol=1e-6)


@both_backends
def test_pictures_of_several_sizes_and_kinds_are_one_batch_in_order(backend, tmp_path):
    images = [picture(30, 20), picture(20, 30, 1), picture(30, 20, 2).convert("L")]
    images[1].save(tmp_path / "cat.png")
    process = backend(size=16)
    batch = process(images, return_tensors="pt")["pixel_values"]
    arrays = [np.array(images[0]), tmp_path / "cat.png", torch.from_numpy(np.array(images[2]))]
    for row, image, other in zip(batch, images, arrays, strict=True):
        for same in (image, other):
            assert torch.equal(row, process(same, return_tensors="pt")["pixel_values"][0])
    assert not torch.equal(batch[0], batch[1])


@both_backends
def test_options(backend):
    process, image = backend(), picture()

    def pixels(**options):
        return process(image, return_tensors="pt", **options)["pixel_values"]

    assert (process.size.height, process.size.width) == (512, 512)
    assert pixels(size=24).shape == (1, 3, 24, 24)
    assert pixels(size={"height": 20, "width": 28}).shape == (1, 3, 20, 28)
    raw = pixels(do_resize=False, do_normalize=False, do_rescale=False)
    assert torch.equal(raw[0], to_tensor(image).float())
    assert torch.equal(pixels(do_resize=False, do_normalize=False, do_rescale=False, channel_order="bgr"), raw.flip(1))
    clear = Image.new("RGBA", (5, 5), (9, 9, 9, 0))
    plain = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt", "size": 2}
    assert (backend(background=(1, 2, 3))(clear, **plain)["pixel_values"][0, :, 0, 0] == torch.tensor([1, 2, 3])).all()
    assert (process(np.array(clear), **plain)["pixel_values"] == 9).all()


@both_backends
@pytest.mark.parametrize(
    "images, options, match",
    [
        ([None], {}, "picture 0 is None"),
        ([], {}, "empty"),
        (np.zeros((5, 5, 3), np.float32), {}, "float32"),
        (Image.new("RGB", (0, 5)), {}, "no pixels"),
        ("/nowhere/cat.png", {}, "/nowhere/cat.png"),
        (Image.new("RGB", (5, 5)), {"channel_order": "gbr"}, "channel_order='gbr'"),
        (Image.new("RGB", (5, 5)), {"size": {"shortest_edge": 5}}, "size must hold height and width"),
        (Image.new("RGB", (5, 5)), {"resample": Image.Resampling.BICUBIC}, "bilinear only"),
        (Image.new("L", (5, 5)), {"do_convert_rgb": False}, r"1 channel\(s\) cannot be normalised by 3 means"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pictures_and_options_that_are_refused(backend, images, options, match):
    with pytest.raises(ValueError, match=match):
        backend(size=8)(images, return_tensors="pt", **options)


def test_colours_of_the_backbones():
    assert backbone_colours("detector") == backbone_colours("my_detector_x152")
    assert backbone_colours("wsl") == backbone_colours("imagenet_res50") != backbone_colours("detector")
    with pytest.raises(ValueError, match="backbone_source='resnet' is unknown.*'imagenet_resnext'"):
        backbone_colours("resnet")


# The processor


def test_a_batch_is_what_forward_takes(of_regions, of_pixels):
    texts = ["A photo", "a photo of a cat"]
    regions = of_regions(regions=["x", "y"], text=texts)
    assert list(regions) == ["input_ids", "attention_mask", "region_features", "region_mask"]
    assert set(regions) == set(of_regions.model_input_names)
    assert regions["region_features"].shape == (2, 5, 8) and regions["region_features"].dtype == torch.float32
    assert regions["region_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    pixels = of_pixels(images=[picture(), picture(seed=1)], text=texts)
    assert set(pixels) == set(of_pixels.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}
    assert pixels["pixel_values"].shape == (2, 3, 16, 16)
    for batch in (regions, pixels):
        assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0, 0], [2, 5, 6, 1, 5, 7, 3]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert set(of_regions(text="a")) == {"input_ids", "attention_mask"}
    assert set(of_regions(regions="x")) == {"region_features", "region_mask"}
    assert set(of_pixels(images=picture())) == {"pixel_values"}
    assert of_pixels(images=picture(), size=24)["pixel_values"].shape == (1, 3, 24, 24)
    assert isinstance(of_regions(regions="x", text="a", return_tensors="np")["region_features"], np.ndarray)


def test_regions_of_every_kind(of_regions):
    stored = of_regions(regions=["x", 7])
    arrays = [of_regions.feature_extractor.store.read(key) for key in ("x", "7")]
    for regions in (
        arrays,
        [one.features for one in arrays],
        [torch.from_numpy(one.features.copy()) for one in arrays],
    ):
        assert torch.equal(of_regions(regions=regions)["region_features"], stored["region_features"])
    with pytest.raises(ValueError, match="z"):
        of_regions(regions=["x", "z"])


@both_tokenizers
def test_long_captions_keep_their_end_and_warn_once_with_the_count(tokenizer):
    processor = VlpVseProcessor(VlpVseImageProcessor(size=16), tokenizer(model_max_length=5))
    end = processor.tokenizer("a")["input_ids"][-1]
    with pytest.warns(UserWarning, match="1 of 3 captions had more than 5 tokens") as caught:
        batch = processor(text=["a cat", "cat " * 3, "a photo a cat"])
    assert caught[0].filename == __file__
    assert batch["input_ids"].shape == (3, 5) and batch["input_ids"][2, -1] == end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(text="cat " * 9)
        assert VlpVseProcessor(VlpVseImageProcessor(), tokenizer())(text="cat " * 600)["input_ids"].shape == (1, 602)
    with pytest.raises(ValueError, match="caption 1 has 11 tokens, more than 5"):
        processor(text=["cat", "cat " * 9], truncation=False)
    assert processor(text=["cat", "cat " * 3], truncation=False)["input_ids"].shape == (2, 5)


@both_tokenizers
def test_special_tokens_in_a_caption_are_text(tokenizer):
    processor = VlpVseProcessor(VlpVseImageProcessor(), tokenizer())
    mask = processor.tokenizer.mask_token
    ids = processor(text=f"a {mask} cat")["input_ids"][0]
    assert len(ids) == 7 and processor.tokenizer.mask_token_id not in ids  # bracket, word, bracket
    if tokenizer is bert:
        assert ids.tolist() == [2, 5, 8, 9, 10, 7, 3]
        known = processor(text=f"a {mask} cat", text_kwargs={"split_special_tokens": False})["input_ids"]
        assert known.tolist() == [[2, 5, 4, 7, 3]]
    loose = VlpVseProcessor(VlpVseImageProcessor(), tokenizer(split_special_tokens=False))
    assert torch.equal(loose(text=f"a {mask} cat")["input_ids"][0], ids)


@pytest.mark.parametrize(
    "inputs, error, match",
    [
        ({}, ValueError, "was given nothing"),
        ({"text": []}, ValueError, "empty"),
        ({"text": ["a", None]}, TypeError, "caption 1 is a NoneType"),
        ({"text": "a", "max_length": 2}, ValueError, "max_length=2 leaves no room"),
        ({"text": "a", "padding_side": "left"}, ValueError, "left"),
        ({"images": [Image.new("RGB", (5, 5))]}, ValueError, "makes images of regions .* give regions="),
    ],
)
def test_calls_that_are_refused(of_regions, inputs, error, match):
    with pytest.raises(error, match=match):
        of_regions(**inputs)


def test_processors_that_cannot_be_made(of_pixels, of_regions):
    with pytest.raises(ValueError, match="was given regions: give images="):
        of_pixels(regions="x")
    with pytest.raises(ValueError, match="neither image_processor nor feature_extractor"):
        VlpVseProcessor(tokenizer=bert())
    with pytest.raises(ValueError, match="both image_processor and feature_extractor"):
        VlpVseProcessor(of_pixels.image_processor, bert(), of_regions.feature_extractor)
    with pytest.raises(ValueError, match="no tokenizer"):
        VlpVseProcessor(of_pixels.image_processor)
    with pytest.raises(ValueError, match="pads on the left"):
        VlpVseProcessor(of_pixels.image_processor, bert(padding_side="left"))
    with pytest.raises(TypeError, match="BertTokenizer for argument image_processor"):
        VlpVseProcessor(bert(), bert())


# Folders


@both_tokenizers
@pytest.mark.parametrize("side", ["regions", "pixels", "foreign pixels"])
def test_a_folder_keeps_the_processor(side, tokenizer, store, tmp_path):
    extractor = VlpRegionFeatureExtractor(feature_size=8, region_store=store, max_regions=4)
    images = VlpVseImageProcessor(size=16, background=(1, 2, 3), **backbone_colours("detector"))
    foreign = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = {
        "regions": lambda: VlpVseProcessor(tokenizer=tokenizer(model_max_length=9), feature_extractor=extractor),
        "pixels": lambda: VlpVseProcessor(images, tokenizer(model_max_length=9)),
        "foreign pixels": lambda: VlpVseProcessor(foreign, tokenizer(model_max_length=9)),
    }[side]()
    given = {"regions": ["x", "y"]} if side == "regions" else {"images": [picture(), picture(20, 40)]}
    first = processor(text=["a cat", "a [MASK] photo"], **given)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    present, absent = ("feature_extractor", "image_processor")[:: 1 if side == "regions" else -1]
    assert set(stored) == {present, "processor_class"} and stored["processor_class"] == "VlpVseProcessor"
    loaded = AutoProcessor.from_pretrained(tmp_path)
    for other in (loaded, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert type(other) is VlpVseProcessor and getattr(other, absent) is None
        assert type(getattr(other, present)) is type(getattr(processor, present))
        assert type(other.tokenizer) is type(processor.tokenizer) and other.tokenizer.model_max_length == 9
        again = other(text=["a cat", "a [MASK] photo"], **given)
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert json.loads(loaded.to_json_string()) == json.loads(processor.to_json_string()) == stored
    assert present in repr(loaded) and absent not in repr(loaded)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(processor.tokenizer)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text()) == stored


def test_parts_of_a_folder_and_options_while_loading(of_regions, of_pixels, tmp_path):
    of_pixels.save_pretrained(tmp_path / "pixels")
    of_regions.save_pretrained(tmp_path / "regions")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "pixels")) is VlpVseImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "pixels", backend="pil")) is VlpVseImageProcessorPil
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "regions")
    assert type(extractor) is VlpRegionFeatureExtractor and extractor.feature_size == 8
    assert extractor.region_store == of_regions.feature_extractor.region_store
    with pytest.raises(OSError, match="image processor"):
        AutoImageProcessor.from_pretrained(tmp_path / "regions")

    exact = AutoProcessor.from_pretrained(tmp_path / "pixels", backend="pil", size=24)
    assert type(exact.image_processor) is VlpVseImageProcessorPil and exact.image_processor.size.height == 24
    moved = AutoProcessor.from_pretrained(tmp_path / "regions", region_store="elsewhere")
    assert moved.feature_extractor.region_store == "elsewhere" and "region_store" not in moved.tokenizer.init_kwargs
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        moved(regions="x")
