"""A gated recurrent unit that reads sequences of different lengths in both directions."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init

PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class BidirectionalGRU(nn.Module):
    """A GRU in both directions (Cho et al. 2014, https://arxiv.org/abs/1406.1078), their states averaged.

    The backward direction of a sequence starts at its own last element. Parameters have the names and the layout of
    `nn.GRU(bidirectional=True)`, which torch.compile cannot trace.

    Args:
        input_size: width of the elements. hidden_size: H. num_layers: each further layer reads both directions of the one before.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        for layer in range(num_layers):
            width = 2 * hidden_size if layer else input_size
            for direction in ("", "_reverse"):
                for part in PARTS:
                    shape = (3 * hidden_size,) if "bias" in part else (3 * hidden_size, width if part == PARTS[0] else hidden_size)
                    self.register_parameter(f"{part}_l{layer}{direction}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own start: uniform in +-1/sqrt(H)."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """`inputs` [B, L, input_size] padded on the right, `lengths` [B] of 1 or more -> [B, L, H], zero at padding.

        Packed, so that no padding is computed; in a traced graph, where shapes must not depend on lengths, as `padded`.
        """
        if torch.compiler.is_compiling():
            return self.padded(inputs, lengths)
        packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        start = inputs.new_zeros(2 * self.num_layers, len(inputs), self.hidden_size)
        weights = list(self.parameters())
        states, _ = torch.gru(
            packed.data, packed.batch_sizes, start, weights, True, self.num_layers, 0.0, self.training, True
        )
        packed = PackedSequence(states, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        states, _ = pad_packed_sequence(packed, batch_first=True, total_length=inputs.shape[1])
        return states.unflatten(-1, (2, self.hidden_size)).mean(dim=2)  # [B, L, 2, H] -> [B, L, H]

    def padded(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The same over the padding too: faster where the hidden state is small. Computed in the type of `inputs`."""
        place = torch.arange(inputs.shape[1], device=inputs.device)[None, :]
        inside = place < lengths[:, None]  # [B, L]
        turned = torch.where(inside, lengths[:, None] - 1 - place, place)  # the elements in reverse, padding where it was
        states = inputs
        for layer in range(self.num_layers):
            ahead = self._one_way(states, layer, "")
            back = _at(self._one_way(_at(states, turned), layer, "_reverse"), turned)
            states = torch.cat([ahead, back], dim=-1)
        return ((ahead + back) / 2).masked_fill(~inside.unsqueeze(-1), 0.0)

    def _one_way(self, inputs: torch.Tensor, layer: int, direction: str) -> torch.Tensor:
        weights = [getattr(self, f"{part}_l{layer}{direction}").to(inputs.dtype) for part in PARTS]
        start = inputs.new_zeros(1, len(inputs), self.hidden_size)
        return torch.gru(inputs, start, weights, True, 1, 0.0, self.training, False, True)[0]


def _at(states: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`states` [B, L, D] in the order `place` [B, L] of each row."""
    return states.gather(1, place.unsqueeze(-1).expand_as(states))
