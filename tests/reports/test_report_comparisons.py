from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import DEVICE, primitive_row

from kernels.workload import linear
from profiler.store import Measurement
from reports.comparisons import (
    Comparison,
    Latency,
    compare,
    count_outcomes,
    latency,
    median_own_mult,
    outcomes_in_words,
    speed_ratio,
    speedups,
)
from reports.layout import log_ticks, spread

SHAPE = (196, 128, 512)
positive = st.floats(1e-4, 1e3)


def product(*rows: tuple[str, str, float | None, bool]) -> Comparison:
    measured = [
        primitive_row(linear(form, *SHAPE), lowering, latency_ms, is_baseline)
        for lowering, form, latency_ms, is_baseline in rows
    ]
    (comparison,) = compare(measured)
    return comparison


@given(positive, positive, st.floats(0, 0.5), st.floats(0, 0.5))
def test_ratio_interval_holds_every_ratio_of_its_ends(baseline, ours, wide, narrow):
    b = Latency(baseline, baseline * (1 - wide), baseline * (1 + wide))
    o = Latency(ours, ours * (1 - narrow), ours * (1 + narrow))
    ratio = speed_ratio(b, o)
    assert ratio.low <= ratio.value <= ratio.high
    for x in (b.low, b.value, b.high):
        for y in (o.low, o.value, o.high):
            assert ratio.low <= x / y * (1 + 1e-9) and x / y <= ratio.high * (1 + 1e-9)


def test_ratio_without_an_interval_is_undecided():
    assert speed_ratio(Latency(9, None, None), Latency(1, None, None)).outcome == "undecided"


def test_baselines_of_other_forms_belong_to_the_same_product():
    one = product(
        ("torch.fp32", "mult_fp32", 4.0, True),
        ("torch.int8", "mult_int8", 2.0, True),
        ("shift.dot", "shift_int8", 1.0, False),
    )
    assert one.fastest_baseline.lowering == "torch.int8"
    assert one.winner.lowering == "shift.dot"
    outcome, ratio, _ = one.verdict
    assert outcome == "pays" and ratio.value == 2.0


def test_nothing_is_fastest_where_a_baseline_failed():
    one = product(
        ("torch.fp32", "mult_fp32", 4.0, True),
        ("torch.int8", "mult_int8", None, True),
        ("shift.dot", "shift_int8", 1.0, False),
    )
    assert one.fastest_baseline is None and one.winner is None
    assert "torch.int8 failed" in one.no_fastest
    assert one.verdict[0] == "undecided" and "torch.int8 failed" in one.verdict[2]
    assert set(speedups([one]).outcome) == {"undecided"}


def test_a_loss_stays_a_loss_where_a_baseline_failed():
    one = product(
        ("torch.fp32", "mult_fp32", 1.0, True),
        ("torch.int8", "mult_int8", None, True),
        ("shift.dot", "shift_int8", 4.0, False),
    )
    assert one.verdict[0] == "does not pay"


def test_shift_does_not_pay_where_our_own_mult_is_faster():
    one = product(
        ("torch.fp32", "mult_fp32", 4.0, True),
        ("mult.dot", "mult_int8", 1.0, False),
        ("shift.dot", "shift_int8", 2.0, False),
    )
    assert one.verdict[0] == "does not pay"
    assert count_outcomes([one]) == {"does not pay": 1}


def test_figures_of_different_runs_make_no_claim():
    workloads = [linear(form, *SHAPE) for form in ("mult_fp32", "shift_int8")]
    rows = [
        primitive_row(workloads[0], "torch.fp32", 4.0, True, run="monday"),
        primitive_row(workloads[1], "shift.dot", 1.0, run="tuesday"),
    ]
    assert compare(rows)[0].verdict[0] == "undecided"


@pytest.mark.parametrize(
    ("other", "paired", "ratio"),
    [
        # A faster one of another schedule is passed over, one of fewer bits is not.
        (("mult.tiled", "mult_int8", 1.0, False), "mult.dot", 1.5),
        (("mult.small_dot", "mult_int7", 2.0, False), "mult.small_dot", 1.0),
    ],
)
def test_own_mult_is_the_fastest_of_the_same_schedule(other, paired, ratio):
    mult, shift = ("mult.dot", "mult_int8", 3.0, False), ("shift.dot", "shift_int8", 2.0, False)
    own = product(other, mult, shift).own_mult()
    assert own.same_schedule and own.mult.lowering == paired and own.ratio.value == ratio


def test_own_mult_is_compared_by_rounds_that_both_were_in():
    """Rows may be of different minutes: here they say 3, the rounds 1.25 and 1."""
    mults = [
        primitive_row(linear("mult_int8", *SHAPE), "mult.dot", 3.0),
        primitive_row(linear("mult_int7", *SHAPE), "mult.small_dot", 3.5),
    ]
    rounds = {"int8": (0.8, 0.7, 0.9), "int7": (1.0, 0.9, 1.1)}
    details = {
        f"shift_over_{types}_mult{end}": value
        for types, values in rounds.items()
        for end, value in zip(("", "_low", "_high"), values)
    }
    shift = primitive_row(linear("shift_int8", *SHAPE), "shift.small_dot", 1.0, details=details)
    own = compare([*mults, shift])[0].own_mult()
    assert own.mult.lowering == "mult.small_dot" and own.ratio.value == 1.0
    assert (own.ratio.low, own.ratio.high) == pytest.approx((1 / 1.1, 1 / 0.9))
    own = compare([mults[0], shift])[0].own_mult()
    assert own.ratio.value == pytest.approx(1.25) and own.ratio.low == pytest.approx(1 / 0.9)


