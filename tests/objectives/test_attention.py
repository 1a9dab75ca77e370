import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_vlp.layers.attention import Attention
from hf_vlp.layers.blocks import Block
from hf_vlp.layers.encoder import Encoder
from hf_vlp.layers.resnet import AttentionPool


def config(implementation="eager"):
    return PreTrainedConfig(attn_implementation=implementation)


def as_torch(attention: Attention) -> nn.MultiheadAttention:
    """torch's own module with the same weights."""
    width = attention.q_proj.out_features
    twin = nn.MultiheadAttention(width, attention.num_heads, batch_first=True)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        twin.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        twin.out_proj.load_state_dict(attention.out_proj.state_dict())
    return twin


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_torch(implementation, causal):
    attention = Attention(config(implementation), 12, 3, is_causal=causal)
    states = torch.randn(2, 5, 12)
    triangle = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, weights = as_torch(attention)(
        states, states, states, attn_mask=triangle if causal else None, average_attn_weights=False
    )
    mixed, ours = attention(states)
    assert torch.allclose(mixed, expected, atol=1e-6)
    assert ours is None or torch.allclose(ours, weights, atol=1e-6)
    other = as_torch(attention)(states, states, states, attn_mask=None if causal else triangle)[0]
    assert not torch.allclose(mixed, other, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cross_attention_equals_torch(implementation):
    attention = Attention(config(implementation), 12, 3)
    queries, source = torch.randn(2, 3, 12), torch.randn(2, 7, 12)
    assert torch.allclose(
        attention(queries, None, source)[0], as_torch(attention)(queries, source, source)[0], atol=1e-6
    )


def test_other_widths():
    attention = Attention(config(), 12, 3, key_value_size=20, out_size=8)
    mixed, weights = attention(torch.randn(2, 3, 12), None, torch.randn(2, 7, 20))
    assert mixed.shape == (2, 3, 8) and weights.shape == (2, 3, 3, 7)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masked_positions_do_not_matter(implementation):
    attention = Attention(config(implementation), 12, 3)
    states = torch.randn(1, 5, 12)
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., 3:] = torch.finfo(torch.float32).min
    changed = states.clone()
    changed[:, 3:] += 1
    assert torch.allclose(attention(states, mask)[0][:, :3], attention(changed, mask)[0][:, :3], atol=1e-6)
    assert not torch.allclose(attention(states)[0][:, :3], attention(changed)[0][:, :3], atol=1e-3)


def test_dropout_in_training_only():
    attention = Attention(config(), 12, 3, dropout=0.5)
    states = torch.randn(2, 5, 12)
    assert not torch.equal(attention(states)[0], attention(states)[0])
    attention.eval()
    assert torch.equal(attention(states)[0], attention(states)[0])


def test_attention_weights_are_softmaxed_in_float32():
    attention = Attention(config(), 8, 1).to(torch.bfloat16)
    mixed, weights = attention(torch.randn(1, 64, 8, dtype=torch.bfloat16))
    assert mixed.dtype == weights.dtype == torch.bfloat16 and mixed.isfinite().all()


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_that_do_not_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"12 is not a multiple of num_heads {heads}"):
        Attention(config(), 12, heads)


def a_block(**kwargs) -> Block:
    block = Block(config(), 12, 20, 3, hidden_act="quick_gelu", norm_eps=1e-5, **kwargs)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_the_formula(causal):
    block, x = a_block(is_causal=causal), torch.randn(2, 5, 12)
    triangle = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    first = nn.functional.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias, 1e-5)
    middle = x + as_torch(block.attention)(first, first, first, attn_mask=triangle)[0]
    second = nn.functional.layer_norm(middle, (12,), block.norm2.weight, block.norm2.bias, 1e-5)
    hidden = second @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    expected = middle + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_chosen_queries_equal_their_rows_of_the_whole_block():
    block, x = a_block(), torch.randn(2, 5, 12)
    assert torch.allclose(block(x, None, x[:, 1:3]), block(x)[:, 1:3], atol=1e-5)


def test_encoder_runs_its_layers_in_order_and_pools_a_row_exactly():
    encoder, x = Encoder([a_block(), a_block()]), torch.randn(3, 5, 12)
    expected = encoder.layers[1](encoder.layers[0](x))
    assert torch.equal(encoder(x), expected)
    assert not torch.allclose(encoder(x), encoder.layers[0](encoder.layers[1](x)), atol=1e-3)
    row = torch.tensor([0, 4, 2])
    assert torch.allclose(encoder.pooled_row(x, None, row), expected[torch.arange(3), row], atol=1e-5)


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        Encoder([])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_pool_equals_torch(implementation):
    pool = AttentionPool(config(implementation), grid=2, hidden_size=12, num_heads=3, out_size=12)
    nn.init.normal_(pool.position_embedding)
    features = torch.randn(2, 12, 2, 2)
    cells = torch.stack([features[:, :, 0, 0], features[:, :, 0, 1], features[:, :, 1, 0], features[:, :, 1, 1]], 1)
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + pool.position_embedding
    expected = as_torch(pool.attention)(tokens[:, :1], tokens, tokens)[0][:, 0]
    assert torch.allclose(pool(features), expected, atol=1e-5)
    assert not torch.allclose(pool(features.transpose(2, 3)), expected, atol=1e-3)  # places matter


def test_attention_pool_on_another_grid():
    pool = AttentionPool(config(), grid=2, hidden_size=12, num_heads=3, out_size=8)
    nn.init.normal_(pool.position_embedding)
    assert pool(torch.randn(2, 12, 3, 4)).shape == (2, 8)
