"""Position tables made for another size: what a forward interpolates by itself, stored."""

import pytest
import torch
from transformers import AutoModel

from tests.contract.rows import ROWS

# a timm tower sizes itself
IMAGE_ROWS = [row for row in ROWS if hasattr(row.model_class, "resize_image_positions") and "timm" not in row.variant]
TOGETHER = {row.config().model_type for row in ROWS if row.reads_both}


def image_features(model, pixel_values):
    """Of models that read both sides together what they read of an image; they have no features of it alone."""
    with torch.no_grad():
        if model.config.model_type in TOGETHER:
            return model.encode_image(pixel_values.flatten(0, -4))["image_embeds"]
        for verb in ("get_image_features", "pooled_output"):
            if hasattr(model, verb):
                return getattr(model, verb)(pixel_values)
        return model(pixel_values).last_hidden_state[:, 0]


@pytest.mark.parametrize("row", IMAGE_ROWS, ids=lambda row: row.name)
def test_a_resized_table_is_what_the_forward_interpolates(row, tmp_path):
    model = row.build()
    small, large = (row.batch(size=(size, size))["pixel_values"] for size in (row.size, 2 * row.size))
    before, at_the_old_size = image_features(model, large), image_features(model, small)
    model.resize_image_positions(2 * row.size)
    torch.testing.assert_close(image_features(model, large), before)
    # the old grid now is an interpolation of an interpolation
    assert (image_features(model, small) - at_the_old_size).abs().max() > 1e-6
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(image_features(AutoModel.from_pretrained(tmp_path).eval(), large), before)


@pytest.mark.parametrize("row", IMAGE_ROWS[:1], ids=lambda row: row.name)
def test_an_image_smaller_than_a_cell_is_refused(row):
    with pytest.raises(ValueError, match="image_size 3 is smaller"):
        row.build().resize_image_positions(3)
