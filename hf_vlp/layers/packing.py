"""Sequences of different lengths without most of their padding: real positions first, those of similar length together."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

GROUP_COST = 64  # of one group more, in tokens: measured on two cores with BERTs of 1 to 12 layers


def group_sizes(lengths: torch.Tensor) -> list[int]:
    """Sizes of the groups of neighbouring sequences that cost least to run one after the other; `lengths` [B] rise.

    A sequence costs as many tokens as the longest of its group, and every group GROUP_COST besides.
    """
    values, counts = lengths.unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]  # sequences up to each length
    best = [(0, 0)]  # of the sequences up to each length: tokens, and where their last group begins
    for stop, longest in enumerate(values.tolist(), start=1):
        tokens = ((best[start][0] + longest * (ends[stop] - ends[start]), start) for start in range(stop))
        cost, begin = min(tokens)
        best.append((cost + GROUP_COST, begin))
    sizes, stop = [], len(best) - 1
    while stop:
        begin = best[stop][1]
        sizes.append(ends[stop] - ends[begin])
        stop = begin
    return sizes[::-1]


def reach_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions up to the last that is 1, of `mask` [B, L]: [B]; 1 where none is."""
    place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.ne(0) * place).amax(dim=1).clamp(min=1)


def run_by_length(
    lengths: torch.Tensor, width: int, run: Callable[[torch.Tensor | slice, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """States [B, width, D] of sequences of these `lengths` [B], those of similar length run together; behind what `run` gives are zeros.

    Args:
        run: (which sequences, their lengths) -> [G, W, D], W at most `width`. One group alone is a slice of all as they stand, of which
            nothing is copied.
    """
    ranked, order = lengths.sort()
    sizes = group_sizes(ranked)
    if len(sizes) == 1:
        groups, order = [(slice(None), lengths)], None
    else:
        groups = zip(order.split(sizes), ranked.split(sizes), strict=True)
    found = [run(members, reach) for members, reach in groups]
    states = torch.cat([nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in found])
    return states if order is None else states[order.argsort()]


def read_states(
    layers: nn.ModuleList, config, hidden_states: torch.Tensor, mask: torch.Tensor | None, rows: int | None = None
) -> torch.Tensor:
    """States that a stack of self-attending blocks gives to the first `rows` positions (None: to all), the last block only there.

    On a CPU, outside of traced graphs, padding is left out: real positions are moved together, sequences of similar length run together.
    What stands at padding positions is not defined; among the first `rows`, padding comes behind the real positions.

    Args:
        layers: blocks as `hf_vlp.layers.blocks.Block`. config: with the attention implementation.
        hidden_states: [B, N, D]. mask: [B, N], 1 at real positions; None: all are.

    Returns:
        [B, rows or N, D].
    """
    if mask is None or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return _run(layers, config, hidden_states, mask, rows)
    count, length, width = hidden_states.shape
    order = mask.eq(0).to(torch.int8).argsort(dim=1, stable=True)  # [B, N], of the real positions, then of the others
    packed = hidden_states.gather(1, order.unsqueeze(-1).expand(-1, -1, width)) if _is_mixed(mask) else hidden_states

    def run(members: torch.Tensor | slice, reach: torch.Tensor) -> torch.Tensor:
        longest = int(reach.max())
        seen = None if int(reach.min()) == longest else torch.arange(longest)[None, :] < reach[:, None]
        return _run(layers, config, packed[members, :longest], None if seen is None else seen.long(), rows)

    states = run_by_length(mask.ne(0).sum(dim=1).clamp(min=1), length if rows is None else rows, run)
    if rows is None and _is_mixed(mask):
        back = order.argsort(dim=1)
        return states.gather(1, back.unsqueeze(-1).expand(-1, -1, width))
    return states


def _is_mixed(mask: torch.Tensor) -> bool:
    """Whether padding stands before a real position of some sequence."""
    return bool((mask[:, 1:] > mask[:, :-1]).any())


def _run(layers, config, hidden_states, mask, rows) -> torch.Tensor:
    attend = create_bidirectional_mask(config, inputs_embeds=hidden_states, attention_mask=mask)
    for layer in layers[:-1]:
        hidden_states = layer(hidden_states, attend)
    # flash attention takes a query shorter than its keys for the end of a sequence
    whole = rows is None or rows >= hidden_states.shape[1] or (rows > 1 and "flash" in config._attn_implementation)
    if whole:
        return layers[-1](hidden_states, attend)[:, :rows]
    queries = hidden_states[:, :rows]
    attend = create_bidirectional_mask(
        config, inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=hidden_states
    )
    return layers[-1](hidden_states, attend, queries)
