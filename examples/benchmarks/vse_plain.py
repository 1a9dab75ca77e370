"""VSE-infinity's region + BERT variant as its specification reads, on weights of the released names: the base of the ratios.

Every caption is computed to the longest of the batch, attention as two matmuls and a softmax, the pooling's GRU runs packed over every
sample and the sort goes across memory. Paper: "Learning the Best Pooling Strategy for Visual Semantic Embedding",
https://arxiv.org/abs/2011.04305, section 3.
"""

import math

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Weights = dict[str, torch.Tensor]
HIDDEN = -10000.0
GRU = [f"{part}_l0{way}" for way in ("", "_reverse") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def linear(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)


def positions(longest: int, width: int) -> torch.Tensor:
    """Sinusoids [longest, width], sines at even and cosines at odd places."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(longest, width)
    table[:, 0::2] = torch.sin(torch.arange(longest)[:, None] * rates)
    table[:, 1::2] = torch.cos(torch.arange(longest)[:, None] * rates)
    return table


def pool(features: torch.Tensor, lengths: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Generalised pooling of `features` [B, K, D], the first `lengths` [B] (on the CPU) of each -> [B, D]."""
    longest, recurrent = int(lengths.max()), [weights[f"{name}.gru.{part}"] for part in GRU]
    beyond = (torch.arange(longest) >= lengths[:, None]).unsqueeze(-1).to(features.device)  # [B, M, 1]
    code = positions(longest, recurrent[0].shape[1]).to(features.device).repeat(len(features), 1, 1)
    order = lengths.argsort(descending=True)  # what is packed begins with the longest
    packed = pack_padded_sequence(code.masked_fill(beyond, 0)[order], lengths[order], batch_first=True)
    start = code.new_zeros(2, len(features), recurrent[1].shape[1])
    states, _ = torch.gru(packed.data, packed.batch_sizes, start, recurrent, True, 1, 0.0, True, True)
    states = pad_packed_sequence(PackedSequence(states, packed.batch_sizes), batch_first=True)[0]
    ahead, back = states[order.argsort()].chunk(2, dim=-1)  # [B, M, hidden] each
    scores = functional.linear((ahead + back) / 2, weights[f"{name}.linear.weight"]).masked_fill(beyond, HIDDEN)
    shares = (scores.float() / 0.1).softmax(dim=1)  # [B, M, 1]
    values = features[:, :longest].masked_fill(beyond, HIDDEN).sort(dim=1, descending=True).values
    return (values.masked_fill(beyond, 0) * shares).sum(dim=1)


def encode_regions(weights: Weights, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`features` [B, R, F] in training mode, all rows in the batch norm -> unit rows [B, E]."""
    name = "img_enc.mlp"
    statistics = [weights[f"{name}.bns.0.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    hidden = linear(features.flatten(0, 1), weights, f"{name}.layers.0")
    hidden = functional.batch_norm(hidden, *statistics, training=True).relu()
    hidden = linear(hidden, weights, f"{name}.layers.1").unflatten(0, features.shape[:2])
    return unit(pool(linear(features, weights, "img_enc.fc") + hidden, lengths, weights, "img_enc.gpool"))


def bert(weights: Weights, ids: torch.Tensor, heads: int, dropout: float) -> torch.Tensor:
    """Last states of BERT, [B, L] -> [B, L, D]."""
    name = "txt_enc.bert.embeddings"
    x = weights[f"{name}.word_embeddings.weight"][ids] + weights[f"{name}.token_type_embeddings.weight"][0]
    x = norm(x + weights[f"{name}.position_embeddings.weight"][: ids.shape[1]], weights, f"{name}.LayerNorm")
    x = functional.dropout(x, dropout)
    hidden, layer = ((ids == 0) * HIDDEN)[:, None, None, :], 0
    while f"txt_enc.bert.encoder.layer.{layer}.output.dense.weight" in weights:
        name = f"txt_enc.bert.encoder.layer.{layer}"
        query, key, value = (
            linear(x, weights, f"{name}.attention.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + hidden
        mixed = functional.dropout(scores.softmax(dim=-1), dropout).to(value.dtype) @ value
        mixed = linear(mixed.transpose(1, 2).flatten(2), weights, f"{name}.attention.output.dense")
        x = norm(x + functional.dropout(mixed, dropout), weights, f"{name}.attention.output.LayerNorm")
        inner = functional.gelu(linear(x, weights, f"{name}.intermediate.dense"))
        inner = functional.dropout(linear(inner, weights, f"{name}.output.dense"), dropout)
        x = norm(x + inner, weights, f"{name}.output.LayerNorm")
        layer += 1
    return x


def encode_text(weights: Weights, ids: torch.Tensor, lengths: torch.Tensor, heads: int, dropout: float) -> torch.Tensor:
    """`ids` [B, L], 0 behind each text -> unit rows [B, E]."""
    states = linear(bert(weights, ids, heads, dropout), weights, "txt_enc.linear")
    return unit(pool(states, lengths, weights, "txt_enc.gpool"))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).sum(dim=-1, keepdim=True).sqrt() + 1e-8)


def loss(
    weights: Weights,
    regions: tuple[torch.Tensor, torch.Tensor],
    words: tuple[torch.Tensor, torch.Tensor],
    heads: int,
    dropout: float,
    margin: float,
) -> torch.Tensor:
    """Hinges of the hardest negatives, summed; `regions` and `words` each with their lengths [B]."""
    scores = encode_regions(weights, *regions) @ encode_text(weights, *words, heads, dropout).t()  # [B, B]
    own = scores.diag().view(-1, 1)
    others = torch.eye(len(scores), device=scores.device, dtype=torch.bool)
    of_texts = (margin + scores - own).clamp(min=0).masked_fill(others, 0)
    of_images = (margin + scores - own.t()).clamp(min=0).masked_fill(others, 0)
    return of_texts.max(dim=1).values.sum() + of_images.max(dim=0).values.sum()


def ranks(images: np.ndarray, texts: np.ndarray, captions: int) -> tuple[np.ndarray, np.ndarray]:
    """Best rank of each image's `captions` consecutive texts, and of each text's image, by sorting all scores in float64."""
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    to_text, to_image = np.zeros(len(images)), np.zeros(len(texts))
    for image, row in enumerate(scores):
        order = np.argsort(row)[::-1]
        own = range(captions * image, captions * (image + 1))
        to_text[image] = min(np.where(order == text)[0][0] for text in own)
    for text, column in enumerate(scores.T):
        to_image[text] = np.where(np.argsort(column)[::-1] == text // captions)[0][0]
    return to_text, to_image
