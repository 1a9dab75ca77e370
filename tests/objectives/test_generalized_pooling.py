"""Generalized pooling against a slow formulation of the paper's, one sample at a time, with torch's own packed GRU."""

import math

import pytest
import torch
from torch import nn

from hf_vlp.layers import pooling
from hf_vlp.layers.pooling import GeneralizedPooling, sinusoids, weighted_sorted_sum

LENGTHS = (5, 2, 7, 7, 1, 4)
WIDTH = 3


def operator(position_size=8, hidden_size=6, scale=1.5, seed=0) -> GeneralizedPooling:
    """Weights large enough for scores that differ; a new operator weighs almost evenly."""
    torch.manual_seed(seed)
    made = GeneralizedPooling(position_size, hidden_size)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def sets(lengths=LENGTHS, width=WIDTH, longest=None, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features [B, K, D] and their mask, elements in front, padding full of what must not be seen."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lengths), longest or max(lengths), width, generator=draw)
    mask = (torch.arange(features.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return features.masked_fill(mask.unsqueeze(-1) == 0, 77.0), mask


class Literal(nn.Module):
    """The operator as the released code computes it: packed, every sample by itself, with -10000 for what is not there."""

    def __init__(self, twin: GeneralizedPooling):
        super().__init__()
        self.gru = nn.GRU(twin.gru.input_size, twin.gru.hidden_size, 1, batch_first=True, bidirectional=True)
        self.gru.load_state_dict(twin.gru.state_dict())
        self.linear = nn.Linear(twin.gru.hidden_size, 1, bias=False)
        self.linear.load_state_dict(twin.linear.state_dict())

    def code(self, positions: int) -> torch.Tensor:
        width = self.gru.input_size
        code = torch.zeros(positions, width)
        for k in range(positions):
            for j in range(width // 2):
                rate = math.exp(-2 * j * math.log(10000.0) / width)
                code[k, 2 * j], code[k, 2 * j + 1] = math.sin(k * rate), math.cos(k * rate)
        return code

    def forward(self, features, lengths):
        pooled, weights = [], []
        longest = max(lengths)
        for row, length in zip(features, lengths, strict=True):
            code = self.code(longest).masked_fill(torch.arange(longest)[:, None] >= length, 0)
            packed = nn.utils.rnn.pack_padded_sequence(code[None], [length], batch_first=True)
            states, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
            half = states.shape[-1] // 2
            scores = self.linear((states[0, :, :half] + states[0, :, half:]) / 2)  # [K, 1]
            beyond = torch.arange(longest)[:, None] >= length
            share = (scores.masked_fill(beyond, -10000) / 0.1).softmax(dim=0)
            values = row[:longest].masked_fill(beyond, -10000).sort(dim=0, descending=True).values
            pooled.append((values.masked_fill(beyond, 0) * share).sum(dim=0))
            weights.append(share[:, 0])
        return torch.stack(pooled), torch.stack(weights)


@pytest.fixture(params=["eager", "distinct lengths unknown"])
def path(request, monkeypatch):
    """What the CPU takes, and what traced graphs and accelerators take: no shape depends on the lengths."""
    if request.param != "eager":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


# Against the literal formulation


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 3), (4,) * 5, (1, 1), (20,)])
@pytest.mark.parametrize(("position_size", "hidden_size"), [(8, 6), (32, 32), (2, 5)])
def test_pooled_and_weights_and_every_gradient_equal_the_formula(path, lengths, position_size, hidden_size):
    ours = operator(position_size, hidden_size)
    theirs = Literal(ours)
    features, mask = sets(lengths)
    one, other = features.clone().requires_grad_(), features.clone().requires_grad_()
    pooled, weights = ours(one, mask)
    expected, expected_weights = theirs(other, lengths)
    assert torch.allclose(pooled, expected, atol=1e-5)
    assert weights.shape == mask.shape and torch.allclose(weights, expected_weights, atol=1e-6)

    weight = torch.arange(pooled.numel()).cos().view(pooled.shape)
    (pooled * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4), name
        assert bool(parameter.grad.abs().max() > 1e-6) == (max(lengths) > 1), name


def test_the_comparison_can_fail(path):
    """Other positions, another temperature, other weights or features: each is seen."""
    ours = operator()
    features, mask = sets()
    pooled, weights = ours(features, mask)
    expected, expected_weights = Literal(operator(seed=3))(features, LENGTHS)
    assert not torch.allclose(weights, expected_weights, atol=1e-2) and not torch.allclose(pooled, expected, atol=1e-2)
    ours.temperature = 0.2
    assert not torch.allclose(ours(features, mask)[1], weights, atol=1e-2)
    other, _ = sets(seed=2)
    assert not torch.allclose(Literal(operator())(other, LENGTHS)[0], pooled, atol=1e-2)


def test_without_a_mask_all_elements_count(path):
    features, _ = sets((6, 6, 6))
    pooled, weights = operator()(features)
    whole = torch.ones(3, 6)
    assert torch.allclose(pooled, operator()(features, whole)[0], atol=1e-6)
    assert torch.allclose(weights, operator()(features, whole)[1]) and weights.shape == (3, 6)
    whole[1, 5] = 0
    assert not torch.allclose(pooled[1], operator()(features, whole)[0][1], atol=1e-3)


def test_sinusoids_equal_the_formula():
    expected = Literal(operator(32)).code(300)
    assert torch.allclose(sinusoids(300, 32), expected, atol=3e-5)  # angles up to 299 in float32
    assert sinusoids(3, 2).tolist()[0] == [0.0, 1.0]
    with pytest.raises(ValueError, match="position_size 7 must be even"):
        GeneralizedPooling(7)


# The weights


def test_weights_sum_to_one_and_are_zero_beyond_the_length(path):
    features, mask = sets(longest=11)
    _, weights = operator()(features, mask)
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(LENGTHS)), atol=1e-6)
    assert not weights[mask == 0].any() and weights[mask == 1].all()


