"""Energy against simulated devices whose true joules are known; no real reading is taken."""

import re
from contextlib import nullcontext
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedGpu, SimulatedSensor
from simulated_stream import SimulatedStream

from profiler import sites
from profiler.device import DeviceInfo
from profiler.energy import (
    EnergyReading,
    EnergySettings,
    NvmlCounterMeter,
    measure_energy,
    measuring_s,
)
from profiler.nvml import Unavailable


def nothing(number: int) -> None:
    raise AssertionError("nothing may be launched")


@given(
    launch_s=st.floats(1e-6, 0.3),
    idle_w=st.floats(5, 100),
    above_w=st.floats(50, 600),
    update_s=st.floats(0.02, 0.1),
)
@settings(max_examples=40)
def test_a_stepping_counter_yields_the_true_joules(launch_s, idle_w, above_w, update_s):
    gpu = SimulatedGpu(launch_s, idle_w, idle_w + above_w, (update_s, update_s))
    reading = gpu.measure(how=EnergySettings(windows=3, window_s=5.0, idle_s=2.0))
    assert reading.energy_mj == pytest.approx((idle_w + above_w) * launch_s * 1e3, rel=0.02)
    # Idle's own error is amplified where it is most of the power.
    tolerance = 0.02 * (1 + 2 * idle_w / above_w)
    assert reading.energy_net_mj == pytest.approx(above_w * launch_s * 1e3, rel=tolerance)
    assert reading.source == "nvml-counter" and reading.reason is None


def test_irregular_updates_yield_the_true_joules():
    reading = SimulatedGpu(launch_s=3e-6).measure()
    assert reading.energy_mj == pytest.approx(300 * 3e-6 * 1e3, rel=0.01)
    assert reading.energy_net_mj == pytest.approx(240 * 3e-6 * 1e3, rel=0.01)


def test_a_window_is_long_against_the_counter_however_short_it_is_asked_for():
    reading = SimulatedGpu().measure(how=EnergySettings(windows=3, window_s=1e-3, idle_s=0.1))
    assert reading.window_s >= 3 * 20 * 0.1


def test_windows_are_as_many_and_as_long_as_asked_for():
    reading = SimulatedGpu().measure(how=EnergySettings(windows=4, window_s=3.0, idle_s=0.1))
    assert 12.0 <= reading.window_s <= 13.0


def test_only_launches_inside_the_windows_are_counted():
    gpu = SimulatedGpu(launch_s=0.01, idle_w=0.1, read_s=0.0)
    reading = gpu.measure()
    # Counting the lead-in would show as 5 % too little energy.
    assert gpu.launched * gpu.launch_s > reading.window_s
    assert reading.energy_mj == pytest.approx(300 * 0.01 * 1e3, rel=0.01)


class StreamMeter:
    """Of a simulated stream: 100 W idle, 400 W at work, in steps of 20 ms."""

    name, step_s, check = "simulated", 0.02, None

    def __init__(self, stream):
        self.stream, self.shown = stream, (-1, 0.0)

    def sampling(self):
        return nullcontext()

    def read_mj(self):
        step = int(self.stream.host_s / self.step_s)
        if step != self.shown[0]:
            joules = 100 * self.stream.host_s + 300 * self.stream.busy_s
            self.shown = (step, joules * 1e3)
        return self.shown[1]


def test_a_gpus_energy_is_of_graphs_and_not_of_the_gaps_between_launches(monkeypatch):
    """Launched one by one this kernel of 10 µs would leave the GPU idle for 5/6 of the time."""
    stream = SimulatedStream(enqueue_s=60e-6)
    device = DeviceInfo(kind="cuda", name="Simulated", uuid="GPU-1", isa="sm_90")
    quick = EnergySettings(windows=2, window_s=0.4, idle_s=0.1)
    simulated = partial(measure_energy, clock=stream.clock, sleep=stream.sleep)
    monkeypatch.setattr(sites, "TorchStream", lambda: stream)
    monkeypatch.setattr(sites, "find_meter", lambda device: StreamMeter(stream))
    monkeypatch.setattr(sites, "EnergySettings", lambda: quick)
    monkeypatch.setattr(sites, "measure_energy", simulated)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    site = sites.cuda_site(device, 0)
    reading = site.energy(stream.kernel(10e-6))
    assert reading.energy_mj == pytest.approx(400 * 10e-6 * 1e3, rel=0.05)
    assert reading.energy_net_mj == pytest.approx(300 * 10e-6 * 1e3, rel=0.05)


def test_a_load_that_draws_no_more_than_idle_has_no_net_figure():
    reading = SimulatedGpu(load_w=50.0, idle_w=60.0).measure()
    assert reading.energy_mj == pytest.approx(50 * 1e-4 * 1e3, rel=0.02)
    assert reading.energy_net_mj is None and "idle" in reading.reason


