import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import nn

from reparam.losses import latency_aware_loss, model_latency_loss, optimal_share, squared_cv
from reparam.moe import MoEMlp, Router

positive = st.floats(0.01, 100)


def route(router, tokens, latencies):
    routing = router(tokens)
    return latency_aware_loss(routing.probabilities, routing.load, torch.tensor(latencies))


def test_squared_cv_is_variance_over_squared_mean():
    assert squared_cv(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert squared_cv(torch.full((4,), 7.0)).item() == 0


@settings(max_examples=50, deadline=None)
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
