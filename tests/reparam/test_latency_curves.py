"""Curves: what the table says at the grid, monotone between, with the gradient of the piece."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cost_models.overheads import LayerOverhead
from cost_models.work import far_counts
from kernels.workload import linear
from reparam.accuracy import dispatch_shares
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.expert_latency import set_expert_latencies_
from reparam.latency_curves import LayerCurves, latency_curves, token_grid
from reparam.watched_work import work_of


class Answer:
    def __init__(self, latency_ms, lowering="some.kernel"):
        self.latency_ms, self.source, self.lowering = latency_ms, "measured", lowering


def lookup(workload):
    """A launch of 0.1 ms, then 1 µs a token for shifts and 3 for the rest."""
    each = 0.001 if workload.primitive == "shift" else 0.003
    return Answer(0.1 + each * workload.m)


def make_model(mlp="moe"):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=3, embed_dim=16, num_heads=2, depth=2
    )
    reparameterize_(model, ReparamConfig(attention="add", mlp=mlp, attention_linears="shift_int8"))
    return model


def curves_of(schedule="sequential", ask=lookup):
    return latency_curves(make_model(), ask, torch.randn(3, 3, 32, 32), schedule)


@settings(max_examples=50)
@given(tokens=st.integers(1, 100_000), points=st.integers(3, 40))
def test_grid_rises_from_none_to_all(tokens, points):
    grid = token_grid(tokens, points)
    assert (grid[0], grid[-1]) == (0, tokens)
    assert grid == sorted(set(grid))
    assert len(grid) <= points


def test_curves_run_through_what_the_table_says():
    curves = curves_of()
    tokens = 3 * 5
    layer = curves.layers["blocks.1.mlp"]
    assert layer.tokens[:, -1].tolist() == [tokens, tokens]
    for share in (1 / tokens, 4 / tokens, 1.0):
        mult, shift = layer.expert_latency_ms(torch.tensor([share, share])).tolist()
        assert mult == pytest.approx(
            2 * lookup(linear("mult_int8", round(tokens * share), 8, 8)).latency_ms
        )
        assert shift == pytest.approx(0.2 + 0.002 * tokens * share, rel=1e-5)
    assert layer.expert_latency_ms(torch.zeros(2)).tolist() == [0, 0]
    # Two routers, two qkv and proj as shifts, two add attentions of b = 6.
    router, attention = 0.1 + 0.003 * tokens, 0.1 + 0.003 * 5
    assert curves.rest_ms == pytest.approx(2 * (router + 2 * (0.1 + 0.001 * tokens) + attention))


def test_experts_by_amx_take_a_task_at_a_time_for_the_loss_and_for_the_curves():
    model, example = make_model(), torch.randn(60, 3, 32, 32)
    found = {}
    for lowering in ("shift.dot", "shift.amx_dot"):

        def ask(workload, lowering=lowering):
            return Answer(lookup(workload).latency_ms, lowering)

        layer = latency_curves(model, ask, example).layers["blocks.0.mlp"]
        by_curve = layer.expert_latency_ms(torch.ones(2))[1].item()
        expert, _ = set_expert_latencies_(model, ask, example)["blocks.0.mlp"]["shift"]
        found[lowering] = (by_curve, expert)
    # Two linears of 300 tokens, a launch of 0.1 ms for every 128 of them by AMX.
    assert found["shift.dot"] == pytest.approx((2 * 0.4, 2 * 0.4), rel=1e-5)
    assert found["shift.amx_dot"] == pytest.approx((2 * 0.6, 2 * 0.6), rel=1e-5)


@settings(max_examples=5)
@given(
    latencies=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    shares=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_more_tokens_never_take_less_whatever_the_table_says(latencies, shares):
    by_tokens = dict(zip((1, 2, 8, 15), latencies))
    curves = curves_of(
        ask=lambda w: Answer(by_tokens.get(w.m, 1.0)) if w.primitive == "shift" else Answer(1.0)
    )
    low, high = sorted(shares)
    layer = curves.layers["blocks.0.mlp"]
    less, more = (layer.expert_latency_ms(torch.tensor([0.0, s]))[1] for s in (low, high))
    assert 0 <= less <= more + 1e-6


def test_gradient_is_the_slope_of_the_piece():
    layer = LayerCurves(
        torch.tensor([[0.0, 10, 100], [0.0, 10, 100]]),
        torch.tensor([[0.0, 1, 4], [0.0, 5, 5]]),
    )
    share = torch.tensor([0.05, 0.5], requires_grad=True)
    layer.layer_latency_ms(share).backward()
    assert share.grad.tolist() == pytest.approx([0.1 * 100, 0.0])
    assert layer.layer_latency_ms(torch.tensor([1.0, 0.0])).item() == pytest.approx(4)


def test_parallel_experts_take_as_long_as_the_slowest():
    shares = torch.tensor([0.4, 0.6])
    one_by_one, at_once = (
        curves_of(schedule).layers["blocks.0.mlp"] for schedule in ("sequential", "parallel")
    )
    each = one_by_one.expert_latency_ms(shares)
    assert one_by_one.layer_latency_ms(shares).item() == pytest.approx(each.sum().item())
    assert at_once.layer_latency_ms(shares).item() == pytest.approx(each.max().item())


def test_bounds_hold_for_every_dispatch():
    for schedule in ("sequential", "parallel"):
        curves = curves_of(schedule)
        low, high = curves.bounds_ms
        found = []
        for tokens in range(16):
            dispatch = torch.tensor([tokens, 15 - tokens]) / 15
            found.append(curves.model_latency_ms(dict.fromkeys(curves.layers, dispatch)).item())
        assert (low, high) == (pytest.approx(min(found)), pytest.approx(max(found)))


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="no MoE layer"):
        latency_curves(make_model("shift_int8"), lookup, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no MoE layer"):
        latency_curves(nn.Identity(), lookup, torch.randn(1))


def test_with_measured_models_the_latency_is_that_of_the_whole_deployed_model():
    model, example = make_model().eval(), torch.randn(3, 3, 32, 32)
    costs = {"calls": 0.5, "operators": 0.01, "elements": 1e-5, "routed_tokens": 1e-4}
    fields = {"kind": "model", "lowering": "deployed", "rows": 4, "models": 4, "mape": 5.0}
    whole = LayerOverhead(costs_ms=costs, kernel_factor=1.5, **fields)
    deployed = deploy(model)
    work = work_of(deployed, example)
    kernels_ms = sum(number * found.latency_ms for number, found in work.kernels(lookup))
    with dispatch_shares(model) as shares, torch.no_grad():
        model(example)
    curves = latency_curves(model, lookup, example, whole=whole)
    found = {fqn: torch.tensor(list(share.values())) for fqn, share in shares.items()}
    expected = whole.latency_ms(kernels_ms, work.counts)
    assert curves.model_latency_ms(found).item() == pytest.approx(expected, rel=1e-4)
    assert curves.rest_ms < expected


def test_weights_that_outgrow_a_cache_cost_a_layer_time():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=384, num_heads=6, depth=1
    )
    reparameterize_(model, ReparamConfig(mlp="moe"))
    example, cost = torch.randn(1, 3, 32, 32), 1e-6
    fields = {"kind": "layer", "lowering": "deployed", "rows": 1, "models": 1, "mape": None}
    near, far = (
        latency_curves(model, lookup, example, overhead=LayerOverhead(costs_ms=costs, **fields))
        for costs in ({}, {"far_weight_bytes": cost})
    )
    forms = [f"{name}_int8" for name in ("mult", "shift")]
    held = sum(
        linear(form, 1, k, n).weight_bytes for form in forms for k, n in ((384, 1536), (1536, 384))
    )
    # Five tokens in and out, of 384 features each.
    far_bytes = far_counts(held, 2 * 5 * 384 * 4)["far_weight_bytes"]
    assert far_bytes > 0
    assert far.rest_ms - near.rest_ms == pytest.approx(cost * far_bytes, rel=0.02)