def _shift_row(latency_ms: float, noise_floor: float, speedup: tuple[float, float, float], **more):
    details = dict(zip(("speedup", "speedup_low", "speedup_high"), speedup))
    return primitive_row(
        linear("shift_int8", *SHAPE),
        "shift.dot",
        latency_ms,
        details=details | {"speedup_baseline": "torch.fp32"},
        noise_floor=noise_floor,
        **more,
    )


@pytest.mark.parametrize(
    ("noise_floor", "speedup", "expected", "why"),
    [
        (0.02, (1.1, 1.05, 1.15), "pays", ""),
        (0.02, (0.9, 0.85, 0.95), "does not pay", ""),
        (0.15, (1.1, 1.05, 1.15), "undecided", "within the noise floor of 15.0%"),
        (0.02, (1.1, 0.95, 1.25), "undecided", "intervals overlap"),
    ],
)
def test_rounds_in_common_decide_beyond_the_noise_floor(noise_floor, speedup, expected, why):
    """The two medians say 0.5, or 3: what the rounds say counts."""
    for latency_ms in (2.0, 1 / 3):
        fp32 = primitive_row(linear("mult_fp32", *SHAPE), "torch.fp32", 1.0, True)
        (one,) = compare([fp32, _shift_row(latency_ms, noise_floor, speedup)])
        outcome, ratio, reason = one.verdict
        assert (outcome, ratio.value, reason) == (expected, speedup[0], why)


def test_a_difference_within_the_noise_is_counted_as_none():
    """Not as undecided: both were in the same rounds and are alike."""
    found = []
    for n, speedup in ((64, (1.01, 0.99, 1.03)), (96, (1.5, 1.4, 1.6)), (128, (1.2, 0.9, 1.6))):
        fp32 = primitive_row(linear("mult_fp32", 8, 16, n), "torch.fp32", 1.0, True)
        shift = _shift_row(1.0, 0.05, speedup)
        shift = shift.model_copy(update={"workload": linear("shift_int8", 8, 16, n)})
        found += compare([fp32, shift])
    assert outcomes_in_words(found) == (
        "shift in 1 of 3 linear products (loses in 0, no difference beyond the noise in 1,"
        " undecided in 1)"
    )


def test_rounds_of_another_run_say_nothing():
    fp32 = primitive_row(linear("mult_fp32", *SHAPE), "torch.fp32", 1.0, True, run="monday")
    tuesday = _shift_row(0.5, 0.02, (9.0, 8.0, 10.0), run="tuesday")
    assert compare([fp32, tuesday])[0].verdict[1].value == 2.0


def test_own_mult_of_another_schedule_says_so():
    one = product(("mult.dot", "mult_int8", 3.0, False), ("shift.dot", "shift_int8", 2.0, False))
    other = product(
        ("mult.tiled", "mult_int8", 1.0, False), ("shift.dot", "shift_int8", 2.0, False)
    )
    assert not other.own_mult().same_schedule and other.own_mult().ratio.value == 0.5
    whole = median_own_mult([one, other])
    assert (whole.low, whole.value, whole.high) == (0.5, 1.0, 1.5)


def test_devices_and_cache_states_are_never_mixed():
    workload = linear("mult_fp32", *SHAPE)
    other = DEVICE.model_copy(update={"threads": 1})
    rows = [
        primitive_row(workload, "mult.tiled", 1.0),
        primitive_row(workload, "mult.tiled", 1.0, cache="cold"),
        primitive_row(workload, "mult.tiled", 1.0, device=other),
        Measurement(
            kind="model",
            subject="net",
            device=DEVICE,
            lowering="deployed",
            latency_ms=1.0,
            energy_reason="none",
        ),
    ]
    assert len(compare(rows)) == 3


def test_speedups_takes_the_best_lowering_of_each_form():
    one = product(
        ("torch.fp32", "mult_fp32", 4.0, True),
        ("shift.dot", "shift_int8", 2.0, False),
        ("shift.tiled", "shift_int8", 1.0, False),
    )
    frame = speedups([one])
    assert list(frame.lowering) == ["shift.tiled"] and list(frame.ratio) == [4.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_keep_their_order_and_distance(values):
    placed = spread(values, 0.1)
    assert max(placed) <= 1
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ordered))
    for (v, p), (w, q) in pairwise(zip(values, placed)):
        assert v == w or (v < w) == (p < q)


@given(st.lists(positive, min_size=1, max_size=20), st.integers(3, 8))
def test_ticks_are_few_and_inside(values, most):
    (low, high), ticks = log_ticks(values, most)
    assert 1 <= len(ticks) <= most
    assert all(low <= tick <= high for tick in ticks) and low < min(values) <= max(values) < high


def test_a_row_without_a_figure_has_no_latency_to_compare():
    with pytest.raises(ValueError, match="no such instruction"):
        latency(primitive_row(linear("mult_fp32", *SHAPE), "torch.fp32", None))
