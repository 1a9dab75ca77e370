"""Grad-CAM of a tiny random model: against differences of its scores, against autograd on what it returns, and what is left behind."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from hf_vlp.explain.attention_maps import (
    attention_and_gradient,
    image_maps,
    pair_maps,
    phrase_maps,
    picture_maps,
    word_maps,
)
from hf_vlp.explain.draw import glow, map_sheet, overlay, unit_range
from hf_vlp.explain.words import word_tokens
from hf_vlp.inputs.vocabulary import train_wordpiece_tokenizer, without_end_mark
from hf_vlp.layers import attention as attention_layer
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval

TEXT_LAYERS, FUSION_LAYERS, BLOCKS, PATCH = 2, 4, 3, 8


def tiny(implementation: str = "eager", seed: int = 0) -> VlpAlbefForImageTextRetrieval:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.3}
    config = VlpAlbefConfig(
        vision_config={**sizes, "num_hidden_layers": BLOCKS, "image_size": 16, "patch_size": PATCH},
        text_config={**sizes, "num_hidden_layers": TEXT_LAYERS, "vocab_size": 60, "max_position_embeddings": 16},
        multimodal_config={**sizes, "num_hidden_layers": FUSION_LAYERS},
        projection_dim=8,
        queue_size=4,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    torch.manual_seed(seed)
    return VlpAlbefForImageTextRetrieval(config).eval()


def batch() -> dict[str, torch.Tensor]:
    """Three pairs of texts of 5, 3 and 4 tokens with images of 2 x 3 patches."""
    draw = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    ids = torch.randint(5, 60, mask.shape, generator=draw) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3, 3, 16, 24, generator=draw),
    }


def matches(model):
    return lambda input_ids, attention_mask, pixel_values: model.match_logits(input_ids, attention_mask, pixel_values)[
        :, 1
    ]


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("side", ["words", "image"])
def test_the_gradient_is_what_more_attention_does_to_the_scores(side, monkeypatch):
    """Every third weight of the last pair is made a little larger and smaller, which moves the scores' sum by gradient times step."""
    model, inputs = tiny().double(), batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    own, scores = {
        "words": (model.cross_attention(3), matches(model)),
        "image": (model.image_attention(1), model.pair_similarities),
    }[side]
    weights, gradient = attention_and_gradient(model, own, scores, **inputs)
    plain, place, step = attention_layer.eager_attention, None, 0.0

    def changed(module, query, key, value, *rest, **options):
        mixed, found = plain(module, query, key, value, *rest, **options)
        if module is own:
            found = found.clone()
            found[place] += step
            mixed = (found @ value).transpose(1, 2).contiguous()
        return mixed, found

    monkeypatch.setattr(attention_layer, "eager_attention", changed)
    scale, differences = float(gradient[-1].abs().max()), []
    places = torch.ones_like(gradient[-1]).nonzero()[::3].tolist()
    for inner in places:
        place, found = (2, *inner), []
        for sign in (1, -1):
            step = sign * 1e-2
            with torch.no_grad():
                found.append(scores(**inputs).sum().item())
        differences.append((found[0] - found[1]) / 2e-2)
    expected = [float(gradient[2][tuple(inner)]) for inner in places]
    assert scale > 1e-2 and max(map(abs, expected)) > scale / 10
    assert differences == pytest.approx(expected, abs=2e-3 * scale)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def by_hand(weights, gradient, row):
    """Mean over heads of weight times gradient where that is above 0, [2 x 3 patches], in plain numbers."""
    weights, gradient = weights[:, row, 1:].tolist(), gradient[:, row, 1:].tolist()
    values = [
        math.fsum(weight * max(slope, 0.0) for weight, slope in zip(*heads)) / len(weights)
        for heads in zip(zip(*weights), zip(*gradient))
    ]
    return torch.tensor(values).reshape(2, 3)


