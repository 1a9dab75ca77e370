"""RandAugment with OpenCV's arithmetic, and the windows before it: numbers by hand, draws, refusals."""

import math
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlp.inputs.image_augmentations import RandomAugmentCrop, TrainingTransform, build_augmentation
from hf_vlp.inputs.image_transforms import CLIP_MEAN, CLIP_STD, normalised, resize_width_first, to_tensor
from hf_vlp.inputs.random_augment import OPERATIONS, WITHOUT_COLOURS, RandomAugment, warped

STAY, TURN = 0.2, 0.8  # a sign's draw; Rotate's the other way round


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def grey(*rows) -> np.ndarray:
    return np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2)


def changed(pixels: np.ndarray, name: str, value: float = 0.0) -> list:
    return OPERATIONS[name].apply(pixels, value)[:, :, 0].tolist()


# Operations


def test_values_at_the_papers_magnitude():
    values = {name: OPERATIONS[name].value(7) for name in OPERATIONS}
    expected = {"Brightness": 1.36, "Sharpness": 1.36, "ShearX": 0.21, "ShearY": 0.21, "TranslateX": 7, "Rotate": 21}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert (values["Solarize"], values["Posterize"], OPERATIONS["Solarize"].value(3)) == (179, 2, 76)  # cut
    assert WITHOUT_COLOURS == (
        *("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX"),
        *("TranslateY", "Rotate"),
    )


def test_levels_by_hand():
    pixels = grey([0, 76, 100, 127, 128, 255])
    assert changed(pixels, "Identity") == pixels[:, :, 0].tolist()
    assert changed(pixels, "Brightness", 1.36) == [[0, 103, 136, 172, 174, 255]]
    assert changed(pixels, "Solarize", 100) == [[0, 76, 155, 128, 127, 0]]
    assert changed(pixels, "Posterize", 1) == [[0, 0, 0, 0, 128, 128]]
    assert changed(pixels, "Posterize", 2) == [[0, 64, 64, 64, 128, 192]]
    assert changed(grey([50, 100, 150]), "AutoContrast") == [[0, 127, 255]]
    assert changed(grey([50, 50]), "AutoContrast") == [[50, 50]]
    assert changed(grey([0, 200]), "Contrast", 0.5) == [[50, 150]]  # about the mean of 100
    assert changed(grey([0, 100]), "Contrast", 3) == [[0, 200]]
    coloured = np.array([[[200, 100, 0]]], np.uint8)  # grey: 22.8 + 58.7 + 0
    assert OPERATIONS["Color"].apply(coloured, 0.0).tolist() == [[[81, 81, 81]]]
    assert OPERATIONS["Color"].apply(coloured, 2.0).tolist() == [[[255, 118, 0]]]


def test_equalizing_by_hand():
    """512 pixels of 10, 255 of 20 and 3 of 30: a step is 767 // 255 = 3, and half of it 1."""
    pixels = grey([10] * 512 + [20] * 255 + [30] * 3)
    assert np.unique(OPERATIONS["Equalize"].apply(pixels, 0.0)).tolist() == [0, 171, 255]  # 1//3, 513//3, 768//3
    few = grey([1, 2, 3])
    assert changed(few, "Equalize") == [[1, 2, 3]]  # a step of 0


def test_sharpening_leaves_the_border_and_may_wrap():
    pixels = np.full((5, 5, 3), 200, np.uint8)
    pixels[2, 2] = 255
    sharp = OPERATIONS["Sharpness"].apply(pixels, 1.9)[:, :, 0]
    # the blurred middle: (8 * 200 + 5 * 255) / 13 = 221.15, 221 + 1.9 * 34 = 285.6, which is 29 beyond 255
    assert sharp[2, 2] == 29 and sharp[1, 1] == 196  # 204 - 1.9 * 4 = 196.4
    assert (sharp[0] == 200).all() and (sharp[:, 4] == 200).all()
    assert OPERATIONS["Sharpness"].apply(pixels, 1.0).tolist() == pixels.tolist()
    thin = grey([9, 200])
    assert changed(thin, "Sharpness", 1.9) == [[9, 200]]


def test_moves_by_hand():
    row = grey([10, 20, 30, 40])
    assert changed(row, "TranslateX", 1) == [[20, 30, 40, 128]]  # to the left
    assert changed(row, "TranslateX", -1) == [[128, 10, 20, 30]]
    assert changed(row, "TranslateX", 0.5) == [[15, 25, 35, 84]]
    assert changed(grey([10], [20], [30]), "TranslateY", 1) == [[20], [30], [128]]
    square = grey(*[[10, 20, 30, 40]] * 3)
    assert changed(square, "ShearX", 1) == [[10, 20, 30, 40], [128, 10, 20, 30], [128, 128, 10, 20]]
    assert changed(square.transpose(1, 0, 2), "ShearY", -1) == [
        [10, 20, 30],
        [20, 30, 40],
        [30, 40, 128],
        [40, 128, 128],
    ]


