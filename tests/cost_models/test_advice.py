import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.advice import advise, compare
from cost_models.advice_result import Advice
from cost_models.break_even import break_even
from cost_models.conversion_plan import Layer, linear_layer, softmax_products
from cost_models.fit import fit
from cost_models.latency_table import LatencyTable, TableError
from cost_models.layer_cost import Cost, CostModel
from kernels.workload import attention, linear

SIZES = (196, 192, 768)
MULT = ("mult_fp32", "mult_bf16", "mult_int8")


def table_of(measure, latencies):
    """A table of these rows alone: too few for any model."""
    rows = [measure(w, ms, name, is_baseline=name.startswith("torch")) for w, name, ms in latencies]
    return fit(rows, "store")[0]


def rows_of(torch_ms, mult_ms, shift_ms, sizes=SIZES):
    """One linear: torch in three forms, our int8 mult, our int8 shift."""
    fp32, bf16, int8 = torch_ms
    return [
        (linear("mult_fp32", *sizes), "torch.fp32", fp32),
        (linear("mult_bf16", *sizes), "torch.bf16", bf16),
        (linear("mult_int8", *sizes), "torch.int8", int8),
        (linear("mult_int8", *sizes), "mult.dot", mult_ms),
        (linear("shift_int8", *sizes), "shift.dot", shift_ms),
    ]


def one_linear(measure, torch_ms, mult_ms, shift_ms):
    layer = linear_layer("mlp.fc1", "mlp", *SIZES, forms=("shift_int8",))
    return advise([layer], table_of(measure, rows_of(torch_ms, mult_ms, shift_ms)))


@pytest.mark.parametrize(
    ("shift_ms", "verdict"),
    [(0.5, "pays"), (1.0, "unknown"), (0.985, "unknown"), (2.0, "does not pay")],
)
def test_a_linear_is_held_against_the_strongest_baseline(measure, shift_ms, verdict):
    advice = one_linear(measure, (4.0, 1.0, 3.0), 0.5, shift_ms)
    (decision,) = advice.decisions
    assert decision.verdict == advice.verdict == verdict
    assert decision.original.kernels == ("mult_bf16 torch.bf16",)
    speed = decision.against_baseline.speed
    assert speed.value == pytest.approx(1 / shift_ms)
    assert speed.low < speed.value < speed.high
    assert advice.convert == ({"mlp.fc1": "shift_int8"} if verdict == "pays" else {})
    if verdict == "does not pay":
        assert advice.reason.startswith("convert none")


def test_faster_than_torch_is_not_yet_what_the_shift_brings(measure):
    (decision,) = one_linear(measure, (4.0, 3.0, 3.0), 0.4, 0.5).decisions
    assert decision.verdict == "pays"
    assert decision.against_own_mult.verdict == "does not pay"
    assert decision.against_own_mult.speed.value == pytest.approx(0.8)


def test_a_baseline_without_a_row_leaves_it_unknown_and_names_it(measure):
    rows = [row for row in rows_of((4.0, 1.0, 3.0), 0.5, 0.5) if row[1] != "torch.bf16"]
    layer = linear_layer("mlp.fc1", "mlp", *SIZES, forms=("shift_int8",))
    (decision,) = advise([layer], table_of(measure, rows)).decisions
    assert decision.verdict == "unknown" and "mult_bf16" in decision.reason
    # Slower than a baseline that is known stays slower, whatever the missing one does.
    rows[-1] = (*rows[-1][:2], 5.0)
    (decision,) = advise([layer], table_of(measure, rows)).decisions
    assert decision.verdict == "does not pay"


def test_a_form_that_the_table_does_not_know_is_unknown(measure):
    layer = linear_layer("mlp.fc1", "mlp", *SIZES, forms=("shift_int4",))
    advice = advise([layer], table_of(measure, rows_of((4.0, 1.0, 3.0), 0.5, 0.5)))
    assert advice.verdict == "unknown" and "shift_int4" in advice.decisions[0].reason


def test_of_forms_that_cannot_be_told_apart_the_smaller_is_chosen(measure):
    rows = rows_of((4.0, 1.0, 3.0), 0.5, 0.5)
    layer = linear_layer("mlp.fc1", "mlp", *SIZES, forms=("shift_int8", "shift_int4"))
    for int4_ms, form in ((0.502, "shift_int4"), (0.6, "shift_int8")):
        table = table_of(measure, [*rows, (linear("shift_int4", *SIZES), "shift.nibbles", int4_ms)])
        advice = advise([layer], table)
        assert advice.convert == {"mlp.fc1": form}
        assert advice.totals.weight_bytes == linear(form, *SIZES).weight_bytes
        assert advice.totals.fp32_weight_bytes == linear("mult_fp32", *SIZES).weight_bytes


def attention_layer(keys=196, tokens=196):
    add = attention(3, tokens, 64, 64).both
    return Layer(
        "attn", "attention", softmax_products(3, tokens, keys, 64), {"add_attention_pm1": (add,)}
    )


