import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cost_models.layer_models import LayerOverhead, MoELatency, fit_overheads, latency_curve


def layer_row(measure, model, tokens, kernel_ms, latency_ms, lowering="deployed"):
    details = {
        "layer": "blocks.0.mlp",
        "model": model,
        "batch": 1,
        "tokens": tokens,
        "tokens.mult": tokens - 1,
        "tokens.shift": 1,
        "kernel_ms": kernel_ms,
    }
    return measure(
        None,
        latency_ms,
        kind="layer",
        subject=f"{model} {tokens} {lowering}",
        lowering=lowering,
        details=details,
    )


def overhead_ms(tokens):
    return 0.02 + 1e-5 * tokens


def rows_of(measure, lowering="deployed", extra=0.0):
    return [
        layer_row(
            measure,
            model,
            tokens,
            tokens * 1e-3,
            tokens * 1e-3 + overhead_ms(tokens) + extra,
            lowering,
        )
        for model in ("a", "b", "c")
        for tokens in (10, 100, 1000)
    ]


def test_overheads_of_layers_are_found_apart_for_each_lowering(measure):
    rows = rows_of(measure) + rows_of(measure, "torch", extra=0.5)
    deployed, torch_ = fit_overheads(rows)
    assert (deployed.lowering, torch_.lowering) == ("deployed", "torch")
    assert deployed.latency_ms(0.2, 5, 200) == pytest.approx(0.2 + overhead_ms(200), rel=0.01)
    assert torch_.latency_ms(0.2, 5, 200) == pytest.approx(0.7 + overhead_ms(200), rel=0.01)
    assert deployed.models == 3 and deployed.rows == 9
    assert deployed.mape < 1


def test_one_model_has_no_error_and_rows_without_details_do_not_count(measure):
    rows = [row for row in rows_of(measure) if row.details["model"] == "a"]
    (found,) = fit_overheads([*rows, measure(None, 1.0, kind="model", lowering="deployed")])
    assert found.mape is None and found.rows == 3
    assert fit_overheads([]) == ()


@given(
    st.lists(st.floats(1e-3, 10), min_size=12, max_size=12),
    st.integers(1, 1500),
    st.floats(0, 1500),
    st.floats(0, 1500),
)
def test_a_curve_starts_at_nothing_and_never_falls(values, most, one, other):
    curve = latency_curve(lambda tokens: values[tokens.bit_length()], most)
    assert curve(0) == pytest.approx(0, abs=1e-9)
    low, high = sorted((one, other))
    assert curve(low) <= curve(high) + 1e-6


def test_a_curve_goes_through_what_it_was_made_of():
    curve = latency_curve(lambda tokens: 0.01 + 0.002 * tokens, 100)
    for tokens in (1, 2, 64, 100):
        assert curve(tokens) == pytest.approx(0.01 + 0.002 * tokens)


def test_the_layer_has_a_gradient_and_two_schedules():
    curves = tuple(latency_curve(lambda tokens, r=rate: r * tokens, 64) for rate in (0.02, 0.005))
    tokens = torch.tensor([40.0, 24.0], requires_grad=True)
    one_by_one = MoELatency(0.1, curves).latency_ms(list(tokens))
    one_by_one.backward()
    assert one_by_one.item() == pytest.approx(0.1 + 40 * 0.02 + 24 * 0.005)
    assert tokens.grad.tolist() == pytest.approx([0.02, 0.005])
    at_once = MoELatency(0.1, curves, parallel=True)
    assert at_once.latency_ms([40, 24]) == pytest.approx(0.1 + 40 * 0.02)
    assert at_once.latency_ms([1, 60]) == pytest.approx(0.1 + 60 * 0.005)


def test_gather_and_combine_count_where_they_were_measured():
    overhead = LayerOverhead(
        kind="layer",
        lowering="deployed",
        launch_ms=0.1,
        per_kernel_ms=0.01,
        per_token_ms=0.001,
        rows=9,
        models=3,
        mape=1.0,
    )
    curves = (latency_curve(lambda tokens: 0.01 * tokens, 64),) * 2
    found = MoELatency(0.2, curves, overhead, kernels=5).latency_ms([10, 20])
    assert found == pytest.approx(0.2 + 0.3 + 0.1 + 0.05 + 0.03)