def test_turns_by_hand():
    pixels = grey([1, 2, 3], [4, 5, 6], [7, 8, 9])
    # about (1.5, 1.5), where centres of pixels are whole numbers: counter-clockwise, and a row is lost above
    assert changed(pixels, "Rotate", 90) == [[128, 128, 128], [3, 6, 9], [2, 5, 8]]
    assert changed(pixels, "Rotate", 0) == pixels[:, :, 0].tolist()
    assert changed(pixels, "Rotate", 90) != changed(pixels, "Rotate", -90)


def test_a_warp_rounds_places_to_32nds_of_a_pixel():
    row = grey([0, 255])
    for move, expected in ((0.5, 128), (1 / 32, 8), (0.01, 0), (0.02, 8)):
        assert warped(row, ((1, 0, -move), (0, 1, 0)))[0, 0, 0] == expected


# The policy


def test_draws_are_spent_as_in_the_released_code():
    policy = RandomAugment()
    steps = policy.steps(["Rotate", "ShearX", "Equalize", "TranslateY"], [0.5, TURN, 0.51, 0.0, 0.1, TURN])
    assert steps == [("Rotate", 21.0), ("Equalize", 0.0), ("TranslateY", -7.0)]
    assert policy.steps(["Rotate"], [0.0, STAY]) == [("Rotate", -21.0)]
    assert policy.steps(["ShearX"], [0.0, 0.5]) == [("ShearX", OPERATIONS["ShearX"].value(7))]
    assert policy.steps(["ShearX"], [0.9]) == policy.steps([], []) == []


def test_operations_follow_one_another():
    pixels, policy = np.asarray(picture()), RandomAugment()
    once = policy(pixels, ["Brightness", "Equalize"], [0.0, 0.0])
    assert np.array_equal(once, OPERATIONS["Equalize"].apply(OPERATIONS["Brightness"].apply(pixels, 1.36), 0.0))
    assert not np.array_equal(once, policy(pixels, ["Equalize", "Brightness"], [0.0, 0.0]))
    assert np.array_equal(policy(pixels, ["Equalize", "Brightness"], [0.6, 0.6]), pixels)
    pixels = pixels // 2 + 70  # no level is at an end of the range
    before = pixels.copy()
    for name in OPERATIONS:
        result = OPERATIONS[name].apply(pixels, OPERATIONS[name].value(7))
        assert result.shape == pixels.shape and result.dtype == np.uint8
        assert np.array_equal(result, pixels) == (name == "Identity") and np.array_equal(pixels, before)


def test_drawn_operations():
    policy = RandomAugment(count=3)
    draws = policy.draws(2000, generator())
    assert draws == policy.draws(2000, generator()) != policy.draws(2000, generator(1))
    applied = [policy.steps(*draw) for draw in draws]  # the numbers fit the operations
    counts = Counter(name for names, _ in draws for name in names)
    assert set(counts) == set(WITHOUT_COLOURS) and all(abs(count - 600) < 100 for count in counts.values())
    assert abs(sum(map(len, applied)) / 6000 - 0.5) < 0.03
    turned = [value < 0 for steps in applied for name, value in steps if OPERATIONS[name].turns]
    assert abs(sum(turned) / len(turned) - 0.5) < 0.05
    colours = RandomAugment(operations=("Color",)).draws(3, generator())
    assert {name for names, _ in colours for name in names} == {"Color"}


def test_policies_and_draws_that_are_refused():
    for options in ({"count": -1}, {"magnitude": 11}, {"magnitude": -1}):
        with pytest.raises(ValueError, match="give a count of 0 or more and a magnitude from 0 to 10"):
            RandomAugment(**options)
    with pytest.raises(ValueError, match="operations is empty"):
        RandomAugment(operations=())
    with pytest.raises(ValueError, match="unknown operation 'Invert'"):
        RandomAugment(operations=["Invert"])
    pixels = np.asarray(picture())
    with pytest.raises(ValueError, match="unknown operation 'Invert'"):
        RandomAugment()(pixels, ["Invert"], [0.1])
    for numbers in ([], [0.1], [0.1, 0.1, 0.1], [0.9, 0.1]):
        with pytest.raises(ValueError, match=f"{len(numbers)} draws for the operations"):
            RandomAugment()(pixels, ["Rotate"], numbers)


# The training transform


def image_processor(size: int = 32):
    return SimpleNamespace(
        size={"height": size, "width": size},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        resample=Image.Resampling.BICUBIC,
        background=None,
    )


