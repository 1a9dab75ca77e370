"""Multi-head attention for every architecture, sent through the attention dispatch of transformers.

Self-attention when only `hidden_states` is given, cross-attention when `key_value_states` is given as well.
The four projections are plain linear layers, which adapters and quantisers need.
"""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, the only one that returns its weights.

    `query` [B, heads, Q, d], `key` and `value` [B, heads, L, d]; `attention_mask` additive, broadcastable to [B, heads, Q, L].
    Returns the mixed values [B, Q, heads, d] and the weights [B, heads, Q, L].
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # [B, heads, Q, L]
    if attention_mask is not None:
        scores = scores + attention_mask
    elif module.is_causal and query.shape[2] > 1:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights


def mask_of_keys(
    config, queries: torch.Tensor, attention_mask: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor | None:
    """The mask by which `queries` [B, Q, D] see `states` [B, L, D] where `attention_mask` [B, L] is 1, for the chosen implementation.

    Flash attention takes a mask of keys for one of as many queries, so for more than one query its mask is [B, 1, 1, L], of which
    `Attention` makes an "sdpa".
    """
    mask = create_bidirectional_mask(
        config, inputs_embeds=queries, attention_mask=attention_mask, encoder_hidden_states=states
    )
    if mask is not None and "flash" in config._attn_implementation and queries.shape[1] > 1:
        return mask[:, None, None].bool()
    return mask


class AttendsInAnyWay:
    """Mixed into a `PreTrainedModel` in front of it: what attends there does so by any implementation that transformers has."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class Attention(nn.Module):
    """Multi-head attention ("Attention Is All You Need", section 3.2.2), scale 1/sqrt(head size).

    Args:
        config: configuration whose attention implementation ("eager", "sdpa", "flash_attention_2", "flex_attention") decides the kernel.
            "sdpa" is transformers' default and the best in float32 and for inference; in bf16 training on a CPU "eager" is as fast on some
            machines and a fifth faster on others (`examples/benchmark.py clip --rows step` tells).
        hidden_size: width D of the queries; must be a multiple of `num_heads`.
        num_heads: number of heads.
        key_value_size: width of the keys' and values' source, D if None.
        out_size: width of the result, D if None.
        dropout: probability of dropping an attention weight in training.
        is_causal: a query sees no later position (self-attention only).

    Raises:
        ValueError: if `hidden_size` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        config,
        hidden_size: int,
        num_heads: int,
        *,
        key_value_size: int | None = None,
        out_size: int | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}: choose heads that divide it")
        self.config = config
        self.num_heads = num_heads
        self.head_size = hidden_size // num_heads
        self.scaling = self.head_size**-0.5
        self.dropout = dropout
        self.is_causal = is_causal
        key_value_size = hidden_size if key_value_size is None else key_value_size
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(key_value_size, hidden_size)
        self.v_proj = nn.Linear(key_value_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size if out_size is None else out_size)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, heads, L, head size]."""
        return projected.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)

    def keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `states` [B, L, key_value_size], each [B, heads, L, head size]: computed once where several passes attend to them."""
        return self._heads(self.k_proj(states)), self._heads(self.v_proj(states))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        key_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, Q, D] attend to `key_value_states` [B, L, key_value_size], or to themselves.

        `key_values`: what `keys_and_values` made of such states, in their place. `attention_mask` is what transformers' mask functions
        make for the chosen implementation (None: everything, or the causal triangle where `is_causal`). Returns [B, Q, out_size] and, with
        "eager" only, the weights [B, heads, Q, L].
        """
        query = self._heads(self.q_proj(hidden_states))
        if key_values is None:
            key_values = self.keys_and_values(hidden_states if key_value_states is None else key_value_states)
        key, value = key_values
        implementation = self.config._attn_implementation
        if "flash" in implementation and attention_mask is not None and attention_mask.ndim == 4:  # see `mask_of_keys`
            implementation = "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(mixed.flatten(2)), weights  # [B, Q, out_size]