def test_a_meter_that_vanishes_midway_leaves_no_figure():
    reading = SimulatedGpu(fails_at_s=3.0).measure()
    assert reading == EnergyReading(reason="energy counter: the GPU was lost")


def test_a_counter_that_stands_still_leaves_no_figure():
    reading = SimulatedGpu(update_s=(1e9, 1e9)).measure()
    assert reading.energy_mj is None and "does not advance" in reading.reason


def test_a_counter_that_is_reset_leaves_no_figure():
    class ResetMeter(NvmlCounterMeter):
        def read_mj(self):
            return super().read_mj() - (5e6 if gpu.now_s > 2.0 else 0)

    gpu = SimulatedGpu()
    reading = gpu.measure(ResetMeter(gpu))
    assert reading.energy_mj is None and "backwards" in reading.reason


def test_a_process_that_joins_midway_leaves_no_figure():
    gpu = SimulatedGpu()
    launch = gpu.launch

    def joined(number: int) -> None:
        gpu.others = (4711,)
        launch(number)

    gpu.launch = joined
    assert gpu.measure() == EnergyReading(reason="other processes run on this GPU (4711)")


@pytest.mark.parametrize("name", ["windows", "window_s", "idle_s"])
def test_settings_have_to_be_above_zero(name):
    with pytest.raises(ValueError, match=f"{name}: must be above 0"):
        EnergySettings(**{name: 0})


def test_a_reading_has_a_reason_exactly_when_a_figure_is_missing():
    with pytest.raises(ValueError, match="reason"):
        EnergyReading()
    with pytest.raises(ValueError, match="reason"):
        EnergyReading(energy_mj=1.0, window_s=1.0, source="rapl")
    with pytest.raises(ValueError, match="reason"):
        EnergyReading(1.0, 0.5, 1.0, "rapl", "but why")


# Two meters


def checked(gpu: SimulatedGpu, **sensor) -> NvmlCounterMeter:
    meter = NvmlCounterMeter(gpu)
    meter.check = SimulatedSensor(gpu, **sensor)
    return meter


def test_both_meters_are_recorded():
    gpu = SimulatedGpu()
    reading = gpu.measure(checked(gpu))
    assert reading.check_source == "simulated-power"
    assert reading.check_mj == pytest.approx(reading.energy_mj, rel=0.06)
    assert reading.details["energy_check_mj"] == reading.check_mj
    assert "energy_flag" not in reading.details


@pytest.mark.parametrize("gain, words", [(0.7, r"-\d\d% against"), (1.3, r"\+\d\d% against")])
def test_meters_that_disagree_are_flagged_and_the_figure_stands(gain, words):
    gpu = SimulatedGpu()
    reading = gpu.measure(checked(gpu, gain=gain))
    assert reading.energy_mj == pytest.approx(300 * 1e-4 * 1e3, rel=0.01)
    assert reading.disagreement == pytest.approx(gain - 1, abs=0.06)
    assert re.search(words, reading.details["energy_flag"])


def test_a_check_that_fails_costs_no_figure():
    gpu = SimulatedGpu()
    meter = checked(gpu)

    def lost():
        raise Unavailable("power: not supported by this GPU")

    meter.check.read_mj = lost
    reading = gpu.measure(meter)
    assert reading.energy_mj is not None
    assert reading.check_mj is reading.check_source is reading.disagreement is None


def test_the_counter_finds_its_check_by_itself():
    assert NvmlCounterMeter(SimulatedGpu()).check.name == "nvml-power-instant"
    without = SimulatedGpu()

    def unsupported():
        raise Unavailable("power: not supported by this GPU")

    without.power = unsupported
    assert NvmlCounterMeter(without).check is None


def test_windows_say_how_well_they_repeat():
    reading = SimulatedGpu().measure(how=EnergySettings(windows=5, window_s=5.0))
    assert len(reading.windows_mj) == 5
    assert reading.variation == reading.details["energy_cv"] <= 0.01
    drifting = SimulatedGpu()
    launch = drifting.launch

    def hotter(number: int) -> None:
        drifting.load_w = 300.0 + 10 * drifting.now_s
        launch(number)

    drifting.launch = hotter
    assert drifting.measure().variation > 0.03
    assert EnergyReading(1.0, 0.5, 1.0, "rapl").variation is None


@given(step_s=st.sampled_from([0.01, 0.1, 1.0]), windows=st.integers(1, 5))
@settings(max_examples=15)
def test_the_time_it_takes_is_told_beforehand(step_s, windows):
    gpu = SimulatedGpu(update_s=(step_s * 0.9, step_s))
    meter = NvmlCounterMeter(gpu)
    meter.check, meter.step_s = None, step_s
    how = EnergySettings(windows=windows, window_s=5.0, idle_s=2.0)
    told_s = measuring_s(meter, how)
    assert gpu.measure(meter, how).energy_mj
    assert gpu.now_s == pytest.approx(told_s, rel=0.15)


# Sampled power
