"""CLIP's processor and image processors: what they take, what they give, what they refuse, and that a folder keeps them."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import functional as tv
from transformers import AutoImageProcessor, AutoProcessor, BertTokenizer, CLIPTokenizer

import hf_vlp  # noqa: F401 (registers the classes)
from hf_vlp.inputs.image_transforms import CLIP_MEAN, CLIP_STD, clip_eval
from hf_vlp.inputs.vocabulary import clip_tokenizer_from_merges
from hf_vlp.models.clip.image_processing_clip import VlpClipImageProcessor, VlpClipImageProcessorPil
from hf_vlp.models.clip.processing_clip import VlpClipProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "clip"
CASES = json.loads((GOLDEN / "image_preprocess" / "cases.json").read_text("utf-8"))
BACKENDS = (VlpClipImageProcessor, VlpClipImageProcessorPil)
GREY_LEVEL = 1 / 255 / min(CLIP_STD)  # the largest step of one grey level after normalisation
LIMIT = 24
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])


def picture(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def clip_tokenizer() -> CLIPTokenizer:
    return clip_tokenizer_from_merges(GOLDEN / "tokenizer_small" / "merges.txt.gz", LIMIT)


def bert_tokenizer(**options) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "cat"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **options)


@pytest.fixture
def processor() -> VlpClipProcessor:
    return VlpClipProcessor(VlpClipImageProcessor(size=32), clip_tokenizer())


# Image processors


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case["file"] for case in CASES])
def test_pixels_of_the_original(case):
    stored = load_file(GOLDEN / "image_preprocess" / "outputs.safetensors")[f"pixels.{case}"]
    path, size = GOLDEN / "image_preprocess" / CASES[case]["file"], CASES[case]["n_px"]
    exact = VlpClipImageProcessorPil(size=size)(Image.open(path), return_tensors="pt")["pixel_values"]
    fast = VlpClipImageProcessor(size=size)(Image.open(path), return_tensors="pt")["pixel_values"]
    assert exact.shape == fast.shape == (1, 3, size, size) and exact.dtype == fast.dtype == torch.float32
    assert (exact[0] - stored).abs().max() <= 2e-5
    assert (fast[0] - stored).abs().max() <= 1.01 * GREY_LEVEL
    assert torch.equal(VlpClipImageProcessorPil(size=size)(str(path), return_tensors="pt")["pixel_values"], exact)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B"]


def picture_of_mode(mode: str) -> Image.Image:
    image, grey = picture(71, 64), np.array(picture(71, 64).convert("L"))
    if mode in ("I", "F"):  # below zero and above 255
        return Image.fromarray((grey.astype(np.int32) * 3 - 200).astype({"I": np.int32, "F": np.float32}[mode]))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, image.size, (grey.astype(np.uint16) * 3).astype(">u2" if "B" in mode else "<u2"))
    if mode in ("RGBA", "RGBa", "LA"):
        image.putalpha(picture(71, 64, seed=1).convert("L"))
    return image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)


def released_transform(image: Image.Image, size: int) -> torch.Tensor:
    """The original's evaluation transform as torchvision has it: resize, crop, three channels, tensor, normalise."""
    image = tv.center_crop(tv.resize(image, size, tv.InterpolationMode.BICUBIC), size).convert("RGB")
    return tv.normalize(tv.to_tensor(image), CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("mode", MODES)
def test_the_exact_backend_is_the_original_in_every_mode(mode):
    image = picture_of_mode(mode)
    assert image.mode == mode
    exact = VlpClipImageProcessorPil(size=32)(image, return_tensors="pt")["pixel_values"][0]
    assert (exact - released_transform(image, 32)).abs().max() <= 1e-6
    assert (exact - released_transform(picture(71, 64, seed=2), 32)).abs().max() > 10 * GREY_LEVEL


@pytest.mark.parametrize("size, crop_size", [(32, 32), (40, 32), (32, 40)])
@pytest.mark.parametrize("mode", MODES)
def test_the_backends_agree_within_two_grey_levels(mode, size, crop_size):
    image, options = picture_of_mode(mode), {"size": size, "crop_size": crop_size, "return_tensors": "pt"}
    exact, fast = (backend()(image, **options)["pixel_values"] for backend in reversed(BACKENDS))
    assert exact.shape == fast.shape == (1, 3, crop_size, crop_size)
    assert (exact - fast).abs().max() <= 2.02 * GREY_LEVEL
    if size == crop_size:
        assert torch.equal(exact[0], clip_eval(image, 32))
    other = VlpClipImageProcessorPil()(picture(71, 64, seed=2), **options)["pixel_values"]
    assert (exact - other).abs().max() > 10 * GREY_LEVEL


@both_backends
def test_the_high_byte_of_sixteen_bits(backend, tmp_path):
    grey = np.array(picture().convert("L"))
    image = Image.fromarray(grey.astype(np.uint16) * 256 + 7)
    raw = {"return_tensors": "pt", "do_normalize": False, "do_rescale": False}
    process = backend(size=16, high_byte=True)
    assert torch.equal(process(image, **raw)["pixel_values"], process(Image.fromarray(grey), **raw)["pixel_values"])
    assert (backend(size=16)(image, **raw)["pixel_values"] == 255).float().mean() > 0.9
    process.save_pretrained(tmp_path)
    assert type(process).from_pretrained(tmp_path).high_byte is True


@both_backends
def test_channels_that_do_not_fit_the_means(backend):
    process = backend(size=8, do_convert_rgb=False)
    for image in (picture().convert("L"), picture().convert("RGBA"), np.zeros((9, 9), np.uint8)):
        with pytest.raises(ValueError, match=r"channel\(s\) cannot be normalised by 3 means"):
            process(image)
    with pytest.raises(ValueError, match="mode P has no channels of 8 bits"):
        process(picture().convert("P"))
    grey = process(picture().convert("L"), image_mean=[0.5], image_std=[0.5], return_tensors="pt")["pixel_values"]
    assert grey.shape == (1, 1, 8, 8)
    assert process(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


@both_backends
def test_every_kind_of_picture_gives_the_same_pixels(backend):
    image = picture()
    rows = np.array(image)
    kinds = [
        image,
        rows,
        rows.transpose(2, 0, 1),
        torch.from_numpy(rows),
        torch.from_numpy(rows).permute(2, 0, 1),
    ]
    process = backend(size=16)
    reference = process(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(process(kinds, return_tensors="pt")["pixel_values"], reference.expand(len(kinds), -1, -1, -1))
    opaque = np.dstack([rows, np.full(rows.shape[:2], 255, np.uint8)])
    assert (process(opaque, return_tensors="pt")["pixel_values"] - reference).abs().max() <= 1.01 * GREY_LEVEL
    assert torch.equal(process(rows[None], return_tensors="pt")["pixel_values"], reference)
    assert torch.equal(process(rows, input_data_format="channels_last", return_tensors="pt")["pixel_values"], reference)
    grey = np.array(image.convert("L"))
    expected = process(image.convert("L"), return_tensors="pt")["pixel_values"]
    assert not torch.equal(expected, reference)
    for kind in (grey, [grey], [torch.from_numpy(grey)], grey[:, :, None]):
        assert torch.equal(process(kind, return_tensors="pt")["pixel_values"], expected)


@both_backends
def test_pictures_of_several_sizes_are_one_batch_in_order(backend):
    images = [picture(50, 40), picture(40, 60, 1), picture(50, 40, 2), picture(33, 33, 3).convert("P")]
    process = backend(size=16)
    batch = process(images, return_tensors="pt")["pixel_values"]
    assert batch.shape == (4, 3, 16, 16)
    for row, image in zip(batch, images, strict=True):
        assert torch.equal(row, process(image, return_tensors="pt")["pixel_values"][0])
    grouped = VlpClipImageProcessor(size=16)(images, disable_grouping=False, return_tensors="pt")["pixel_values"]
    assert (grouped - batch).abs().max() <= 1.01 * GREY_LEVEL


@both_backends
def test_options(backend):
    process, image = backend(size=16), picture(50, 40)

    def pixels(**options):
        return process(image, return_tensors="pt", **options)["pixel_values"]

    assert (process.crop_size.height, process.crop_size.width) == (16, 16)
    assert pixels(size=24).shape == pixels(size={"shortest_edge": 24}).shape == (1, 3, 24, 24)
    assert pixels(size={"height": 20, "width": 28}).shape == (1, 3, 20, 28)
    assert pixels(do_center_crop=False).shape == (1, 3, 16, 20)
    assert pixels(do_resize=False, do_center_crop=False).shape == (1, 3, 40, 50)
    assert pixels(crop_size=8).shape == (1, 3, 8, 8)
    raw = pixels(do_normalize=False, do_rescale=False)
    assert raw.min() >= 0 and raw.max() > 100 and torch.equal(raw, raw.round())
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (process.image_mean, process.image_std))
    assert torch.allclose(pixels(), (raw / 255 - mean) / std, atol=1e-6)
    assert torch.allclose(pixels(rescale_factor=1 / 127.5), (raw / 127.5 - mean) / std, atol=1e-5)
    assert torch.allclose(pixels(image_mean=[0.5] * 3, image_std=[0.5] * 3), raw / 127.5 - 1, atol=1e-6)
    assert not torch.equal(pixels(resample=Image.Resampling.NEAREST), pixels())
    assert isinstance(process(image, return_tensors="np")["pixel_values"], np.ndarray)
    assert backend().size.shortest_edge == 224 and backend().crop_size.height == 224


@both_backends
def test_transparency_on_a_background(backend):
    clear = Image.new("RGBA", (20, 20), (200, 100, 0, 0))
    raw = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
    assert backend(size=8)(clear, **raw)["pixel_values"][0, :, 0, 0].tolist() != [255, 255, 255]
    white = backend(size=8, background=(255, 255, 255))
    assert (white(clear, **raw)["pixel_values"] == 255).all()
    assert (white(np.array(clear), **raw)["pixel_values"] == 255).all()
    assert torch.equal(white(picture(), **raw)["pixel_values"], backend(size=8)(picture(), **raw)["pixel_values"])
    with pytest.raises(ValueError, match="background"):
        backend(background=(300, 0, 0))(clear)


@both_backends
@pytest.mark.parametrize(
    "images, match",
    [
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("1", (14000, 13000)), "14000 wide"),
        (Image.new("L", (1, 900000)), "once resized"),
        (Image.new("La", (5, 5)), "mode La"),
        ([None], "picture 0 is None"),
        ([Image.new("RGB", (5, 5)), None], "picture 1 is None"),
        (np.zeros((5, 5, 3), np.float32), "float32"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), "int64"),
        (np.zeros((5, 5, 2), np.uint8), r"\(5, 5, 2\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((1, 2, 3, 5, 5), np.uint8), "axes"),
        ([], "empty"),
        ("/nowhere/cat.png", "/nowhere/cat.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pictures_that_are_refused(backend, images, match):
    process = backend()
    with pytest.raises(ValueError, match=match):
        process(images, return_tensors="pt")


@both_backends
def test_a_file_that_does_not_decode(backend, tmp_path):
    path = tmp_path / "cat.png"
    picture().save(path)
    whole = path.read_bytes()
    assert backend(size=8)(path)["pixel_values"][0].shape == (3, 8, 8)
    for content in (whole[: len(whole) // 2], b"not a picture", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cat.png.*does not decode"):
            backend(size=8)(path)


def test_a_size_that_is_none():
    with pytest.raises(ValueError, match="shortest_edge"):
        VlpClipImageProcessor(size={"shortest_edge": 0})(picture())


# The processor


def test_a_batch_is_what_forward_takes(processor):
    batch = processor(images=[picture(), picture(seed=1)], text=["a photo of a cat", "the cat"])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"} == set(processor.model_input_names)
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    start, end = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist() == [start, 320, 521, 522, 320, 526, end]
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 4]
    assert batch["input_ids"][1, 3:].tolist() == [end] * 4
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    assert set(processor(images=picture())) == {"pixel_values"}
    assert torch.equal(processor(images=[picture()])["pixel_values"], batch["pixel_values"][:1])


def test_one_caption_is_a_batch_of_one_and_an_empty_one_is_its_marks(processor):
    assert processor(text="a cat")["input_ids"].shape == (1, 4)
    assert processor(text=("", "a"))["input_ids"].tolist()[0] == [552, 553, 553]


def test_captions_are_cleaned(processor):
    def ids(text, **options):
        return processor(text=text, **options)["input_ids"].tolist()

    assert ids("A  PHOTO of a &amp;amp; cat") == ids("a photo of a & cat")
    bare = VlpClipProcessor(processor.image_processor, processor.tokenizer, text_cleaning="none")
    assert bare(text="a &amp; cat")["input_ids"].tolist() != ids("a &amp; cat")
    assert bare(text="a & cat")["input_ids"].tolist() == ids("a & cat")


def test_padding_and_lengths(processor):
    assert processor(text=["a", "a a a"])["input_ids"].shape == (2, 5)
    assert processor(text="a", padding="max_length")["input_ids"].shape == (1, LIMIT)
    assert processor(text="a", max_length=3)["input_ids"].shape == (1, 3)
    assert processor(text="a", padding="max_length", max_length=9)["input_ids"].shape == (1, 9)
    lists = processor(text=["a", "a a a"], padding=False, return_tensors=None)["input_ids"]
    assert [len(row) for row in lists] == [3, 5]
    assert isinstance(processor(text="a", return_tensors="np")["input_ids"], np.ndarray)
    assert processor(text="a", text_kwargs={"padding": "max_length"})["input_ids"].shape == (1, LIMIT)


def test_long_captions_keep_their_end_and_warn_once_with_the_count(processor):
    long = ["a " * 40, "cat", "cat " * 40, " ".join("a" * (LIMIT - 2))]
    with pytest.warns(UserWarning, match=f"2 of 4 captions had more than {LIMIT} tokens") as caught:
        batch = processor(text=long)
    assert caught[0].filename == __file__
    assert batch["input_ids"].shape == (4, LIMIT)
    assert batch["input_ids"][:, -1].tolist() == [processor.tokenizer.eos_token_id] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor(text=long)["input_ids"].shape == (4, LIMIT)
        VlpClipProcessor(processor.image_processor, processor.tokenizer)(text=long[3])
    with pytest.warns(UserWarning, match="1 of 1 captions had more than 4"):
        short = VlpClipProcessor(processor.image_processor, processor.tokenizer)(text="a a a a", max_length=4)
    assert short["input_ids"].tolist() == [[552, 320, 320, 553]]


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_the_limit_of_one_call_is_not_saved(processor, tmp_path):
    assert processor(text="a " * 40, max_length=9)["input_ids"].shape == (1, 9)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again(text="a " * 40)["input_ids"].shape == (1, LIMIT)
    again.tokenizer.model_max_length = 7
    assert again(text="a " * 40)["input_ids"].shape == (1, 7)


def test_captions_that_may_not_be_cut(processor):
    with pytest.raises(ValueError, match=f"caption 1 has 42 tokens, more than {LIMIT}"):
        processor(text=["a", "a " * 40], truncation=False)
    assert processor(text=["a", "a a"], truncation=False)["input_ids"].shape == (2, 4)


@pytest.mark.parametrize(
    "inputs, error, match",
    [
        ({}, ValueError, "neither images nor text"),
        ({"text": []}, ValueError, "empty"),
        ({"text": ["a", None]}, TypeError, "caption 1 is a NoneType"),
        ({"text": 7}, TypeError, "int"),
        ({"text": "a", "padding_side": "left"}, ValueError, "left"),
        ({"images": []}, ValueError, "empty"),
        ({"images": [None]}, ValueError, "picture 0 is None"),
        ({"text": "a", "max_length": 2}, ValueError, "max_length=2 leaves no room"),
        ({"text": "a", "max_length": 1}, ValueError, "max_length=1 leaves no room"),
        ({"text": "a", "max_length": 0}, ValueError, "max_length=0 leaves no room"),
    ],
)
def test_calls_that_are_refused(processor, inputs, error, match):
    with pytest.raises(error, match=match):
        processor(**inputs)


def test_processors_that_cannot_be_made():
    images = VlpClipImageProcessor(size=32)
    with pytest.raises(ValueError, match="pads on the left"):
        VlpClipProcessor(images, bert_tokenizer(padding_side="left"))
    with pytest.raises(ValueError, match="text_cleaning='lower'"):
        VlpClipProcessor(images, bert_tokenizer(), text_cleaning="lower")


def test_text_comes_back(processor):
    ids = processor(text=["a photo of a cat", "the cat"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a photo of a cat", "the cat"]
    assert processor.decode(ids[0]).startswith("<|startoftext|>")


# A text encoder's own tokenizer


def test_a_foreign_tokenizer_keeps_its_own_rules():
    processor = VlpClipProcessor(VlpClipImageProcessor(size=32), bert_tokenizer(model_max_length=6))
    assert processor.text_cleaning == "none"
    with pytest.warns(UserWarning, match="1 of 2 captions had more than 6"):
        batch = processor(text=["a photo", "a photo a photo a photo cat"])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0], [2, 5, 6, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert "token_type_ids" in processor(text="a", return_token_type_ids=True)


def test_a_tokenizer_without_a_limit():
    processor = VlpClipProcessor(VlpClipImageProcessor(size=32), bert_tokenizer())
    assert processor(text="a " * 600)["input_ids"].shape == (1, 602)
    with pytest.warns(UserWarning, match="more than 5"):
        assert processor(text="a " * 600, max_length=5)["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="max_length"):
        processor(text="a", padding="max_length")


# Folders


@pytest.mark.parametrize("tokenizer", [clip_tokenizer, bert_tokenizer], ids=["clip", "bert"])
def test_a_folder_keeps_the_processor(tokenizer, tmp_path):
    images = VlpClipImageProcessor(size=32, background=(1, 2, 3), image_mean=[0.5, 0.4, 0.3])
    processor = VlpClipProcessor(images, tokenizer(), text_cleaning="clip")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VlpClipProcessor and type(loaded.image_processor) is VlpClipImageProcessor
    assert type(loaded.tokenizer) is type(processor.tokenizer)
    assert loaded.text_cleaning == "clip"
    assert json.loads(loaded.to_json_string()) == json.loads(processor.to_json_string())
    one, other = (p(images=picture(), text=["A  cat", "a photo of a"]) for p in (processor, loaded))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["text_cleaning"] == "clip" and stored["processor_class"] == "VlpClipProcessor"


def test_the_backend_is_chosen_when_loading(tmp_path):
    VlpClipProcessor(VlpClipImageProcessor(size=32), clip_tokenizer()).save_pretrained(tmp_path)
    exact = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(exact) is VlpClipImageProcessorPil and exact.crop_size.height == 32
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VlpClipImageProcessor
    assert type(AutoProcessor.from_pretrained(tmp_path, backend="pil").image_processor) is VlpClipImageProcessorPil
    exact.save_pretrained(tmp_path / "alone")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "alone")) is VlpClipImageProcessor
