"""ALBEF's processor and image processors: what they take, what they give, what they refuse, and that a folder keeps them."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertTokenizer

from hf_vlp.inputs.image_transforms import resize_width_first, to_rgb, to_tensor
from hf_vlp.inputs.vocabulary import without_end_mark
from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor, VlpAlbefImageProcessorPil
from hf_vlp.models.albef.processing_albef import VlpAlbefProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "albef" / "image_transform"
BACKENDS = (VlpAlbefImageProcessor, VlpAlbefImageProcessorPil)
LIMIT = 12
RAW = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["torchvision", "pil"])


def picture(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def bert(**options) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "cat", "red", "[", "]", "mask"]
    return BertTokenizer(
        vocab={word: index for index, word in enumerate(words)}, **{"model_max_length": LIMIT} | options
    )


@pytest.fixture
def processor() -> VlpAlbefProcessor:
    return VlpAlbefProcessor(VlpAlbefImageProcessor(size=32), without_end_mark(bert()))


# Image processors


@pytest.mark.parametrize("number", [0, 1])
def test_pixels_of_the_original(number):
    raw, stored = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    image, expected = Image.fromarray(raw[f"image{number}_uint8"].numpy()), stored[f"eval{number}"]
    fast, exact = (backend(size=48)(image, return_tensors="pt")["pixel_values"] for backend in BACKENDS)
    assert exact.dtype == fast.dtype == torch.float32 and exact.shape == fast.shape == (1, 3, 48, 48)
    assert torch.equal(exact[0], expected) and (fast[0] - expected).abs().max() < 0.031  # two grey levels
    assert (stored["eval0"] - stored["eval1"]).abs().max() > 1
    # the sibling: Pillow's own order of the two passes gives other pixels where it takes the height first
    assert not torch.equal(stored["eval1"], stored["alt_pillow13.eval1"])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_every_mode_become_rgb_and_square(mode):
    image = picture(71, 60).convert(mode)
    fast, exact = (backend(size=64)(image, **RAW)["pixel_values"] for backend in BACKENDS)
    assert torch.equal(exact[0], to_tensor(resize_width_first(to_rgb(image), (64, 64))).float())
    assert (fast - exact).abs().max() <= 2
    other = VlpAlbefImageProcessorPil(size=64)(picture(71, 60, seed=2), **RAW)["pixel_values"]
    assert (exact - other).abs().max() > 10


@both_backends
def test_one_at_a_time_equals_the_batch_of_every_kind_of_picture(backend, tmp_path):
    image = picture(100, 64)
    image.save(tmp_path / "cat.png")
    rows = np.array(image)
    kinds = [image, rows, rows.transpose(2, 0, 1), torch.from_numpy(rows), str(tmp_path / "cat.png")]
    process = backend(size=32)
    reference = process(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(process(kinds, return_tensors="pt")["pixel_values"], reference.expand(5, -1, -1, -1))
    mixed = process([image, picture(30, 90, 1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(mixed[:1], reference)
    assert torch.equal(mixed[1:], process(picture(30, 90, 1), return_tensors="pt")["pixel_values"])
    assert not torch.equal(mixed[0], mixed[1])


@both_backends
def test_options(backend):
    process, image = backend(size=32), picture(100, 64)

    def pixels(**options):
        return process(image, return_tensors="pt", **options)["pixel_values"]

    assert (backend().size.height, backend().size.width) == (256, 256)
    assert pixels().shape == (1, 3, 32, 32) and pixels(size=48).shape == (1, 3, 48, 48)
    assert pixels(size={"height": 32, "width": 48}).shape == (1, 3, 32, 48)
    assert pixels(do_resize=False).shape == (1, 3, 64, 100)
    raw = process(image, **RAW)["pixel_values"]
    assert torch.allclose(pixels(image_mean=[0.0] * 3, image_std=[1.0] * 3), raw / 255, atol=1e-6)
    assert not torch.equal(pixels(resample=Image.Resampling.NEAREST), pixels())
    assert isinstance(process(image, return_tensors="np")["pixel_values"], np.ndarray)
    clear = Image.new("RGBA", (20, 20), (200, 100, 0, 0))
    assert process(clear, **RAW)["pixel_values"][0, :, 0, 0].tolist() == [200, 100, 0]
    assert (process(clear, background=(255, 255, 255), **RAW)["pixel_values"] == 255).all()


@both_backends
@pytest.mark.parametrize(
    "images, options, match",
    [
        (picture(), {"size": {"shortest_edge": 64}}, "must hold height and width"),
        (Image.new("L", (50, 50)), {"do_convert_rgb": False}, "cannot be normalised by 3 means"),
        ([None], {}, "picture 0 is None"),
        ([], {}, "empty"),
        (np.zeros((5, 5, 3), np.float32), {}, "float32"),
        (Image.new("RGB", (0, 5)), {}, "no pixels"),
        ("/nowhere/cat.png", {}, "/nowhere/cat.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pictures_and_options_that_are_refused(backend, images, options, match):
    with pytest.raises(ValueError, match=match):
        backend()(images, return_tensors="pt", **options)


# The processor


def test_a_batch_is_what_forward_takes(processor):
    batch = processor(images=[picture(), picture(30, 60, 1)], text=["A photo!", "a red-cat"])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"} == set(processor.model_input_names)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 0], [2, 5, 8, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].dtype == torch.int64
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    assert set(processor(images=picture())) == {"pixel_values"}
    assert processor(text="")["input_ids"].tolist() == [[2]]


def test_pairs_of_pictures(processor):
    images = [picture(100, 64), picture(64, 64, 1), picture(64, 100, 2), picture(64, 64, 3)]
    flat = processor(images=images)["pixel_values"]
    pairs = processor(images=[images[:2], images[2:]], text=["a", "a cat"])["pixel_values"]
    assert pairs.shape == (2, 2, 3, 32, 32) and torch.equal(pairs.flatten(0, 1), flat)
    assert not torch.equal(pairs[0, 1], pairs[1, 0])
    loose = processor(images=[images[:2]], do_resize=False, return_tensors=None)["pixel_values"]
    assert [[tuple(one.shape[1:]) for one in pair] for pair in loose] == [[(64, 100), (64, 64)]]


def test_cleaning_by_name(processor):
    text = "A  <cat>, RED?"
    tokenizer, images = processor.tokenizer, processor.image_processor
    for cleaning, words, cleaned in (
        ("caption", 2, "a <cat>"),
        ("question", 2, "a "),
        ("question", 3, "a  <cat>"),
        (None, 1, text),
    ):
        made = VlpAlbefProcessor(images, tokenizer, text_cleaning=cleaning, max_words=words)
        assert made(text=text)["input_ids"].tolist() == [tokenizer(cleaned)["input_ids"]]
        assert made(text=text, max_words=words).input_ids.tolist() == made(text=text).input_ids.tolist()
    assert processor(text=text, max_words=1)["input_ids"].tolist() == [[2, 5]]
    assert processor(text="a [MASK]")["input_ids"].tolist() == [[2, 5, 9, 11, 10]]  # in lower case it is no token
    bare = VlpAlbefProcessor(images, tokenizer, text_cleaning=None)
    assert bare(text="a [MASK]")["input_ids"].tolist() == [[2, 5, 4]]


def test_text_is_cut_with_its_first_mark_counted(processor):
    long = ["a " * 25, "cat"]
    with pytest.warns(UserWarning, match=f"1 of 2 captions had more than {LIMIT} tokens"):
        batch = processor(text=long)
    assert batch["input_ids"].tolist() == [[2, *[5] * 11], [2, 7, *[0] * 10]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processor(text=long, padding="max_length", max_length=9)["input_ids"].shape == (2, 9)
        assert processor(text="a " * 11)["input_ids"].shape == (1, LIMIT)
    with pytest.raises(ValueError, match=f"caption 0 has 26 tokens, more than {LIMIT}"):
        processor(text=long, truncation=False)


def test_answers_end_with_their_mark_whatever_the_tokenizer_does(processor):
    usual = VlpAlbefProcessor(processor.image_processor, bert(), text_cleaning="question")
    for one in (processor, usual):
        answers = one.encode_answers(["a cat", "red", ""])
        assert set(answers) == {"answer_ids", "answer_mask"}
        assert answers["answer_ids"].tolist() == [[2, 5, 7, 3], [2, 8, 3, 0], [2, 3, 0, 0]]
        assert answers["answer_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert processor.encode_answers("red")["answer_ids"].tolist() == [[2, 8, 3]]
    assert processor(text="red")["input_ids"].tolist() == [[2, 8]] != usual(text="red")["input_ids"].tolist()
    with pytest.raises(ValueError, match="the list is empty"):
        processor.encode_answers([])
    with pytest.raises(TypeError, match="caption 1 is a NoneType"):
        processor.encode_answers(["a", None])
    assert processor.encode_answers(["a " * 10])["answer_ids"].shape == (1, LIMIT)
    with pytest.raises(ValueError, match="'a a a.* has 13 tokens, more than 12"):
        processor.encode_answers(["cat", "a " * 11])


@pytest.mark.parametrize(
    "inputs, error, match",
    [
        ({}, ValueError, "neither images nor text"),
        ({"text": []}, ValueError, "empty"),
        ({"text": ["a", None]}, TypeError, "caption 1 is a NoneType"),
        ({"text": "a", "padding_side": "left"}, ValueError, "left"),
        ({"text": "a", "max_length": 2}, ValueError, "max_length=2 leaves no room"),
        ({"text": "a", "max_words": 0}, ValueError, "max_words=0"),
        ({"images": []}, ValueError, "empty"),
        ({"images": [[picture()]]}, ValueError, "entry 0 of images is 1 pictures"),
        ({"images": [[picture()] * 2, picture()]}, ValueError, "entry 1 of images is one picture without a list"),
    ],
)
def test_calls_that_are_refused(processor, inputs, error, match):
    with pytest.raises(error, match=match):
        processor(**inputs)


def test_processors_that_are_refused(processor):
    parts = (processor.image_processor, processor.tokenizer)
    with pytest.raises(ValueError, match="text_cleaning='clip' is unknown: choose one of 'caption', 'question', None"):
        VlpAlbefProcessor(*parts, text_cleaning="clip")
    with pytest.raises(ValueError, match="max_words=0"):
        VlpAlbefProcessor(*parts, max_words=0)
    with pytest.raises(ValueError, match="pads on the left"):
        VlpAlbefProcessor(parts[0], without_end_mark(bert(padding_side="left")))


# Folders


@pytest.mark.parametrize("cleaning", ["question", None])
def test_a_folder_keeps_the_parts_and_the_cleaning(processor, tmp_path, cleaning):
    images = VlpAlbefImageProcessor(size=48, background=(1, 2, 3))
    saved = VlpAlbefProcessor(images, processor.tokenizer, text_cleaning=cleaning, max_words=7)
    saved.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text("utf-8"))
    assert (settings.get("text_cleaning", "missing"), settings["max_words"]) == (cleaning, 7)
    assert AutoTokenizer.from_pretrained(tmp_path)("a cat")["input_ids"] == [2, 5, 7]
    images.save_pretrained(tmp_path / "alone")
    for backend in BACKENDS:
        loaded = backend.from_pretrained(tmp_path / "alone")
        assert (loaded.size.height, loaded.size.width, tuple(loaded.background)) == (48, 48, (1, 2, 3))
