import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.vision_transformer import Attention as VitAttention
from torch import nn

from reparam.add_attention import (
    AddAttention,
    AddProducts,
    dropped_parts,
    is_softmax_attention,
    refusal,
)


def naive(attention, x):
    """Token by token and head by head, in float64."""
    b, tokens, _ = x.shape
    heads, d = attention.num_heads, attention.head_dim
    w, bias = attention.qkv.weight.double().numpy(), attention.qkv.bias.double().numpy()
    taps = attention.token_conv.weight.double().numpy()[:, 0, :, 0]
    y = np.zeros((b, tokens, heads * d))
    for i in range(b):
        qkv = (x[i].double().numpy() @ w.T + bias).reshape(tokens, 3, heads, d)
        for h in range(heads):
            q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]
            if attention.alphabet == "01":
                q, k = q > q.mean(1, keepdims=True), k > k.mean(1, keepdims=True)
            else:
                q, k = np.where(q > 0, 1, -1), np.where(k > 0, 1, -1)
            for t in range(tokens):
                total = sum((q[t] * 1.0) @ (k[s] * 1.0) / d * v[s] for s in range(tokens))
                z = v[t] / 2 + total / math.pi / math.sqrt(tokens)
                z = z / np.linalg.norm(z)
                for tap in range(9):
                    if 0 <= t + tap - 4 < tokens:
                        z = z + taps[h, tap] * v[t + tap - 4]
                y[i, t, h * d : (h + 1) * d] = z
    proj = attention.proj
    return y @ proj.weight.double().numpy().T + proj.bias.double().numpy()


@torch.no_grad()
@settings(max_examples=15)
@given(
    b=st.integers(1, 3),
    tokens=st.integers(1, 13),
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 9),
    alphabet=st.sampled_from(["pm1", "01"]),
    seed=st.integers(0, 99),
)
def test_forward_equals_a_naive_reference(b, tokens, heads, head_dim, alphabet, seed):
    torch.manual_seed(seed)
    attention = AddAttention(12, heads, head_dim, alphabet)
    nn.init.normal_(attention.token_conv.weight)
    x = torch.randn(b, tokens, 12)
    np.testing.assert_allclose(attention(x).numpy(), naive(attention, x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("alphabet", ["pm1", "01"])
def test_without_the_convolution_tokens_are_exchangeable(alphabet):
    torch.manual_seed(0)
    attention, order = AddAttention(16, 2, 8, alphabet), torch.randperm(11)
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]))


@torch.no_grad()
def test_every_token_depends_on_every_other():
    torch.manual_seed(0)
    attention, x = AddAttention(16, 2, 8), torch.randn(1, 30, 16)
    changed = x.clone()
    changed[0, 29] = torch.randn(16)
    assert ((attention(x) - attention(changed)).abs().amax(-1) > 1e-6).all()


def test_gradients_reach_queries_keys_and_values():
    torch.manual_seed(0)
    attention = AddAttention(16, 2, 8)
    attention(torch.randn(2, 7, 16)).square().sum().backward()
    assert all(part.abs().sum() > 0 for part in attention.qkv.weight.grad.chunk(3))
    assert attention.token_conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("alphabet", ["pm1", "01"])
def test_products_depend_on_signs_alone_but_pass_a_clipped_gradient(alphabet):
    torch.manual_seed(0)
    products, v = AddProducts(alphabet), torch.randn(2, 6, 4)
    q, k = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 8)
    assert torch.equal(products(q, k, v), products(3 * q, k.sign(), v))
    with torch.no_grad():
        q[..., 0] = 100.0
    (gradient,) = torch.autograd.grad(products(q, k, v).square().sum(), q)
    assert (gradient[..., 1:] != 0).all()
    assert (gradient[..., 0].abs() < 0.1 * gradient[..., 1:].abs().amax(-1)).all()


def test_products_are_called_with_the_sources_of_the_codes():
    """The seam of deployment: replacing ``add_products`` replaces both products and no more."""
    seen = []

    class Recorder(nn.Module):
        def forward(self, q, k, v):
            seen.append((q, k, v))
            return torch.zeros_like(v)

    attention = AddAttention(16, 2, 8)
    attention.add_products = Recorder()
    x = torch.randn(3, 5, 16)
    attention(x)
    q, k, v = seen[0]
    assert q.shape == k.shape == v.shape == (6, 5, 8)
    expected = attention.qkv(x).reshape(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).flatten(1, 2)
    assert torch.equal(torch.stack([q, k, v]), expected)


@torch.no_grad()
def test_weights_of_a_fused_attention_carry_over():
    source = VitAttention(16, num_heads=2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    nn.init.normal_(source.q_norm.bias)
    made = AddAttention.from_attention(source)
    assert torch.equal(made.qkv.weight, source.qkv.weight)
    assert torch.equal(made.proj.bias, source.proj.bias)
    assert made.q_norm is source.q_norm and made(torch.randn(2, 5, 16)).shape == (2, 5, 16)


@torch.no_grad()
def test_weights_of_separate_linears_carry_over_and_spatial_reduction_is_dropped():
    source = PvtAttention(16, num_heads=2, sr_ratio=2)
    made = AddAttention.from_attention(source)
    x = torch.randn(2, 16, 16)
    assert torch.equal(made.qkv(x), torch.cat([source.q(x), source.kv(x)], dim=-1))
    assert dropped_parts(source) == ("sr", "norm")
    assert dropped_parts(PvtAttention(16, num_heads=2)) == ()
    assert made(x, [4, 4]).shape == x.shape


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_kept_as_it_is(bias):
    made = AddAttention.from_attention(VitAttention(16, num_heads=2, qkv_bias=bias))
    assert (made.qkv.bias is not None) == bias


def test_what_cannot_be_taken_over_is_refused():
    gated = VitAttention(16, num_heads=2, gated=True)
    assert "gate" in refusal(gated)
    with pytest.raises(ValueError, match="gate"):
        AddAttention.from_attention(gated)
    scaled = VitAttention(16, num_heads=2, scale_norm=True, norm_layer=nn.LayerNorm)
    assert "norm" in refusal(scaled)
    biased = timm.create_model("swin_tiny_patch4_window7_224").layers[0].blocks[0].attn
    assert is_softmax_attention(biased) and "relative_position_bias_table" in refusal(biased)


def test_a_mask_is_refused():
    attention, x = AddAttention(16, 2, 8), torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(x, attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="attn_mask"):
        attention(x, is_causal=True)
