import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from reparam.attention_structure import example_input, trace


class Steps(nn.Module):
    """Attention under a name of its own, in steps of its own."""

    def __init__(self, dim=8, softmax_dim=-1):
        super().__init__()
        self.mix, self.unused = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.softmax_dim = softmax_dim

    def forward(self, x):
        a, b, c = self.mix(x).chunk(3, dim=-1)
        x = F.linear(x, self.unused.weight)
        other = x @ x.transpose(1, 2)  # a product that no softmax sees
        return (a @ b.transpose(1, 2) / 3).softmax(self.softmax_dim) @ c + 0 * other.mean()


def test_steps_are_found_with_the_product_that_a_softmax_sees():
    seen = trace(nn.Sequential(Steps()), torch.randn(2, 5, 8))
    found = seen.attentions["0"]
    assert not found.fused and found.scores == (1,)
    assert found.queries == found.keys == (2, 5, 8)
    assert "0.mix" in seen.called and "0.unused" not in seen.called


def test_a_softmax_over_another_dimension_is_no_attention():
    seen = trace(nn.Sequential(Steps(softmax_dim=1)), torch.randn(2, 5, 8))
    assert seen.attentions == {} and seen.unpaired == ("0",)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(training):
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 2))
    model.train(training)
    model.layers[0].eval()
    before = {n: (m.training, getattr(m, "fused_attn", None)) for n, m in model.named_modules()}
    state = torch.random.get_rng_state()
    seen = trace(model, example_input(model))
    assert torch.equal(state, torch.random.get_rng_state())
    after = {n: (m.training, getattr(m, "fused_attn", None)) for n, m in model.named_modules()}
    assert before == after
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert [a.masked for a in seen.attentions.values()] == [True] * 3
    assert all(a.fused for a in seen.attentions.values())


def test_channel_attention_and_pooled_keys_are_told_apart():
    model = timm.create_model("davit_tiny", depths=(1, 1, 1, 1))
    found = trace(model, example_input(model)).attentions
    assert not found["stages.0.blocks.0.0.attn"].over_channels
    assert found["stages.0.blocks.0.1.attn"].over_channels
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))
    first = trace(model, example_input(model)).attentions["stages.0.blocks.0.attn"]
    assert first.tokens_in and first.queries[-2] == 64 * first.keys[-2]
    assert not any("norm" in fqn for fqn in found)


def test_the_example_follows_the_models_own_size():
    assert example_input(
        timm.create_model("vit_tiny_patch16_224", img_size=48, in_chans=1)
    ).shape == (2, 1, 48, 48)
    assert example_input(timm.create_model("levit_128s")).shape == (2, 3, 224, 224)
    # A transform of its colours comes before its first convolution.
    assert example_input(timm.create_model("csatv2")).shape == (2, 3, 512, 512)
