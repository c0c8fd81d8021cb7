import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import nn

from kernels.workload import attention, linear
from reparam.convert import ReparamConfig, reparameterize_
from reparam.expert_latency import layer_workloads, set_expert_latencies_
from reparam.moe import MoEMlp, Router, moe_layers, top1_probability

FORMS = {"mult": "mult_fp32", "shift": "shift_fp32"}


def make_moe(forms=FORMS, seed=0):
    torch.manual_seed(seed)
    return MoEMlp.from_module(Mlp(8, 16), forms).eval()


def send_to(moe, expert):
    with torch.no_grad():
        moe.router.gate.weight.zero_()
        moe.router.gate.bias.zero_()
        moe.router.gate.bias[expert] = 2.0


@settings(max_examples=20)
@given(shape=st.lists(st.integers(1, 5), max_size=3), seed=st.integers(0, 99))
def test_each_token_gets_its_experts_output_times_its_probability(shape, seed):
    moe = make_moe(seed=seed)
    nn.init.normal_(moe.router.gate.weight)
    x = torch.randn(*shape, 8) * 20
    y = moe(x)
    for token, out in zip(x.reshape(-1, 8), y.reshape(-1, 8)):
        p = moe.router.gate(token).softmax(-1)
        expected = p.max() * list(moe.experts.values())[p.argmax()](token[None])[0]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert moe.routing.counts.sum() == x[..., 0].numel()


@pytest.mark.parametrize("expert", [0, 1])
def test_all_tokens_to_one_expert_leave_the_other_without(expert):
    moe = make_moe()
    send_to(moe, expert)
    x = torch.randn(2, 7, 8)
    y = moe(x)
    p = moe.routing.probabilities[:, expert].reshape(2, 7, 1)
    torch.testing.assert_close(y, p * list(moe.experts.values())[expert](x))
    assert moe.routing.counts.tolist() == [14 * (expert == 0), 14 * (expert == 1)]


def test_large_values_survive_the_combination():
    moe = make_moe()
    for expert in moe.experts.values():
        expert.fc2 = nn.Linear(16, 8)
        nn.init.zeros_(expert.fc2.weight)
        nn.init.constant_(expert.fc2.bias, -100.0)
    y = moe(torch.randn(5, 8))
    torch.testing.assert_close(y, -100 * moe.routing.probabilities.amax(-1)[:, None].expand(-1, 8))


@pytest.mark.parametrize("forms", [FORMS, {**FORMS, "third": "mult_fp32"}])
def test_an_undecided_router_starts_from_the_original(forms):
    torch.manual_seed(0)
    mlp = Mlp(8, 16).eval()
    moe = MoEMlp.from_module(mlp, dict.fromkeys(forms, "mult_fp32"))
    send_to(moe, 0)
    nn.init.zeros_(moe.router.gate.bias)
    x = torch.randn(9, 8)
    torch.testing.assert_close(moe(x), mlp(x))


def test_task_loss_gives_the_router_a_gradient():
    moe = make_moe()
    moe(torch.randn(20, 8)).square().sum().backward()
    assert moe.router.gate.weight.grad.abs().sum() > 0


def test_noise_moves_the_choice_in_training_only():
    torch.manual_seed(0)
    router, tokens = Router(8, 2), torch.randn(2000, 8)
    first, second = router(tokens), router(tokens)
    assert not torch.equal(first.choice, second.choice)
    assert torch.equal(first.probabilities, second.probabilities)
    router.eval()
    assert torch.equal(router(tokens).choice, router(tokens).probabilities.argmax(-1))


@pytest.mark.parametrize("logits", [[0.3, -0.1], [0.0, 0.0], [-2.0, 0.5]])
def test_load_is_the_share_of_draws_that_an_expert_wins(logits):
    torch.manual_seed(0)
    clean = torch.tensor(logits)
    draws = (clean + 0.5 * torch.randn(40000, 2)).argmax(-1)
    load = top1_probability(clean[None], 0.5)[0]
    assert load.sum().item() == pytest.approx(1)
    assert load[1].item() == pytest.approx((draws == 1).float().mean().item(), abs=0.01)


def test_a_layer_can_be_copied_in_the_middle_of_training():
    moe = make_moe().train()
    moe(torch.randn(3, 8))
    copied = copy.deepcopy(moe)
    assert copied.routing is None and moe.routing is not None
    assert torch.equal(copied.router.gate.weight, moe.router.gate.weight)


class Answer:
    def __init__(self, latency_ms, source):
        self.latency_ms, self.source, self.lowering = latency_ms, source, "some.kernel"


