"""Sequences without most of their padding: the states of all at once."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from hf_vlp.layers import packing
from hf_vlp.layers.blocks import Block
from hf_vlp.layers.packing import read_states

WIDTH = 16
HOLES = [  # real positions in front, behind a gap (as patches behind a short text), everywhere, one alone
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 1, 1, 1, 1, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 1, 1, 1, 1, 1, 1],
]


@pytest.fixture
def stack():
    torch.manual_seed(0)
    config = PreTrainedConfig(attn_implementation="sdpa")
    config._attn_implementation = "sdpa"
    layers = nn.ModuleList(Block(config, WIDTH, 24, 2, hidden_act="gelu", norm_eps=1e-6) for _ in range(3)).eval()
    return layers, config


def at_once(layers, config, states, mask):
    attend = create_bidirectional_mask(config, inputs_embeds=states, attention_mask=mask)
    for layer in layers:
        states = layer(states, attend)
    return states


@pytest.mark.parametrize("cost", [0, 10**6])
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_states_and_gradients_are_those_of_all_at_once(stack, monkeypatch, cost, rows):
    monkeypatch.setattr(packing, "GROUP_COST", cost)  # as many groups as lengths, and one
    mask = torch.tensor(HOLES)
    states = torch.randn(len(mask), 10, WIDTH)
    real = mask.bool() if rows is None else mask.bool()[:, :rows]
    weight = torch.arange(int(real.sum()) * WIDTH).cos().view(-1, WIDTH)
    results = []
    for compute in (lambda x: read_states(*stack, x, mask, rows), lambda x: at_once(*stack, x, mask)[:, :rows]):
        given = states.clone().requires_grad_()
        found = compute(given)
        assert found.shape == (5, rows or 10, WIDTH)
        weights = [given, *stack[0].parameters()]
        results.append((found[real], torch.autograd.grad((found[real] * weight).sum(), weights)))
    (one, gradients), (other, expected) = results
    assert torch.allclose(one, other, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, expected, strict=True))
    assert not torch.allclose(read_states(*stack, states, torch.ones_like(mask), rows)[real], other, atol=1e-3)


def test_padding_costs_nothing(stack, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_COST", 0)
    seen = []
    stack[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    read_states(*stack, torch.randn(5, 10, WIDTH), torch.tensor(HOLES))
    assert seen == [(1, 1), (1, 3), (1, 7), (1, 9), (1, 10)]
    monkeypatch.setattr(packing, "GROUP_COST", 10**6)
    read_states(*stack, torch.randn(4, 10, WIDTH), torch.tensor(HOLES)[[0, 1, 3, 4]])
    assert seen[5:] == [(4, 9)]  # the gap behind short texts is closed all the same


def test_the_last_block_runs_for_the_rows_read_alone(stack):
    read = []
    stack[0][2].mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    states, mask = torch.randn(2, 10, WIDTH), torch.ones(2, 10, dtype=torch.long)
    read_states(*stack, states, mask, 3)
    read_states(*stack, states, mask)
    assert read == [3, 10]
