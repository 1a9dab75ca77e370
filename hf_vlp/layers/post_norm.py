"""The transformer block of BERT: a layer norm behind each sum, and where wanted attention to another sequence in between."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_vlp.layers.attention import Attention
from hf_vlp.layers.blocks import FeedForward

KeyValues = tuple[torch.Tensor, torch.Tensor]


class PostNormBlock(GradientCheckpointingLayer):
    """Norm(x + Attention(x)), then Norm(x + Attention(x, others)) with `key_value_size`, then Norm(x + FeedForward(x)).

    "Attention Is All You Need", section 3.1; BERT (https://arxiv.org/abs/1810.04805), section 3.

    Args:
        config: configuration with the attention implementation.
        hidden_size, intermediate_size, num_heads: widths and heads.
        hidden_act: name of the activation in transformers' table.
        norm_eps: eps of the layer norms.
        dropout: of the attention weights. hidden_dropout: of what is added to each sum.
        key_value_size: width of the sequence that is attended to besides; None for none.
        is_causal: self-attention sees no later position.
    """

    def __init__(
        self,
        config,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        *,
        hidden_act: str,
        norm_eps: float,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        key_value_size: int | None = None,
        is_causal: bool = False,
    ):
        super().__init__()
        self.attention = Attention(config, hidden_size, num_heads, dropout=dropout, is_causal=is_causal)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        if key_value_size is not None:
            self.cross_attention = Attention(
                config, hidden_size, num_heads, key_value_size=key_value_size, dropout=dropout
            )
            self.cross_attention_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.mlp = FeedForward(hidden_size, intermediate_size, hidden_act)
        self.output_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_values: KeyValues | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        rows: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One block.

        Args:
            hidden_states: [B * T, L, D]. attention_mask: for their self-attention, of `rows` queries where those are given.
            key_values: of B other sequences, as `cross_attention.keys_and_values` makes them, each attended to by T neighbouring rows.
            cross_attention_mask: for the [B, T * L] queries.
            rows: only the first so many positions are computed; None: all.

        Returns:
            [B * T, L or rows, D].
        """
        queries = hidden_states if rows is None else hidden_states[:, :rows]
        source = None if rows is None else hidden_states
        queries = self.attention_norm(
            queries + self.dropout(self.attention(queries, attention_mask, source, **kwargs)[0])
        )
        if key_values is not None:
            # texts that attend to the same sequence are one long sequence of queries to it
            together = queries.reshape(len(key_values[0]), -1, queries.shape[-1])
            mixed = self.cross_attention(together, cross_attention_mask, key_values=key_values, **kwargs)[0]
            queries = self.cross_attention_norm(queries + self.dropout(mixed.view_as(queries)))
        return self.output_norm(queries + self.dropout(self.mlp(queries)))
