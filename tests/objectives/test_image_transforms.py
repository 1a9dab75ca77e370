"""Pictures to tensors: the exact order of operations, its corners, and the random part of training transforms."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_vlp.data.collate import PairCollator
from hf_vlp.inputs.image_augmentations import (
    RandomCropSquash,
    RandomResizedCrop,
    RandomSquareCrop,
    TrainingTransform,
    build_augmentation,
)
from hf_vlp.inputs.image_transforms import (
    CLIP_MEAN,
    CLIP_STD,
    DETECTOR_MEAN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre_crop,
    channels_to_front,
    check_size,
    clip_eval,
    crop_offset,
    eight_bits,
    in_channel_order,
    normalised,
    on_background,
    picture_from_array,
    resize_picture,
    resized_size,
    squashed,
    to_rgb,
    to_tensor,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "clip" / "image_preprocess"
CASES = json.loads((GOLDEN / "cases.json").read_text("utf-8"))
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # pixels stay 0..255


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_picture(width: int = 50, height: int = 40) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def pictures(count: int = 4, side: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=generator(seed), dtype=torch.uint8)


# The evaluation transform


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case["file"] for case in CASES])
def test_clip_eval_has_the_numbers_of_the_original(case):
    stored = load_file(GOLDEN / "outputs.safetensors")[f"pixels.{case}"]
    picture, size = Image.open(GOLDEN / CASES[case]["file"]), CASES[case]["n_px"]
    assert (clip_eval(picture, size) - stored).abs().max() <= 2e-5
    early = (clip_eval(picture.convert("RGB"), size) - stored).abs().max().item()
    expected = CASES[case]["max_abs_diff_if_converted_to_rgb_first"]
    assert early == pytest.approx(expected, abs=1e-4)
    assert (early > 0.1) == (picture.mode in ("P", "RGBA"))


@pytest.mark.parametrize("left_over, offset", [(19, 10), (17, 8), (3, 2), (1, 0), (4, 2), (0, 0)])
def test_half_a_pixel_rounds_to_the_even_neighbour(left_over, offset):
    assert crop_offset(32 + left_over, 32) == offset


def test_the_longer_side_is_cut_to_a_whole_number():
    assert resized_size(31, 20, 32) == (49, 32)  # 49.6
    assert resized_size(20, 31, 32) == (32, 49)
    assert resized_size(31, 20, (7, 9)) == (7, 9)


def test_a_crop_larger_than_the_picture_is_framed_with_zeros():
    framed = to_tensor(centre_crop(Image.new("RGB", (3, 2), (9, 9, 9)), 6, 4))
    assert framed.shape == (3, 4, 6)
    assert framed[0].tolist() == [[0] * 6, [0, 9, 9, 9, 0, 0], [0, 9, 9, 9, 0, 0], [0] * 6]


def test_normalisation_by_hand():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(value - mean) / std for value, mean, std in zip((0.0, 1.0, 0.2), CLIP_MEAN, CLIP_STD, strict=True)]
    assert normalised(pixels).flatten().tolist() == pytest.approx(expected, abs=1e-6)


# Modes and sizes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I"])
def test_every_mode_gives_three_channels(mode):
    via = {"PA": "P", "RGBa": "RGBA"}.get(mode)
    picture = smooth_picture()
    picture = (picture.convert(via) if via else picture).convert(mode)
    pixels = clip_eval(picture, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    grey = mode in ("1", "L", "LA", "I")
    reference = clip_eval(smooth_picture().convert("L") if grey else smooth_picture(), 16)
    if mode not in ("1", "P", "PA", "HSV"):  # these lose colours, and hues are no numbers to mix
        assert (pixels - reference).abs().max() < 0.2
    if mode != "PA":  # Pillow forgets the palette when it resizes: black, in the original too
        assert (pixels - clip_eval(Image.new("RGB", (16, 16)), 16)).abs().max() > 0.5


def test_sixteen_bits_keep_their_high_byte():
    low = np.arange(30 * 40).reshape(30, 40).astype(np.uint16) % 256
    for picture in (Image.fromarray(low * 256 + 7), Image.fromarray(low.astype(np.int32) * 256)):
        assert picture.mode.startswith("I")
        assert np.array_equal(np.asarray(eight_bits(picture)), low)
        brighter = clip_eval(picture, 16) > clip_eval(eight_bits(picture), 16)  # the original cuts at 255
        assert brighter.float().mean() > 0.9
    small = Image.fromarray(low.astype(np.int32))
    assert np.array_equal(np.asarray(eight_bits(small)), low)
    assert eight_bits(smooth_picture()).mode == "RGB"


def test_training_takes_the_high_byte_where_the_processor_does():
    picture = Image.fromarray(np.full((20, 20), 77 * 256 + 7, np.uint16))
    assert TrainingTransform(image_processor(high_byte=True)).prepare(picture).unique().tolist() == [77]
    assert TrainingTransform(image_processor()).prepare(picture).unique().tolist() == [255]


@pytest.mark.parametrize("value", [-1, 70000])
def test_pictures_without_sixteen_bits(value):
    picture = Image.new("I", (4, 4), value)
    with pytest.raises(ValueError, match="mode I has pixels"):
        eight_bits(picture)
    assert to_tensor(to_rgb(picture)).unique().tolist() == [0 if value < 0 else 255]


@pytest.mark.parametrize("mode", ["1", "P", "I", "F", "I;16"])
def test_modes_without_channels_of_eight_bits(mode):
    with pytest.raises(ValueError, match=f"mode {mode} has no channels"):
        to_tensor(Image.new(mode, (4, 4)))


def test_alpha_is_dropped_or_laid_on_a_background():
    picture = Image.new("RGBA", (4, 4), (200, 100, 0, 0))
    assert to_tensor(to_rgb(on_background(picture, None)))[:, 0, 0].tolist() == [200, 100, 0]
    assert to_tensor(on_background(picture, (255, 254, 253)))[:, 0, 0].tolist() == [255, 254, 253]
    half = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    assert to_tensor(on_background(half, [0, 0, 0]))[:, 0, 0].tolist() == pytest.approx([100, 50, 0], abs=1)
    opaque = smooth_picture()
    assert on_background(opaque, (1, 2, 3)) is opaque
    with pytest.raises(ValueError, match="background"):
        on_background(picture, (0, 0, 256))


@pytest.mark.parametrize(
    "array, channels_first",
    [
        (np.zeros((3, 5, 7), np.uint8), None),
        (np.zeros((5, 7, 3), np.uint8), None),
        (torch.zeros(5, 7, 3, dtype=torch.uint8), False),
        (torch.zeros(4, 5, 7, dtype=torch.uint8), None),
        (np.zeros((5, 7, 1), np.uint8), None),
        (np.zeros((5, 7), np.uint8), None),
    ],
)
def test_arrays_and_tensors_in_either_layout(array, channels_first):
    assert picture_from_array(array, channels_first).size == (7, 5)
    assert tuple(channels_to_front(array, channels_first).shape[1:]) == (5, 7)


def test_three_channels_win_where_both_ends_could_be_channels():
    assert tuple(channels_to_front(np.zeros((4, 5, 3), np.uint8)).shape) == (3, 4, 5)
    assert tuple(channels_to_front(np.zeros((3, 5, 4), np.uint8)).shape) == (3, 5, 4)
    assert tuple(channels_to_front(np.zeros((3, 5, 3), np.uint8)).shape) == (3, 5, 3)
    assert tuple(channels_to_front(np.zeros((3, 5, 3), np.uint8), False).shape) == (3, 3, 5)


@pytest.mark.parametrize(
    "array, match",
    [
        (np.zeros((5, 7, 3), np.float32), "float32"),
        (torch.zeros(3, 5, 7), "float32"),
        (np.zeros((5, 7, 2), np.uint8), r"\(5, 7, 2\)"),
        (np.zeros((2, 5, 7, 3), np.uint8), r"\(2, 5, 7, 3\)"),
        (np.zeros((0, 7, 3), np.uint8), r"\(0, 7, 3\).*no pixels"),
    ],
)
def test_arrays_that_are_no_picture(array, match):
    with pytest.raises(ValueError, match=match):
        picture_from_array(array)


@pytest.mark.parametrize("size, match", [((0, 5), "no pixels"), ((5, 0), "no pixels"), ((14000, 13000), "14000 wide")])
def test_absurd_sizes(size, match):
    with pytest.raises(ValueError, match=match):
        check_size(*size)
    check_size(1, 1)


def test_a_strip_that_would_become_absurd_when_resized():
    with pytest.raises(ValueError, match="1 x 900000 pixels, once resized"):
        clip_eval(Image.new("L", (1, 900000)), 224)
    assert clip_eval(Image.new("L", (1, 900)), 8).shape == (3, 8, 8)


# Squashing: VSE-infinity


def test_each_axis_is_squashed_on_its_own_between_pixel_centres():
    row = torch.tensor([[0, 10, 20, 30]], dtype=torch.uint8)
    assert squashed(row[None], 1, 2).tolist() == [[[5.0, 25.0]]]
    assert squashed(row[None], 1, 8)[0, 0].tolist() == [0.0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30.0]
    assert squashed(row.T[None], 2, 3)[0].tolist() == [[5.0] * 3, [25.0] * 3]
    # no antialiasing: of six pixels a third of the side reads the one in the middle alone
    assert squashed(torch.tensor([[[255, 0, 255, 255, 0, 255]]], dtype=torch.uint8), 1, 2).tolist() == [[[0.0, 0.0]]]
    several = pictures(4, 7)
    assert torch.equal(squashed(several, 5, 3)[2], squashed(several[2], 5, 3))
    assert squashed(several, 5, 3).shape == (4, 3, 5, 3) and squashed(several, 5, 3).dtype == torch.float32
    assert torch.equal(squashed(several, 7, 7), several.float())
    with pytest.raises(ValueError, match="once resized"):
        squashed(several, 20_000, 20_000)


def test_channel_orders():
    pixels = pictures(2, 4)
    assert torch.equal(in_channel_order(pixels, "bgr"), pixels[:, [2, 1, 0]])
    assert torch.equal(in_channel_order(pixels, "rgb"), pixels)
    with pytest.raises(ValueError, match="channel_order='gbr'"):
        in_channel_order(pixels, "gbr")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-3)


def test_a_random_part_squashed_by_hand():
    image = torch.arange(10 * 20).view(1, 10, 20).expand(3, 10, 20).to(torch.uint8)
    crop = RandomCropSquash(5, **PLAIN)

    def part(*draws, images=image):
        return crop([images], draws=[draws])[0]

    assert same(part(0.5, 3, 1, 0.5), squashed(image[:, 1:9, 3:19], 5, 5))  # 0.6 + 0.4 / 2 of each side
    assert same(part(0.0, 7, 3, 0.5), squashed(image[:, 3:9, 7:19], 5, 5))
    assert same(part(0.5, 3, 1, 0.51), part(0.5, 3, 1, 0.5).flip(-1))
    assert not same(part(0.5, 2, 1, 0.5), part(0.5, 3, 1, 0.5))
    assert same(part(0.99, 0, 0, 0.0, images=image[:, :, :2]), squashed(image[:, :9, :1], 5, 5))
    with pytest.raises(ValueError, match="picture 0 of 20 x 1 pixels is too small"):
        part(0.5, 3, 0.5, images=image[:, :1])  # less than one row


def test_parts_without_room_have_no_offset():
    image = pictures(1, 8)[0]
    whole = RandomCropSquash(4, smallest=1.0, **PLAIN)
    assert same(whole([image], draws=[[0.3, 0.2]])[0], squashed(image, 4, 4))
    assert not same(whole([image], draws=[[0.3, 0.8]])[0], squashed(image, 4, 4))
    views = whole(image.expand(50, 3, 8, 8), generator())
    assert {same(view, squashed(image, 4, 4)) for view in views} == {True, False}
    assert all(same(view, squashed(image, 4, 4)) or same(view.flip(-1), squashed(image, 4, 4)) for view in views)
    with pytest.raises(ValueError, match=r"offsets \[0\] of picture 0 do not fit.*room for 0 and 0"):
        whole([image], draws=[[0.3, 0, 0.2]])
    crop = RandomCropSquash(4)
    for offsets in ([2, 0], [0, 4], [0], [-1, 0], [0, 0, 0]):  # of 8 x 8 pixels, 6 x 6: room for 2, the last not taken
        with pytest.raises(ValueError, match="room for 2 and 2"):
            crop([image], draws=[[0.5, *offsets, 0.0]])
    assert crop([image], draws=[[0.5, 1, 1, 0.0]]).shape == (1, 3, 4, 4)


def test_drawn_parts_have_the_sizes_places_and_sides_asked_for():
    ramp = torch.arange(100, dtype=torch.uint8)
    images = torch.stack([ramp.expand(100, 100), ramp[:, None].expand(100, 100), ramp.expand(100, 100)])
    views = RandomCropSquash(10, **PLAIN)(images.expand(600, 3, 100, 100), generator())
    width = (views[:, 0, 5, 9] - views[:, 0, 5, 0]) / 9 * 10
    height = (views[:, 1, 9, 5] - views[:, 1, 0, 5]) / 9 * 10
    assert torch.allclose(width.abs(), height, atol=0.1)  # the same share of both sides
    assert 59.5 < height.min() < 61 and 99 <= height.max() + 1.5 and height.max() < 100
    assert 0.45 < (width < 0).float().mean() < 0.55
    left = views[:, 0, 5].amin(dim=1) - height / 20 + 0.5
    room = 100 - height.round()
    assert (left > -0.1).all() and (left <= (room - 1).clamp(min=0) + 0.1).all() and (left[room > 20] > 10).any()


def test_draws_that_are_missing():
    with pytest.raises(ValueError, match="needs a generator"):
        RandomCropSquash(4)(pictures(2, 8))
    with pytest.raises(ValueError, match="1 lists for 2 pictures"):
        RandomCropSquash(4)(pictures(2, 8), draws=[[0.5, 0, 0, 0.5]])
    with pytest.raises(ValueError, match="smallest=0"):
        RandomCropSquash(4, smallest=0)


# The paper's augmentation


def test_square_crops_are_windows_of_the_picture():
    images = torch.arange(5 * 7).view(1, 1, 5, 7).expand(64, 3, 5, 7).to(torch.uint8)
    crops = RandomSquareCrop(5, **PLAIN)(images, generator()).round()
    lefts = crops[:, 0, 0, 0].unique().tolist()
    assert lefts == [0, 1, 2]
    for crop in crops:
        left = int(crop[0, 0, 0])
        assert torch.equal(crop, images[0, :, :, left : left + 5].float())


def test_square_crops_of_pictures_of_several_sizes():
    several = [pictures(1, 12)[0], pictures(1, 9)[0, :, :8], pictures(1, 20)[0, :, :, :8]]
    assert RandomSquareCrop(8)(several, generator()).shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="crop of 9"):
        RandomSquareCrop(9)(several, generator())


# The other one


def test_a_window_of_the_whole_picture_changes_nothing():
    images = pictures(3, 10)
    views = RandomResizedCrop(10, scale=(1.0, 1.0))(images, generator())
    assert torch.allclose(views, normalised(images), atol=1e-4)
    assert not torch.allclose(
        RandomResizedCrop(10, scale=(0.5, 0.5))(images, generator()), normalised(images), atol=0.1
    )


def test_mirrored_pictures():
    images = pictures(40, 10)
    views = RandomResizedCrop(10, scale=(1.0, 1.0), flip=0.5, **PLAIN)(images, generator())
    kept = [torch.allclose(view, image.float(), atol=0.1) for view, image in zip(views, images, strict=True)]
    mirrored = [
        torch.allclose(view, image.flip(-1).float(), atol=0.1) for view, image in zip(views, images, strict=True)
    ]
    assert all(one != other for one, other in zip(kept, mirrored, strict=True))
    assert 10 < sum(kept) < 30


def test_windows_have_the_area_the_place_and_the_shape_asked_for():
    ramp = torch.arange(64, dtype=torch.uint8)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.expand(64, 64)]).expand(
        500, 3, 64, 64
    )
    # a ramp tells where a window begins and how wide it is
    views = RandomResizedCrop(32, scale=(0.25, 0.5), aspect=0.5, **PLAIN)(images, generator())
    width = (views[:, 0, 16, 30] - views[:, 0, 16, 1]) / 29 * 32
    height = (views[:, 1, 30, 16] - views[:, 1, 1, 16]) / 29 * 32
    area, shape = width * height / 64**2, width / height
    assert 0.24 < area.min() < 0.27 and 0.48 < area.max() < 0.51
    assert 0.65 < shape.min() < 0.72 and 1.4 < shape.max() < 1.54
    centre = (views[:, 0, 16, 1] + views[:, 0, 16, 30]) / 2 + 0.5
    assert (centre - width / 2 > -0.1).all() and (centre + width / 2 < 64.1).all()
    assert centre.std() > 5


def test_a_scale_above_one_shrinks_the_picture_and_repeats_its_border():
    images = pictures(1, 8)
    views = RandomResizedCrop(16, scale=(4.0, 4.0), **PLAIN)(images.expand(50, 3, 8, 8), generator())
    corners = images[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].float()
    found = views[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert ((found - corners).abs() < 0.5).any(dim=0).all()


def test_turning_keeps_the_middle_and_the_distances_from_it():
    place = torch.arange(33) - 16
    rings = (place[:, None] ** 2 + place**2).sqrt().mul(10).clamp(max=255).round().to(torch.uint8)
    images = torch.stack([rings, place.clamp(0).mul(10).to(torch.uint8).expand(33, 33), rings]).expand(30, 3, 33, 33)
    views = RandomResizedCrop(33, scale=(1.0, 1.0), rotation=180, **PLAIN)(images, generator())
    inside = rings < 150
    assert ((views[:, 0] - rings)[:, inside].abs() < 5).all()  # rings look the same from every side
    assert views[:, 1, 16, 0].min() == 0 and views[:, 1, 16, 0].max() > 120  # a half-plane does not


def test_colour_changes_by_hand():
    images = torch.tensor([100, 80, 60], dtype=torch.uint8).view(1, 3, 1, 1).expand(300, 3, 4, 4)
    grey = 0.299 * 100 + 0.587 * 80 + 0.114 * 60
    for name, pivot in (("brightness", 0.0), ("contrast", grey), ("saturation", grey)):
        views = RandomResizedCrop(4, scale=(1.0, 1.0), **{name: 0.5}, **PLAIN)(images, generator())[:, :, 0, 0]
        factors = (views - pivot) / (torch.tensor([100.0, 80.0, 60.0]) - pivot)
        assert torch.allclose(factors[:, :1].expand(-1, 3), factors, atol=1e-3), name
        assert 0.49 < factors.min() < 0.55 and 1.45 < factors.max() < 1.51, name


def test_colours_stay_within_limits():
    views = RandomResizedCrop(12, brightness=1.0, contrast=1.0, saturation=1.0, **PLAIN)(pictures(64), generator())
    assert views.min() >= 0 and views.max() <= 255.01


def test_erasing():
    images = torch.full((400, 3, 20, 20), 200, dtype=torch.uint8)
    views = RandomResizedCrop(20, scale=(1.0, 1.0), erasing=0.5, erasing_area=(0.1, 0.1))(images, generator())
    hidden = (views == 0).all(dim=1).flatten(1).float().mean(dim=1)
    assert 0.4 < (hidden > 0).float().mean() < 0.6
    assert 0.02 < hidden[hidden > 0].mean() < 0.12 and hidden.max() < 0.15
    assert not (RandomResizedCrop(20)(images, generator()) == 0).any()


@pytest.mark.parametrize(
    "augmentation",
    [
        RandomSquareCrop(8),
        RandomCropSquash(8),
        RandomResizedCrop(
            8, aspect=0.3, rotation=10, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, erasing=0.5
        ),
    ],
    ids=["square", "squash", "resized"],
)
def test_the_generator_alone_decides(augmentation):
    images = pictures(70)
    before = images.clone()
    first = augmentation(images, generator(1))
    torch.manual_seed(99)
    assert torch.equal(first, augmentation(images, generator(1)))
    assert not torch.equal(first, augmentation(images, generator(2)))
    assert torch.equal(images, before)
    assert first.shape == (70, 3, 8, 8) and first.dtype == torch.float32 and first.is_contiguous()
    state = torch.get_rng_state()
    augmentation(images, generator(1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("numbers", [{"scale": (0, 1)}, {"scale": (1.0, 0.5)}, {"flip": 1.5}, {"rotation": -1}])
def test_impossible_numbers(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        RandomResizedCrop(8, **numbers)


@pytest.mark.parametrize(
    "shape, dtype", [((2, 3, 8, 9), torch.uint8), ((3, 8, 8), torch.uint8), ((2, 3, 8, 8), torch.float32)]
)
def test_batches_that_cannot_be_resized_crops(shape, dtype):
    with pytest.raises(ValueError, match="square uint8"):
        RandomResizedCrop(8)(torch.zeros(shape, dtype=dtype), generator())


# Both parts


def image_processor(**changes):
    options = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    options |= {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": Image.Resampling.BICUBIC,
        "background": None,
    }
    return SimpleNamespace(**options | changes)


def test_names_and_numbers():
    assert isinstance(build_augmentation("random_square_crop", 8), RandomSquareCrop)
    assert build_augmentation("random_resized_crop", 8, rotation=5.0).rotation == 5.0
    with pytest.raises(ValueError, match="unknown augmentation 'mixup'.*random_resized_crop"):
        build_augmentation("mixup", 8)
    with pytest.raises(ValueError, match="did you mean rotation"):
        build_augmentation("random_resized_crop", 8, rotatoin=5.0)
    with pytest.raises(ValueError, match="no number 'flip'"):
        build_augmentation("random_square_crop", 8, flip=0.5)


def test_the_papers_transform_keeps_the_longer_side():
    transform = TrainingTransform(image_processor())
    prepared = transform.prepare(smooth_picture(50, 40))
    assert prepared.shape == (3, 16, 20) and prepared.dtype == torch.uint8
    assert torch.equal(prepared, to_tensor(resize_picture(smooth_picture(50, 40), 16)))
    assert transform.augment([prepared], generator()).shape == (1, 3, 16, 16)
    square = transform.prepare(smooth_picture(40, 40))
    assert torch.allclose(transform.augment(square[None], generator())[0], clip_eval(smooth_picture(40, 40), 16))


def test_the_other_transform_prepares_squares_with_a_margin():
    transform = TrainingTransform(image_processor(background=(255, 255, 255)), "random_resized_crop", rotation=5)
    assert transform.prepare(smooth_picture(50, 40)).shape == (3, 18, 18)
    assert transform.prepare(Image.new("RGBA", (9, 9), (0, 0, 0, 0))).unique().tolist() == [255]
    assert (
        TrainingTransform(image_processor(), "random_resized_crop", canvas=30).prepare(smooth_picture()).shape[1] == 30
    )
    with pytest.raises(ValueError, match="canvas=15"):
        TrainingTransform(image_processor(), canvas=15)


def test_image_processors_that_do_not_crop_or_are_not_square():
    assert TrainingTransform(image_processor(do_center_crop=False, size={"height": 24, "width": 24})).augment.size == 24
    with pytest.raises(ValueError, match="no square"):
        TrainingTransform(image_processor(crop_size={"height": 16, "width": 20}))


def test_the_collator_hands_over_pictures_of_several_sizes():
    transform = TrainingTransform(image_processor())
    sizes = [(50, 40), (40, 60), (30, 30)]
    items = [
        {"image": transform.prepare(smooth_picture(*size)), "text": "a", "image_id": i, "draw": i}
        for i, size in enumerate(sizes)
    ]
    collator = PairCollator(lambda **_: {}, transform.augment)
    assert collator(items)["pixel_values"].shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="sizes"):
        PairCollator(lambda **_: {}, TrainingTransform(image_processor(), "random_resized_crop").augment)(items)


DETECTOR = {"channel_order": "bgr", "do_rescale": False, "image_mean": DETECTOR_MEAN, "image_std": (1.0,) * 3}
IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}


@pytest.mark.parametrize("name", ["random_square_crop", "random_resized_crop", "random_crop_squash"])
@pytest.mark.parametrize("colours", [DETECTOR, IMAGENET, {**IMAGENET, "rescale_factor": 1 / 127.5}])
def test_every_augmentation_ends_in_the_colours_of_the_network(name, colours):
    """A picture of one colour looks the same wherever it is cut."""
    processor = image_processor(do_center_crop=False, size={"height": 16, "width": 16}, **colours)
    transform = TrainingTransform(processor, name)
    prepared = transform.prepare(Image.new("RGB", (20, 20), (10, 100, 200)))
    pixels = torch.tensor([200.0, 100.0, 10.0] if colours is DETECTOR else [10.0, 100.0, 200.0])
    factor = 1.0 if colours is DETECTOR else colours.get("rescale_factor", 1 / 255)
    mean, std = torch.tensor(colours["image_mean"]), torch.tensor(colours["image_std"])
    views = transform.augment(prepared[None], generator())
    assert torch.allclose(views, ((pixels * factor - mean) / std).view(1, 3, 1, 1).expand(1, 3, 16, 16), atol=1e-4)


def test_squashed_parts_are_prepared_at_their_own_size_or_reduced_to_a_canvas():
    def prepare(picture, **options):
        return TrainingTransform(image_processor(), "random_crop_squash", **options).prepare(picture)

    large, small = smooth_picture(50, 40), smooth_picture(18, 30)
    assert torch.equal(prepare(large), to_tensor(large))
    assert prepare(large, canvas=20).shape == (3, 20, 20)  # each axis on its own: the part is squashed anyway
    assert prepare(small, canvas=20).shape == (3, 20, 18)
    assert torch.equal(prepare(small, canvas=40), to_tensor(small))
    assert torch.equal(prepare(large, canvas=20), to_tensor(resize_picture(large, (20, 20))))
    assert prepare(Image.new("P", (900, 30)), canvas=16).shape == (3, 16, 16)
    assert prepare(Image.new("L", (9, 9))).shape == (3, 9, 9)
    with pytest.raises(ValueError, match="canvas=15"):
        prepare(large, canvas=15)
    with pytest.raises(ValueError, match="no pixels"):
        prepare(Image.new("RGB", (0, 9)))
