import gc
import os
import subprocess
import sys
import time
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.device import DeviceInfo
from profiler.samples import Burst, median_interval, summarise
from profiler.store import Measurement
from profiler.timing import (
    PRESETS,
    Contamination,
    TimingSettings,
    cache_flush,
    measure_interleaved,
    paired_ratio,
)

SETTINGS = TimingSettings(rounds_min=6, max_time_s=0.5)


class Simulation:
    """A clock that only launches advance, by their cost times ``slowdown``."""

    def __init__(self):
        self.now_s = 0.0
        self.slowdown = 1.0
        self.waited_s = 0.0
        self.stolen_s = 0.0
        self.launched = []

    def clock(self):
        return self.now_s

    def launch(self, name, cost_ms, before=lambda: None):
        def run():
            before()
            self.launched.append(name)
            self.now_s += cost_ms / 1e3 * self.slowdown

        return run

    def wait(self, ms):
        self.now_s += ms / 1e3
        self.waited_s += ms / 1e3

    def measure(self, launches, settings=SETTINGS, **options):
        counters = Contamination(lambda: self.waited_s, lambda: self.stolen_s)
        return measure_interleaved(launches, settings, self.clock, counters, **options)


def every(period, action):
    """Calls ``action`` at each ``period``-th call."""
    count = 0

    def step():
        nonlocal count
        count += 1
        if count % period == 0:
            action()

    return step


def bursts_of(rows, number=1, waited_ms=0.0, stolen_ms=0.0):
    return [Burst(number, tuple(row), (waited_ms,) * len(row), stolen_ms) for row in rows]


@pytest.mark.parametrize("cost_ms", [0.002, 0.05, 0.7, 50.0])
def test_finds_the_latency_of_a_steady_launch(cost_ms):
    simulation = Simulation()
    timing = simulation.measure({"a": simulation.launch("a", cost_ms)})["a"]
    assert timing.latency_ms == pytest.approx(cost_ms, rel=1e-3)
    assert timing.stop_reason == "precision"
    assert timing.samples_discarded == 0
    assert len(timing.bursts_ms) == SETTINGS.rounds_min


def test_samples_are_of_the_target_length():
    simulation = Simulation()
    starts = []
    launches = {"a": simulation.launch("a", 0.01)}
    simulation.measure(launches, synchronise=lambda: starts.append(len(simulation.launched)))
    longest = max(np.diff(starts))
    assert longest * 0.01 == pytest.approx(SETTINGS.sample_ms, rel=0.05)


def test_candidates_are_measured_in_rounds():
    simulation = Simulation()
    launches = {name: simulation.launch(name, 0.1) for name in "abc"}
    assert list(simulation.measure(launches)) == ["a", "b", "c"]
    order = [
        name
        for name, before in zip(simulation.launched, [None, *simulation.launched])
        if name != before
    ]
    calibration = list("abc")
    assert order == calibration + list("abc") * SETTINGS.rounds_min


def test_each_burst_follows_a_warm_up_of_the_same_candidate():
    """Here the first 5 ms after a change of candidate are three times slower."""
    simulation = Simulation()

    def launch(name):
        run = simulation.launch(name, 0.1)
        since = {"changed": 0.0}

        def step():
            if simulation.launched and simulation.launched[-1] != name:
                since["changed"] = simulation.now_s
            simulation.slowdown = 3.0 if simulation.now_s < since["changed"] + 5e-3 else 1.0
            run()

        return step

    timings = simulation.measure({name: launch(name) for name in "ab"})
    for timing in timings.values():
        assert timing.latency_p90_ms == pytest.approx(0.1, rel=1e-3)


def test_stops_at_max_time_when_noise_hides_the_median():
    simulation = Simulation()
    random = np.random.default_rng(0)

    def jitter():
        simulation.slowdown = random.uniform(0.5, 1.5)

    noisy = simulation.launch("noisy", 2.0, jitter)
    steady = simulation.launch("steady", 2.0, lambda: setattr(simulation, "slowdown", 1.0))
    settings = TimingSettings(precision=0.001, max_time_s=0.5)
    timings = simulation.measure({"noisy": noisy, "steady": steady}, settings)
    assert timings["noisy"].stop_reason == "max_time"
    assert timings["steady"].stop_reason == "precision"
    assert timings["noisy"].latency_low_ms < timings["noisy"].latency_high_ms
    assert len(timings["noisy"].bursts_ms) > len(timings["steady"].bursts_ms)


def test_a_kernel_slower_than_max_time_still_gets_its_interval():
    simulation = Simulation()
    timing = simulation.measure({"slow": simulation.launch("slow", 900.0)})["slow"]
    assert timing.latency_ms == pytest.approx(900.0)
    assert timing.samples_kept == SETTINGS.rounds_min


def test_one_disturbed_burst_does_not_cost_a_slow_kernel_its_figure():
    simulation = Simulation()
    waits = every(9, lambda: simulation.wait(300))
    timing = simulation.measure({"slow": simulation.launch("slow", 900.0, waits)})["slow"]
    assert timing.latency_ms == pytest.approx(900.0)
    assert timing.samples_discarded > 0


