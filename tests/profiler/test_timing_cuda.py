"""The GPU's clock on a simulated stream and probe; nothing here was measured on a GPU."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_stream import FULL_MHZ, SimulatedStream

from profiler.nvml import Unavailable
from profiler.samples import TimingSettings
from profiler.timing_cuda import RECOVERY_S, SHORTEST_SAMPLE_MS, SHORTEST_SINGLE_MS

SETTINGS = TimingSettings(rounds_min=6, max_time_s=0.5)


@given(st.floats(2e-6, 5e-2))
@settings(max_examples=20)
def test_neither_resolution_nor_gaps_show_in_the_figure(cost_s):
    """A graph's launch takes 20 µs on the host: without a lead it would be in each sample."""
    stream = SimulatedStream()
    timing = stream.measure({"a": stream.kernel(cost_s)}, SETTINGS)["a"]
    assert timing.latency_ms == pytest.approx(cost_s * 1e3, rel=2e-3)
    assert timing.stop_reason == "precision"


def test_a_short_kernel_is_never_timed_singly_however_short_its_sample_is_asked_for():
    stream = SimulatedStream()
    hasty = TimingSettings(rounds_min=6, sample_ms=1e-3)
    timing = stream.measure({"a": stream.kernel(3e-6)}, hasty)["a"]
    assert timing.details["launches_per_sample"] * 3e-3 >= 0.9 * SHORTEST_SAMPLE_MS
    assert timing.latency_ms == pytest.approx(3e-3, rel=2e-3)


def test_launch_overhead_is_reported_apart():
    stream = SimulatedStream(enqueue_s=7e-6)
    timing = stream.measure({"a": stream.kernel(2e-6)}, SETTINGS)["a"]
    assert timing.details["launch_overhead_ms"] == pytest.approx(7e-3)
    assert timing.latency_ms == pytest.approx(2e-3, rel=2e-3)


def test_candidates_are_measured_in_rounds():
    stream = SimulatedStream()
    timings = stream.measure({"a": stream.kernel(1e-4), "b": stream.kernel(2e-4)}, SETTINGS)
    assert list(timings) == ["a", "b"]
    assert [len(timing.bursts_ms) for timing in timings.values()] == [6, 6]


def test_clock_and_throttle_reasons_are_recorded():
    stream = SimulatedStream(mhz_at=lambda now_s: 1800.0, reasons=("software power cap",))
    details = stream.measure({"a": stream.kernel(1e-4)}, SETTINGS)["a"].details
    assert details["sm_clock_mhz"] == 1800
    assert details["throttle_reasons"] == "software power cap"
    assert details["samples_throttled"] == 0
    calm = SimulatedStream()
    assert calm.measure({"a": calm.kernel(1e-4)}, SETTINGS)["a"].details["throttle_reasons"] == ""


def test_samples_below_three_quarters_of_the_clock_are_dropped_and_counted():
    """For 0.1 of each 0.5 s the GPU halves its clock."""
    stream = SimulatedStream(
        mhz_at=lambda now_s: FULL_MHZ / (2 if now_s % 0.5 < 0.1 else 1),
        reasons=("hardware thermal slowdown",),
    )
    timing = stream.measure({"a": stream.kernel(1e-4)}, TimingSettings(min_time_s=2.0))["a"]
    dropped = timing.details["samples_throttled"]
    assert 0 < dropped <= timing.samples_discarded
    assert timing.latency_p90_ms == pytest.approx(0.1, rel=0.01)
    assert timing.details["throttle_reasons"] == "hardware thermal slowdown"
    assert stream.slept_s == pytest.approx(dropped * RECOVERY_S)


def test_a_gpu_that_stays_throttled_has_no_figure():
    ramp = SimulatedStream(mhz_at=lambda now_s: FULL_MHZ / 2, reasons=("power brake",))
    timing = ramp.measure({"a": ramp.kernel(1e-3)}, TimingSettings(rounds_min=6, burst_ms=5.0))["a"]
    assert timing.latency_ms is None
    assert timing.samples_kept == 0
    assert "at too low a clock" in timing.reason
    assert timing.columns["status"] == "contended"


