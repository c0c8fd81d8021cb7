"""Layers and models as the sum of their kernels and what those leave out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fit import fit
from cost_models.layer_models import fit_overheads, predict_left_out
from cost_models.overheads import LayerOverhead
from cost_models.work import COUNTS, Work, WorkError, expert_kernels, far_counts
from kernels.forms import FORMS
from kernels.workload import Workload, attention, linear

PRODUCTS = {linear("shift_int8", 100, 64, 64): 2, linear("shift_int8", 49, 64, 512): 1}


@pytest.fixture(scope="module")
def table(sweep):
    return fit(sweep, "sweep")[0]


def kernels_ms(table, times):
    return sum(times * n * table.lookup(w).latency_ms for w, n in PRODUCTS.items())


def row_of(measure, table, model, times, tokens, lowering="deployed", extra=0.0, **fields):
    work = Work(
        {w: times * n for w, n in PRODUCTS.items()},
        {"calls": 1.0, "operators": 3.0 * times, "routed": float(tokens)},
    )
    latency_ms = kernels_ms(table, times) + 0.02 + 0.01 * 3 * times + 1e-5 * tokens + extra
    return measure(
        None,
        latency_ms,
        kind="layer",
        subject=f"{model} {times} {tokens} {lowering}",
        lowering=lowering,
        device=table.device,
        details={"model": model, **work.details()} | fields,
    )


@pytest.fixture
def rows(measure, table):
    return [
        row_of(measure, table, model, times, tokens)
        for model in ("a", "b", "c")
        for times in (1, 4)
        for tokens in (10, 1000, 30000)
    ]


def test_overheads_are_found_and_models_predicted_that_were_not_fitted(rows, table):
    predicted, skipped = predict_left_out(rows, table)
    assert not skipped and len(predicted) == len(rows)
    for one in predicted:
        assert one.predicted_ms == pytest.approx(one.row.latency_ms, rel=0.01)
        assert one.kernel_ms < one.row.latency_ms
    (overhead,) = fit_overheads(predicted)
    assert (overhead.models, overhead.rows) == (3, 18) and overhead.mape < 1
    assert overhead.costs_ms["operators"] == pytest.approx(0.01, rel=0.05)
    assert overhead.costs_ms["routed"] == pytest.approx(1e-5, rel=0.05)


def test_deployed_and_torch_are_never_mixed(measure, table, rows, sweep):
    others = [
        measure(
            None,
            5.0,
            kind="layer",
            subject=name,
            lowering="torch",
            device=table.device,
            details={"model": name, **Work({}, {"calls": 1.0}).details()},
        )
        for name in ("a", "b")
    ]
    fitted, _ = fit([*sweep, *rows, *others], "sweep")
    assert fitted.overhead("layer", "torch").costs_ms == pytest.approx({"calls": 5.0})
    assert fitted.overhead("layer", "deployed").models == 3
    assert fitted.overhead("model", "deployed") is None


def test_one_model_has_no_error_and_a_row_without_work_says_why(measure, table, rows):
    own = [row for row in rows if row.details["model"] == "a"]
    bare = measure(
        None, 1.0, kind="model", subject="bare", lowering="deployed", device=table.device
    )
    unknown = row_of(measure, table, "a", 1, 10, products="1*mult_bf16:1x5x64x64", subject="new")
    predicted, skipped = predict_left_out([*own, bare, unknown], table)
    assert {one.predicted_ms for one in predicted} == {None}
    assert fit_overheads(predicted)[0].mape is None
    assert "products" in skipped["bare"] and "mult_bf16" in skipped[unknown.subject]
    assert predict_left_out([], table) == ([], {}) and fit_overheads([]) == ()


def test_a_gradient_flows_through_an_overhead():
    overhead = LayerOverhead(
        kind="layer",
        lowering="deployed",
        costs_ms={"calls": 0.1, "operators": 0.01, "routed": 0.001},
        rows=9,
        models=3,
        mape=1.0,
    )
    routed = torch.tensor(30.0, requires_grad=True)
    found = overhead.latency_ms(0.5, {"calls": 1, "operators": 5, "routed": routed})
    found.backward()
    assert found.item() == pytest.approx(0.5 + 0.1 + 0.05 + 0.03)
    assert routed.grad.item() == pytest.approx(0.001)


linears = st.builds(
    linear,
    st.sampled_from([name for name, form in FORMS.items() if form["w_layout"] == "nk"]),
    *[st.integers(1, 5000)] * 3,
)
attentions = st.builds(lambda b, m: attention(b, m, 32, 32).both, *[st.integers(1, 500)] * 2)


@given(
    st.dictionaries(linears | attentions, st.integers(1, 50), max_size=5),
    st.dictionaries(st.sampled_from(list(COUNTS)), st.floats(0, 1e9), max_size=5),
    st.dictionaries(linears, st.integers(1, 50), max_size=5),
)
def test_work_survives_a_row_of_the_store(products, counts, experts):
    work = Work(products, counts, experts)
    assert Work.of_details({"model": "x", **work.details()}) == work


@pytest.mark.parametrize(
    "details, named",
    [
        ({}, "products"),
        ({"products": "3*nothing:1x1x1x1"}, "nothing"),
        ({"products": "3*mult_fp32:1x1x1"}, "products"),
        ({"products": 3}, "products"),
        ({"products": "", "experts": "3*mult_fp32"}, "experts"),
        ({"products": "", "count.wishes": 1.0}, "wishes"),
        ({"products": "", "count.calls": -1.0}, "calls"),
    ],
)
def test_details_that_describe_no_work_are_refused(details, named):
    with pytest.raises(WorkError, match=named):
        Work.of_details(details)


def test_products_are_written_for_people_too():
    text = Work({Workload(m=5, k=7, n=9, **FORMS["mult_fp32"]): 2}, {}).details()["products"]
    assert text == "2*mult_fp32:1x5x7x9"


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_bytes_are_far_as_they_outgrow_a_cache(weights, passed):
    found = far_counts(weights, passed)
    assert 0 <= found["far_weight_bytes"] <= weights
    assert 0 <= found["memory_bytes"] <= found["far_bytes"] <= passed
    more = far_counts(2 * weights, 2 * passed)
    assert all(found[name] <= more[name] for name in found)


def test_weights_and_what_passes_share_the_cache():
    assert set(far_counts(2**18, 2**18).values()) == {0.0}
    both = far_counts(2**20, 2**20)
    assert both["far_weight_bytes"] == both["far_bytes"] == 2**20 and not both["memory_bytes"]
    assert far_counts(0.0, 2.0**27)["memory_bytes"] == 2**27


class Kernel:
    """What a table says of a kernel whose launch takes 1 ms beside 0.01 ms a token."""

    def __init__(self, workload, lowering):
        self.latency_ms, self.lowering = 1 + 0.01 * workload.m, lowering


@pytest.mark.parametrize("tokens, times", [(300, 3), (256, 2), (100, 1)])
def test_an_expert_by_amx_is_like_a_kernel_for_each_task(tokens, times):
    work = Work({}, {}, {linear("shift_int8", tokens, 64, 64): 2})
    found = work.kernels(lambda workload: Kernel(workload, "shift.amx_dot"))
    total = sum(number * one.latency_ms for number, one in found)
    assert total == pytest.approx(2 * (times + 0.01 * tokens))


def test_an_expert_by_vectors_is_like_one_kernel_and_so_is_any_other_product():
    workload = linear("shift_int8", 300, 64, 64)
    (kernel,) = expert_kernels(workload, lambda workload: Kernel(workload, "shift.dot"))
    assert kernel[0] == 1 and kernel[1].latency_ms == pytest.approx(4)
    (product,) = Work({workload: 2}, {}).kernels(lambda w: Kernel(w, "shift.amx_dot"))
    assert product[0] == 2 and product[1].latency_ms == pytest.approx(4)


def test_layers_are_charged_far_weights_and_models_all(measure, table):
    """Layers that differ in nothing else teach what a far byte costs."""
    rows = []
    for kind, name in (("layer", "far_weight_bytes"), ("model", "weight_bytes")):
        for times in (1, 2, 3, 4):
            held = 1e6 * times
            work = Work(PRODUCTS, {"weight_bytes": held} | far_counts(held, 0.0))
            ms = kernels_ms(table, 1) + 1e-7 * work.counts[name]
            details = {"model": f"m{times}", **work.details()}
            fields = {"kind": kind, "subject": f"{kind} {times}", "lowering": "deployed"}
            rows.append(measure(None, ms, device=table.device, details=details, **fields))
    for found in fit_overheads(predict_left_out(rows, table)[0]):
        (cost,) = found.costs_ms.items()
        name = "far_weight_bytes" if found.kind == "layer" else "weight_bytes"
        assert cost == (name, pytest.approx(1e-7, rel=1e-3))


@pytest.mark.parametrize("factor", [1.0, 1.4])
def test_kernels_are_slower_in_a_model_than_alone(measure, table, factor):
    """And how much so is learned beside what each operator takes."""
    rows = []
    for name, times, operators in (("a", 1, 3), ("b", 2, 9), ("c", 4, 2), ("d", 3, 30)):
        work = Work(
            {one: n * times for one, n in PRODUCTS.items()}, {"operators": float(operators)}
        )
        ms = factor * kernels_ms(table, times) + 0.05 * operators
        fields = {"kind": "model", "subject": name, "lowering": "deployed"}
        details = {"model": name, **work.details()}
        rows.append(measure(None, ms, device=table.device, details=details, **fields))
    (found,) = fit_overheads(predict_left_out(rows, table)[0])
    assert found.kernel_factor == pytest.approx(factor, rel=1e-3) and found.mape < 0.1
    assert found.costs_ms == {"operators": pytest.approx(0.05, rel=1e-3)}
    assert found.latency_ms(2.0, {"operators": 10}) == pytest.approx(2 * factor + 0.5, rel=1e-3)


def test_a_plan_launches_no_operators():
    work = Work(PRODUCTS, {"calls": 1.0, "operators": 7.0, "routed": 3.0})
    assert work.planned == Work(PRODUCTS, {"routed": 3.0})
    assert Work({}, {}, PRODUCTS).planned.experts == PRODUCTS