def attention_rows(add_ms):
    add = attention(3, 196, 64, 64).both
    return [
        *rows_of((4.0, 1.0, 3.0), 0.5, 0.5),
        (add, "torch.fp32", 0.5),
        (add, "add.both", add_ms),
    ]


def test_softmax_attention_without_a_row_is_bounded_by_the_fastest_rate_in_the_table(measure):
    macs = sum(w.macs for w in softmax_products(3, 196, 196, 64))
    floor_ms = macs / (math.prod(SIZES) / 1.0)
    for add_ms, verdict in ((0.9 * floor_ms, "pays"), (1.1 * floor_ms, "unknown")):
        (decision,) = advise(
            [attention_layer()], table_of(measure, attention_rows(add_ms))
        ).decisions
        assert decision.original.low_ms == pytest.approx(floor_ms)
        assert decision.original.latency_ms is None and decision.original.source == "bound"
        assert decision.verdict == verdict
        assert decision.against_same_product.speed.value == pytest.approx(0.5 / add_ms)
        assert decision.energy_source == "modelled"


def test_softmax_attention_with_rows_is_compared_with_them(measure):
    scores, values = softmax_products(3, 196, 196, 64)
    rows = [*attention_rows(0.3), (scores, "torch.sdpa", 0.05), (values, "torch.sdpa", 0.05)]
    (decision,) = advise([attention_layer()], table_of(measure, rows)).decisions
    assert decision.verdict == "does not pay"
    assert decision.original.latency_ms == pytest.approx(0.1)


def test_what_an_attention_brings_along_is_decided_only_where_it_is_converted(measure):
    merged = linear_layer("attn.qkv", "attention_linears", *SIZES, forms=("shift_int8",))
    before = linear_layer("attn.kv", "attention_linears", *SIZES, forms=("shift_int8",))
    from dataclasses import replace

    layers = [attention_layer(), replace(merged, after="attn"), replace(before, before="attn")]
    for add_ms, there in ((0.001, "attn.qkv"), (5.0, "attn.kv")):
        advice = advise(layers, table_of(measure, attention_rows(add_ms)))
        assert [one.fqn for one in advice.decisions] == ["attn", there]


def test_a_filter_for_conversion(measure):
    layers = [
        attention_layer(),
        linear_layer("attn.proj", "attention_linears", *SIZES, forms=("shift_int8",)),
        linear_layer("mlp.fc1", "mlp", *SIZES, forms=("shift_int8",)),
        linear_layer("mlp.fc2", "mlp", 196, 768, 192, forms=("shift_int8",)),
    ]
    advice = advise(layers, table_of(measure, attention_rows(5.0)))
    said = {n: advice.allows(None, n) for n in ("attn", "attn.proj", "mlp", "mlp.fc1", "mlp.fc2")}
    assert said == {
        "attn": False,
        "attn.proj": True,
        "mlp": True,
        "mlp.fc1": True,
        "mlp.fc2": False,
    }
    assert not advice.allows(None, "head")


def test_totals_add_up_and_leave_out_what_has_no_baseline(measure):
    layers = [
        linear_layer("a.fc1", "mlp", *SIZES, forms=("shift_int8",)),
        linear_layer("b.fc1", "mlp", *SIZES, forms=("shift_int8",)),
        linear_layer("reduce", "other", *SIZES),
        attention_layer(),
    ]
    totals = advise(layers, table_of(measure, attention_rows(5.0))).totals
    assert totals.original_ms.value == pytest.approx(3 * 1.0)
    assert totals.saved_ms.value == pytest.approx(2 * 0.5)
    assert totals.saved_ms.low == pytest.approx(2 * (0.99 - 0.505))
    assert (totals.layers, totals.converted, totals.unknown, totals.uncounted) == (3, 2, 1, 1)
    dense, shift = linear("mult_fp32", *SIZES), linear("shift_int8", *SIZES)
    assert totals.fp32_weight_bytes == 3 * dense.weight_bytes
    assert totals.weight_bytes == dense.weight_bytes + 2 * shift.weight_bytes


def test_measured_energy_is_never_set_against_a_modelled_one(measure):
    rows = rows_of((4.0, 1.0, 3.0), 0.5, 0.5)
    layer = linear_layer("mlp.fc1", "mlp", *SIZES, forms=("shift_int8",))

    def advice(*with_energy):
        found = []
        for w, name, ms in rows:
            has = {"energy_mj": 7.0 if name.startswith("torch") else 3.0, "energy_source": "rapl"}
            known = has | {"energy_reason": None} if name in with_energy else {}
            found.append(measure(w, ms, name, is_baseline=name.startswith("torch"), **known))
        return advise([layer], fit(found, "store")[0]).decisions[0]

    both = advice("torch.bf16", "shift.dot")
    assert (both.energy_source, both.energy_saved_mj) == ("measured", pytest.approx(4.0))
    one = advice("shift.dot")
    assert one.energy_source == "modelled"
    assert one.energy_saved_mj == pytest.approx(
        one.original.modelled_energy_mj - one.converted.modelled_energy_mj
    )
    assert one.converted.compute_energy_mj < one.converted.modelled_energy_mj


