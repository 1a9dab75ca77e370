"""ViLT's processor and image processors: what they take, what they give, what they refuse, and that a folder keeps them."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, BertTokenizer, ViltImageProcessor

import hf_vlp  # noqa: F401 (registers the classes)
from hf_vlp.inputs.image_transforms import resize_width_first, to_rgb, to_tensor
from hf_vlp.models.vilt.image_processing_vilt import VlpViltImageProcessor, VlpViltImageProcessorPil
from hf_vlp.models.vilt.processing_vilt import VlpViltProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "vilt" / "image_processing"
BACKENDS = (VlpViltImageProcessor, VlpViltImageProcessorPil)
GREY_LEVEL = 2 / 255  # after normalisation
LIMIT = 40
RAW = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])


def picture(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tokenizer(**options) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "cat", "[", "]", "mask"]
    options = {"model_max_length": LIMIT} | options
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **options)


@pytest.fixture
def processor() -> VlpViltProcessor:
    return VlpViltProcessor(VlpViltImageProcessor(size=64), tokenizer())


# Image processors


def test_pixels_of_the_original_in_one_batch_of_five_sizes():
    raw, stored = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    images = [Image.fromarray(raw[f"raw_{number}"].numpy()) for number in range(5)]
    exact, fast = (backend(size=64)(images, return_tensors="pt") for backend in reversed(BACKENDS))
    assert exact["pixel_values"].shape == fast["pixel_values"].shape == tuple(stored["batch_shape"].tolist())
    for batch in (exact, fast):
        assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_mask"].dtype == torch.int64
        assert torch.equal(batch["pixel_mask"], stored["pixel_mask"].long())
    for number in range(5):
        expected = stored[f"processed_{number}"]
        place = (number, slice(None), slice(expected.shape[1]), slice(expected.shape[2]))
        assert torch.equal(exact["pixel_values"][place], expected)
        assert (fast["pixel_values"][place] - expected).abs().max() <= 2.02 * GREY_LEVEL
    # the sibling: Pillow's own order of the two passes gives other pixels where it takes the height first
    assert not torch.equal(stored["processed_1"], stored["processed_1_pillow13"])


@pytest.mark.parametrize(
    "size, expected",
    [((640, 480), (384, 512)), ((480, 640), (512, 384)), ((300, 1000), (608, 192)), ((20, 20), (384, 384))],
)
def test_the_papers_sizes(size, expected):
    for backend in BACKENDS:
        batch = backend()(picture(*size), return_tensors="pt")
        assert batch["pixel_values"].shape[-2:] == batch["pixel_mask"].shape[-2:] == expected


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_become_rgb_before_they_are_resized(mode):
    image = picture(71, 60).convert("L") if mode == "I;16" else picture(71, 60).convert(mode)
    image = Image.fromarray(np.array(image).astype(np.uint16)) if mode == "I;16" else image
    assert image.mode == mode
    exact, fast = (backend(size=64)(image, return_tensors="pt")["pixel_values"] for backend in reversed(BACKENDS))
    expected = to_tensor(resize_width_first(to_rgb(image), (64, 64))) / 127.5 - 1
    assert (exact[0] - expected).abs().max() <= 1e-6
    assert (fast - exact).abs().max() <= 2.02 * GREY_LEVEL
    other = VlpViltImageProcessorPil(size=64)(picture(71, 60, seed=2), return_tensors="pt")["pixel_values"]
    assert (exact - other).abs().max() > 10 * GREY_LEVEL


@both_backends
def test_every_kind_of_picture_gives_the_same_pixels(backend, tmp_path):
    image = picture()
    image.save(tmp_path / "cat.png")
    rows = np.array(image)
    kinds = [
        image,
        rows,
        rows.transpose(2, 0, 1),
        torch.from_numpy(rows),
        tmp_path / "cat.png",
        str(tmp_path / "cat.png"),
    ]
    process = backend(size=64)
    reference = process(image, return_tensors="pt")["pixel_values"]
    batch = process(kinds, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, reference.expand(len(kinds), -1, -1, -1))
    opaque = np.dstack([rows, np.full(rows.shape[:2], 255, np.uint8)])
    assert torch.equal(process(opaque, return_tensors="pt")["pixel_values"], reference)
    grey = np.array(image.convert("L"))
    expected = process(image.convert("L"), return_tensors="pt")["pixel_values"]
    assert not torch.equal(expected, reference)
    for kind in (grey, [torch.from_numpy(grey)], grey[:, :, None]):
        assert torch.equal(process(kind, return_tensors="pt")["pixel_values"], expected)


@both_backends
def test_one_at_a_time_equals_the_batch_and_zeros_lie_right_and_below(backend):
    images = [picture(100, 64), picture(64, 100, 1), picture(100, 64, 2), picture(40, 40, 3).convert("P")]
    process = backend(size=64)
    batch = process(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (4, 3, 96, 96) and batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [
        64 * 96,
        96 * 64,
        64 * 96,
        64 * 64,
    ]
    for row, image in enumerate(images):
        alone = process(image, return_tensors="pt")
        _, _, height, width = alone["pixel_values"].shape
        assert alone["pixel_mask"].all()
        assert torch.equal(batch["pixel_values"][row, :, :height, :width], alone["pixel_values"][0])
        assert batch["pixel_mask"][row, :height, :width].all()
        padding = batch["pixel_mask"][row] == 0
        assert padding.sum() == 96 * 96 - height * width > 0
        assert (batch["pixel_values"][row, :, padding] == 0).all() and alone["pixel_values"].abs().min() > 0
    grouped = VlpViltImageProcessor(size=64)(images, disable_grouping=False, return_tensors="pt")
    assert torch.equal(grouped["pixel_mask"], batch["pixel_mask"])
    assert (grouped["pixel_values"] - batch["pixel_values"]).abs().max() <= 2.02 * GREY_LEVEL


@both_backends
def test_options(backend):
    process, image = backend(size=64), picture(100, 64)

    def pixels(**options):
        return process(image, return_tensors="pt", **options)["pixel_values"]

    assert (backend().size.shortest_edge, backend().size.longest_edge, backend().size_divisor) == (384, 639, 32)
    assert pixels().shape == (1, 3, 64, 96)
    assert pixels(size=96).shape == pixels(size={"shortest_edge": 96}).shape == (1, 3, 96, 128)
    assert pixels(size={"shortest_edge": 64, "longest_edge": 64}, size_divisor=8).shape == (1, 3, 40, 64)
    assert pixels(size_divisor=1).shape == (1, 3, 64, 100)
    assert torch.equal(pixels(do_resize=False)[0], (to_tensor(image) / 255 - 0.5) / 0.5)
    raw = pixels(do_normalize=False, do_rescale=False)
    assert raw.min() >= 0 and raw.max() > 100 and torch.equal(raw, raw.round())
    assert torch.allclose(pixels(), raw / 127.5 - 1, atol=1e-6)
    assert torch.allclose(pixels(image_mean=[0.0] * 3, image_std=[1.0] * 3), raw / 255, atol=1e-6)
    assert not torch.equal(pixels(resample=Image.Resampling.NEAREST), pixels())
    assert isinstance(process(image, return_tensors="np")["pixel_values"], np.ndarray)
    two = process([image, picture(64, 64)], do_pad=False)
    assert [tuple(one.shape) for one in two["pixel_values"]] == [(3, 64, 96), (3, 64, 64)] and "pixel_mask" not in two
    wide = process(image, pad_size={"height": 96, "width": 128}, return_tensors="pt")
    assert wide["pixel_values"].shape == (1, 3, 96, 128) and wide["pixel_mask"].sum() == 64 * 96
    assert torch.equal(wide["pixel_values"][:, :, :64, :96], pixels())


@both_backends
def test_transparency_and_sixteen_bits(backend):
    clear = Image.new("RGBA", (20, 20), (200, 100, 0, 0))
    assert backend(size=32)(clear, **RAW)["pixel_values"][0, :, 0, 0].tolist() == [200, 100, 0]
    white = backend(size=32, background=(255, 255, 255))
    assert (white(clear, **RAW)["pixel_values"] == 255).all() and (
        white(np.array(clear), **RAW)["pixel_values"] == 255
    ).all()
    deep = Image.fromarray(np.full((20, 20), 77 * 256 + 7, np.uint16))
    assert (backend(size=32, high_byte=True)(deep, **RAW)["pixel_values"] == 77).all()
    assert (backend(size=32)(deep, **RAW)["pixel_values"] == 255).all()


def test_released_settings_of_transformers_give_the_same_sizes():
    """Their files hold the shortest edge alone."""
    theirs, images = ViltImageProcessor(size={"shortest_edge": 64}), [picture(160, 80), picture(97, 100, 1)]
    ours, expected = (
        VlpViltImageProcessor(**theirs.to_dict())(images, return_tensors="pt"),
        theirs(images, return_tensors="pt"),
    )
    assert torch.equal(ours["pixel_mask"], expected["pixel_mask"])
    assert (ours["pixel_values"] - expected["pixel_values"]).abs().max() <= 2.02 * GREY_LEVEL


@both_backends
@pytest.mark.parametrize(
    "images, options, match",
    [
        (
            Image.new("RGB", (900, 31)),
            {},
            "900 x 31 pixels is too thin: resized to 639 x 22 .*one patch of 32. Crop it",
        ),
        ([Image.new("RGB", (50, 50)), Image.new("RGB", (26, 926))], {}, "26 x 926 pixels is too thin"),
        (Image.new("RGB", (50, 50)), {"size": 31}, "shorter side of 31 .*patches of 32"),
        (Image.new("RGB", (50, 50)), {"size_divisor": 0}, "patches of 0"),
        (Image.new("RGB", (50, 50)), {"size": {"height": 64, "width": 64}}, "must hold shortest_edge"),
        (Image.new("RGB", (50, 50)), {"size": {"longest_edge": 64}}, "must hold shortest_edge"),
        (Image.new("RGB", (50, 50)), {"pad_size": {"height": 64, "width": 384}}, "beyond the canvas of 64 x 384"),
        (Image.new("L", (50, 50)), {"do_convert_rgb": False}, "cannot be normalised by 3 means"),
        ([None], {}, "picture 0 is None"),
        ([], {}, "empty"),
        (np.zeros((5, 5, 3), np.float32), {}, "float32"),
        (np.zeros((5, 5, 2), np.uint8), {}, r"\(5, 5, 2\)"),
        (Image.new("RGB", (0, 5)), {}, "no pixels"),
        (Image.new("1", (14000, 13000)), {}, "14000 wide"),
        (Image.new("La", (5, 5)), {}, "mode La"),
        ("/nowhere/cat.png", {}, "/nowhere/cat.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pictures_and_options_that_are_refused(backend, images, options, match):
    with pytest.raises(ValueError, match=match):
        backend()(images, return_tensors="pt", **options)


@both_backends
def test_grey_and_colour_are_no_batch_unless_converted(backend):
    images, process = [picture(), picture().convert("L")], backend(size=64, image_mean=[0.5], image_std=[0.5])
    assert process(images, return_tensors="pt")["pixel_values"].shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="convert them all to RGB"):
        process(images, do_convert_rgb=False)


@both_backends
def test_a_file_that_does_not_decode(backend, tmp_path):
    path = tmp_path / "cat.png"
    picture().save(path)
    whole = path.read_bytes()
    assert backend(size=32)(path, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cat.png.*does not decode"):
        backend(size=32)(path)


# The processor


def test_a_batch_is_what_forward_takes(processor):
    batch = processor(images=[picture(100, 64), picture(64, 64, 1)], text=["a photo", "a photo a cat"])
    assert (
        set(batch) == {"pixel_values", "pixel_mask", "input_ids", "attention_mask"} == set(processor.model_input_names)
    )
    assert batch["pixel_values"].shape == (2, 3, 64, 96) and batch["pixel_mask"].shape == (2, 64, 96)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0], [2, 5, 6, 5, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["input_ids"].dtype == batch["pixel_mask"].dtype == torch.int64
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    assert set(processor(images=picture())) == {"pixel_values", "pixel_mask"}
    assert processor(text=["", "a"])["input_ids"].tolist() == [[2, 3, 0], [2, 5, 3]]
    assert "token_type_ids" in processor(text="a", return_token_type_ids=True)


def test_pairs_of_pictures(processor):
    images = [picture(100, 64), picture(64, 64, 1), picture(64, 100, 2), picture(64, 64, 3)]
    flat = processor(images=images)
    for pairs in ([images[:2], images[2:]], (tuple(images[:2]), tuple(images[2:]))):
        batch = processor(images=pairs, text=["a", "a cat"])
        assert batch["pixel_values"].shape == (2, 2, 3, 96, 96) and batch["pixel_mask"].shape == (2, 2, 96, 96)
        for name in ("pixel_values", "pixel_mask"):
            assert torch.equal(batch[name].flatten(0, 1), flat[name])
    assert not torch.equal(batch["pixel_values"][0, 1], batch["pixel_values"][1, 0])
    assert processor(images=[images[:2]])["pixel_mask"].shape == (1, 2, 64, 96)
    assert processor(images=tuple(images[:2]))["pixel_mask"].shape == (2, 64, 96)  # no pair: two pictures
    loose = processor(images=[images[:2], images[2:]], do_pad=False, return_tensors=None)["pixel_values"]
    assert [[tuple(one.shape[1:]) for one in pair] for pair in loose] == [[(64, 96), (64, 64)], [(96, 64), (64, 64)]]


def test_a_masked_word_is_written_as_its_token(processor):
    assert processor(text="a [MASK]")["input_ids"].tolist() == [[2, 5, 4, 3]]
    literal = VlpViltProcessor(processor.image_processor, tokenizer(split_special_tokens=True))
    assert literal(text="a [MASK]")["input_ids"].tolist() == [[2, 5, 8, 10, 9, 3]]


def test_text_is_cut_at_the_models_length_with_its_end_kept(processor):
    long = ["a " * 60, "cat"]
    with pytest.warns(UserWarning, match=f"1 of 2 captions had more than {LIMIT} tokens") as caught:
        batch = processor(text=long)
    assert caught[0].filename == __file__
    assert batch["input_ids"].shape == (2, LIMIT) and batch["input_ids"][0].tolist() == [2, *[5] * 38, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor(text=long, padding="max_length", max_length=9)["input_ids"].shape == (2, 9)
        assert processor(text=["a", "a a"])["input_ids"].shape == (2, 4)
    assert processor(text="a", padding="max_length")["input_ids"].shape == (1, LIMIT)
    with pytest.raises(ValueError, match=f"caption 0 has 62 tokens, more than {LIMIT}"):
        processor(text=long, truncation=False)


@pytest.mark.parametrize(
    "inputs, error, match",
    [
        ({}, ValueError, "neither images nor text"),
        ({"text": []}, ValueError, "empty"),
        ({"text": ["a", None]}, TypeError, "caption 1 is a NoneType"),
        ({"text": "a", "padding_side": "left"}, ValueError, "left"),
        ({"text": "a", "max_length": 2}, ValueError, "max_length=2 leaves no room"),
        ({"images": []}, ValueError, "empty"),
        ({"images": [None]}, ValueError, "picture 0 is None"),
        ({"images": [[picture()]]}, ValueError, "entry 0 of images is 1 pictures"),
        ({"images": [[picture()] * 2, [picture()] * 3]}, ValueError, "entry 1 of images is 3 pictures"),
        ({"images": [[picture()] * 2, picture()]}, ValueError, "entry 1 of images is one picture without a list"),
        ({"images": [[]]}, ValueError, "entry 0 of images is 0 pictures"),
    ],
)
def test_calls_that_are_refused(processor, inputs, error, match):
    with pytest.raises(error, match=match):
        processor(**inputs)


def test_a_tokenizer_that_pads_on_the_left():
    with pytest.raises(ValueError, match="pads on the left"):
        VlpViltProcessor(VlpViltImageProcessor(), tokenizer(padding_side="left"))


# Folders


def test_a_folder_keeps_the_processor(tmp_path):
    images = VlpViltImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 80}, size_divisor=16, background=(1, 2, 3)
    )
    processor = VlpViltProcessor(images, tokenizer())
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VlpViltProcessor and type(loaded.image_processor) is VlpViltImageProcessor
    assert type(loaded.tokenizer) is type(processor.tokenizer) and loaded.tokenizer.model_max_length == LIMIT
    assert json.loads(loaded.to_json_string()) == json.loads(processor.to_json_string())
    one, other = (p(images=picture(100, 64), text="a photo") for p in (processor, loaded))
    assert one["pixel_values"].shape == (1, 3, 48, 80)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    exact = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(exact) is VlpViltImageProcessorPil and exact.size_divisor == 16
    assert type(AutoProcessor.from_pretrained(tmp_path, backend="pil").image_processor) is VlpViltImageProcessorPil
    exact.save_pretrained(tmp_path / "alone")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "alone")) is VlpViltImageProcessor
