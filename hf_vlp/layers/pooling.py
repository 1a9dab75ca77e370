"""From token states to one vector."""

import functools
import math

import torch
from torch import nn

from hf_vlp.layers.recurrent import BidirectionalGRU


def gather_rows(hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`hidden_states` [B, L, D] at position `index` [B] of each sequence -> [B, D]."""
    return hidden_states.gather(1, index.view(-1, 1, 1).expand(-1, 1, hidden_states.shape[-1])).squeeze(1)


def first_token_index(input_ids: torch.Tensor, token_id: int) -> torch.Tensor:
    """Position of the first `token_id` in each row of `input_ids` [B, L] -> [B].

    Raises:
        ValueError: on the CPU, naming the rows that hold no such token. On an accelerator the same check is a device-side
            assertion (a synchronisation in every step would cost more than it finds), in a traced graph a runtime assertion.
    """
    found = input_ids == token_id
    present = found.any(dim=1)
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        torch._assert_async(present.all(), f"a row of input_ids holds no end-of-text token (id {token_id})")
    elif not present.all():
        rows = (~present).nonzero().flatten().tolist()
        raise ValueError(
            f"row(s) {rows[:10]} of input_ids hold no end-of-text token (eos_token_id {token_id}): let the processor add it, "
            'or set pooling="largest_id" in the text config for the rule of the original code'
        )
    return found.int().argmax(dim=1)


def largest_id_index(input_ids: torch.Tensor) -> torch.Tensor:
    """Position of the first largest id in each row of `input_ids` [B, L] -> [B]."""
    return input_ids.argmax(dim=1)


def refuse_padding_before(index: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Padding at or before position `index` [B] of a row: `attention_mask` [B, L] is 0 there. Right padding has none.

    Looked for on the CPU outside of traced graphs alone: elsewhere it would be a synchronisation in every step.

    Raises:
        ValueError: naming the rows.
    """
    if torch.compiler.is_compiling() or attention_mask.device.type != "cpu" or index.device.type != "cpu":
        return
    seen = torch.arange(attention_mask.shape[1])[None, :] <= index[:, None]  # [B, L]
    padded = ((attention_mask == 0) & seen).any(dim=1)
    if padded.any():
        rows = padded.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask is 0 at or before the end of text in row(s) {rows[:10]}: pad texts on the right "
            '(tokenizer.padding_side = "right"), positions count from the start'
        )


def masked_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `hidden_states` [B, L, D] over the positions where `attention_mask` [B, L] is 1 -> [B, D]."""
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weight = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # [B, L, 1]
    return (hidden_states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def unit_rows(embeds: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Rows divided by their L2 norm plus `eps`, [B, E]; under autocast in float32, because lengths of half precision are off by 0.4 %."""
    device = embeds.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            embeds = embeds.float()
            return embeds / (embeds.norm(dim=-1, keepdim=True) + eps)
    return embeds / (embeds.norm(dim=-1, keepdim=True) + eps)


class GeneralizedPooling(nn.Module):
    """Generalized pooling operator (VSE-infinity, https://arxiv.org/abs/2011.04305): learned weights over sorted features.

    Every feature's values are sorted in descending order over the elements, and position k of the sorted values weighs
    softmax(score(k, length) / 0.1), where a small GRU over sinusoids of the positions gives the scores. Mean, maximum and k-max
    pooling are special cases. The weights depend on the number of elements alone, never on the features.

    Args:
        position_size: width of the position code, even (32 in the paper). hidden_size: of the GRU (32).

    Raises:
        ValueError: an odd `position_size`.
    """

    temperature = 0.1

    def __init__(self, position_size: int = 32, hidden_size: int = 32):
        super().__init__()
        if position_size % 2:
            raise ValueError(f"position_size {position_size} must be even: sines and cosines come in pairs")
        self.gru = BidirectionalGRU(position_size, hidden_size)
        self.linear = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`features` [B, K, D], `mask` [B, K] with 1 at real elements (anywhere; None: all are) -> [B, D] and the weights [B, K].

        Raises:
            ValueError: a mask of another shape; on the CPU, a row without any element.
        """
        if mask is None:
            lengths = torch.tensor([features.shape[1]], device=features.device)
            weights = self.coefficients(lengths, features.shape[1]).expand(len(features), -1)
            return weighted_sorted_sum(features, weights), weights
        if mask.shape != features.shape[:2]:
            raise ValueError(
                f"the mask of {list(features.shape[:2])} elements must have that shape, got {list(mask.shape)}"
            )
        mask = mask.bool()
        lengths = mask.sum(dim=1)
        refuse_empty(lengths)
        weights = self.coefficients(lengths, features.shape[1])
        return weighted_sorted_sum(features, weights, mask), weights

    def coefficients(self, lengths: torch.Tensor, longest: int) -> torch.Tensor:
        """Weights of sets of `lengths` [B] elements -> [B, longest] float32; each row sums to 1 and is 0 beyond its length.

        Computed once for each distinct length. Where shapes must not depend on values (a traced graph) or looking at them would
        make an accelerator wait, once for each possible length, or once a row where these are fewer.
        """
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            distinct, place = lengths.unique(return_inverse=True)
        elif longest <= len(lengths):
            distinct, place = torch.arange(1, longest + 1, device=lengths.device), lengths - 1
        else:
            distinct, place = lengths, slice(None)
        return (self.scores(distinct, longest) / self.temperature).softmax(dim=1)[place]

    def scores(self, lengths: torch.Tensor, longest: int) -> torch.Tensor:
        """Scores of the sorted positions, [B, longest] float32; -10000 beyond a row's length."""
        with torch.autocast(lengths.device.type, enabled=False):
            positions = sinusoids(longest, self.gru.input_size, lengths.device)
            states = self.gru.padded(positions.expand(len(lengths), -1, -1), lengths)  # [B, longest, hidden]
            scores = nn.functional.linear(states, self.linear.weight.float()).squeeze(-1)
        beyond = torch.arange(longest, device=lengths.device)[None, :] >= lengths[:, None]
        return scores.masked_fill(beyond, -10000.0)