def test_strict_refuses_what_lies_outside(table):
    far = linear_layer("mlp.fc1", "mlp", 10**6, 128, 1024, forms=("shift_int8",))
    assert advise([far], table).decisions[0].converted.source == "extrapolated"
    refused = advise([far], table, strict=True).decisions[0]
    assert refused.converted.latency_ms is None and refused.verdict == "unknown"


def cost(latency_ms, source="predicted", wide=1.05):
    return Cost(
        latency_ms=latency_ms, low_ms=latency_ms / wide, high_ms=latency_ms * wide, source=source,
        kernels=("x",), energy_mj=None, energy_source=None, modelled_energy_mj=None,
        compute_energy_mj=None, weight_bytes=0,
    )  # fmt: skip


@given(st.integers(2, 2**16), st.floats(0.1, 0.9))
@settings(max_examples=60)
def test_the_break_even_is_where_the_latencies_cross(tokens, rate):
    """A launch that costs more, and a rate that is better, cross at one count."""
    overhead = (1 - rate) * (tokens - 0.5)
    found = break_even(lambda m: (cost(m), cost(overhead + rate * m)))
    assert (found.where, found.tokens) == ("above", tokens)
    assert found.surely_from is None or found.surely_from >= tokens
    other = break_even(lambda m: (cost(overhead + rate * m), cost(m)))
    assert (other.where, other.tokens, other.surely_from) == ("below", tokens, None)


def test_break_even_never_always_and_outside_of_what_is_known():
    assert break_even(lambda m: (cost(2.0 * m), cost(1.0 * m))).where == "always"
    assert break_even(lambda m: (cost(1.0 * m), cost(2.0 * m))).where == "never"
    known = lambda m: "predicted" if 64 <= m <= 1024 else "extrapolated"  # noqa: E731
    found = break_even(lambda m: (cost(2.0 * m), cost(1.0 * m, known(m))))
    assert (found.first_tokens, found.last_tokens, found.surely_from) == (64, 1024, 64)
    nothing = break_even(lambda m: (cost(1.0), cost(1.0, "extrapolated")))
    assert nothing.where == "unknown" and nothing.reason


@given(*[st.floats(0.01, 100)] * 2, *[st.floats(1.0, 2.0)] * 2)
def test_a_verdict_never_rests_on_intervals_that_meet(old_ms, new_ms, old_wide, new_wide):
    old, new = cost(old_ms, wide=old_wide), cost(new_ms, wide=new_wide)
    there, back = compare(old, new).verdict, compare(new, old).verdict
    apart = new.high_ms < old.low_ms or old.high_ms < new.low_ms
    assert (there == "unknown") == (not apart)
    assert {there, back} in ({"unknown"}, {"pays", "does not pay"})


def test_a_missing_form_of_baseline_leaves_only_an_upper_bound(table):
    model = CostModel(table)
    dense = linear("mult_fp32", 49, 64, 512)
    strongest = model.strongest_baseline((dense,))
    # Only fp32 was measured: the others may be anything from nothing to as fast as that.
    assert strongest.latency_ms is None and "mult_bf16" in strongest.reason
    assert strongest.low_ms == 0
    assert strongest.high_ms == table.lookup(dense, "torch.fp32").high_ms


def test_of_several_baselines_either_end_may_be_anothers(measure):
    rows = rows_of((1.0, 1.0, 1.0), 0.5, 0.5)
    # The same median, one sure and one unsure.
    unsure = linear("mult_bf16", *SIZES)
    found = [
        measure(w, ms, name, is_baseline=name.startswith("torch"))
        for w, name, ms in rows
        if w != unsure
    ]
    wide = {"latency_low_ms": 0.5, "latency_high_ms": 1.5}
    found.append(measure(unsure, 1.0, "torch.bf16", is_baseline=True, **wide))
    model = CostModel(fit(found, "store")[0])
    strongest = model.strongest_baseline((linear("mult_fp32", *SIZES),))
    assert (strongest.low_ms, strongest.high_ms) == (0.5, pytest.approx(1.01))


def test_advice_round_trips_and_a_damaged_one_is_one_line(measure, tmp_path):
    advice = one_linear(measure, (4.0, 1.0, 3.0), 0.5, 0.5)
    path = tmp_path / "advice.json"
    advice.save(path)
    assert Advice.load(path) == advice
    path.write_text(path.read_text().replace('"verdict": "pays"', '"verdict": "perhaps"', 1))
    with pytest.raises(TableError, match=rf"^{path}: .*verdict"):
        Advice.load(path)
    with pytest.raises(TableError, match="cannot be read"):
        Advice.load(tmp_path / "none.json")


def test_advice_needs_no_training_and_no_model(measure):
    """The pure function answers from workloads alone."""
    table = LatencyTable.model_validate_json(
        table_of(measure, rows_of((4.0, 1.0, 3.0), 0.5, 0.5)).model_dump_json()
    )
    assert advise([], table).verdict == "unknown"