@pytest.mark.parametrize("layer", range(TEXT_LAYERS, TEXT_LAYERS + FUSION_LAYERS))
def test_maps_of_words(layer):
    model, inputs = tiny(), batch()
    outputs = model.albef(**inputs, output_attentions=True)
    weights = outputs.cross_attentions[layer - TEXT_LAYERS]
    total = model.itm_head(outputs.last_hidden_state[:, 0])[:, 1].sum()
    (gradient,) = torch.autograd.grad(total, weights)
    maps = word_maps(model, **inputs, layer=layer)
    assert maps.shape == (3, 5, 2, 3)
    for pair in range(3):
        for row in range(5):
            real = inputs["attention_mask"][pair, row]
            expected = by_hand(weights[pair], gradient[pair], row) * real
            torch.testing.assert_close(maps[pair, row], expected, atol=1e-6, rtol=1e-4)
    last = layer == TEXT_LAYERS + FUSION_LAYERS - 1
    assert (
        maps[:, 0].gt(0).any() and maps[:, 1:].gt(0).any() != last
    )  # after the last layer only the first token is read
    assert not maps[1, 3:].any() and not maps[2, 4:].any()
    others = [word_maps(model, **inputs, layer=TEXT_LAYERS + one) for one in range(FUSION_LAYERS)]
    assert [torch.equal(maps, other) for other in others].count(True) == 1


def test_the_paper_s_layer_is_the_third_that_fuses():
    model, inputs = tiny(), batch()
    assert torch.equal(word_maps(model, **inputs), word_maps(model, **inputs, layer=TEXT_LAYERS + 2))
    assert model.cross_attention() is model.albef.fusion_model.layers[2].cross_attention
    layers = model.albef.fusion_model.layers
    for count, expected in ((3, 1), (2, 0), (1, 0)):  # of fewer, one after which all words are still read
        model.albef.fusion_model.layers = layers[:count]
        assert model.cross_attention() is layers[expected].cross_attention