def test_window_then_mirror_then_operations():
    transform = TrainingTransform(image_processor(), "random_augment")
    prepared = transform.prepare(picture())
    assert torch.equal(prepared, to_tensor(picture()))  # kept as it is
    names, numbers = ["TranslateX", "Brightness"], [0.0, STAY, 0.0]
    seen = transform.augment([prepared], draws=[((3, 5, 30, 20), True, names, numbers)])
    window = resize_width_first(picture().crop((5, 3, 25, 33)), (32, 32)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = RandomAugment()(np.asarray(window), names, numbers)
    assert torch.equal(seen[0], normalised(torch.from_numpy(expected).permute(2, 0, 1)))
    other = transform.augment([prepared], draws=[((3, 5, 30, 20), False, names, numbers)])
    assert not torch.equal(seen, other)
    whole = transform.augment([prepared], draws=[(None, False, [], [])])
    assert torch.equal(whole[0], normalised(to_tensor(resize_width_first(picture(), (32, 32)))))


def test_pictures_of_any_size_from_a_generator():
    transform = TrainingTransform(image_processor(), "random_augment", scale=[0.5, 1.0])
    prepared = [transform.prepare(picture(*size)) for size in ((50, 40), (40, 90), (1, 1), (50, 40))]
    seen, same, other = (transform.augment(prepared, generator(seed)) for seed in (0, 0, 1))
    assert seen.shape == (4, 3, 32, 32) and seen.dtype == torch.float32
    assert torch.equal(seen, same) and not torch.equal(seen, other) and not torch.equal(seen[0], seen[3])
    assert pickle.loads(pickle.dumps(transform)).augment.scale == [0.5, 1.0]  # for the workers of a loader


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 1.0)])
def test_windows(scale):
    augment = RandomAugmentCrop(32, scale=scale)
    windows = [window for window, *_ in augment.draws([(300, 200)] * 500, generator())]
    shares = [tall * wide / 60000 for _, _, tall, wide in windows]
    assert scale[0] * 0.97 < min(shares) < scale[0] + 0.1 and 0.8 < max(shares) <= 1.0
    for top, left, tall, wide in windows:
        assert 0 <= top <= 200 - tall and 0 <= left <= 300 - wide and 0.73 < wide / tall < 1.36
    flips = [flip for _, flip, *_ in augment.draws([(300, 200)] * 500, generator())]
    assert 200 < sum(flips) < 300
    assert not any(flip for _, flip, *_ in RandomAugmentCrop(32, flip=0.0).draws([(9, 9)] * 50, generator()))


def test_a_window_where_none_fits_is_the_largest_in_the_middle():
    augment = RandomAugmentCrop(32, scale=(1.0, 1.0))
    for size, expected in (((90, 30), (0, 25, 30, 40)), ((30, 90), (25, 0, 40, 30))):
        windows = {window for window, *_ in augment.draws([size] * 20, generator())}
        assert windows == {expected}
    top, left, tall, wide = augment._window(100, 100, [0.0, 0.5, 0.0, 0.0] * 10)
    assert (top, left, tall, wide) == (0, 0, 100, 100)
    assert math.isclose(augment._window(400, 300, [0.0, 1.0, 0, 0] * 10)[3], 400)


def test_without_a_window_the_picture_is_kept_as_the_model_sees_it():
    transform = TrainingTransform(image_processor(), "random_augment", scale=None)
    prepared = transform.prepare(picture(90, 40))
    assert torch.equal(prepared, to_tensor(resize_width_first(picture(90, 40), (32, 32))))
    draws = transform.augment.draws([(32, 32)] * 20, generator())
    assert {window for window, *_ in draws} == {None} and len({flip for _, flip, *_ in draws}) == 2
    still = transform.augment([prepared], draws=[(None, False, [], [])])
    assert torch.equal(still[0], normalised(prepared))
    with pytest.raises(ValueError, match="canvas=64"):
        TrainingTransform(image_processor(), "random_augment", scale=None, canvas=64)


def test_a_canvas_shrinks_the_longer_side():
    transform = TrainingTransform(image_processor(), "random_augment", canvas=40)
    assert transform.prepare(picture(80, 50)).shape == (3, 25, 40)
    assert transform.prepare(picture(30, 36)).shape == (3, 36, 30)


def test_numbers_and_draws_that_are_refused():
    assert type(build_augmentation("random_augment", 32, magnitude=5)) is RandomAugmentCrop
    for options, match in (
        ({"scale": (0.0, 1.0)}, "scale="),
        ({"scale": (0.9, 0.5)}, "scale="),
        ({"scale": (0.5, 1.1)}, "scale="),
        ({"aspect": 0.9}, "aspect=0.9"),
        ({"flip": 1.1}, "flip=1.1"),
        ({"magnitude": 11}, "magnitude=11"),
        ({"policy": 1}, "has no number 'policy'"),
    ):
        with pytest.raises(ValueError, match=match):
            build_augmentation("random_augment", 32, **options)
    augment, image = RandomAugmentCrop(32), to_tensor(picture())
    with pytest.raises(ValueError, match="needs a generator"):
        augment([image])
    with pytest.raises(ValueError, match="0 entries for 1 pictures"):
        augment([image], draws=[])
    for window in ((-1, 0, 5, 5), (0, 0, 0, 5), (36, 0, 5, 5), (0, 46, 5, 5)):
        with pytest.raises(ValueError, match="leaves the picture of 50 x 40"):
            augment([image], draws=[(window, False, [], [])])
