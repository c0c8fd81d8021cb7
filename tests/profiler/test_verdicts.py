import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from profiler.verdicts import Effect, holm, judge, paired_effect, separate_effect

SWAPPED = {"FASTER": "SLOWER", "SLOWER": "FASTER", "SAME": "SAME", "AMBIGUOUS": "AMBIGUOUS"}
bursts = st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=14)


def turns(draw):
    size = draw(st.integers(6, 14))
    side = st.lists(st.floats(1e-3, 1e3), min_size=size, max_size=size)
    return draw(side), draw(side)


@pytest.mark.parametrize(
    "ratio, half_width, p_value, verdict",
    [
        (1.0, 0.01, 1.0, "SAME"),
        (1.03, 0.005, 1e-6, "SAME"),  # surely slower, too little to matter
        (1.03, 0.03, 0.5, "AMBIGUOUS"),  # too coarse to show that it is the same
        (1.06, 0.005, 1e-6, "SLOWER"),
        (1.2, 0.01, 1e-6, "SLOWER"),
        (0.8, 0.01, 1e-6, "FASTER"),
        (1.2, 0.3, 0.2, "AMBIGUOUS"),
        (1.2, 0.01, 0.06, "AMBIGUOUS"),  # not sure once corrected for the other rows
    ],
)
def test_verdict_from_size_and_certainty(ratio, half_width, p_value, verdict):
    effect = Effect(ratio, ratio * (1 - half_width), ratio * (1 + half_width), p_value)
    assert judge(effect, p_value, threshold=0.05) == verdict


def test_nothing_below_the_noise_floor_is_called_a_difference():
    sure = Effect(1.08, 1.07, 1.09, 1e-9)
    assert judge(sure, 1e-9, threshold=0.05, floor=0.02) == "SLOWER"
    assert judge(sure, 1e-9, threshold=0.05, floor=0.1) == "SAME"
    assert judge(sure, 1e-9, threshold=0.05, floor=0.085) == "AMBIGUOUS"
    assert judge(sure, 1e-9, threshold=0.1, floor=0.0) == "SAME"


def test_a_threshold_has_to_be_above_zero():
    with pytest.raises(ValueError, match="threshold"):
        judge(Effect(1.0, 1.0, 1.0, 1.0), 1.0, threshold=0.0)


@given(bursts, bursts, st.floats(0.001, 0.5), st.floats(0, 0.5))
@settings(max_examples=60)
def test_swapping_separate_runs_swaps_the_verdict(a, b, threshold, floor):
    there, back = separate_effect(a, b), separate_effect(b, a)
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert (back.low, back.high) == pytest.approx((1 / there.high, 1 / there.low))
    assert back.p_value == pytest.approx(there.p_value)
    at_the_edge = {1 + max(threshold, floor), there.ratio, there.low, there.high}
    assume(all(abs(x / y - 1) > 1e-9 for x in at_the_edge for y in at_the_edge if x != y))
    verdict = judge(there, there.p_value, threshold, floor)
    assert judge(back, there.p_value, threshold, floor) == SWAPPED[verdict]


@given(st.composite(turns)())
@settings(max_examples=60)
def test_swapping_paired_sides_inverts_the_effect(sides):
    a, b = sides
    there, back = paired_effect(a, b), paired_effect(b, a)
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert back.p_value == pytest.approx(there.p_value)
    assert there.low <= there.ratio <= there.high


@given(bursts)
def test_a_series_does_not_differ_from_itself(a):
    for effect in (separate_effect(a, a), paired_effect(a, a)):
        assert effect.ratio == pytest.approx(1.0)
        assert effect.p_value > 0.9
        assert judge(effect, effect.p_value, threshold=0.05) in ("SAME", "AMBIGUOUS")


def test_fewer_than_six_bursts_say_nothing():
    assert separate_effect([1.0] * 5, [2.0] * 9) is None
    assert paired_effect([1.0] * 5, [2.0] * 5) is None
    with pytest.raises(ValueError, match="no turns"):
        paired_effect([1.0] * 6, [1.0] * 7)


def test_pairing_cancels_what_both_sides_saw():
    """The machine slows down threefold meanwhile; b is 10 % slower all along."""
    drift = np.linspace(1.0, 3.0, 12)
    assert paired_effect(drift, 1.1 * drift).low == pytest.approx(1.1)
    assert separate_effect(drift, 1.1 * drift).low < 1.0


def test_intervals_cover_and_tests_hold_their_level():
    random = np.random.default_rng(3)
    trials = 400
    covered = alarms = 0
    for _ in range(trials):
        a, b = np.exp(random.standard_t(3, size=(2, 10)) * 0.01)
        effect = separate_effect(a, 1.07 * b)
        covered += effect.low <= 1.07 <= effect.high
        alarms += separate_effect(a, b).p_value <= 0.05
    assert covered / trials >= 0.93
    assert alarms / trials <= 0.07


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_never_below_the_raw_value_nor_above_bonferronis(p_values):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, len(p_values) * raw) or math.isclose(raw, adjusted)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    in_order = [holm(p_values)[index] for index in order]
    assert all(before <= after for before, after in itertools.pairwise(in_order))


def test_holm_holds_the_chance_of_any_false_alarm():
    random = np.random.default_rng(4)
    any_alarm = sum(min(holm(random.uniform(size=50))) <= 0.05 for _ in range(1000))
    assert any_alarm / 1000 <= 0.07
