"""CLIP as its specification reads, on a state dict of the released layout: the base that the benchmark's ratios refer to.

Every position of every text, every row of the last block, query, key and value from one fused matrix, the loss as two
cross-entropies, the transforms one picture at a time, byte pairs merged in Python.
Paper: "Learning Transferable Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020, section 2.
"""

import html
from functools import lru_cache

import ftfy
import numpy as np
import regex
import torch
from PIL import Image
from torch.nn import functional

Weights = dict[str, torch.Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Layer norm in float32, [..., D]."""
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return functional.layer_norm(x.float(), x.shape[-1:], scale, shift, 1e-5).to(x.dtype)


def transformer(
    x: torch.Tensor, weights: Weights, prefix: str, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """All blocks under `prefix`, [B, L, D] -> [B, L, D]; `mask` [L, L] is added to the scores."""
    layer = 0
    while f"{prefix}.{layer}.ln_1.weight" in weights:
        name = f"{prefix}.{layer}"
        fused = functional.linear(
            norm(x, weights, f"{name}.ln_1"),
            weights[f"{name}.attn.in_proj_weight"],
            weights[f"{name}.attn.in_proj_bias"],
        )
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=-1))
        added = None if mask is None else mask.to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=added).transpose(1, 2).flatten(2)
        x = x + functional.linear(mixed, weights[f"{name}.attn.out_proj.weight"], weights[f"{name}.attn.out_proj.bias"])
        hidden = functional.linear(
            norm(x, weights, f"{name}.ln_2"), weights[f"{name}.mlp.c_fc.weight"], weights[f"{name}.mlp.c_fc.bias"]
        )
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + functional.linear(hidden, weights[f"{name}.mlp.c_proj.weight"], weights[f"{name}.mlp.c_proj.bias"])
        layer += 1
    return x


def encode_image(weights: Weights, pixel_values: torch.Tensor, heads: int) -> torch.Tensor:
    """The vision transformer, [B, 3, R, R] -> [B, E]."""
    kernel = weights["visual.conv1.weight"]
    patches = functional.conv2d(pixel_values, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)  # [B, P, D]
    classes = weights["visual.class_embedding"].to(patches.dtype).expand(len(patches), 1, -1)
    x = torch.cat([classes, patches], dim=1) + weights["visual.positional_embedding"].to(patches.dtype)
    x = transformer(norm(x, weights, "visual.ln_pre"), weights, "visual.transformer.resblocks", heads)
    return norm(x[:, 0], weights, "visual.ln_post") @ weights["visual.proj"]


def encode_text(weights: Weights, input_ids: torch.Tensor, heads: int) -> torch.Tensor:
    """The causal text transformer pooled at the largest id, [B, L] -> [B, E]."""
    length = input_ids.shape[1]
    x = weights["token_embedding.weight"][input_ids] + weights["positional_embedding"][:length]
    mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
    x = norm(transformer(x, weights, "transformer.resblocks", heads, mask), weights, "ln_final")
    ends = input_ids.argmax(dim=1)
    return x[torch.arange(len(x), device=x.device), ends] @ weights["text_projection"]


def loss(weights: Weights, pixel_values: torch.Tensor, input_ids: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """Symmetric cross-entropy of one batch of pairs; `heads` of the image and of the text tower."""
    images = encode_image(weights, pixel_values, heads[0])
    texts = encode_text(weights, input_ids, heads[1])
    images, texts = images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)
    per_image = weights["logit_scale"].exp() * images @ texts.t()  # [B, B]
    own = torch.arange(len(images), device=images.device)
    return (functional.cross_entropy(per_image, own) + functional.cross_entropy(per_image.t(), own)) / 2


def encode_image_resnet(weights: Weights, pixel_values: torch.Tensor, heads: int) -> torch.Tensor:
    """The modified ResNet in evaluation mode, [B, 3, R, R] -> [B, E]."""

    def convolved(x: torch.Tensor, conv: str, bn: str, stride: int = 1) -> torch.Tensor:
        kernel = weights[f"{conv}.weight"]
        x = functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        statistics = (weights[f"{bn}.running_mean"], weights[f"{bn}.running_var"])
        return functional.batch_norm(x, *statistics, weights[f"{bn}.weight"], weights[f"{bn}.bias"])

    x = pixel_values
    for stem, stride in ((1, 2), (2, 1), (3, 1)):
        x = convolved(x, f"visual.conv{stem}", f"visual.bn{stem}", stride).relu()
    x = functional.avg_pool2d(x, 2)
    for stage in (1, 2, 3, 4):
        block = 0
        while f"visual.layer{stage}.{block}.conv1.weight" in weights:
            name = f"visual.layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            inner = convolved(x, f"{name}.conv1", f"{name}.bn1").relu()
            inner = convolved(inner, f"{name}.conv2", f"{name}.bn2").relu()
            inner = convolved(functional.avg_pool2d(inner, stride), f"{name}.conv3", f"{name}.bn3")
            if f"{name}.downsample.0.weight" in weights:
                x = convolved(functional.avg_pool2d(x, stride), f"{name}.downsample.0", f"{name}.downsample.1")
            x = (inner + x).relu()
            block += 1
    tokens = x.flatten(2).transpose(1, 2)  # [B, h*w, D]
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    tokens = tokens + weights["visual.attnpool.positional_embedding"].to(tokens.dtype)
    query, key, value = (
        functional.linear(
            source, weights[f"visual.attnpool.{part}_proj.weight"], weights[f"visual.attnpool.{part}_proj.bias"]
        )
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for part, source in (("q", tokens[:, :1]), ("k", tokens), ("v", tokens))
    )
    pooled = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)  # [B, D]
    return functional.linear(pooled, weights["visual.attnpool.c_proj.weight"], weights["visual.attnpool.c_proj.bias"])


def transform(picture: Image.Image, size: int) -> torch.Tensor:
    """Resized with Pillow, cropped, to RGB, normalised: [3, R, R]."""
    width, height = picture.size
    longer = int(size * max(width, height) / min(width, height))
    picture = picture.resize((size, longer) if width <= height else (longer, size), Image.Resampling.BICUBIC)
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    picture = picture.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Tokenizer:
    """Byte pairs merged in Python, a word at a time, each word's result remembered.

    vocabulary: entry -> id. merges: pairs, the most frequent first.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], symbols: list[str]):
        self.vocabulary = vocabulary
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        rest = iter(sorted(set(range(256)) - {ord(symbol) for symbol in symbols if ord(symbol) < 256}))
        self.symbol = {ord(symbol) if ord(symbol) < 256 else next(rest): symbol for symbol in symbols}
        self.merged = lru_cache(maxsize=None)(self._merged)

    def _merged(self, piece: str) -> list[int]:
        if piece in self.vocabulary and piece.startswith("<|"):
            return [self.vocabulary[piece]]
        word = [self.symbol[byte] for byte in piece.encode("utf-8")]
        word[-1] += "</w>"
        while len(word) > 1:
            best = min(zip(word, word[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            joined, place = [], 0
            while place < len(word):
                if tuple(word[place : place + 2]) == best:
                    joined.append(word[place] + word[place + 1])
                    place += 2
                else:
                    joined.append(word[place])
                    place += 1
            word = joined
        return [self.vocabulary[symbol] for symbol in word]

    def __call__(self, texts: list[str], length: int) -> torch.Tensor:
        """Texts to ids [B, length], 0 after the end of text."""
        result = torch.zeros(len(texts), length, dtype=torch.long)
        start, end = self.vocabulary["<|startoftext|>"], self.vocabulary["<|endoftext|>"]
        for row, text in enumerate(texts):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
            text = " ".join(text.split()).lower()
            ids = [start, *(number for piece in PIECES.findall(text) for number in self.merged(piece))][: length - 1]
            result[row, : len(ids) + 1] = torch.tensor([*ids, end])
        return result