def test_weights_depend_on_the_length_alone(path):
    ours = operator()
    features, mask = sets((5, 3, 5, 4))
    weights = ours(features, mask)[1]
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights, ours(features * -3 + 1, mask)[1])
    assert not torch.allclose(weights[0, :4], weights[3, :4], atol=1e-2)
    alone = ours(features[3:, :4], mask[3:, :4])[1]
    assert torch.allclose(alone[0], weights[3, :4], atol=1e-6)


@pytest.mark.parametrize("longest", [4, 30])
def test_one_computation_a_length_equals_one_a_sample(path, longest):
    """Also where there are fewer elements than rows, and more."""
    ours = operator()
    lengths = torch.tensor([3, 1, 4, 4, 2, 4, 1])
    together = ours.coefficients(lengths, longest)
    apart = [ours.coefficients(length[None], longest)[0] for length in lengths]
    assert torch.allclose(together, torch.stack(apart), atol=1e-6)
    # the order and the gradient are those of the rows
    turned = ours.coefficients(lengths.flip(0), longest)
    assert torch.allclose(turned.flip(0), together, atol=1e-6) and not torch.allclose(turned, together, atol=1e-2)
    weight = torch.arange(together.numel()).cos().view(together.shape)
    ours_gradient = torch.autograd.grad((together * weight).sum(), list(ours.parameters()))
    expected = torch.autograd.grad((torch.stack(apart) * weight).sum(), list(ours.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(ours_gradient, expected, strict=True))


def test_the_gru_runs_once_a_distinct_length(monkeypatch):
    seen = []
    ours = operator()
    monkeypatch.setattr(
        ours.gru,
        "padded",
        lambda inputs, lengths, run=ours.gru.padded: seen.append(len(inputs)) or run(inputs, lengths),
    )
    features, mask = sets((5, 3, 5, 3, 3, 5, 5, 5))
    ours(features, mask)
    ours(features)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours(features, mask)  # five possible lengths, eight rows
    ours(features[:2], mask[:2])  # five possible lengths, two rows
    assert seen == [2, 1, 5, 2]


def test_mean_and_maximum_are_special_cases():
    ours = operator()
    features, mask = sets()
    with torch.no_grad():
        ours.linear.weight.zero_()
    counts = mask.sum(dim=1, keepdim=True)
    mean = (features * mask.unsqueeze(-1)).sum(dim=1) / counts
    assert torch.allclose(ours(features, mask)[0], mean, atol=1e-6)
    # a GRU that adds up: its first place is the one with the smallest state ahead and the largest behind
    maximum = features.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1)
    assert not torch.allclose(mean, maximum, atol=0.1)
    with torch.no_grad():
        for name, parameter in ours.gru.named_parameters():
            parameter.zero_()
            if name == "bias_ih_l0_reverse":
                parameter[6:12] = 3.0  # the update gate keeps most of the old state ...
                parameter[12:] = 5.0  # ... and moves it towards 1
            if name == "bias_ih_l0":
                parameter[6:12], parameter[12:] = 3.0, -5.0
        ours.linear.weight.fill_(20.0)
    assert torch.allclose(ours(features, mask)[0], maximum, atol=1e-4)
    with torch.no_grad():
        ours.linear.weight.fill_(-20.0)
    minimum = features.masked_fill(mask.unsqueeze(-1) == 0, torch.inf).amin(dim=1)
    assert torch.allclose(ours(features, mask)[0], minimum, atol=1e-4)


