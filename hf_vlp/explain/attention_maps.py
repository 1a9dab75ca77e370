"""Where in the picture a model looks when it finds that words match: Grad-CAM on its attention, by word, phrase or text.

"Align before Fuse" (https://arxiv.org/abs/2107.07651), section 6.4 and figures 4 and 5; Grad-CAM (https://arxiv.org/abs/1610.02391): how
much each place is attended to, times how much more attention there would raise the score, where it would.

For any model whose words attend to the image, with these methods: `cross_attention(layer)` and `image_attention(block)`, the attention to
look at, which returns (result, weights) where its configuration says "eager"; `match_logits` [B, 2] and `pair_similarities` [B], both of
`input_ids` [B, L], `attention_mask` [B, L] and `pixel_values` [B, 3, H, W]. The image's tokens are a class token, then its patches row by
row, whose side is `config.vision_config.patch_size`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from hf_vlp.explain.draw import unit_range
from hf_vlp.explain.words import WordMap, evaluating, real_ids, word_tokens

MATCH = 1  # row of the matching logits


def picture_maps(
    model: nn.Module,
    processor: Any,
    picture: Image.Image,
    text: str,
    *,
    phrases: Sequence[str] | None = None,
    layer: int | None = None,
) -> list[WordMap]:
    """Maps of a text over one picture; `mass` is the Grad-CAM map and `heat` the same between 0 and 1.

    Args:
        processor: makes the batch of the model, and has a fast `tokenizer`.
        phrases: words of the text, or several in a row, upper and lower case alike, each of which has a map wherever it stands in the text;
            None: the whole text, as the mean over its words, then each of them.
        layer: see `word_maps`.

    Raises:
        ValueError: a text without words, a phrase that it does not have, a processor that makes other tokens of the text than its
            tokenizer alone does, and what `word_maps` refuses.
    """
    batch = processor(images=picture, text=text, return_tensors="pt")
    words = word_tokens(processor.tokenizer, text, real_ids(batch))
    if phrases is None:
        wanted = [(text, [place for _, places in words for place in places]), *words]
    else:
        wanted = [(phrase, _phrase_tokens(words, phrase)) for phrase in phrases]
    device = next(model.parameters()).device
    inputs = (batch[name].to(device) for name in ("input_ids", "attention_mask", "pixel_values"))
    maps = word_maps(model, *inputs, layer=layer)[0].cpu()
    found = [(name, maps[places].mean(dim=0)) for name, places in wanted]
    return [WordMap(name, one, unit_range(one)) for name, one in found]


def _phrase_tokens(words: list[tuple[str, list[int]]], phrase: str) -> list[int]:
    """Places of the tokens of every stretch of the words that is the phrase."""
    told, parts = [word.casefold() for word, _ in words], phrase.casefold().split()
    starts = [start for start in range(len(told)) if parts and told[start : start + len(parts)] == parts]
    if not starts:
        raise ValueError(f"the text has no {phrase!r}; it has {', '.join(word for word, _ in words)}")
    places = {place for start in starts for _, own in words[start : start + len(parts)] for place in own}
    return sorted(places)


def word_maps(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
    *,
    layer: int | None = None,
) -> torch.Tensor:
    """Grad-CAM of each token over the patches, [B, L, h, w] float32, 0 at padding: from its attention to the image in one layer.

    The score is the logit that the pair matches. A token is a piece of a word; see `phrase_maps`.

    Args:
        layer: see the model's `cross_attention`, whose choice None is.

    Raises:
        ValueError: a model without cross-attention or a matching head, a layer without it.
    """
    _require(model, "cross_attention", "match_logits")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    batch = input_ids, attention_mask, pixel_values
    weights, gradient = attention_and_gradient(
        model, model.cross_attention(layer), lambda *batch: model.match_logits(*batch)[:, MATCH], *batch
    )
    maps = (weights * gradient.clamp(min=0))[..., 1:].mean(dim=1)  # [B, L, P]
    maps = maps * attention_mask.ne(0).unsqueeze(2)
    return maps.unflatten(2, patch_grid(model, pixel_values))


def pair_maps(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
    *,
    layer: int | None = None,
) -> torch.Tensor:
    """One map of each pair, [B, h, w]: the mean of `word_maps` over its tokens, whatever padding the batch has.

    The paper's grounding counts padding too, which has no map: its maps are smaller by a factor, and order boxes of an image alike.

    Args:
        layer: see `word_maps`, whose errors are raised.
    """
    maps = word_maps(model, input_ids, attention_mask, pixel_values, layer=layer)
    return phrase_maps(maps, torch.ones_like(input_ids) if attention_mask is None else attention_mask)


def phrase_maps(maps: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """One map of a phrase or a word of each text, [B, h, w], of `word_maps` [B, L, h, w]: the mean over its tokens.

    `chosen`: [B, L], other than 0 at the tokens of the phrase.

    Raises:
        ValueError: another shape, or a text of which no token is chosen.
    """
    chosen = chosen.ne(0).to(maps)
    if chosen.shape != maps.shape[:2]:
        raise ValueError(f"chosen tokens {tuple(chosen.shape)} must be [B, L], here {tuple(maps.shape[:2])}")
    count = chosen.sum(dim=1)
    if not count.all():
        raise ValueError(f"text {int(count.argmin())} of the batch has no chosen token: mark one or more")
    return torch.einsum("bl,blhw->bhw", chosen, maps) / count[:, None, None]


def image_maps(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
    *,
    block: int,
) -> torch.Tensor:
    """Grad-CAM of each pair over the patches, [B, h, w] float32: from what the class token attends to in a block of the image encoder.

    The score is the similarity of the pair over the temperature, before words and image are fused.

    Raises:
        ValueError: a model without one of the methods, no such block.
    """
    _require(model, "image_attention", "pair_similarities")
    batch = input_ids, attention_mask, pixel_values
    weights, gradient = attention_and_gradient(model, model.image_attention(block), model.pair_similarities, *batch)
    maps = (weights * gradient.clamp(min=0))[:, :, 0, 1:].mean(dim=1)  # [B, P]
    return maps.unflatten(1, patch_grid(model, pixel_values))


def attention_and_gradient(
    model: nn.Module,
    attention: nn.Module,
    scores: Callable[..., torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of an attention in evaluation mode, and the gradient of the sum of the pairs' scores by them: [B, heads, Q, K] float32.

    The model is left as it was: no parameter gets a gradient, and the modes and the attention's implementation come back.

    Args:
        attention: one of the model's, used once in the pass, whose `config` decides the implementation. scores: of the batch, [B].
    """
    found: list[torch.Tensor] = []
    config = attention.config
    before = config._attn_implementation
    hook = attention.register_forward_hook(lambda module, inputs, output: found.append(output[1]))
    try:
        config._attn_implementation = {"": "eager"}  # this configuration's alone, not those of the parts below it
        with evaluating(model), torch.enable_grad():
            # by the pixels there is a gradient even if every weight is frozen
            total = scores(input_ids, attention_mask, pixel_values.detach().requires_grad_()).sum()
            (gradient,) = torch.autograd.grad(total, found[0])
    finally:
        hook.remove()
        config._attn_implementation = {"": before}
    return found[0].detach().float(), gradient.float()


def patch_grid(model: nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """(h, w), patches along the height and the width of images [B, 3, H, W]."""
    patch = model.config.vision_config.patch_size
    return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch


def _require(model: nn.Module, *methods: str) -> None:
    missing = [name for name in methods if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(missing)}: attention maps need a model whose words attend to the image, with its "
            "matching head"
        )
