"""What stands on top of an encoder: predictions of masked tokens or patches, and classes of a pooled state."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class MaskedTokenHead(nn.Module):
    """Linear(D, D) -> activation -> layer norm -> Linear(D, V), as BERT's (https://arxiv.org/abs/1810.04805, appendix A)."""

    def __init__(self, hidden_size: int, vocab_size: int, hidden_act: str, norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = ACT2FN[hidden_act]
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> logits [..., V]."""
        return self.decoder(self.norm(self.activation(self.dense(states))))


class PredictsWords:
    """Mixed into a `PreTrainedModel` in front of it: the decoder of its `mlm_head`, if it has one, predicts its words."""

    def get_output_embeddings(self) -> nn.Linear | None:
        return self.mlm_head.decoder if hasattr(self, "mlm_head") else None

    def set_output_embeddings(self, value: nn.Linear):
        self.mlm_head.decoder = value


class ClassifierHead(nn.Module):
    """Linear(D, hidden) -> layer norm -> activation -> Linear(hidden, K)."""

    def __init__(self, size: int, hidden_size: int, num_labels: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.activation = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(hidden_size, num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """[B, D] -> logits [B, K]."""
        return self.fc2(self.activation(self.norm(self.fc1(pooled))))
