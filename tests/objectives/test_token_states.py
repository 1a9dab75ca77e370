"""Texts of similar length run together: the numbers of all at once, and groups that cost least by trying out every other."""

import itertools

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_vlp.layers import packing
from hf_vlp.layers.packing import GROUP_COST, group_sizes
from hf_vlp.layers.towers import token_states

LENGTHS = (9, 30, 4, 9, 12, 5, 28, 9, 11, 9, 6, 10)


def cost(lengths, sizes) -> int:
    ends = list(itertools.accumulate(sizes))
    return sum(size * lengths[end - 1] + GROUP_COST for size, end in zip(sizes, ends, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_groups_cost_less(seed):
    lengths = (1 + 60 * torch.rand(9, generator=torch.Generator().manual_seed(seed)).pow(2)).long().sort().values
    sizes, listed = group_sizes(lengths), lengths.tolist()
    cuts = (cut for count in range(9) for cut in itertools.combinations(range(1, 9), count))
    every = [[stop - start for start, stop in itertools.pairwise((0, *cut, 9))] for cut in cuts]
    assert len(every) == 2**8 and sizes in every
    assert cost(listed, sizes) == min(cost(listed, one) for one in every)


def test_groups_of_plain_cases():
    assert group_sizes(torch.full((50,), 7)) == [50] and group_sizes(torch.tensor([3])) == [1]
    assert group_sizes(torch.tensor([5] * 40 + [60] * 2)) == [40, 2]
    assert group_sizes(torch.tensor([5, 6, 7])) == [3]  # too few to be worth another run


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=32, **sizes), add_pooling_layer=False).eval()
    model.runs = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: model.runs.append(inputs["input_ids"].shape), with_kwargs=True
    )
    return model


def texts(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def gradients(model, states, mask) -> list[torch.Tensor]:
    weight = torch.arange(states[mask == 1].numel()).cos().view(-1, states.shape[-1])
    return torch.autograd.grad((states[mask == 1] * weight).sum(), list(model.parameters()))


def test_states_and_gradients_are_those_of_all_at_once(bert):
    ids, mask = texts()
    seen = mask.clone()
    seen[0, 3] = 0  # a word that is pooled and not attended to
    states = token_states(bert, ids, mask, seen)
    assert bert.runs == [(10, 12), (2, 30)]
    expected = bert(input_ids=ids, attention_mask=seen).last_hidden_state
    assert states.shape == expected.shape and torch.allclose(states[mask == 1], expected[mask == 1], atol=1e-5)
    assert not torch.allclose(token_states(bert, ids, mask, mask)[0, :9], expected[0, :9], atol=1e-3)
    found, wanted = gradients(bert, states, mask), gradients(bert, expected, mask)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, wanted, strict=True))
    assert max(one.abs().max() for one in wanted) > 0.1


def test_texts_padded_on_the_left_or_empty_keep_their_places(bert, monkeypatch):
    monkeypatch.setattr(packing, "GROUP_COST", 0)
    ids, mask = texts((5, 3, 8, 2))
    ids, mask = ids.roll(2, dims=1), mask.roll(2, dims=1)  # the longest goes round its end
    mask[1] = 0
    states = token_states(bert, ids, mask, mask)
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask == 1
    assert len(bert.runs) > 2 and torch.allclose(states[kept], expected[kept], atol=1e-5)


def test_all_run_at_once_without_a_mask_or_in_a_traced_graph(bert, monkeypatch):
    ids, mask = texts()
    token_states(bert, ids, None, None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    token_states(bert, ids, mask, mask)
    assert bert.runs == [ids.shape] * 2
