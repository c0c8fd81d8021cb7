"""What samples say: plateau, contamination, intervals, noise floor."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.device import DeviceInfo
from profiler.ratios import noise_floor, paired_ratio
from profiler.samples import (
    LARGEST_OTHERS_SHARE,
    LARGEST_WAITING_SHARE,
    Burst,
    TimingSettings,
    has_plateaued,
    median_interval,
    summarise,
)
from profiler.store import Measurement

SETTINGS = TimingSettings(rounds_min=6, max_time_s=0.5)


def bursts_of(rows, number=1, waited_ms=0.0, stolen_ms=0.0):
    return [Burst(number, tuple(row), (waited_ms,) * len(row), stolen_ms) for row in rows]


def test_contended_when_more_time_went_in_waiting_than_in_running():
    """Also the samples that lost nothing shared their core's caches then."""
    lost_ms = 4.0 * LARGEST_WAITING_SHARE / (1 - LARGEST_WAITING_SHARE)
    for factor, has_figure in ((0.9, True), (1.1, False)):
        row = (1.0, 1.0, 1.0, 1.0 + factor * lost_ms)
        bursts = [Burst(1, row, (0.0, 0.0, 0.0, factor * lost_ms), 0.0)] * 10
        timing = summarise(bursts, SETTINGS)
        assert (timing.latency_ms == 1.0) == has_figure
        assert has_figure or "waiting for a CPU" in timing.reason


def test_contended_when_others_had_most_of_the_machine():
    for share, has_figure in ((0.9 * LARGEST_OTHERS_SHARE, True), (0.7, False)):
        bursts = [Burst(1, (1.0,) * 4, (0.0,) * 4, 0.0, 5.0, 5.0 * share)] * 10
        timing = summarise(bursts, SETTINGS)
        assert (timing.latency_ms == 1.0) == has_figure
        assert timing.details["others_share"] == pytest.approx(share, abs=1e-3)
    assert timing.reason == "contended: other processes took 70% of all CPUs"


def test_samples_at_too_low_a_clock_are_dropped_and_counted():
    bursts = [Burst(1, (1.0, 2.0, 1.0), (0.0,) * 3, 0.0, throttled=(False, True, False))] * 8
    timing = summarise(bursts, SETTINGS)
    assert timing.latency_p90_ms == 1.0
    assert timing.samples_discarded == timing.details["samples_throttled"] == 8
    slow = [Burst(1, (2.0,) * 3, (0.0,) * 3, 0.0, throttled=(True,) * 3)] * 8
    assert "24 at too low a clock" in summarise(slow, SETTINGS).reason


def test_samples_on_a_shared_core_are_left_out_where_there_are_enough_others():
    def burst(latencies, shares):
        return Burst(1, latencies, (0.0,) * len(latencies), 0.0, core_shares=shares)

    mixed, shared = burst((1.0, 1.6, 1.6), (1.0, 0.6, 0.62)), burst((1.6,) * 3, (0.6,) * 3)
    timing = summarise([mixed, shared] * 6, SETTINGS)
    assert timing.latency_ms == timing.latency_high_ms == 1.0 and timing.samples_kept == 6
    assert timing.samples_discarded == 30
    assert timing.bursts_ms == (1.0, None) * 6 and timing.rounds_ms == (1.6,) * 12
    assert timing.details["own_core"] and timing.details["own_core_share"] == 0.167
    assert not timing.on_shared_core
    always = summarise([mixed, shared] * 5, SETTINGS)
    assert always.latency_ms == 1.6 and always.bursts_ms == always.rounds_ms
    assert always.on_shared_core
    nobody_looked = summarise([burst((1.6,) * 3, ())] * 6, SETTINGS)
    assert "own_core" not in nobody_looked.details and not nobody_looked.on_shared_core


def test_kept_samples_are_handed_on_in_their_order():
    rows = [[1.0, 1.1, 1.2], [1.3, 99.0, 1.25]] * 4
    timing = summarise(bursts_of(rows), SETTINGS)
    kept = [value for row in rows for value in row if value < 99.0]
    assert timing.samples_ms == tuple(kept)
    assert timing.columns["samples_ms"] == tuple(kept)
    assert summarise(bursts_of(rows, waited_ms=0.5), SETTINGS).samples_ms == ()


# Plateau


@pytest.mark.parametrize("window", [5, 20, 100])
def test_a_flat_series_has_plateaued_and_a_short_one_has_not(window):
    assert has_plateaued([2.0] * 3 * window)
    assert not has_plateaued([2.0] * 14)


def test_noise_around_a_level_is_a_plateau():
    random = np.random.default_rng(0)
    found = [has_plateaued(random.normal(1.0, 0.1, size=60)) for _ in range(100)]
    assert sum(found) >= 80


@pytest.mark.parametrize("count", [15, 60, 500])
@pytest.mark.parametrize("end", [0.5, 0.9, 1.1, 3.0])
def test_a_ramp_is_no_plateau_however_many_samples_it_takes(count, end):
    noise = np.random.default_rng(0).normal(1.0, 0.002, count)
    assert not has_plateaued(np.linspace(1.0, end, count) * noise)


def test_a_ramp_that_has_ended_is_a_plateau_after_a_while():
    ramp = [2.0 - step / 50 for step in range(50)]
    settled = [has_plateaued(ramp + [1.0] * count) for count in range(200)]
    assert not any(settled[:20])
    assert all(settled[150:])


# Noise floor


