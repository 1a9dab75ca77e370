"""Regions of an image: what is refused, with id and field; padding, dropping, the location code."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hf_vlp.inputs.regions import RegionDropping, RegionError, RegionFeatures, location_code, pad_regions

GOLDEN = Path(__file__).parents[1] / "golden" / "vilbert"
BOXES = [[0.0, 0.0, 0.5, 0.25], [0.25, 0.5, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]]


def good(**changes):
    fields = {"features": np.arange(12, dtype=np.float32).reshape(3, 4), "boxes": BOXES, "width": 80, "height": 40}
    fields |= {"class_probs": np.full((3, 2), 0.5), "objectness": [0.9, 0.8, 0.7], "image_id": "cat"}
    return RegionFeatures(**{**fields, **changes})


def of(count, image_id, width=4):
    return RegionFeatures(np.random.rand(count, width).astype(np.float16), image_id=image_id)


def test_good_regions_of_many_kinds():
    regions = good()
    assert len(regions) == 3 and regions.boxes.dtype == np.float32 and regions.class_probs.dtype == np.float32
    half = np.ones((2, 3), np.float16)
    assert RegionFeatures(half).features is half
    for features in (torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bfloat16), [[1, 1, 1]] * 2):
        assert np.array_equal(RegionFeatures(features).features, np.ones((2, 3), np.float32))
    corner = RegionFeatures(half, [[0, 0, 1.001, 1]] * 2, 100, 100)  # a tenth of a pixel, of a detector that rounds
    assert corner.boxes.max() > 1


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"features": np.ones(4)}, "features", r"shape is \[4\], \[R, F\] is expected"),
        ({"features": np.ones((0, 4))}, "features", "there are no regions"),
        (
            {"features": [[1, 2, 3, 4], [1, 2, np.nan, 4], [1, 2, 3, 4]]},
            "features",
            "nan in region 1, number 2 .1 such",
        ),
        ({"features": [[1, 2], [1, 2], [1, -np.inf]]}, "features", "-inf in region 2"),
        ({"features": [[1.0, 2], [1, 1e39], [1, 2]]}, "features", "inf in region 1"),
        ({"features": [["a", "b"]] * 3}, "features", "not numbers"),
        ({"features": [[1, 2], [1]]}, "features", "differ in length"),
        ({"boxes": BOXES[:2]}, "boxes", "2 rows and features 3"),
        ({"boxes": np.ones((3, 5))}, "boxes", r"\[3, 5\], \[R, 4\] is expected"),
        ({"boxes": [*BOXES[:2], [0, 0, np.nan, 1]]}, "boxes", "nan in region 2"),
        ({"boxes": [*BOXES[:2], [0, 0, 1.1, 1]]}, "boxes", "box 2 is 0 0 1.1 1, outside the image"),
        ({"boxes": [*BOXES[:2], [-0.1, 0, 1, 1]]}, "boxes", "box 2 is -0.1 0 1 1, outside the image"),
        ({"boxes": [*BOXES[:2], [0.5, 0, 0.2, 1]]}, "boxes", "box 2 .* above or left"),
        ({"boxes": np.multiply(BOXES, 80)}, "boxes", "pixels, it seems"),
        ({"width": 0}, "width", "0 is no number of pixels"),
        ({"height": 7.5}, "height", "7.5 is no number of pixels"),
        ({"height": None}, "width", "width is 80 and height None"),
        ({"class_probs": np.full((3, 2), 3.0)}, "class_probs", "no probabilities"),
        ({"class_probs": np.full((2, 2), 0.5)}, "class_probs", "2 rows"),
        ({"objectness": [[1], [1], [1]]}, "objectness", r"\[3, 1\], \[R\] is expected"),
        ({"objectness": [1.0, np.inf, 0]}, "objectness", "inf in region 1 "),
    ],
)
def test_what_is_refused_names_image_and_field(changes, field, reason):
    with pytest.raises(RegionError, match=f"image 'cat', field '{field}'.*{reason}") as caught:
        good(**changes)
    assert (caught.value.image_id, caught.value.field) == ("cat", field) and caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_pixels_in_place_of_fractions_name_the_remedy():
    with pytest.raises(RegionError, match="RegionFeatures.from_pixels"):
        good(boxes=[[0, 0, 40, 20]] * 3)
    good(boxes=[[0, 0, 0.5, 0.5]] * 3)


def test_pixel_boxes_become_fractions():
    regions = RegionFeatures.from_pixels(np.ones((1, 2)), [[20, 10, 80, 40]], 80, 40, image_id=3)
    assert regions.boxes.tolist() == [[0.25, 0.25, 1.0, 1.0]] and (regions.width, regions.height) == (80, 40)
    assert regions.boxes.dtype == np.float32
    for boxes, reason in (
        ([[0.25, 0.25, 1.0, 1.0]], "these are fractions"),
        ([[0, 0, 90, 40]], "outside the image"),
        ([[0, 0, 5]], r"\[1, 3\], \[R, 4\]"),
        ([], r"\[0\], \[R, 4\]"),
    ):
        with pytest.raises(RegionError, match=f"image 3, field 'boxes'.*{reason}"):
            RegionFeatures.from_pixels(np.ones((1, 2)), boxes, 80, 40, image_id=3)
    with pytest.raises(RegionError, match="image 3, field 'height'"):
        RegionFeatures.from_pixels(np.ones((1, 2)), [[20, 10, 80, 40]], 80, None, image_id=3)


def test_another_width_than_expected():
    regions = good()
    regions.check(4)
    with pytest.raises(RegionError, match="image 'cat', field 'features'.*4 wide, 2048 is expected"):
        regions.check(2048)
    regions.features[1, 1] = np.nan  # arrays can change after they were looked at
    with pytest.raises(RegionError, match="nan in region 1"):
        regions.check()


@pytest.mark.parametrize("case", ["regions_12in1", "regions_beta"])
def test_location_code_of_vilbert(case):
    inputs, outputs = (load_file(GOLDEN / case / f"{name}puts.safetensors") for name in ("in", "out"))
    for image in {name.partition(".")[0] for name in inputs}:
        width, height = inputs[f"{image}.image_wh"].tolist()
        raw = inputs[f"{image}.raw_features"], inputs[f"{image}.raw_boxes"]
        regions = RegionFeatures.from_pixels(*raw, width, height, image_id=image)
        code = location_code(regions.boxes)
        stored = outputs[f"{image}.boxes"]
        np.testing.assert_allclose(code, stored[1:], atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(location_code(np.array([0.0, 0, 1, 1])), stored[0])
        assert torch.equal(location_code(torch.from_numpy(regions.boxes)), torch.from_numpy(code))
        turned = RegionFeatures.from_pixels(*raw, height * 2, width * 2).boxes
        assert np.abs(location_code(turned) - stored[1:]).max() > 1e-2


def test_padding():
    regions = [good(), good(features=np.ones((1, 4)), boxes=BOXES[:1], class_probs=[[1, 0]], objectness=[1])]
    batch = pad_regions(regions, boxes=True, class_probs=True)
    assert list(batch) == ["region_features", "region_mask", "region_boxes", "region_class_probs"]
    assert batch["region_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and batch["region_mask"].dtype == torch.int64
    for name, width in (("region_features", 4), ("region_boxes", 4), ("region_class_probs", 2)):
        assert batch[name].shape == (2, 3, width) and batch[name].dtype == torch.float32
        assert not batch[name][1, 1:].any() and batch[name][1, 0].any()
    assert torch.equal(batch["region_features"][0], torch.from_numpy(regions[0].features))
    assert list(pad_regions(regions)) == ["region_features", "region_mask"]


def test_padding_gives_the_numbers_of_halves_exactly():
    regions = [of(count, image_id=count) for count in (3, 1, 5)]
    regions[1].features.flags.writeable = False  # as a store hands them out
    batch = pad_regions(regions)["region_features"]
    for row, one in zip(batch, regions):
        assert np.array_equal(row[: len(one)].numpy(), one.features.astype(np.float32))
        assert not row[len(one) :].any()


def test_batches_that_do_not_fit_together():
    with pytest.raises(RegionError, match="image 8, field 'features'.*5 wide, and 4 wide for image 7"):
        pad_regions([of(2, 7), of(2, 8, width=5)])
    for field, options in (("boxes", {"boxes": True}), ("class_probs", {"class_probs": True})):
        with pytest.raises(RegionError, match=f"image 7, field '{field}'.*have none"):
            pad_regions([of(2, 7)], **options)
    with pytest.raises(ValueError, match="no regions"):
        pad_regions([])


def test_dropping_keeps_draws_above_the_rate_in_order():
    regions = good()
    (kept,) = RegionDropping(0.2)([regions], draws=[[0.1, 0.21, 0.9, 0.0]])
    assert np.array_equal(kept.features, regions.features[1:]) and np.array_equal(kept.boxes, regions.boxes[1:])
    assert kept.objectness.tolist() == regions.objectness[1:].tolist() and len(kept.class_probs) == 2
    assert (kept.width, kept.image_id) == (80, "cat")
    (exact,) = RegionDropping(0.5)([regions], draws=[[0.5, 0.6, 0.5]])  # the draw must be above
    assert exact.features.tolist() == regions.features[1:2].tolist()
    assert RegionDropping(0.0)([regions]) == [regions]


def test_an_image_never_loses_every_region():
    regions = good()
    (kept,) = RegionDropping(0.2)([regions], draws=[[0.1, 0.19, 0.0]])
    assert kept.features.tolist() == regions.features[1:2].tolist()
    batch = RegionDropping(1.0)([of(36, i) for i in range(50)], torch.Generator().manual_seed(0))
    assert [len(one) for one in batch] == [1] * 50


def test_dropping_is_drawn_from_the_generator():
    regions = [of(36, i) for i in range(100)]
    first, again = (RegionDropping(0.2)(regions, torch.Generator().manual_seed(3)) for _ in range(2))
    other = RegionDropping(0.2)(regions, torch.Generator().manual_seed(4))
    counts = [[len(one) for one in batch] for batch in (first, again, other)]
    assert counts[0] == counts[1] != counts[2]
    assert 0.78 < sum(counts[0]) / 3600 < 0.82  # four standard deviations are 0.027
    for options in ({}, {"draws": [[0.5] * 36]}, {"draws": [[0.5] * 35] * 100}):
        with pytest.raises(ValueError, match="generator|100 images|36 regions"):
            RegionDropping(0.2)(regions, **options)
    with pytest.raises(ValueError, match="rate=1.2"):
        RegionDropping(1.2)