def make_model(mlp="moe", linears="shift_int8", name="vit_tiny_patch16_224", **more):
    model = timm.create_model(name, img_size=32, num_classes=3, **more)
    config = ReparamConfig(attention="add", attention_linears=linears, mlp=mlp)
    reparameterize_(model, config)
    return model


VIT = {"embed_dim": 16, "num_heads": 2, "depth": 2}


def test_expert_latencies_are_looked_up_at_all_tokens_of_the_layer():
    model = make_model(**VIT)
    asked = []

    def lookup(workload):
        asked.append(workload)
        shift = workload.form == "shift_int8"
        source = "predicted" if shift and workload.k == 16 else "measured"
        return Answer(workload.n * (2.0 if shift else 1.0), source)

    found = set_expert_latencies_(model, lookup, torch.randn(3, 3, 32, 32))
    tokens = 3 * 5
    assert asked[:4] == [
        linear("mult_int8", tokens, 16, 64),
        linear("mult_int8", tokens, 64, 16),
        linear("shift_int8", tokens, 16, 64),
        linear("shift_int8", tokens, 64, 16),
    ]
    expected = {"mult": (80.0, "measured"), "shift": (160.0, "predicted")}
    assert found == {f"blocks.{i}.mlp": expected for i in range(2)}
    for _, layer in moe_layers(model):
        assert layer.expert_latency_ms.tolist() == [80.0, 160.0]
    assert model.training
    fresh = make_model(**VIT)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh.blocks[1].mlp.expert_latency_ms.tolist() == [80.0, 160.0]


def test_a_failed_lookup_sets_nothing():
    model = make_model(**VIT)
    calls = []

    def lookup(workload):
        calls.append(workload)
        if len(calls) > 6:
            raise KeyError("not in the table")
        return Answer(1.0, "measured")

    with pytest.raises(KeyError):
        set_expert_latencies_(model, lookup, torch.randn(1, 3, 32, 32))
    assert all(layer.expert_latency_ms.isnan().all() for _, layer in moe_layers(model))


def test_workloads_of_each_converted_layer():
    model = make_model(**VIT)
    tokens = 2 * 5
    dispatch = {f"blocks.{i}.mlp": {"mult": 3, "shift": tokens - 3} for i in range(2)}
    dispatch["blocks.1.mlp"] = {"mult": 0, "shift": tokens}
    workloads = layer_workloads(model, torch.randn(2, 3, 32, 32), dispatch)
    shift_all = [linear("shift_int8", tokens, 16, 64), linear("shift_int8", tokens, 64, 16)]
    block = {
        "attn.qkv": [linear("shift_int8", tokens, 16, 48)],
        "attn.add_products": [attention(4, 5, 8, 8, "pm1").both],
        "attn.proj": [linear("shift_int8", tokens, 16, 16)],
    }
    expected = {f"blocks.{i}.{name}": w for i in range(2) for name, w in block.items()}
    router = linear("mult_fp32", tokens, 16, 2)
    expected["blocks.0.mlp"] = [
        router,
        linear("mult_int8", 3, 16, 64),
        linear("mult_int8", 3, 64, 16),
        linear("shift_int8", 7, 16, 64),
        linear("shift_int8", 7, 64, 16),
    ]
    expected["blocks.1.mlp"] = [router, *shift_all]
    assert workloads == expected


def test_workloads_take_the_routers_own_dispatch_by_default():
    model = make_model(**VIT)
    for _, layer in moe_layers(model):
        send_to(layer, 1)
    workloads = layer_workloads(model, torch.randn(2, 3, 32, 32))
    _, *experts = workloads["blocks.0.mlp"]
    assert [w.m for w in experts] == [10, 10]
    assert {w.form for w in experts} == {"shift_int8"}


def test_linears_that_stage_1_leaves_in_an_attention_are_charged_as_fp32():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **VIT)
    reparameterize_(model, ReparamConfig(attention="add"))
    workloads = layer_workloads(model, torch.randn(2, 3, 32, 32))
    assert workloads["blocks.0.attn.qkv"] == [linear("mult_fp32", 10, 16, 48)]
    assert "blocks.0.mlp.fc1" not in workloads


def test_computing_all_or_chosen_tokens_is_the_same_and_all_needs_no_host(monkeypatch):
    chosen, everything = make_moe(), make_moe()
    monkeypatch.setattr(everything, "_combine_chosen", everything._combine_all)
    x = torch.randn(20, 8) * 5
    first, second = chosen(x), everything(x)
    torch.testing.assert_close(first, second)
    for y in (first, second):
        y.square().sum().backward()
    for one, other in zip(chosen.parameters(), everything.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
    # Nothing on the meta device has values: whatever asked for one would fail.
    assert make_moe().to("meta").train()(torch.empty(20, 8, device="meta")).shape == (20, 8)
