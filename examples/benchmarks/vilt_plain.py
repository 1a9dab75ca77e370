"""ViLT as its specification reads, on weights of the released names: the base of the ratios.

Texts are computed to the length they are padded to, every image of a batch to as many patches as the largest has, all blocks for all
positions, logits over the vocabulary for every word. Images are embedded one after the other, as the released code does, but in raster
order. Paper: "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", https://arxiv.org/abs/2102.03334.
"""

import torch
from torch.nn import functional

Weights = dict[str, torch.Tensor]
HEAD_EPS, BLOCK_EPS = 1e-12, 1e-6


def linear(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(x: torch.Tensor, weights: Weights, name: str, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def embed_text(weights: Weights, ids: torch.Tensor, dropout: float) -> torch.Tensor:
    """`ids` [B, L] -> [B, L, D]."""
    name = "text_embeddings"
    x = weights[f"{name}.word_embeddings.weight"][ids] + weights[f"{name}.token_type_embeddings.weight"][0]
    x = x + weights[f"{name}.position_embeddings.weight"][: ids.shape[1]]
    return functional.dropout(norm(x, weights, f"{name}.LayerNorm", HEAD_EPS), dropout)


def embed_image(
    weights: Weights, pixels: torch.Tensor, sizes: list[tuple[int, int]], dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pixels` [B, 3, H, W], the first h x w patches of each real -> [B, 1 + n, D] and their mask [B, 1 + n]."""
    table = weights["transformer.pos_embed"]
    side = round((table.shape[1] - 1) ** 0.5)
    square = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # [1, D, g, g]
    convolution = weights["transformer.patch_embed.proj.weight"], weights["transformer.patch_embed.proj.bias"]
    maps = functional.conv2d(pixels, *convolution, stride=convolution[0].shape[-1])  # [B, D, rows, columns]
    longest = max(height * width for height, width in sizes)
    rows, masks = [], []
    for image, (height, width) in zip(maps, sizes, strict=True):
        positions = functional.interpolate(square, size=(height, width), mode="bilinear", align_corners=True)[0]
        patches = (image[:, :height, :width] + positions).flatten(1).t()
        rows.append(functional.pad(patches, (0, 0, 0, longest - len(patches))))
        masks.append((torch.arange(1 + longest) <= len(patches)).long())
    classes = (weights["transformer.cls_token"] + table[:, :1]).expand(len(rows), -1, -1)
    x = torch.cat([classes, torch.stack(rows)], dim=1)
    return functional.dropout(x, dropout), torch.stack(masks).to(pixels.device)


def attention(x: torch.Tensor, hidden: torch.Tensor, weights: Weights, name: str, heads: int) -> torch.Tensor:
    query, key, value = linear(x, weights, f"{name}.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    shares = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(value.dtype)
    return linear((shares @ value).transpose(1, 2).flatten(2), weights, f"{name}.proj")


def read(
    weights: Weights,
    words: tuple[torch.Tensor, torch.Tensor],
    image: tuple[torch.Tensor, list[tuple[int, int]]],
    heads: int,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`words`: ids and mask [B, L]; `image`: pixels [B, 3, H, W] and patches of each -> states [B, L + 1 + n, D] and their mask."""
    ids, mask = words
    modality = weights["token_type_embeddings.weight"]
    patches, image_mask = embed_image(weights, *image, dropout)
    x = torch.cat([embed_text(weights, ids, dropout) + modality[0], patches + modality[1]], dim=1)
    mask = torch.cat([mask, image_mask], dim=1)
    hidden, layer = mask[:, None, None, :] == 0, 0
    while f"transformer.blocks.{layer}.norm1.weight" in weights:
        name = f"transformer.blocks.{layer}"
        mixed = attention(norm(x, weights, f"{name}.norm1", BLOCK_EPS), hidden, weights, f"{name}.attn", heads)
        x = x + functional.dropout(mixed, dropout)
        inner = functional.gelu(linear(norm(x, weights, f"{name}.norm2", BLOCK_EPS), weights, f"{name}.mlp.fc1"))
        x = x + functional.dropout(linear(functional.dropout(inner, dropout), weights, f"{name}.mlp.fc2"), dropout)
        layer += 1
    return norm(x, weights, "transformer.norm", BLOCK_EPS), mask


def pooled(states: torch.Tensor, weights: Weights) -> torch.Tensor:
    """[B, N, D] -> [B, D]."""
    return linear(states[:, 0], weights, "pooler.dense").tanh()


def transport(
    cost: torch.Tensor, unused_x: torch.Tensor, unused_y: torch.Tensor, beta=0.5, iterations=50
) -> torch.Tensor:
    """The plan [B, n, m] that IPOT finds for `cost` [B, m, n]; `unused_x` [B, m] and `unused_y` [B, n] are True at unused positions."""
    counts_x, counts_y = ((~unused).sum(dim=1, keepdim=True).to(cost.dtype) for unused in (unused_x, unused_y))
    joint = unused_y.unsqueeze(-1) | unused_x.unsqueeze(-2)  # [B, n, m]
    sigma = (torch.ones_like(cost[:, :, 0]) / counts_x).masked_fill(unused_x, 0)
    plan = torch.ones_like(cost.transpose(1, 2)).masked_fill(joint, 0)
    kernel = torch.exp(-cost.transpose(1, 2) / beta).masked_fill(joint, 0)
    for _ in range(iterations):
        weighted = kernel * plan
        delta = 1 / (counts_y * (weighted @ sigma.unsqueeze(-1)).squeeze(-1) + 1e4 * unused_y)
        sigma = 1 / (counts_x * (delta.unsqueeze(1) @ weighted).squeeze(1) + 1e4 * unused_x)
        plan = delta.unsqueeze(-1) * weighted * sigma.unsqueeze(1)
    return plan.masked_fill(joint, 0)


def alignment(states: torch.Tensor, mask: torch.Tensor, length: int, labels: torch.Tensor) -> torch.Tensor:
    """Distances of positives less those of negatives, over the batch."""
    text, image = (part.float() for part in states.split([length, states.shape[1] - length], dim=1))
    used_x, used_y = mask[:, :length].bool().clone(), mask[:, length:].bool().clone()
    ends = used_x.sum(dim=1) - 1
    used_x[:, 0] = used_y[:, 0] = False
    used_x[torch.arange(len(ends)), ends] = False
    cost = 1 - functional.normalize(text, dim=-1, eps=1e-5) @ functional.normalize(image, dim=-1, eps=1e-5).transpose(
        1, 2
    )
    cost = cost.masked_fill(~(used_x.unsqueeze(-1) & used_y.unsqueeze(1)), 0)
    with torch.no_grad():
        plan = transport(cost.detach(), ~used_x, ~used_y)
    distances = (cost @ plan).diagonal(dim1=1, dim2=2).sum(dim=-1)
    return (distances * (2 * labels - 1)).sum() / len(labels)


def pretraining_loss(weights: Weights, batch: dict, heads: int, dropout: float) -> torch.Tensor:
    """Masked words, matching and word-patch alignment.

    `batch`: ids, mask, masked_ids, masked_labels [B, L]; pixels, read_pixels [B, 3, H, W] with sizes, read_sizes, the texts' own pictures
    and those that they are read with; labels [B], 1 where these are the same.
    """
    length = batch["ids"].shape[1]
    states, _ = read(weights, (batch["masked_ids"], batch["mask"]), (batch["pixels"], batch["sizes"]), heads, dropout)
    hidden = functional.gelu(linear(states[:, :length], weights, "mlm_score.transform.dense"))
    hidden = norm(hidden, weights, "mlm_score.transform.LayerNorm", HEAD_EPS)
    logits = functional.linear(hidden, weights["mlm_score.decoder.weight"]) + weights["mlm_score.bias"]
    words = functional.cross_entropy(logits.flatten(0, 1).float(), batch["masked_labels"].flatten(), ignore_index=-100)

    labels, image = batch["labels"], (batch["read_pixels"], batch["read_sizes"])
    states, mask = read(weights, (batch["ids"], batch["mask"]), image, heads, dropout)
    matching = functional.cross_entropy(linear(pooled(states, weights), weights, "itm_score.fc").float(), labels)
    return words + matching + 0.1 * alignment(states, mask, length, labels)