def test_maps_of_images():
    model, inputs = tiny(), batch()
    vision = model.albef.vision_model(inputs["pixel_values"], output_attentions=True)
    image = model.albef.project_image(vision.last_hidden_state)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    total = (image @ text.T / model.config.temperature_init_value).diagonal().sum()
    maps = []
    for block in range(BLOCKS):
        (gradient,) = torch.autograd.grad(total, vision.attentions[block], retain_graph=True)
        maps.append(image_maps(model, **inputs, block=block))
        assert maps[-1].shape == (3, 2, 3) and maps[-1].gt(0).any()
        for pair in range(3):
            expected = by_hand(vision.attentions[block][pair], gradient[pair], 0)
            torch.testing.assert_close(maps[-1][pair], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(maps[0], maps[1]) and not torch.allclose(maps[1], maps[2])


def test_a_pair_has_the_same_maps_alone():
    model, inputs = tiny(), batch()
    words, images = word_maps(model, **inputs), image_maps(model, **inputs, block=1)
    for pair, length in enumerate((5, 3, 4)):
        alone = {name: value[pair : pair + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(word_maps(model, **alone)[0], words[pair, :length], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(image_maps(model, **alone, block=1)[0], images[pair], atol=1e-5, rtol=1e-3)
        unmasked = word_maps(model, **{**alone, "attention_mask": None})[0]
        torch.testing.assert_close(unmasked, words[pair, :length], atol=1e-5, rtol=1e-3)
    changed = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.allclose(word_maps(model, **changed)[0], words[0], rtol=1e-2)


def test_maps_of_phrases_are_means():
    maps = torch.zeros(2, 4, 1, 2)
    maps[0, :, 0, 0] = torch.tensor([1.0, 2.0, 6.0, 0.0])
    maps[1, :, 0, 1] = torch.tensor([4.0, 0.0, 0.0, 0.0])
    chosen = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    assert phrase_maps(maps, chosen).tolist() == [[[4.0, 0.0]], [[0.0, 4.0]]]
    assert phrase_maps(maps, chosen.bool()).equal(phrase_maps(maps, chosen * 7))
    with pytest.raises(ValueError, match="text 1 of the batch has no chosen token"):
        phrase_maps(maps, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"chosen tokens \(2, 3\) must be \[B, L\], here \(2, 4\)"):
        phrase_maps(maps, chosen[:, :3])


class AttendsEverywhere(nn.Module):
    """Another model of the same methods: every row, padding too, attends evenly to the pixels of an image, which are patches of 1."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=1), _attn_implementation="eager")
        self.attention = nn.Identity()
        self.attention.config = self.config
        self.attention.forward = lambda values: (values, values.softmax(dim=-1))

    def cross_attention(self, layer):
        return self.attention

    def match_logits(self, input_ids, attention_mask, pixel_values):
        places = nn.functional.pad(pixel_values[:, 0].flatten(1), (1, 0))  # [B, 1 + P]
        weights = self.attention(0 * places[:, None, None] + torch.zeros(*input_ids.shape, 1)[:, None])[1]
        match = (weights * places[:, None, None] * input_ids[:, None, :, None]).sum(dim=(1, 2, 3))
        return torch.stack([-match, match], dim=1)


def test_padding_has_no_map_even_where_a_model_reads_it():
    """Of even weights 1/4, the map of a row is its number times the pixel over 4, where that is above 0."""
    pixels = torch.tensor([8.0, -8.0, 4.0]).reshape(1, 1, 1, 3).expand(2, 3, 1, 3)
    inputs = {"input_ids": torch.tensor([[1, 2], [3, -1]]), "pixel_values": pixels}
    masked = word_maps(AttendsEverywhere(), attention_mask=torch.tensor([[1, 0], [1, 1]]), **inputs)
    assert masked[:, :, 0].tolist() == [[[2, 0, 1], [0, 0, 0]], [[6, 0, 3], [0, 2, 0]]]
    plain = word_maps(AttendsEverywhere(), attention_mask=None, **inputs)
    assert plain[0, 1, 0].tolist() == [4, 0, 2] and plain[1].equal(masked[1])


# ------------------------------------------------------------------------------------------------ what is left behind


def implementations(model) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_the_model_is_left_as_it_was():
    model, reference, inputs = tiny("sdpa"), tiny(), batch()
    model.train()
    model.albef.vision_model.eval()
    model.config.text_config._attn_implementation = "eager"
    before, modes = implementations(model), [module.training for module in model.modules()]
    assert {"sdpa", "eager"} <= set(before)
    model.itm_head.weight.grad = torch.ones_like(model.itm_head.weight)
    inputs["pixel_values"].requires_grad_(False)
    for maps, wanted in (
        (word_maps(model, **inputs), word_maps(reference, **inputs)),  # without dropout although in training
        (image_maps(model, **inputs, block=1), image_maps(reference, **inputs, block=1)),
    ):
        torch.testing.assert_close(maps, wanted, atol=1e-5, rtol=1e-3)
        assert not maps.requires_grad
    assert implementations(model) == before and [module.training for module in model.modules()] == modes
    assert model.itm_head.weight.grad.eq(1).all()
    gradients = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert gradients == ["itm_head.weight"] and inputs["pixel_values"].grad is None
    assert not inputs["pixel_values"].requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_after_an_error():
    model, inputs = tiny("sdpa").train(), batch()
    before = implementations(model)
    with pytest.raises(ValueError, match="got 3 input_ids, 2 image"):
        word_maps(model, **{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    assert implementations(model) == before == ["sdpa"] * len(before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_weights_and_no_grad_change_nothing():
    model, inputs = tiny(), batch()
    wanted = word_maps(model, **inputs), image_maps(model, **inputs, block=0)
    model.requires_grad_(False)
    with torch.no_grad():
        found = word_maps(model, **inputs), image_maps(model, **inputs, block=0)
    assert all(map(torch.equal, found, wanted))


def test_a_wrong_layer_or_model_is_named():
    model, inputs = tiny(), batch()
    for layer in (-1, TEXT_LAYERS - 1, TEXT_LAYERS + FUSION_LAYERS):
        with pytest.raises(ValueError, match=f"layer {layer} has no attention to the image: choose one of 2 to 5"):
            word_maps(model, **inputs, layer=layer)
    for block in (-1, BLOCKS):
        with pytest.raises(ValueError, match=f"no block {block}: choose one of 0 to 2"):
            image_maps(model, **inputs, block=block)
    with pytest.raises(ValueError, match="VlpAlbefModel has no match_logits: attention maps need a model"):
        word_maps(model.albef, **inputs)
    with pytest.raises(ValueError, match="VlpAlbefVisionModel has no image_attention, pair_similarities"):
        image_maps(model.albef.vision_model, **inputs, block=0)


# ------------------------------------------------------------------------------------------------ pictures


class Processor:
    """Texts by a tokenizer without an end mark, pictures as [-1, 1] at their own size."""

    def __init__(self):
        self.tokenizer = without_end_mark(train_wordpiece_tokenizer("red red blue blue sky sky redsky".split(), 40, 16))

    def __call__(self, images, text, return_tensors):
        encoding = self.tokenizer([text], return_tensors=return_tensors)
        pixels = torch.tensor(list(images.convert("RGB").tobytes()), dtype=torch.float32)
        pixels = pixels.reshape(1, images.height, images.width, 3).permute(0, 3, 1, 2) / 127.5 - 1
        return {**{name: encoding[name] for name in ("input_ids", "attention_mask")}, "pixel_values": pixels}


def test_maps_over_a_picture():
    model, tools, text = tiny(), Processor(), "Red blues sky red"
    picture = Image.effect_noise((24, 16), 90)
    inputs = tools(picture, text, "pt")
    tokens = tools.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["[CLS]", "red", "blue", "##s", "sky", "red"]
    maps = word_maps(model, **inputs)[0]
    found = picture_maps(model, tools, picture, text)
    assert [one.word for one in found] == [text, "Red", "blues", "sky", "red"]
    for one, places in zip(found, ([1, 2, 3, 4, 5], [1], [2, 3], [4], [5]), strict=True):
        torch.testing.assert_close(one.mass, maps[places].mean(dim=0))
        assert one.heat.equal(unit_range(one.mass)) and one.mass.shape == (2, 3)
    assert not torch.allclose(found[1].mass, found[3].mass, rtol=1e-2)
    phrase, word = picture_maps(model, tools, picture, text, phrases=["BLUES sky", "red"], layer=3)
    maps = word_maps(model, **inputs, layer=3)[0]
    torch.testing.assert_close(phrase.mass, maps[[2, 3, 4]].mean(dim=0))
    torch.testing.assert_close(word.mass, maps[[1, 5]].mean(dim=0))
    for unknown in ("sky blues", "green", " "):
        with pytest.raises(ValueError, match=f"no '{unknown}'; it has Red, blues, sky, red"):
            picture_maps(model, tools, picture, text, phrases=[unknown])
    with pytest.raises(ValueError, match="'' has no words"):
        picture_maps(model, tools, picture, "")
    ids = tools(picture, "red sky", "pt")["input_ids"][0]
    assert word_tokens(tools.tokenizer, "Red sky blue", ids) == [("Red", [1]), ("sky", [2])]  # cut behind the second
    with pytest.raises(ValueError, match="'red' has no words"):
        word_tokens(tools.tokenizer, "red", ids[:1])  # a cleaning left nothing of it
    with pytest.raises(ValueError, match="makes other tokens of 'red blue'"):
        word_tokens(tools.tokenizer, "red blue", ids)


def test_a_glow_is_red_where_it_is_hot_and_the_picture_where_it_is_cold():
    picture, heat = Image.new("RGB", (80, 40), (10, 200, 30)), torch.zeros(4, 8)
    heat[:2, :2] = 7.0
    drawn = glow(picture, heat)
    assert drawn.size == (80, 40) and drawn.mode == "RGB"
    hot, cold = drawn.getpixel((6, 6)), drawn.getpixel((79, 39))
    assert hot[0] > 110 and hot[1] < 60 and hot[2] < 30
    assert sum(abs(a - b) for a, b in zip(cold, (10, 200, 30))) < 60
    assert glow(picture, heat * 3 + 5).tobytes() == drawn.tobytes() != glow(picture, heat.flip(1)).tobytes()
    assert glow(picture, torch.ones(4, 8)).tobytes() == picture.tobytes()
    sheets = [map_sheet(picture, ["a"], [unit_range(heat)], draw=draw) for draw in (glow, overlay)]
    assert sheets[0].size == sheets[1].size and sheets[0].tobytes() != sheets[1].tobytes()


def test_the_range_of_a_map():
    assert unit_range(torch.tensor([[2.0, 4.0], [3.0, 2.0]])).tolist() == [[0.0, 1.0], [0.5, 0.0]]
    assert not unit_range(torch.full((2, 2), 3.0)).any()


def test_a_map_of_each_pair_is_the_papers_times_a_number_and_knows_no_padding():
    model, inputs = tiny(), batch()
    maps, whole = pair_maps(model, **inputs), word_maps(model, **inputs).mean(dim=1)
    real = inputs["attention_mask"].sum(dim=1)[:, None, None]
    torch.testing.assert_close(maps * real / inputs["attention_mask"].shape[1], whole)
    short = {name: value[1:2] for name, value in inputs.items()}
    short |= {name: short[name][:, :3] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(pair_maps(model, **short)[0], maps[1], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(maps[1], whole[1]) and not torch.allclose(pair_maps(model, **inputs, layer=2), maps)
    everything = inputs | {"attention_mask": None}
    torch.testing.assert_close(pair_maps(model, **everything)[0], maps[0], rtol=1e-4, atol=1e-7)
