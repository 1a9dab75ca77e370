"""Pictures that keep their proportions: the rule of their sizes, their batches, and RandAugment before them."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.data.collate import PairCollator
from hf_vlp.inputs.image_augmentations import (
    TrainingTransform,
    WholePatches,
    WholePatchesRandAugment,
    build_augmentation,
)
from hf_vlp.inputs.image_transforms import HALF, padded, resize_width_first, to_tensor, whole_patches_size
from hf_vlp.inputs.rand_augment import OPERATIONS, RandAugment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def image_processor(**changes):
    options = {
        "size": {"shortest_edge": 64, "longest_edge": 106},
        "size_divisor": 32,
        "image_mean": HALF,
        "image_std": HALF,
    }
    options |= {"resample": Image.Resampling.BICUBIC, "background": None}
    return SimpleNamespace(**options | changes)


# Sizes


@pytest.mark.parametrize(
    "size, expected",
    [
        ((640, 480), (512, 384)),  # scale 0.8
        ((480, 640), (384, 512)),
        ((1280, 800), (608, 384)),  # 614.4, cut to patches
        ((1000, 300), (608, 192)),  # 1280 is beyond 639: 639 x 191.7, rounded before it is cut
        ((100, 100), (384, 384)),
        ((1, 1), (384, 384)),
    ],
)
def test_sizes_by_hand(size, expected):
    assert whole_patches_size(*size, 384) == whole_patches_size(*size, 384, 639) == expected
    assert whole_patches_size(*size[::-1], 384) == expected[::-1]


def test_bounds_by_hand():
    assert whole_patches_size(200, 100, 10, divisor=1) == (16, 8)  # int(16.66) = 16; 20 is beyond it
    assert whole_patches_size(200, 100, 10, 20, divisor=1) == (20, 10)
    assert whole_patches_size(5, 4, 2, 9, divisor=1) == (3, 2)  # 2.5: a half goes up
    assert whole_patches_size(49, 40, 20, 90, divisor=1) == (25, 20)  # 24.5, to the even neighbour it would be 24
    assert whole_patches_size(200, 100, 64, 90, divisor=8) == (88, 40)  # 90 x 45
    assert whole_patches_size(200, 100, 64, 90, divisor=32) == (64, 32)
    for size in ((640, 480), (31, 200), (977, 123)):
        assert all(side % 32 == 0 and 32 <= side <= 608 for side in whole_patches_size(*size, 384))


def test_sizes_that_are_refused():
    assert whole_patches_size(639, 32, 384) == (608, 32)
    with pytest.raises(ValueError, match="639 x 31 pixels is too thin: resized to 639 x 31"):
        whole_patches_size(639, 31, 384)
    with pytest.raises(ValueError, match="31 x 639 pixels is too thin: resized to 31 x 639"):
        whole_patches_size(31, 639, 384)
    with pytest.raises(ValueError, match="no pixels"):
        whole_patches_size(0, 5, 384)
    for bounds in ((16, 639, 32), (384, 16, 32), (384, 639, 0)):
        with pytest.raises(ValueError, match="give bounds of one patch or more"):
            whole_patches_size(50, 50, *bounds)


def test_the_width_is_resized_first_and_rounded():
    """Rows of 1, 2 and 1, 0 are 1.5 and 0.5, rounded 2 and 1, whose mean 1.5 is 2; columns are 1 and 1, and so 1."""
    pixels = Image.fromarray(np.array([[1, 2], [1, 0]], np.uint8))
    turned = pixels.transpose(Image.Transpose.TRANSPOSE)
    assert resize_width_first(pixels, (1, 1), Image.Resampling.BOX).getpixel((0, 0)) == 2
    assert resize_width_first(turned, (1, 1), Image.Resampling.BOX).getpixel((0, 0)) == 1


def test_a_batch_of_several_sizes():
    images = [torch.ones(3, 2, 3), torch.full((3, 1, 4), 2.0)]
    values, mask = padded(images)
    assert values.shape == (2, 3, 2, 4) and mask.dtype == torch.int64
    assert values[0, 1].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]] and values[1, 2].tolist() == [
        [2, 2, 2, 2],
        [0, 0, 0, 0],
    ]
    assert mask.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    assert padded(images, (5, 6))[1].sum(dim=(1, 2)).tolist() == [6, 4] and padded(images, (5, 6))[0].shape == (
        2,
        3,
        5,
        6,
    )
    with pytest.raises(ValueError, match="image 1 is 1 high and 4 wide, beyond the canvas of 2 x 3"):
        padded(images, (2, 3))
    with pytest.raises(ValueError, match="convert them all to RGB"):
        padded([torch.ones(3, 2, 3), torch.ones(1, 2, 3)])


# RandAugment


def test_magnitudes_by_hand():
    values = {name: operation.value(9) for name, operation in OPERATIONS.items()}
    expected = {
        "Rotate": 9,
        "Posterize": 1.2,
        "Solarize": 76.8,
        "SolarizeAdd": 33,
        "Color": 0.64,
        "ShearX": 0.09,
        "TranslateXabs": 30,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert [OPERATIONS["Brightness"].value(magnitude) for magnitude in (0, 15, 30)] == pytest.approx([0.1, 1.0, 1.9])
    signed = {name for name, operation in OPERATIONS.items() if operation.signed}
    assert signed == {"Rotate", "ShearX", "ShearY", "TranslateXabs", "TranslateYabs"}
    assert len(OPERATIONS) == 14


def grey(*rows) -> Image.Image:
    return Image.fromarray(np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2))


def changed(image: Image.Image, *names: str, signs=(), magnitude: float = 9) -> list:
    return to_tensor(RandAugment(magnitude=magnitude)(image, names, signs))[0].tolist()


def test_colours_by_hand():
    image = grey([0, 76, 77, 100, 127, 128, 255])
    assert changed(image, "Posterize") == [[0, 0, 0, 0, 0, 128, 128]]  # one bit
    assert changed(image, "Posterize", magnitude=15) == [[0, 64, 64, 64, 64, 128, 192]]  # two
    assert changed(image, "Solarize") == [[0, 76, 178, 155, 128, 127, 0]]  # from 76.8 on turned round
    assert changed(image, "SolarizeAdd") == [[33, 109, 110, 255 - 133, 255 - 160, 255 - 161, 0]]
    assert changed(image, "Brightness") == [[0, 48, 49, 64, 81, 81, 163]]  # times 0.64, cut
    assert changed(grey([50, 100, 150]), "AutoContrast") == [[0, 127, 255]]
    assert changed(image, "Color") == changed(image) == [[0, 76, 77, 100, 127, 128, 255]]  # grey has no colour to lose


def test_moves_by_hand():
    image = grey([9] * 40)
    assert changed(image, "TranslateXabs", signs=[0.5]) == [[9] * 10 + [0] * 30]  # to the left: read 30 further
    assert changed(image, "TranslateXabs", signs=[0.51]) == [[0] * 30 + [9] * 10]
    column = grey(*[[9]] * 40)
    assert changed(column, "TranslateYabs", signs=[0.0]) == [[9]] * 10 + [[0]] * 30
    assert changed(column, "TranslateXabs", signs=[0.0]) == [[0]] * 40
    square = picture(21, 21)
    turned, back = (changed(square, "Rotate", signs=[sign]) for sign in (0.0, 1.0))
    assert (
        turned == to_tensor(square.rotate(9))[0].tolist() and back == to_tensor(square.rotate(-9))[0].tolist() != turned
    )
    corner = grey(*([[5] * 30] * 30))
    for name in ("ShearX", "ShearY"):
        one, other = np.array(changed(corner, name, signs=[0.0])), np.array(changed(corner, name, signs=[1.0]))
        one, other = (one, other) if name == "ShearX" else (one.T, other.T)
        assert (one[0] == 5).all() and one[29].tolist() == [5] * 27 + [0] * 3  # 29.5 rows * 0.09 = 2.7 columns
        assert other[29].tolist() == [0] * 3 + [5] * 27


def test_operations_follow_one_another_and_signs_go_to_those_that_have_one():
    image = picture()
    policy = RandAugment()
    one = policy(image, ["Color", "Rotate", "Solarize", "ShearX"], [0.0, 0.9])
    steps = policy(policy(image, ["Color"], []), ["Rotate"], [0.0])
    assert np.array_equal(one, policy(policy(steps, ["Solarize"], []), ["ShearX"], [0.9]))
    assert not np.array_equal(one, policy(image, ["Color", "Rotate", "Solarize", "ShearX"], [0.9, 0.0]))
    assert not np.array_equal(policy(image, ["Solarize", "Color"], []), policy(image, ["Color", "Solarize"], []))
    assert np.array_equal(policy(image, [], []), image)


def test_draws():
    policy = RandAugment(count=3)
    draws = policy.draws(2000, generator())
    assert draws == policy.draws(2000, generator()) != policy.draws(2000, generator(1))
    for names, signs in draws:
        assert len(names) == 3 and len(signs) == sum(OPERATIONS[name].signed for name in names)
    counts = Counter(name for names, _ in draws for name in names)
    assert set(counts) == set(OPERATIONS) and all(abs(count - 6000 / 14) < 100 for count in counts.values())
    assert any(len(set(names)) < 3 for names, _ in draws)  # with replacement
    turned = [sign > 0.5 for _, signs in draws for sign in signs]
    assert abs(sum(turned) / len(turned) - 0.5) < 0.05


def test_augmentations_that_are_refused():
    for options in ({"count": -1}, {"magnitude": 31}, {"magnitude": -1}):
        with pytest.raises(ValueError, match="give a count of 0 or more and a magnitude from 0 to 30"):
            RandAugment(**options)
    with pytest.raises(ValueError, match="unknown operation 'Invert'"):
        RandAugment()(picture(), ["Invert"], [])
    with pytest.raises(ValueError, match="1 signs for the 0 signed operations"):
        RandAugment()(picture(), ["Color"], [0.5])
    with pytest.raises(ValueError, match="0 signs for the 1 signed operations"):
        RandAugment()(picture(), ["Rotate"], [])


# Training transforms


def test_pictures_without_augmentation_are_kept_as_the_model_sees_them():
    transform = TrainingTransform(image_processor(), "pixelbert")
    prepared = [transform.prepare(picture(*size)) for size in ((100, 64), (64, 100), (40, 40))]
    assert [tuple(one.shape) for one in prepared] == [(3, 64, 96), (3, 96, 64), (3, 64, 64)]
    assert torch.equal(prepared[0], to_tensor(resize_width_first(picture(100, 64), (96, 64))))
    batch = transform.augment(prepared, generator())
    assert batch["pixel_values"].shape == (3, 3, 96, 96) and batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [
        6144,
        6144,
        4096,
    ]
    assert torch.allclose(batch["pixel_values"][0, :, :64], prepared[0] / 127.5 - 1, atol=1e-6)
    assert (batch["pixel_values"][0, :, 64:] == 0).all()
    with pytest.raises(ValueError, match="canvas=200"):
        TrainingTransform(image_processor(), "pixelbert", canvas=200)


@pytest.mark.parametrize("name", ["pixelbert", "pixelbert_randaugment"])
def test_a_picture_too_thin_is_refused_while_its_record_is_known(name):
    transform = TrainingTransform(image_processor(), name)
    assert transform.prepare(Image.new("RGB", (900, 300))).shape[0] == 3
    with pytest.raises(ValueError, match="900 x 31 pixels is too thin"):
        transform.prepare(Image.new("RGB", (900, 31)))


def test_randaugment_works_on_the_picture_before_it_is_resized():
    transform = TrainingTransform(image_processor(), "pixelbert_randaugment")
    image = picture(120, 90)
    prepared = transform.prepare(image)
    assert torch.equal(prepared, to_tensor(image)) and prepared.dtype == torch.uint8
    draws = [(["TranslateXabs", "Solarize"], [0.0])]
    batch = transform.augment([prepared], draws=draws)
    expected = to_tensor(resize_width_first(RandAugment()(image, *draws[0]), (64, 64)))
    assert whole_patches_size(120, 90, 64, 106) == (64, 64)
    assert torch.allclose(batch["pixel_values"][0], expected / 127.5 - 1, atol=1e-6)
    late = RandAugment()(resize_width_first(image, (64, 64)), *draws[0])
    assert not torch.equal(to_tensor(late), expected)
    plain = TrainingTransform(image_processor(), "pixelbert")
    still = transform.augment([prepared], draws=[([], [])])
    assert torch.equal(still["pixel_values"], plain.augment([plain.prepare(image)])["pixel_values"])


def test_randaugment_is_drawn_from_the_generator_for_each_picture():
    transform = TrainingTransform(image_processor(), "pixelbert_randaugment")
    prepared = [transform.prepare(picture(100, 64))] * 4
    one, same, other = (transform.augment(prepared, generator(seed))["pixel_values"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    with pytest.raises(ValueError, match="needs a generator"):
        transform.augment(prepared)
    with pytest.raises(ValueError, match="1 entries for 4 pictures"):
        transform.augment(prepared, draws=[([], [])])


def test_numbers_and_settings():
    transform = TrainingTransform(image_processor(), "pixelbert_randaugment", magnitude=12, count=3)
    assert (transform.augment.policy.count, transform.augment.policy.magnitude) == (3, 12)
    assert (transform.augment.size, transform.augment.longest, transform.augment.divisor) == (64, 106, 32)
    assert TrainingTransform(image_processor(size={"shortest_edge": 64}), "pixelbert").augment.longest is None
    assert TrainingTransform(image_processor(), "pixelbert_randaugment", canvas=80).prepare(
        picture(160, 100)
    ).shape == (3, 50, 80)
    assert TrainingTransform(image_processor(), "pixelbert_randaugment", canvas=80).prepare(picture(70, 60)).shape == (
        3,
        60,
        70,
    )
    white = TrainingTransform(image_processor(background=(255, 255, 255)), "pixelbert")
    assert white.prepare(Image.new("RGBA", (9, 9), (0, 0, 0, 0))).unique().tolist() == [255]
    assert type(build_augmentation("pixelbert", 64)) is WholePatches
    assert type(build_augmentation("pixelbert_randaugment", 64)) is WholePatchesRandAugment
    for number in ({"policy": 1}, {"magnitud": 1}):
        with pytest.raises(ValueError, match="has no number"):
            build_augmentation("pixelbert_randaugment", 64, **number)
    for changes in ({"size": {"height": 64, "width": 64}}, {"size_divisor": None}):
        with pytest.raises(ValueError, match="no bounds of whole patches"):
            TrainingTransform(image_processor(**changes), "pixelbert")
    # the other transforms see squares of the shorter side
    assert TrainingTransform(image_processor(), "random_resized_crop").prepare(picture()).shape == (3, 72, 72)


@pytest.mark.parametrize("name", ["pixelbert", "pixelbert_randaugment"])
def test_the_collator_takes_values_and_mask(name):
    transform = TrainingTransform(image_processor(), name)
    items = [
        {"image": transform.prepare(picture(*size)), "text": "a", "image_id": row, "draw": row}
        for row, size in enumerate([(100, 64), (64, 100)])
    ]
    batch = PairCollator(lambda **_: {"input_ids": torch.ones(2, 3)}, transform.augment)(items)
    assert set(batch) == {"pixel_values", "pixel_mask", "input_ids", "image_ids"}
    assert batch["pixel_values"].shape == (2, 3, 96, 96) and batch["pixel_mask"].shape == (2, 96, 96)
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [64 * 96] * 2
