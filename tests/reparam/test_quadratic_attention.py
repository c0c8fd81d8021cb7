import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Attention as VitAttention
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.agreement import ROUNDING, first_flip, layer_error
from reparam.attention_structure import example_input, trace
from reparam.coded_attention import CodedAttention, with_core
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed import DeployedQuadraticCore
from reparam.plan import Plan
from reparam.quadratic_attention import CodeScores, QuadraticCore


@torch.no_grad()
@settings(max_examples=15)
@given(
    queries=st.integers(1, 6),
    keys=st.integers(1, 7),
    d=st.integers(2, 9),
    alphabet=st.sampled_from(["pm1", "01"]),
    seed=st.integers(0, 99),
)
def test_scores_equal_a_naive_reference(queries, keys, d, alphabet, seed):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 3, queries, d), torch.randn(2, 3, keys, d)
    got = QuadraticCore(alphabet).scores(q, k.transpose(-2, -1))
    for i in range(queries):
        for j in range(keys):
            a, b = q[1, 2, i], k[1, 2, j]
            if alphabet == "01":
                codes = ((a > a.mean()) & (b > b.mean())).sum()
            else:
                codes = ((a > 0) == (b > 0)).sum() * 2 - d
            expected = codes * a.abs().mean() * b.abs().mean()
            torch.testing.assert_close(got[1, 2, i, j], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_angular_weights_are_shares_of_equal_bits_times_the_bias():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 4)
    bias = torch.tensor([[0.0, 1.0, -torch.inf], [0.5, 0.0, 0.0]])
    share = ((q[0, 0, :, None] > 0) == (k[0, 0, None] > 0)).float().mean(-1)
    weight = share * bias.exp()
    expected = (weight / weight.sum(-1, keepdim=True)) @ v[0, 0]
    got = QuadraticCore(similarity="angular").attend(q, k, v, attn_mask=bias)
    torch.testing.assert_close(got[0, 0], expected)


@torch.no_grad()
def test_codes_of_codes_give_the_attention_itself():
    """Of ±1 features the codes lose nothing: bias, mask, causality and scale are all kept."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 16).sign() for _ in range(2))
    v, bias, core = torch.randn(2, 3, 5, 4), torch.randn(5, 5), QuadraticCore()
    seen = torch.rand(5, 5) > 0.5
    seen.fill_diagonal_(True)
    for options in ({}, {"attn_mask": bias}, {"attn_mask": seen}, {"is_causal": True}):
        for scale in (None, 0.1):
            expected = F.scaled_dot_product_attention(q, k, v, scale=scale, **options)
            torch.testing.assert_close(core.attend(q, k, v, scale=scale, **options), expected)


def test_with_core_replaces_the_scores_alone_and_leaves_the_original():
    torch.manual_seed(0)
    attention, x = VitAttention(16, num_heads=2), torch.randn(2, 5, 16)
    before = attention(x)
    made = with_core(attention, QuadraticCore())
    assert isinstance(made, VitAttention) and isinstance(made, CodedAttention)
    assert torch.equal(attention(x), before) and not hasattr(attention, "core")
    assert made.qkv.weight is attention.qkv.weight
    seen = []
    made.core.code_scores.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    made(x).square().sum().backward()
    (q, k), out = seen[0]
    assert q.shape == k.shape == (4, 5, 8) and out.shape == (4, 5, 5)
    assert torch.equal(out, out.round())
    assert all(part.abs().sum() > 0 for part in made.qkv.weight.grad.chunk(3))


@torch.no_grad()
def test_only_the_products_that_a_softmax_sees_are_replaced():
    model = timm.create_model("efficientvit_m0").eval()
    x = torch.randn(1, 3, 224, 224)
    fqn, traced = next(iter(trace(model, x).attentions.items()))
    core, heads = QuadraticCore(), len(model.get_submodule(fqn).qkvs)
    calls = []
    core.code_scores.register_forward_hook(lambda *args: calls.append(1))
    model.set_submodule(fqn, with_core(model.get_submodule(fqn), core, traced.scores))
    assert model(x).isfinite().all() and len(calls) == heads > 1


MASKS = {
    "none": {},
    "numbers": {"attn_mask": torch.randn(5, 7)},
    "truths": {"attn_mask": torch.randn(3, 5, 7) > -1},
    "causal": {"is_causal": True, "scale": 0.7},
}


@torch.no_grad()
@pytest.mark.parametrize("alphabet", ["pm1", "01"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("before", [(3,), (2, 3), (2, 1, 3)])
def test_the_deployed_core_computes_what_was_trained(before, mask, alphabet):
    torch.manual_seed(0)
    q, k = torch.randn(*before, 5, 12), torch.randn(*before, 7, 12)
    v, core = torch.randn(*before, 7, 4), QuadraticCore(alphabet)
    deployed = deploy(core)
    assert isinstance(deployed, DeployedQuadraticCore)
    given = MASKS[mask]
    torch.testing.assert_close(deployed.attend(q, k, v, **given), core.attend(q, k, v, **given))
    given = q, k.transpose(-2, -1)
    torch.testing.assert_close(deployed.scores(*given), core.scores(*given))


@pytest.mark.parametrize("other", [{"similarity": "angular"}, {"hashing": nn.Identity()}])
def test_what_the_kernel_does_not_compute_stays(other):
    assert type(deploy(QuadraticCore(**other))) is QuadraticCore


class Operators(TorchDispatchMode):
    """Notes the name of each operator that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


