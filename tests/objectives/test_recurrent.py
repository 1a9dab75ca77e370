import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_vlp.layers.recurrent import BidirectionalGRU

LENGTHS = torch.tensor([4, 7, 1, 3, 7])


def pair(layers: int, seed=0) -> tuple[BidirectionalGRU, nn.GRU]:
    """Ours and torch's with the same weights."""
    torch.manual_seed(seed)
    ours = BidirectionalGRU(5, 6, layers)
    theirs = nn.GRU(5, 6, layers, batch_first=True, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def words(longest=7, seed=1) -> torch.Tensor:
    return torch.randn(len(LENGTHS), longest, 5, generator=torch.Generator().manual_seed(seed))


def packed_mean(gru: nn.GRU, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    states, _ = pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=inputs.shape[1])
    return (states[..., :6] + states[..., 6:]) / 2


@pytest.mark.parametrize("way", ["packed", "padded"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_states_and_every_gradient_equal_torchs_packed_gru(layers, way):
    ours, theirs = pair(layers)
    one, other = words().requires_grad_(), words().requires_grad_()
    states = ours(one, LENGTHS) if way == "packed" else ours.padded(one, LENGTHS)
    expected = packed_mean(theirs, other, LENGTHS)
    assert states.shape == (5, 7, 6) and torch.allclose(states, expected, atol=1e-6)
    weight = torch.arange(states.numel()).cos().view(states.shape)
    (states * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad.any() and torch.allclose(parameter.grad, gradients[name], atol=1e-5), name
    _, another = pair(layers, seed=5)
    assert not torch.allclose(packed_mean(another, words(), LENGTHS), states, atol=1e-2)


def test_names_and_order_of_parameters_are_torchs():
    ours, theirs = pair(2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_it_starts_as_torchs():
    ours = BidirectionalGRU(40, 100)
    bound = 100**-0.5
    for name, parameter in ours.named_parameters():
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    again = BidirectionalGRU(40, 100)
    assert not torch.equal(ours.weight_ih_l0, again.weight_ih_l0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("way", ["forward", "padded"])
def test_padding_is_not_seen_and_comes_out_zero(layers, way):
    ours, _ = pair(layers)
    run = ours if way == "forward" else ours.padded
    inside = torch.arange(7)[None, :] < LENGTHS[:, None]
    states = run(words(), LENGTHS)
    assert not states[~inside].any() and states[inside].all()
    changed = words().masked_fill(~inside.unsqueeze(-1), 9.0)
    assert torch.equal(run(changed, LENGTHS), states)
    wider = nn.functional.pad(words(), (0, 0, 0, 3), value=4.0)
    longer = run(wider, LENGTHS)
    assert longer.shape[1] == 10 and torch.allclose(longer[:, :7], states, atol=1e-6) and not longer[:, 7:].any()
    # the backward direction begins at the last element of each row
    assert not torch.allclose(run(words(), LENGTHS.clamp(max=6))[1], states[1], atol=1e-2)


def test_every_row_alone_gives_the_same():
    ours, _ = pair(2)
    together = ours(words(), LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = ours(words()[row : row + 1, :length], torch.tensor([length]))
        assert torch.allclose(alone[0], together[row, :length], atol=1e-6)


def test_a_traced_graph_takes_the_padded_way_whatever_the_lengths():
    ours, _ = pair(2)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(words(), LENGTHS), ours(words(), LENGTHS), atol=1e-6)
    others = LENGTHS.flip(0).clamp(max=5)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = compiled(words(), others)
    assert torch.allclose(again, ours(words(), others), atol=1e-6)
    assert not torch.allclose(again, ours(words(), LENGTHS), atol=1e-2)


@pytest.mark.parametrize("way", ["forward", "padded"])
def test_half_precision(way):
    ours, _ = pair(1)
    expected = ours(words(), LENGTHS)
    half = ours.bfloat16()
    states = (half if way == "forward" else half.padded)(words().bfloat16(), LENGTHS)
    assert states.dtype == torch.bfloat16
    assert (states.float() - expected).norm() / expected.norm() < 0.02
    # the pooling's way: half-precision weights, computed in float32
    assert half.padded(words(), LENGTHS).dtype == torch.float32
