"""What a text encoder reads: words, positions and segments, as BERT's (https://arxiv.org/abs/1810.04805), section 3."""

import torch
from torch import nn


class TextEmbeddings(nn.Module):
    """Words, positions and segments added up and normalised.

    Args:
        vocab_size, max_position_embeddings, type_vocab_size: rows of the three tables. hidden_size: their width D.
        norm_eps: eps of the layer norm. dropout: behind it. pad_token_id: its row gets no gradient from here.
    """

    def __init__(
        self,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        hidden_size: int,
        *,
        norm_eps: float,
        dropout: float = 0.0,
        pad_token_id: int | None = None,
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`input_ids` [B, L] or the embeddings of words [B, L, D], and `token_type_ids` [B, L] where not all are 0 -> [B, L, D].

        Raises:
            ValueError: for a text longer than the table, or without either input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, longest = words.shape[1], self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(
                f"texts of {length} tokens, but the position table has {longest} rows: truncate (the processor does) or lengthen "
                "the table with resize_position_embeddings, which needs training"
            )
        segments = self.token_type_embeddings
        words = words + (segments.weight[0] if token_type_ids is None else segments(token_type_ids))
        return self.dropout(self.norm(words + self.position_embeddings.weight[:length]))

    @torch.no_grad()
    def resize_positions(self, rows: int, std: float) -> None:
        """Shorten or lengthen the table of positions; new rows are normal with `std` and need training."""
        old = self.position_embeddings.weight
        new = nn.Embedding(rows, old.shape[1], dtype=old.dtype, device=old.device)
        new.weight.normal_(std=std)
        kept = min(len(old), rows)
        new.weight[:kept] = old[:kept]
        self.position_embeddings = new
