import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import nn

from reparam.latency_curves import LayerCurves, ModelCurves
from reparam.losses import (
    LatencyObjective,
    budget_penalty,
    dispatched_share,
    expected_latency_ms,
    latency_aware_loss,
    latency_loss,
    load_as_dispatched,
    model_latency_loss,
    objective_weight,
    optimal_share,
    share_under_noise,
    squared_cv,
)
from reparam.moe import MoEMlp, Router

positive = st.floats(0.01, 100)


def route(router, tokens, latencies):
    routing = router(tokens)
    return latency_aware_loss(routing.probabilities, routing.load, torch.tensor(latencies))


def test_squared_cv_is_variance_over_squared_mean():
    assert squared_cv(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert squared_cv(torch.full((4,), 7.0)).item() == 0


@settings(max_examples=50)
@given(latencies=st.lists(positive, min_size=2, max_size=5), factor=positive)
def test_loss_vanishes_exactly_at_the_optimal_share(latencies, factor):
    latency = torch.tensor(latencies)
    share = optimal_share(latency)
    assert share.sum().item() == pytest.approx(1)
    torch.testing.assert_close(share * latency, (share * latency)[:1].expand(len(latencies)))
    at_optimum = share.expand(10, -1)
    assert latency_aware_loss(at_optimum, at_optimum, latency).item() < 1e-6
    # Only the ratio of the latencies counts.
    torch.testing.assert_close(optimal_share(latency * factor), share)
    moved = at_optimum + torch.tensor([0.05] + [0.0] * (len(latencies) - 1))
    assert latency_aware_loss(moved, at_optimum, latency) > 0
    assert latency_aware_loss(at_optimum, moved, latency) > 0


def test_loss_against_the_formula():
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    q = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    # α = (1/4, 3/4); α·Σp = (0.325, 0.525), α·Σq = (0.325, 0.525).
    expected = 2 * (0.1 / 0.425) ** 2
    assert latency_aware_loss(p, q, torch.tensor([2.0, 6.0])).item() == pytest.approx(expected)


@pytest.mark.parametrize("latencies", [[1.0, float("nan")], [0.0, 1.0], [-1.0, 1.0]])
def test_a_latency_that_is_none_is_refused(latencies):
    p = torch.full((3, 2), 0.5)
    with pytest.raises(ValueError, match="expert_latency_ms"):
        latency_aware_loss(p, p, torch.tensor(latencies))


def test_other_latencies_give_the_router_other_gradients():
    torch.manual_seed(0)
    router, tokens = Router(8, 2).eval(), torch.randn(50, 8)
    gradients = [
        torch.autograd.grad(route(router, tokens, lat), router.gate.bias)[0]
        for lat in ([1.0, 4.0], [4.0, 1.0], [1.0, 2.0])
    ]
    # Descent gives more tokens to the faster expert.
    assert gradients[0][0] < 0 < gradients[0][1]
    assert gradients[1][0] > 0 > gradients[1][1]
    assert not torch.allclose(gradients[0], gradients[2])


@pytest.mark.parametrize("latencies", [[1.0, 4.0], [4.0, 1.0]])
def test_a_trained_router_sends_tokens_in_inverse_proportion_to_latency(latencies):
    shares = []
    for seed in range(3):
        torch.manual_seed(seed)
        router = Router(32, 2)
        optimiser = torch.optim.Adam(router.parameters(), lr=0.05)
        for _ in range(150):
            loss = route(router, torch.randn(256, 32), latencies)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        shares.append(router.eval()(torch.randn(4096, 32)).counts / 4096)
    share = torch.stack(shares).mean(0)
    assert (share - optimal_share(torch.tensor(latencies))).abs().max() < 0.1


def test_model_loss_is_the_mean_over_layers_and_asks_for_latencies():
    torch.manual_seed(0)
    forms = {"mult": "mult_fp32", "shift": "shift_fp32"}
    model = nn.Sequential(*(MoEMlp.from_module(Mlp(8, 16), forms) for _ in range(2)))
    with pytest.raises(ValueError, match="0: has not been run"):
        model_latency_loss(model)
    model(torch.randn(6, 8))
    with pytest.raises(ValueError, match="0: expert_latency_ms is not set"):
        model_latency_loss(model)
    model[0].expert_latency_ms.copy_(torch.tensor([1.0, 3.0]))
    model[1].expert_latency_ms.copy_(torch.tensor([5.0, 1.0]))
    each = [
        latency_aware_loss(m.routing.probabilities, m.routing.load, m.expert_latency_ms)
        for m in model
    ]
    assert model_latency_loss(model).item() == pytest.approx((each[0] + each[1]).item() / 2)
    with pytest.raises(ValueError, match="no MoE layer"):
        model_latency_loss(nn.Linear(2, 2))


CURVES = LayerCurves(
    torch.tensor([[0.0, 1, 100], [0.0, 1, 100]]), torch.tensor([[0.0, 1, 10], [0.0, 1, 4]])
)


def moe_model(layers=2):
    torch.manual_seed(0)
    forms = {"mult": "mult_fp32", "shift": "shift_fp32"}
    return nn.Sequential(*(MoEMlp.from_module(Mlp(8, 16), forms) for _ in range(layers)))


def test_a_deployed_router_has_no_noise_and_its_share_no_gradient():
    torch.manual_seed(0)
    router, tokens = Router(8, 2), torch.randn(50, 8)
    routing = router(tokens)
    deployed = copy.deepcopy(router).eval()(tokens).counts / 50
    torch.testing.assert_close(dispatched_share(routing), deployed)
    assert not dispatched_share(routing).requires_grad
    torch.testing.assert_close(share_under_noise(routing), routing.load.mean(0))


def test_noise_does_not_hide_that_a_budget_is_missed():
    """All tokens lean to the slow expert by less than the noise, which sends half elsewhere."""
    curves = ModelCurves({"0": CURVES}, rest_ms=1.0)
    model = moe_model(1)
    with torch.no_grad():
        model[0].router.gate.weight.zero_()
        model[0].router.gate.bias.copy_(torch.tensor([0.01, 0.0]))
    model.train()(torch.randn(400, 8))
    assert 0.4 < model[0].routing.counts[0] / 400 < 0.6
    assert curves.expected_ms({"0": {"mult": 0.5, "shift": 0.5}}) < 9
    assert expected_latency_ms(model, curves).item() == pytest.approx(1 + 10)
    loss = latency_loss(model, LatencyObjective(1.0, curves, budget_ms=10.0))
    loss.backward()
    assert loss.item() > 0 and model[0].router.gate.bias.grad[0] > 0


def test_expected_latency_adds_the_layers_at_their_own_dispatch():
    model = moe_model()
    curves = ModelCurves({"0": CURVES, "1": CURVES}, rest_ms=7.0)
    model(torch.randn(30, 8))
    by_hand = sum(
        CURVES.layer_latency_ms(load_as_dispatched(layer.routing).mean(0)).item() for layer in model
    )
    assert expected_latency_ms(model, curves).item() == pytest.approx(7 + by_hand)
    with pytest.raises(ValueError, match="0: has not been run"):
        expected_latency_ms(moe_model(), curves)


@pytest.mark.parametrize(("budget_share", "meets"), [(0.0, True), (0.5, True)])
def test_a_router_trained_against_a_budget_meets_it(budget_share, meets):
    curves = ModelCurves({"0": CURVES}, rest_ms=1.0)
    low, high = curves.bounds_ms
    budget = low + max(budget_share, 0.05) * (high - low)
    objective = LatencyObjective(1.0, curves, budget)
    model = moe_model(1)
    nn.init.constant_(model[0].router.gate.bias, 0.0)
    with torch.no_grad():
        model[0].router.gate.bias[0] = 1.0  # starts on the slow expert
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    torch.manual_seed(0)
    first = None
    for _ in range(150):
        model(torch.randn(256, 8))
        loss = latency_loss(model, objective)
        first = first if first is not None else loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()(torch.randn(4096, 8))
    assert first > 0
    assert (expected_latency_ms(model, curves).item() <= budget) == meets


def test_penalty_and_weight_press_only_while_the_budget_is_missed():
    assert budget_penalty(torch.tensor(3.0), 4.0).item() == 0
    assert budget_penalty(torch.tensor(5.0), 4.0).item() == pytest.approx(0.25)
    curves = ModelCurves({"0": CURVES}, rest_ms=0.0)
    objective = LatencyObjective(0.5, curves, budget_ms=4.0)
    weights = [objective_weight(objective, past) for past in ([], [5.0], [5.0, 3.9], [5.0] * 99)]
    assert weights == [0.5, 1.0, 1.0, 512.0]
    assert objective_weight(LatencyObjective(0.5, curves), [9.0]) == 0.5


def test_without_a_budget_the_loss_is_relative_to_the_slowest_dispatch():
    model, curves = moe_model(1), ModelCurves({"0": CURVES}, rest_ms=0.0)
    with torch.no_grad():
        model[0].router.gate.weight.zero_()
        model[0].router.gate.bias.copy_(torch.tensor([9.0, 0.0]))
    model(torch.randn(10, 8))
    slowest = curves.bounds_ms[1]
    found = latency_loss(model, LatencyObjective(1.0, curves)).item()
    assert found == pytest.approx(10.0 / slowest)


def test_the_load_as_dispatched_knows_no_noise():
    """Logits closer than the noise: under it half of the tokens go either way, without it none."""
    torch.manual_seed(0)
    router = Router(4, 2)
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.bias.copy_(torch.tensor([0.01, 0.0]))
    routing = router(torch.randn(500, 4))
    soft, hard = routing.load.mean(0), load_as_dispatched(routing).mean(0)
    assert soft.tolist() == pytest.approx([0.5, 0.5], abs=0.02) and hard.tolist() == [1.0, 0.0]
    equal = torch.ones(2)
    assert latency_aware_loss(routing.probabilities, routing.load, equal) < 1e-3
    loss = latency_aware_loss(routing.probabilities, load_as_dispatched(routing), equal)
    assert loss.item() == pytest.approx(1, abs=1e-3)
    loss.backward()
    assert router.gate.bias.grad[0] > 0 > router.gate.bias.grad[1]


def test_training_by_it_balances_what_is_deployed():
    """Most tokens are near one logit, a few far on the other side: the paper's loss is content."""
    shares = []
    for as_dispatched in (False, True):
        torch.manual_seed(0)
        forms = {"mult": "mult_fp32", "shift": "shift_fp32"}
        layer = MoEMlp.from_module(Mlp(2, 4), forms)
        layer.expert_latency_ms.fill_(1.0)
        tokens = torch.cat(
            [
                torch.tensor([[1.0, 0.0]]).repeat(75, 1) + 0.5 * torch.randn(75, 2),
                torch.tensor([[-3.0, 0.0]]).repeat(25, 1),
            ]
        )
        with torch.no_grad():
            layer.router.gate.weight.copy_(torch.tensor([[0.1, 0.0], [-0.1, 0.0]]))
        optimiser = torch.optim.SGD(layer.router.parameters(), lr=0.005)
        for _ in range(600):
            layer(tokens)
            loss = model_latency_loss(layer, as_dispatched)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        layer.eval()
        layer(tokens)
        shares.append(float(layer.routing.counts[1]) / len(tokens))
    paper, dispatched = shares
    assert paper < 0.4 and dispatched == pytest.approx(0.5, abs=0.1)
