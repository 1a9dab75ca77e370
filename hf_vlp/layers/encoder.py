"""A stack of blocks."""

from collections.abc import Iterable

import torch
from torch import nn

from hf_vlp.layers.pooling import gather_rows


class Encoder(nn.Module):
    """Blocks one after the other; each block checkpoints itself when gradient checkpointing is on.

    Args:
        layers: the blocks, first to last; at least one.

    Raises:
        ValueError: without any layer.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("an encoder needs at least one layer: num_hidden_layers must be 1 or more")
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states

    def pooled_row(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        row: torch.Tensor,
        row_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The same as `forward(...)` at position `row` [B] of each sequence, [B, D], without computing the last block elsewhere.

        `row_mask` is the mask of that single query, made for the attention implementation in use.
        """
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        query = gather_rows(hidden_states, row).unsqueeze(1)  # [B, 1, D]
        return self.layers[-1](hidden_states, row_mask, query, **kwargs).squeeze(1)
