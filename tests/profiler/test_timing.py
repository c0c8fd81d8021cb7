import gc
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from profiler.samples import CLOCK_RATE
from profiler.timing import Contamination, TimingSettings, cache_flush, measure_interleaved

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
        counters = Contamination(
            lambda: self.waited_s, lambda: self.stolen_s, core_share=lambda: 1 / self.slowdown
        )
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


def test_the_clock_is_noted_around_each_burst_and_its_time_is_nobodys():
    simulation, rates = Simulation(), iter([100.0, 90.0] * SETTINGS.rounds_min)

    def rate():
        simulation.now_s += 1.0
        return next(rates)

    timing = simulation.measure({"a": simulation.launch("a", 0.1)}, clock_rate=rate)["a"]
    assert timing.details[CLOCK_RATE] == 95.0 and next(rates, None) is None
    assert timing.latency_ms == pytest.approx(0.1, rel=1e-3)
    assert CLOCK_RATE not in simulation.measure({"a": simulation.launch("a", 0.1)})["a"].details


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


def test_warm_up_goes_on_until_the_samples_have_plateaued():
    """For 300 ms the device speeds up; then it is twice as fast as at first."""
    simulation = Simulation()

    def speed_up():
        simulation.slowdown = max(1.0, 2.0 - simulation.now_s / 0.3)

    launches = {"a": simulation.launch("a", 0.1, speed_up)}
    patient = TimingSettings(rounds_min=6, warmup_max_ms=2000.0)
    timing = simulation.measure(launches, patient)["a"]
    assert timing.latency_p90_ms == pytest.approx(0.1, rel=2e-3)
    assert timing.details["plateaued"] is True
    hasty = Simulation()
    launches = {
        "a": hasty.launch("a", 0.1, lambda: setattr(hasty, "slowdown", 1 + 20 * hasty.now_s))
    }
    impatient = TimingSettings(rounds_min=6, rest_ms=0, warmup_ms=1.0, warmup_max_ms=20.0)
    assert hasty.measure(launches, impatient)["a"].details["plateaued"] is False


def test_a_neighbour_on_the_same_core_is_waited_for():
    simulation = Simulation()

    def comes_and_goes():
        """For 60 ms in each 100: whole bursts are spoiled, and parts of others."""
        simulation.slowdown = 1.7 if simulation.now_s % 0.1 < 0.06 else 1.0

    launches = {name: simulation.launch(name, 0.05, comes_and_goes) for name in "ab"}
    found = simulation.measure(launches, TimingSettings(rounds_min=6, max_time_s=0.5))
    assert all(each.latency_ms == pytest.approx(0.05) for each in found.values())
    assert all(each.details["own_core"] for each in found.values())


def test_a_neighbour_that_stays_costs_time_and_no_figure():
    simulation, settings = Simulation(), TimingSettings(rounds_min=6, max_time_s=0.5)
    simulation.slowdown = 1.7
    timing = simulation.measure({"a": simulation.launch("a", 0.05)}, settings)["a"]
    assert timing.latency_ms == pytest.approx(1.7 * 0.05)
    assert timing.details["own_core"] is False
    assert 1.0 < simulation.now_s < 2.0


def test_nothing_runs_for_a_while_before_each_burst(monkeypatch):
    """Workers of the candidate before spin on as long as there is something to run beside."""
    simulation, told = Simulation(), []
    launches = {
        name: simulation.launch(name, 0.1, lambda name=name: told.append(name)) for name in "ab"
    }
    monkeypatch.setattr("profiler.timing.time.sleep", lambda seconds: told.append(seconds))
    found = simulation.measure(launches, TimingSettings(rounds_min=6, rest_ms=7.0))
    assert told.count(0.007) == sum(len(each.bursts_ms) for each in found.values())
    handovers = [pair for pair in pairwise(told) if pair in {("a", "b"), ("b", "a")}]
    # One for the first warm-up of the second, which comes before all bursts.
    assert handovers == [("a", "b")]


def test_the_clock_is_read_before_the_rest_and_behind_the_samples(monkeypatch):
    """Our threads, on which it is read, spin on beside what comes next."""
    simulation, told = Simulation(), []
    launch = simulation.launch("a", 0.1, lambda: told.append("a"))
    monkeypatch.setattr("profiler.timing.time.sleep", lambda seconds: told.append("rest"))

    def rate():
        told.append("clock")
        return 1.0

    settings = TimingSettings(rounds_min=6, rest_ms=7.0)
    simulation.measure({"a": launch}, settings, clock_rate=rate)
    first = told.index("clock")
    assert set(pairwise(told[first:])) == {
        ("clock", "rest"), ("rest", "a"), ("a", "a"), ("a", "clock"), ("clock", "clock")
    }  # fmt: skip


def test_a_steady_launch_is_warmed_up_no_longer_than_it_takes_to_see_that():
    simulation = Simulation()
    settings = TimingSettings(rounds_min=6, warmup_ms=5.0, warmup_max_ms=200.0, burst_ms=15.0)
    simulation.measure({"a": simulation.launch("a", 0.1)}, settings)
    assert simulation.now_s < 6 * 0.035 + 0.1


def test_goes_on_for_min_time_however_precise_it_is():
    simulation = Simulation()
    settings = TimingSettings(rounds_min=6, min_time_s=2.0, max_time_s=4.0)
    timing = simulation.measure({"a": simulation.launch("a", 0.1)}, settings)["a"]
    assert timing.stop_reason == "precision"
    assert 2.0 < simulation.now_s < 2.5


def test_stops_at_max_time_when_noise_hides_the_median():
    simulation = Simulation()
    random = np.random.default_rng(0)

    def jitter():
        simulation.slowdown = random.uniform(0.5, 1.5)

    noisy = simulation.launch("noisy", 2.0, jitter)
    steady = simulation.launch("steady", 2.0, lambda: setattr(simulation, "slowdown", 1.0))
    settings = TimingSettings(precision=0.001, max_time_s=2.0)
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


def test_bursts_with_steal_are_dropped():
    simulation = Simulation()
    random = np.random.default_rng(0)

    def steal():
        if random.random() < 1 / 800:
            simulation.stolen_s += 0.01
            simulation.now_s += 0.01

    timing = simulation.measure({"a": simulation.launch("a", 0.1, steal)})["a"]
    assert timing.samples_discarded >= 20
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


def test_what_the_flush_waits_for_is_not_the_samples():
    """It moves from CPU to CPU, and waits there."""
    simulation = Simulation()
    flushes = simulation.measure(
        {"a": simulation.launch("a", 0.1)}, flush=lambda: simulation.wait(1.0)
    )
    assert flushes["a"].samples_discarded == 0
    assert flushes["a"].latency_ms == pytest.approx(0.1)


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


def test_importing_needs_neither_torch_nor_tvm():
    command = "import sys, profiler.timing; print({'torch', 'tvm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