# The set


@pytest.mark.parametrize("gradient", [False, True])
def test_elements_may_stand_anywhere_and_in_any_order(path, gradient):
    ours = operator()
    features, mask = sets()
    pooled, weights = ours(features, mask)
    order = torch.stack([torch.randperm(7) for _ in LENGTHS])
    scattered = features.gather(1, order.unsqueeze(-1).expand_as(features)).requires_grad_(gradient)
    scattered_mask = mask.gather(1, order)
    assert not torch.equal(scattered_mask, mask)
    with torch.set_grad_enabled(gradient):
        turned, again = ours(scattered, scattered_mask)
        moved = ours(scattered, mask)[0]
    assert torch.allclose(turned, pooled, atol=1e-5) and torch.equal(again, weights)
    assert not torch.allclose(moved, pooled, atol=1e-2)
    if gradient:
        turned.sum().backward()
        assert torch.equal(scattered.grad.abs().sum(-1) > 0, scattered_mask.bool())
        assert torch.allclose(
            scattered.grad.sum(dim=1), torch.ones(len(LENGTHS), WIDTH), atol=1e-5
        )  # weights of a row sum to 1


@pytest.mark.parametrize("gradient", [False, True])
def test_padding_and_what_is_in_it_change_nothing(path, gradient):
    ours = operator()
    features, mask = sets()
    with torch.set_grad_enabled(gradient):
        pooled = ours(features.requires_grad_(gradient), mask)[0]
        wider = nn.functional.pad(features, (0, 0, 0, 4), value=-3.0)
        assert torch.allclose(ours(wider, nn.functional.pad(mask, (0, 4)))[0], pooled, atol=1e-5)
        for junk in (1e30, -1e30, torch.inf, -torch.inf, torch.nan):
            filled = features.masked_fill(mask.unsqueeze(-1) == 0, junk)
            assert torch.allclose(ours(filled, mask)[0], pooled, atol=1e-5)
        assert not torch.allclose(ours(wider, nn.functional.pad(mask, (0, 4), value=1))[0], pooled, atol=1e-2)


def test_types_of_masks(path):
    features, mask = sets()
    pooled = operator()(features, mask)[0]
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(operator()(features, mask.to(dtype))[0], pooled)


def test_rows_without_elements_are_named():
    features, mask = sets((3, 2, 3, 1))
    mask[1], mask[3] = 0, 0
    with pytest.raises(ValueError, match=r"row\(s\) \[1, 3\] of the mask hold no element"):
        operator()(features, mask)


