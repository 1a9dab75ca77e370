"""The transformer block and its feed-forward network."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_vlp.layers.attention import Attention


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of CLIP's released code, as SiLU(1.702 x) / 1.702.

    Written so, one tensor is kept for the backward instead of two, and two fewer are written.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]."""
        return nn.functional.silu(1.702 * x) * (1 / 1.702)


class FeedForward(nn.Module):
    """Linear(D, intermediate) -> activation -> Linear(intermediate, D); `dropout` behind the activation and at the end."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = QuickGELU() if hidden_act == "quick_gelu" else ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(hidden_states)))))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block: x + Attention(Norm(x)), then x + FeedForward(Norm(x)).

    Args:
        config: configuration with the attention implementation.
        hidden_size, intermediate_size, num_heads: widths and heads.
        hidden_act: name of the activation in transformers' table.
        norm_eps: eps of both layer norms.
        dropout: of the attention weights. hidden_dropout: of the attention's result, and inside and behind the feed-forward network.
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
        is_causal: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.attention = Attention(config, hidden_size, num_heads, dropout=dropout, is_causal=is_causal)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.mlp = FeedForward(hidden_size, intermediate_size, hidden_act, hidden_dropout)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`hidden_states` [B, L, D] -> [B, L, D]; with `queries` [B, Q, D] (rows of `hidden_states`) only those rows -> [B, Q, D]."""
        context = self.norm1(hidden_states)
        if queries is None:
            queries, mixed = hidden_states, self.attention(context, attention_mask, **kwargs)[0]
        else:
            mixed = self.attention(self.norm1(queries), attention_mask, context, **kwargs)[0]
        queries = queries + self.dropout(mixed)
        return queries + self.mlp(self.norm2(queries))