DEPLOYED = {
    "vit_tiny_patch16_224": {"img_size": 48, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 2), "embed_dim": 48},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 8, "depths": (2,)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", DEPLOYED)
def test_deployed_models_compare_codes_by_kernels(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **DEPLOYED[name]).eval()
    x = example_input(model)
    done = reparameterize_(model, ReparamConfig(attention="quadratic", mlp="shift_int8"))
    attentions = {fqn for fqn, what in done.converted.items() if "quadratic" in what}
    assert layer_error(model, deploy(model, fuse=False), x) < 1e-4
    deployed = deploy(model)
    with Operators() as operators:
        out = deployed(x)
    kernels = [name for name in operators.seen if name.startswith("shiftadd.code_")]
    assert len(kernels) == len(attentions) > 1
    # A code within rounding of its threshold may fall on either side.
    assert (out - model(x)).norm() < 2e-2 * out.norm()
    torch.testing.assert_close(Plan(deployed, x)(x), out, rtol=1e-4, atol=1e-5)


class SharedHeads(nn.Module):
    """Eight channels in four heads of queries, and fewer of keys and values."""

    def __init__(self, way, sharing):
        super().__init__()
        self.way, self.sharing = way, sharing
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 2 * (8 // sharing))

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, 2)).transpose(1, 2).chunk(2, dim=1)
        if self.way == "each its own":
            k, v = (part.repeat_interleave(self.sharing, dim=1) for part in (k, v))
        if self.way == "steps":
            out = (q @ k.transpose(-2, -1) * 2**-0.5).softmax(-1) @ v
        else:
            grouped = {"enable_gqa": True} if self.way == "grouped" else {}
            out = F.scaled_dot_product_attention(q, k, v, **grouped)
        return out.transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "way", "sharing"),
    [
        ("add", "grouped", 2),
        ("add", "broadcast", 4),
        ("quadratic", "grouped", 2),
        ("quadratic", "broadcast", 4),
        ("quadratic", "steps", 4),
    ],
)
def test_heads_that_share_keys_are_converted_as_if_each_had_its_own(form, way, sharing):
    x, found = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)), []
    for each in (way, "each its own"):
        torch.manual_seed(0)
        model = nn.Sequential(SharedHeads(each, sharing)).eval()
        model.get_classifier = lambda: None
        done = reparameterize_(model, ReparamConfig(attention=form), example=x)
        assert list(done.converted) == ["0"]
        found.append(model(x))
    torch.testing.assert_close(*found)


def test_a_failing_forward_leaves_no_mode_behind():
    attention = with_core(VitAttention(16, num_heads=2), QuadraticCore())
    with pytest.raises(RuntimeError):
        attention(torch.randn(2, 5, 17))
    q = torch.randn(1, 1, 3, 4)
    assert torch.equal(q @ q.transpose(-2, -1), torch.matmul(q, q.transpose(-2, -1)))
    nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("alphabet", ["pm1", "01"])
def test_code_scores_depend_on_signs_alone_and_pass_a_gradient(alphabet):
    torch.manual_seed(0)
    scores = CodeScores(alphabet)
    q, k = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 8)
    assert torch.equal(scores(q, k), scores(5 * q, k.sign() / math.pi))
    assert torch.autograd.grad(scores(q, k).square().sum(), q)[0].abs().sum() > 0


@torch.no_grad()
def test_a_flipped_code_is_traced_to_its_attention():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2).eval()
    reparameterize_(model, ReparamConfig(attention="quadratic"))
    deployed, images = deploy(model), torch.randn(20, 1, 3, 96, 96)
    deployed.blocks[0].attn.qkv.weight.mul_(1 + 3e-5 * torch.randn(576, 192))
    flips = [flip for image in images if (flip := first_flip(model, deployed, image))]
    assert {flip.layer for flip in flips} >= {"blocks.0.attn.core"}
    assert all(0 < flip.gap <= ROUNDING for flip in flips)