def test_the_noise_floor_is_what_an_a_a_pair_shows():
    random = np.random.default_rng(1)
    pair = [summarise(bursts_of(random.normal(1.0, 0.004, size=(10, 9))), SETTINGS) for _ in "aa"]
    floor = noise_floor(*pair)
    ratio = paired_ratio(*pair)
    assert 1 / (1 + floor) <= ratio.low <= ratio.high <= 1 + floor
    assert 0.0005 < floor < 0.02
    assert noise_floor(*reversed(pair)) == pytest.approx(floor)


def test_two_bindings_that_differ_all_along_are_noise_as_well():
    """Where the arrays lie: one copy of the same kernel is 3 % slower."""
    first, second = (summarise(bursts_of([[level] * 5] * 10), SETTINGS) for level in (1.0, 1.03))
    assert noise_floor(first, second) == pytest.approx(0.03)


def test_no_noise_floor_from_a_contended_pair():
    clean = summarise(bursts_of([[1.0]] * 6), SETTINGS)
    assert noise_floor(clean, summarise(bursts_of([[1.0]] * 6, waited_ms=0.5), SETTINGS)) is None
    assert noise_floor(clean, clean) == 0.0


@given(st.floats(0.9, 1.1), st.floats(1e-4, 0.02))
@settings(max_examples=30)
def test_the_noise_floor_covers_what_it_was_measured_from(offset, noise):
    random = np.random.default_rng(2)
    first = summarise(bursts_of(random.normal(1.0, noise, size=(10, 5))), SETTINGS)
    second = summarise(bursts_of(offset * random.normal(1.0, noise, size=(10, 5))), SETTINGS)
    ratio = paired_ratio(first, second)
    assert max(ratio.value, 1 / ratio.value) <= 1 + noise_floor(first, second)


def test_the_interval_covers_correlated_bursts():
    """Bursts that differ by 3 % and samples that differ by 0.5 % within one."""
    random = np.random.default_rng(1)
    covered = covered_by_samples = 0
    trials = 300
    for _ in range(trials):
        levels = random.normal(1.0, 0.03, size=(12, 1))
        rows = levels + random.normal(0.0, 0.005, size=(12, 20))
        timing = summarise(bursts_of(rows), SETTINGS)
        covered += timing.latency_low_ms <= 1.0 <= timing.latency_high_ms
        low, high = median_interval(rows.ravel())
        covered_by_samples += low <= 1.0 <= high
    assert covered / trials >= 0.93
    assert covered_by_samples / trials < 0.7


latencies = st.floats(1e-4, 1e3)


@given(st.lists(st.lists(latencies, min_size=1, max_size=8), min_size=6, max_size=12))
def test_summaries_are_ordered_and_count_every_sample(rows):
    timing = summarise(bursts_of(rows), SETTINGS)
    assert timing.samples_kept + timing.samples_discarded == sum(map(len, rows))
    assert len(timing.bursts_ms) == len(rows)
    if timing.latency_ms is None:
        assert timing.reason
    else:
        assert timing.latency_low_ms <= timing.latency_ms <= timing.latency_high_ms
        assert timing.latency_p10_ms <= timing.latency_ms <= timing.latency_p90_ms


@given(st.integers(6, 200))
def test_median_interval_is_the_narrowest_that_covers_95_percent(n):
    low, high = median_interval(np.arange(1, n + 1)[::-1])
    assert low + high == n + 1

    def coverage(rank):
        return 1 - 2 * sum(comb(n, below) for below in range(rank)) / 2**n

    assert coverage(int(low)) >= 0.95 > coverage(int(low) + 1)


def test_median_interval_of_few_values_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_paired_ratio_cancels_what_both_candidates_saw():
    drift = np.linspace(1.0, 1.8, 12)[:, None]
    noise = np.random.default_rng(2).normal(1.0, 0.002, size=(2, 12, 10))
    fast, slow = (
        summarise(bursts_of(latency * drift * rows), SETTINGS)
        for latency, rows in zip((1.0, 1.25), noise)
    )
    ratio = paired_ratio(slow, fast)
    assert ratio.low <= ratio.value <= ratio.high
    assert 1.245 < ratio.low < ratio.high < 1.255
    assert slow.latency_low_ms < fast.latency_high_ms


def test_no_ratio_from_a_contended_candidate_or_too_few_rounds():
    clean = summarise(bursts_of([[1.0]] * 6), SETTINGS)
    contended = summarise(bursts_of([[1.0]] * 6, waited_ms=0.5), SETTINGS)
    assert paired_ratio(clean, contended) is None
    assert paired_ratio(clean, clean).value == 1.0
    short = clean.__class__(**{**vars(clean), "rounds_ms": (1.0, None) * 4})
    assert paired_ratio(clean, short) is None


def test_columns_make_a_row_of_the_store():
    device = DeviceInfo(kind="cpu", name="simulated", threads=1)
    about = {"subject": "a", "device": device, "lowering": "x", "energy_reason": "not asked for"}
    clean = summarise(bursts_of([[1.0]] * 6), SETTINGS)
    contended = summarise(bursts_of([[1.0]] * 6, waited_ms=0.5), SETTINGS)
    assert Measurement(**about, **clean.columns).latency_ms == 1.0
    row = Measurement(**about, **contended.columns)
    assert (row.status, row.latency_ms) == ("contended", None)
    assert row.reason == contended.reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds_min": 5},
        {"sample_ms": 0},
        {"precision": -1.0},
        {"warmup_ms": -1.0},
        {"warmup_ms": 20.0, "warmup_max_ms": 10.0},
        {"min_time_s": 4.0, "max_time_s": 3.0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TimingSettings(**wrong)
