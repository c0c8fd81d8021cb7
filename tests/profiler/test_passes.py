"""Passes: what several measurements of the same candidates say together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.passes import PASS_SPREAD, PASSES, far_behind, of_a_pass, pool
from profiler.ratios import paired_ratio
from profiler.samples import CLOCK_RATE, PRESETS, Timing, TimingSettings


def timing(level, rounds=8, own=True, clock=None, jitter=0.01, seed=0):
    bursts = level * (1 + jitter * np.random.default_rng(seed).normal(size=rounds))
    samples = np.repeat(bursts, 5)
    details = {"own_core": own, "others_share": 0.1, "launches_per_sample": 3}
    return Timing(
        latency_ms=float(np.median(samples)),
        latency_low_ms=float(samples.min()),
        latency_high_ms=float(samples.max()),
        samples_kept=samples.size,
        samples_discarded=2,
        stop_reason="precision",
        bursts_ms=tuple(bursts.tolist()),
        rounds_ms=tuple(bursts.tolist()),
        samples_ms=tuple(samples.tolist()),
        details=details | ({} if clock is None else {CLOCK_RATE: clock}),
    )


def test_one_slow_pass_of_three_does_not_move_the_figure():
    levels = (1.0, 1.4, 1.02)
    found = pool([{"a": timing(level, seed=i)} for i, level in enumerate(levels)])["a"]
    assert found.latency_ms == pytest.approx(1.02, abs=0.03)
    assert found.details[PASSES] == 3
    assert found.details[PASS_SPREAD] == pytest.approx(0.4, abs=0.03)
    assert found.samples_kept == 3 * 40 and found.samples_discarded == 6
    assert len(found.samples_ms) == 3 * 40 and len(found.bursts_ms) == 3 * 8


def test_the_interval_says_that_passes_differ():
    apart, alike = (
        pool([{"a": timing(level, seed=i)} for i, level in enumerate(levels)])["a"]
        for levels in ((1.0, 1.2), (1.0, 1.0))
    )

    def width(found):
        return found.latency_high_ms - found.latency_low_ms

    assert width(apart) > 0.15 and width(alike) < 0.03
    assert apart.latency_low_ms <= apart.latency_ms <= apart.latency_high_ms


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("shared", [None, timing(1.5, own=False)])
def test_a_worse_pass_does_not_count_where_there_is_a_better_one(order, shared, contended):
    parts = [timing(1.0), shared or contended]
    found = pool([{"a": parts[i]} for i in order])["a"]
    assert found.latency_ms == timing(1.0).latency_ms and not found.on_shared_core
    assert found.details[PASSES] == 1 and PASS_SPREAD not in found.details


def test_without_any_figure_the_reason_stays(contended):
    found = pool([{"a": contended}, {"a": contended}])["a"]
    assert found.latency_ms is None and found.reason == "contended: a neighbour"


def test_a_shared_core_is_better_than_none(contended):
    found = pool([{"a": contended}, {"a": timing(1.5, own=False)}])["a"]
    assert found.on_shared_core and found.latency_ms == pytest.approx(1.5, abs=0.03)


def test_means_are_over_the_passes_that_count():
    passes = [{"a": timing(1.0, clock=100.0)}, {"a": timing(1.0, clock=110.0)}]
    assert pool(passes)["a"].details[CLOCK_RATE] == 105.0
    passes.append({"a": timing(1.0, clock=10.0, own=False)})
    assert pool(passes)["a"].details[CLOCK_RATE] == 105.0


@given(
    factor=st.floats(0.5, 2.0),
    levels=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4),
    lengths=st.lists(st.integers(6, 12), min_size=8, max_size=8),
)
def test_ratios_are_of_what_both_saw_whatever_each_pass_was_like(factor, levels, lengths):
    """One candidate may stop before the other: rounds must not slip from pass to pass."""
    passes = [
        {
            "a": timing(level, rounds=lengths[2 * i], seed=i),
            "b": timing(level * factor, rounds=lengths[2 * i + 1], seed=i),
        }
        for i, level in enumerate(levels)
    ]
    found = pool(passes)
    ratio = paired_ratio(found["b"], found["a"])
    assert ratio.value == pytest.approx(factor, rel=1e-9)
    assert ratio.high / ratio.low == pytest.approx(1.0, rel=1e-9)


def test_one_that_could_not_be_bound_once_is_still_one():
    found = pool([{"a": timing(1.0)}, {"a": timing(1.0), "b": timing(2.0)}])
    assert found["b"].details[PASSES] == 1
    assert paired_ratio(found["b"], found["a"]).value == pytest.approx(2.0)
    found = pool([{"a": timing(1.0), "b": timing(2.0)}, {"a": timing(1.0)}])
    assert found["a"].details[PASSES] == 2 and found["b"].details[PASSES] == 1


def test_of_nothing_there_is_nothing():
    assert pool([{}]) == {}
    assert pool([{}, {"a": timing(1.0)}])["a"].details[PASSES] == 1


def test_a_rival_far_behind_another_is_measured_once(contended):
    first = {"ours": timing(0.1), "a": timing(1.0), "b": timing(3.0), "slow": timing(5.0)}
    assert far_behind(first, ["a", "b", "slow"]) == {"slow"}
    # It is the rivals' own fastest that counts, and what has no figure is measured again.
    assert far_behind(first, ["b", "slow"]) == set()
    assert far_behind({"a": timing(1.0), "slow": contended}, ["a", "slow", "absent"]) == set()


@pytest.mark.parametrize("passes", [1, 2, 3, 9])
@pytest.mark.parametrize("name", PRESETS)
def test_passes_share_the_time(name, passes):
    whole, part = PRESETS[name], of_a_pass(PRESETS[name], passes)
    assert isinstance(part, TimingSettings)
    assert part.max_time_s * passes == pytest.approx(whole.max_time_s)
    assert part.rounds_min * passes >= whole.rounds_min
    assert of_a_pass(whole, 1) == whole