def test_rows_without_elements_are_zero_where_nobody_looks(monkeypatch):
    """On an accelerator nothing waits to look at lengths: such a row comes out as zero, and the others as ever."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    features, mask = sets((3, 2, 3, 1))
    expected = operator()(features, mask)[0]
    mask[1] = 0
    for rows in (slice(None), slice(0, 2)):
        leaf = features[rows].clone().requires_grad_()
        pooled = operator()(leaf, mask[rows])[0]
        assert not pooled[1].any() and torch.allclose(pooled[0], expected[0], atol=1e-6)
        pooled.sum().backward()
        assert leaf.grad.isfinite().all() and not leaf.grad[1].any()


@pytest.mark.parametrize("shape", [(6, 6), (6, 1), (5, 7), (7,), (6, 8)])
def test_a_mask_of_another_shape_is_refused(shape):
    features, _ = sets()
    with pytest.raises(ValueError, match=r"mask of \[6, 7\] elements must have that shape, got"):
        operator()(features, torch.ones(shape))


# The sorted sum and its sorting network


def exchanged(rows: list) -> list:
    rows = list(rows)
    for upper, lower in pooling._exchanges(len(rows)):
        rows[upper], rows[lower] = max(rows[upper], rows[lower]), min(rows[upper], rows[lower])
    return rows


@pytest.mark.parametrize("count", range(1, pooling.LARGEST_NETWORK + 1))
def test_the_network_sorts(count):
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(40, count, generator=draw)
    values[10:20] = values[10:20].round()  # ties
    values[20:30] = (values[20:30] > 0).float()
    values[30] = -5.0
    ends = values[31:34].clone()
    ends[0, ::2], ends[1, ::3], ends[2, ::2], ends[2, 1::2] = torch.inf, -torch.inf, torch.inf, -torch.inf
    for row in ends.tolist():
        assert exchanged(row) == sorted(row, reverse=True)
    for ones in range(count + 1):
        worst = [0] * (count - ones) + [1] * ones
        assert exchanged(worst) == worst[::-1]
    # set p of `count` sets takes the value at place p
    places = pooling._sum_through_network(values.T.expand(count, -1, -1), torch.eye(count), None)  # [count, 40]
    assert torch.equal(places, values.T.sort(dim=0, descending=True).values)


def test_every_row_of_zeros_and_ones_is_sorted_up_to_twelve():
    for count in range(1, 13):
        bits = (torch.arange(2**count)[:, None] >> torch.arange(count)) & 1
        rows = list(bits.unbind(1))
        for upper, lower in pooling._exchanges(count):
            rows[upper], rows[lower] = rows[upper] | rows[lower], rows[upper] & rows[lower]
        assert torch.equal(torch.stack(rows, 1), bits.sort(dim=1, descending=True).values), count
        if count > 1:  # one exchange fewer does not sort
            rows = list(bits.unbind(1))
            for upper, lower in pooling._exchanges(count)[:-1]:
                rows[upper], rows[lower] = rows[upper] | rows[lower], rows[upper] & rows[lower]
            assert not torch.equal(torch.stack(rows, 1), bits.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 36, 63, 64, 65, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_sorted_sums_with_and_without_gradient_are_the_same(count, masked, monkeypatch):
    """Without a gradient a network sorts up to 64 elements; more, and all with gradient, torch does."""
    used = []
    monkeypatch.setattr(
        pooling,
        "_sum_through_network",
        lambda *args, run=pooling._sum_through_network: used.append(count) or run(*args),
    )
    draw = torch.Generator().manual_seed(count)
    features = torch.randn(4, count, 5, generator=draw).round(decimals=1)
    mask = torch.rand(4, count, generator=draw) > 0.4
    mask[:, 0] = True
    mask = mask if masked else None
    lengths = mask.sum(dim=1) if masked else torch.full((4,), count)
    weights = torch.rand(4, count, generator=draw).masked_fill(torch.arange(count) >= lengths[:, None], 0)
    without = weighted_sorted_sum(features, weights, mask)
    assert bool(used) == (count <= 64)
    used.clear()
    leaf = features.clone().requires_grad_()
    with_gradient = weighted_sorted_sum(leaf, weights, mask)
    assert not used and with_gradient.requires_grad
    for row in range(4):
        kept = features[row] if mask is None else features[row][mask[row]]
        expected = (kept.sort(dim=0, descending=True).values * weights[row, : len(kept), None]).sum(dim=0)
        assert torch.allclose(without[row], expected, atol=1e-5)
        assert torch.allclose(with_gradient[row], expected, atol=1e-5)
    if count > 1:
        assert not torch.allclose(weighted_sorted_sum(features, weights.flip(1), mask), without, atol=1e-2)


# Precision and graphs


@pytest.mark.parametrize("gradient", [False, True])
def test_half_precision_keeps_the_weights_in_float32(gradient):
    ours = operator()
    features, mask = sets(LENGTHS, width=16)
    pooled, weights = ours(features, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(gradient):
        half, same = ours(features.bfloat16().requires_grad_(gradient), mask)
    assert same.dtype == torch.float32 and torch.equal(same, weights)
    assert (half.float() - pooled).norm() / pooled.norm() < 0.01
    with torch.set_grad_enabled(gradient):
        half, rounded = ours.bfloat16()(features.bfloat16().requires_grad_(gradient), mask)
    assert half.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert torch.allclose(rounded.sum(dim=1), torch.ones(len(LENGTHS)), atol=1e-6)
    assert (half.float() - pooled).norm() / pooled.norm() < 0.05
    assert not torch.equal(rounded, weights)  # parameters of half precision


def test_long_sets_of_half_precision_add_up_as_precisely_as_short_ones():
    """Adding 60 numbers in bfloat16 itself would be off by several per cent."""
    ours = operator(scale=0.0)
    features = torch.rand(8, 60, 16).bfloat16()
    expected = features.float().mean(dim=1)
    for leaf in (features, features.clone().requires_grad_()):
        half = ours(leaf)[0]
        assert half.dtype == torch.bfloat16
        assert ((half.float() - expected) / expected).abs().max() < 2**-7


def test_compiles_without_a_graph_break():
    ours = operator()
    features, mask = sets()
    expected = ours(features, mask)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compiled(features, mask), expected, strict=True))
    shorter = mask.clone()
    shorter[2:4, 5:] = 0  # the lengths are not part of the graph
    with torch.compiler.set_stance("fail_on_recompile"):
        again = compiled(features, shorter)[0]
    assert torch.allclose(again, ours(features, shorter)[0], atol=1e-5)
    assert not torch.allclose(again, expected[0], atol=1e-3)