def sinusoids(positions: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Position codes [positions, width], float32: sin(k w_j) at 2j and cos(k w_j) at 2j + 1 with w_j = 10000^(-2j / width)."""
    frequency = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))  # [width / 2]
    angle = torch.arange(positions, device=device)[:, None] * frequency  # [positions, width / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def refuse_empty(lengths: torch.Tensor) -> None:
    """A set without any element, which no pooling is defined for. Looked for on the CPU outside of traced graphs alone.

    Raises:
        ValueError: naming the rows of `lengths` [B].
    """
    if torch.compiler.is_compiling() or lengths.device.type != "cpu" or bool((lengths > 0).all()):
        return
    rows = (lengths <= 0).nonzero().flatten().tolist()
    raise ValueError(
        f"row(s) {rows[:10]} of the mask hold no element to pool: give each at least one, or leave the row out"
    )


def weighted_sorted_sum(
    features: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over k of `weights` [B, K] at k times the k-th largest value of each feature, `features` [B, K, D] -> [B, D].

    Elements where `mask` [B, K] is False are sorted last and count as 0.
    """
    if mask is not None:
        features = features.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    few = features.shape[1] <= LARGEST_NETWORK and features.device.type == "cpu"
    if few and not (torch.is_grad_enabled() and features.requires_grad) and not torch.compiler.is_compiling():
        return _sum_through_network(features, weights, None if mask is None else mask.sum(dim=1))
    # along memory: a third of the time of sorting across it
    values = features.transpose(1, 2).contiguous().sort(dim=2, descending=True).values  # [B, D, K]
    if mask is not None:
        beyond = torch.arange(mask.shape[1], device=mask.device) >= mask.sum(dim=1, keepdim=True)  # [B, K]
        values = values.masked_fill(beyond.unsqueeze(1), 0.0)
    return torch.bmm(values, weights.to(values.dtype).unsqueeze(2)).squeeze(2)


LARGEST_NETWORK = 64  # elements up to which the network beats sorting


def _sum_through_network(features: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """`weighted_sorted_sum` without gradient: whole slices [B, D] are compared at once, with no index to carry."""
    rows = list(features.unbind(dim=1))
    for upper, lower in _exchanges(len(rows)):
        rows[upper], rows[lower] = torch.maximum(rows[upper], rows[lower]), torch.minimum(rows[upper], rows[lower])
    exact = torch.promote_types(features.dtype, torch.float32)  # half precision adds up as `bmm` does
    total = torch.zeros_like(rows[0], dtype=exact)
    for place, row in enumerate(rows):
        if lengths is not None:
            row = row.masked_fill((lengths <= place)[:, None], 0.0)
        total = total.addcmul_(row.to(exact), weights[:, place, None].to(exact))
    return total.to(features.dtype)


@functools.lru_cache(maxsize=LARGEST_NETWORK)
def _exchanges(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs of places to put in order, one after the other, that sort `count` rows (Batcher's odd-even merge sort, 1968)."""
    pairs, run = [], 1
    while run < count:
        distance = run
        while distance >= 1:
            for start in range(distance % run, count - distance, 2 * distance):
                for place in range(start, start + min(distance, count - start - distance)):
                    if place // (2 * run) == (place + distance) // (2 * run):
                        pairs.append((place, place + distance))
            distance //= 2
        run *= 2
    return tuple(pairs)