@pytest.mark.parametrize("reasons", [(), ("application clocks",)])
def test_a_locked_clock_is_not_throttled_however_low(reasons):
    """1410 MHz of 1980, an A100's highest on an H100, is below three quarters."""
    locked = SimulatedStream(mhz_at=lambda now_s: 1410.0, reasons=reasons)
    timing = locked.measure({"a": locked.kernel(1e-4)}, SETTINGS)["a"]
    assert timing.latency_ms == pytest.approx(0.1 * FULL_MHZ / 1410, rel=5e-3)
    assert timing.details["samples_throttled"] == 0 and locked.slept_s == 0
    assert timing.details["sm_clock_mhz"] == 1410


def test_without_any_reasons_at_hand_the_clock_alone_decides(monkeypatch):
    def unread(stream):
        raise Unavailable("throttle reasons: not supported by this GPU")

    monkeypatch.setattr(SimulatedStream, "throttle_reasons", unread)
    low = SimulatedStream(mhz_at=lambda now_s: FULL_MHZ / 2)
    timing = low.measure({"a": low.kernel(1e-3)}, TimingSettings(rounds_min=6, burst_ms=5.0))["a"]
    assert timing.latency_ms is None and "at too low a clock" in timing.reason


def test_warm_up_goes_on_until_the_clock_has_plateaued():
    """The kernel is bound by memory and does not show it, but the clock still rises."""
    stream = SimulatedStream(mhz_at=lambda now_s: FULL_MHZ * min(1.0, 0.5 + now_s))
    stream._work = lambda cost_s: setattr(
        stream, "gpu_s", max(stream.gpu_s, stream.host_s) + cost_s
    )
    patient = TimingSettings(rounds_min=6, warmup_max_ms=2000.0)
    timing = stream.measure({"a": stream.kernel(1e-4)}, patient)["a"]
    assert timing.details["plateaued"] is True
    assert timing.details["sm_clock_mhz"] == FULL_MHZ
    assert timing.samples_discarded == 0


def test_without_a_probe_the_clock_is_unknown_and_the_figure_stands():
    vanishing = SimulatedStream(probe_fails_at_s=0.03)
    absent = SimulatedStream(probe_fails_at_s=0.0)
    for stream in (vanishing, absent):
        timing = stream.measure({"a": stream.kernel(1e-4)}, SETTINGS)["a"]
        assert timing.latency_ms == pytest.approx(0.1, rel=2e-3)
    assert timing.details["sm_clock_mhz"] is None
    assert timing.details["throttle_reasons"] is None
    assert "samples_throttled" not in timing.details


def test_cold_is_a_single_launch_after_an_erasure():
    stream = SimulatedStream()
    launches = {"a": stream.kernel(5e-5, cold_cost_s=2e-4)}
    cold = stream.measure(launches, SETTINGS, cold_bytes=50 * 2**20)["a"]
    assert cold.details["launches_per_sample"] == 1
    assert cold.latency_ms == pytest.approx(0.2, rel=5e-3)
    assert stream.measure(launches, SETTINGS)["a"].latency_ms == pytest.approx(0.05, rel=5e-3)


def test_what_cannot_be_captured_fails_alone():
    stream = SimulatedStream()
    launch = stream.kernel(1e-3)

    def stubborn():
        if stream.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        launch()

    timings = stream.measure({"a": launch, "b": stubborn}, SETTINGS)
    assert timings["a"].latency_ms == pytest.approx(1.0, rel=5e-3)
    assert timings["b"].columns["status"] == "failed"
    assert timings["b"].reason.startswith("clock: RuntimeError: CUDA error: operation not perm")


def test_cold_refuses_a_kernel_too_short_to_be_timed_singly():
    stream = SimulatedStream()
    launches = {"long": stream.kernel(1e-3), "short": stream.kernel(SHORTEST_SINGLE_MS / 1e3 / 2)}
    timings = stream.measure(launches, SETTINGS, cold_bytes=50 * 2**20)
    assert timings["long"].latency_ms == pytest.approx(1.0, rel=5e-3)
    short = timings["short"]
    assert short.latency_ms is None
    assert short.reason == "too short to be timed singly: 5.0 µs hot, and an event resolves 0.5 µs"
    assert short.columns["status"] == "skipped"
