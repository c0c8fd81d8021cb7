"""Real kernels beside a real CPU hog: the right figure or none, never a wrong one."""

import os
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import closing, contextmanager

import numpy as np
import pytest

from profiler.contamination import RunQueueDelay, host_contamination
from profiler.measurement import CLOCK_RATE
from profiler.samples import PRESETS, TimingSettings
from profiler.settings import settings_for
from profiler.store import create_store
from profiler.sweep import sweep
from profiler.sweep_config import SweepConfig
from profiler.timing import cache_flush, measure_interleaved

# Of the figures without a hog, at the clock that each sweep saw.
TOLERANCE = 0.15

# A figure that a hog falsifies is false each time; a neighbour of a virtual machine comes and goes.
ATTEMPTS = 3

SWEEP = """
timing = "quick"
threads = [1]
forms = ["mult_fp32", "shift_int8"]

[[shapes]]
m = 196
k = 128
n = 128
"""


@contextmanager
def hogs(number):
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    time.sleep(0.3)
    try:
        yield
    finally:
        for hog in running:
            hog.kill()
            hog.wait()


@pytest.fixture
def swept(tmp_path):
    config = SweepConfig.model_validate(tomllib.loads(SWEEP))

    def rows(name):
        (setting,) = settings_for(config, name, "cpu", None)
        with closing(create_store(tmp_path / f"{name}.sqlite")) as store:
            return {row.key: row for row in sweep(setting, store)}

    return rows


def at_equal_clock(row):
    """In multiply-accumulates that the CPU's own loop makes in that time; None if contended."""
    return row.latency_ms and row.latency_ms * row.details[CLOCK_RATE]


def wrong_figures(disturbed, undisturbed):
    """Figures found beside a hog that no sweep without one comes near; the others are NULL."""
    assert all(found.keys() == disturbed.keys() for found in undisturbed)
    wrong = {}
    for key, row in disturbed.items():
        if row.latency_ms is None:
            assert row.status == "contended"
            assert row.reason.startswith("contended: ")
        elif quiet := [figure for found in undisturbed if (figure := at_equal_clock(found[key]))]:
            figure = at_equal_clock(row)
            if not min(quiet) * (1 - TOLERANCE) <= figure <= max(quiet) * (1 + TOLERANCE):
                wrong[key] = figure, quiet
    return wrong


def test_a_sweep_beside_hogs_finds_the_right_figure_or_null(swept):
    before = swept("quiet")
    for number in dict.fromkeys((1, os.cpu_count() or 1)):
        for attempt in range(ATTEMPTS):
            with hogs(number):
                disturbed = swept(f"beside-{number}-{attempt}")
            after = swept(f"quiet-{number}-{attempt}")
            if not any(row.latency_ms for row in after.values()):
                pytest.skip("this machine is busy")
            wrong = wrong_figures(disturbed, (before, after))
            before = after
            contended = sum(row.latency_ms is None for row in disturbed.values())
            right = len(disturbed) - contended - len(wrong)
            print(f"{number} hogs: {right} figures right, {contended} contended, {wrong} wrong")
            if not wrong:
                break
        else:
            pytest.fail(f"{number} hogs: wrong {ATTEMPTS} times, the last: {wrong}")


def test_a_hog_on_every_core_is_in_the_counters():
    counters = host_contamination()
    waited_s, others_s = counters.waited_s(), counters.others_s()
    start_s = time.perf_counter()
    with hogs(2 * (os.cpu_count() or 1)):
        spin_until = time.perf_counter() + 0.7
        while time.perf_counter() < spin_until:
            pass
    elapsed_s = time.perf_counter() - start_s
    assert counters.waited_s() - waited_s > 0.1 * 0.7
    assert counters.others_s() - others_s > 0.3 * elapsed_s


def test_threads_that_end_keep_their_delay():
    delay = RunQueueDelay()
    before_s = delay()
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    during_s = delay()
    ended.set()
    for thread in threads:
        thread.join()
    assert before_s <= during_s <= delay()
    assert len(delay._files) == len(os.listdir("/proc/self/task"))  # noqa: PTH208


def test_cold_is_slower_than_hot_for_what_fits_the_caches():
    """Half a MiB fits the last-level cache of any machine of today, and is read faster there."""
    data, out = np.ones(2**16), np.empty(())
    launches = {"sum": lambda: np.sum(data, out=out)}
    settings = TimingSettings(rounds_min=10, burst_ms=5.0, max_time_s=2.0, precision=0.05)
    hot = measure_interleaved(launches, settings)["sum"]
    cold = measure_interleaved(launches, settings, flush=cache_flush(2**25))["sum"]
    if hot.latency_ms is None or cold.latency_ms is None:
        pytest.skip(f"this machine is busy: {hot.reason or cold.reason}")
    assert cold.latency_low_ms > hot.latency_high_ms
    assert cold.details["launches_per_sample"] == 1 < hot.details["launches_per_sample"]


def test_a_flush_leaves_the_thread_where_it_may_run():
    allowed = os.sched_getaffinity(0)
    cache_flush(1 << 20)()
    assert os.sched_getaffinity(0) == allowed


def test_a_real_measurement_plateaus_and_repeats():
    factor, out = np.random.default_rng(0).normal(size=(64, 64)), np.empty((64, 64))
    launches = {name: lambda: np.matmul(factor, factor, out=out) for name in ("a", "again")}
    timings = measure_interleaved(launches, PRESETS["quick"])
    if any(timing.latency_ms is None for timing in timings.values()):
        pytest.skip("this machine is busy")
    assert timings["a"].latency_ms == pytest.approx(timings["again"].latency_ms, rel=0.25)
    assert "plateaued" in timings["a"].details
    assert 0 <= timings["a"].details["own_core_share"] <= 1