def test_disturbed_samples_are_dropped_and_counted():
    simulation = Simulation()
    waits = every(30, lambda: simulation.wait(0.3))
    timing = simulation.measure({"a": simulation.launch("a", 0.1, waits)})["a"]
    assert timing.samples_discarded > 0
    assert timing.latency_p90_ms == pytest.approx(0.1, rel=1e-3)


def test_a_wait_too_short_to_matter_drops_nothing():
    simulation = Simulation()
    waits = every(10, lambda: simulation.wait(0.005))
    timing = simulation.measure({"a": simulation.launch("a", 0.1, waits)})["a"]
    assert timing.samples_discarded == 0


def test_contended_when_most_samples_are_disturbed():
    simulation = Simulation()
    waits = every(2, lambda: simulation.wait(0.03))
    timing = simulation.measure({"a": simulation.launch("a", 0.1, waits)})["a"]
    assert timing.latency_ms is None
    assert timing.latency_low_ms is None
    assert timing.stop_reason == "contended"
    assert "samples clean" in timing.reason


def test_contended_when_more_time_went_in_waiting_than_in_running():
    rows = [[1.0, 1.0, 1.0, 31.0]] * 10
    waiting = [Burst(1, tuple(row), (0.0, 0.0, 0.0, 30.0), 0.0) for row in rows]
    timing = summarise(waiting, SETTINGS)
    assert timing.latency_ms is None
    assert "waiting for a CPU" in timing.reason


def test_bursts_with_steal_are_dropped():
    simulation = Simulation()
    random = np.random.default_rng(0)

    def steal():
        if random.random() < 1 / 200:
            simulation.stolen_s += 0.01
            simulation.now_s += 0.01

    timing = simulation.measure({"a": simulation.launch("a", 0.1, steal)})["a"]
    assert timing.samples_discarded >= 5
    assert None in timing.bursts_ms
    assert timing.latency_ms == pytest.approx(0.1, rel=1e-3)


def test_a_held_up_spin_barrier_is_dropped_without_any_counter():
    simulation = Simulation()

    def hold_up():
        simulation.now_s += 8e-3

    launches = {"a": simulation.launch("a", 0.05, every(100, hold_up))}
    timing = simulation.measure(launches)["a"]
    assert timing.samples_discarded > 0
    assert timing.latency_p90_ms == pytest.approx(0.05, rel=1e-3)


def test_cold_flushes_before_every_single_launch():
    simulation = Simulation()
    hot = {"value": False}

    def launch():
        simulation.now_s += 1e-5 if hot["value"] else 5e-5
        hot["value"] = True

    timing = simulation.measure({"a": launch}, flush=lambda: hot.update(value=False))["a"]
    assert timing.latency_ms == pytest.approx(0.05)
    assert timing.latency_p10_ms == pytest.approx(0.05)
    assert simulation.measure({"a": launch})["a"].latency_ms == pytest.approx(0.01, rel=0.01)


def test_cache_flush_writes_and_reads_twice_the_cache():
    flush = cache_flush(1 << 16)
    assert [flush(), flush()] == [2 * (1 << 16) / 8, 2 * 2 * (1 << 16) / 8]


def test_what_was_launched_is_waited_for():
    """An asynchronous launch costs nothing until it is synchronised."""
    simulation = Simulation()
    queue = []

    def synchronise():
        simulation.now_s += 1e-9 + 2e-4 * len(queue)
        queue.clear()

    timing = simulation.measure({"a": lambda: queue.append(1)}, synchronise=synchronise)["a"]
    assert timing.latency_ms == pytest.approx(0.2, rel=1e-3)


def test_garbage_collection_is_off_while_measuring_and_on_after_a_failure():
    seen = []

    def fails():
        seen.append(gc.isenabled())
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        measure_interleaved({"a": fails})
    assert seen == [False]
    assert gc.isenabled()


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
    short = clean.__class__(**{**vars(clean), "bursts_ms": (1.0, None) * 4})
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
    "wrong", [{"rounds_min": 5}, {"sample_ms": 0}, {"precision": -1.0}, {"warmup_ms": -1.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TimingSettings(**wrong)


def test_a_busy_loop_on_every_core_is_noticed_or_does_no_harm():
    factor, out = np.random.default_rng(0).normal(size=(64, 64)), np.empty((64, 64))
    launches = {"product": lambda: np.matmul(factor, factor, out=out)}
    settings = PRESETS["quick"]
    quiet = measure_interleaved(launches, settings)["product"]
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        time.sleep(0.3)
        beside_hogs = measure_interleaved(launches, settings)["product"]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    if beside_hogs.latency_ms is None:
        assert beside_hogs.stop_reason == "contended"
        assert beside_hogs.reason
    elif quiet.latency_ms is not None:
        assert beside_hogs.latency_ms == pytest.approx(quiet.latency_ms, rel=0.25)


def test_importing_needs_neither_torch_nor_tvm():
    command = "import sys, profiler.timing; print({'torch', 'tvm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
