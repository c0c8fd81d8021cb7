"""Energy against simulated devices whose true joules are known; no real reading is taken."""

import re
import time

import pynvml
import pytest
from fake_nvml import H100, SECOND_H100, FakeNvml, failing
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import QUICK, SimulatedGpu, SimulatedSensor

from profiler.device import DeviceInfo
from profiler.energy import (
    EnergyReading,
    EnergySettings,
    NvmlCounterMeter,
    NvmlPowerMeter,
    RaplMeter,
    find_meter,
    measure_energy,
    measuring_s,
)
from profiler.nvml import Power, Unavailable
from profiler.timing import NO_CONTAMINATION, Contamination

CUDA = DeviceInfo(kind="cuda", name="simulated", uuid="GPU-0")
CPU = DeviceInfo(kind="cpu", name="simulated", threads=1)
H100_INFO = DeviceInfo(kind="cuda", name="fake", uuid=H100["nvmlDeviceGetUUID"])
METERS = (
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetFieldValues",
)


def nothing(number: int) -> None:
    raise AssertionError("nothing may be launched")


@given(
    launch_s=st.floats(1e-6, 0.3),
    idle_w=st.floats(5, 100),
    above_w=st.floats(50, 600),
    update_s=st.floats(0.02, 0.1),
)
@settings(max_examples=40, deadline=None)
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
@settings(max_examples=15, deadline=None)
def test_the_time_it_takes_is_told_beforehand(step_s, windows):
    gpu = SimulatedGpu(update_s=(step_s * 0.9, step_s))
    meter = NvmlCounterMeter(gpu)
    meter.check, meter.step_s = None, step_s
    how = EnergySettings(windows=windows, window_s=5.0, idle_s=2.0)
    told_s = measuring_s(meter, how)
    assert gpu.measure(meter, how).energy_mj
    assert gpu.now_s == pytest.approx(told_s, rel=0.15)


# Sampled power


def test_power_is_integrated_by_the_trapezoidal_rule():
    gpu = SimulatedGpu()
    meter = NvmlPowerMeter(gpu, clock=gpu.clock)
    for now_s, watts in ((0.0, 100.0), (0.5, 200.0), (2.0, 0.0)):
        gpu.now_s, gpu.load_w = now_s, watts
        meter.sample()
    assert meter.read_mj() == pytest.approx((0.5 * 150 + 1.5 * 100) * 1e3)


def test_power_is_sampled_in_a_thread_while_measuring_only():
    meter = NvmlPowerMeter(SimulatedGpu(load_w=100.0), interval_s=1e-3)
    began_s = time.perf_counter()
    with meter.sampling():
        while meter.read_mj() == 0:
            time.sleep(1e-3)
    after_mj = meter.read_mj()
    assert 0 < after_mj <= 100.0 * (time.perf_counter() - began_s) * 1e3
    time.sleep(5e-3)
    assert meter.read_mj() == after_mj


def test_power_that_vanishes_is_told_to_the_reader():
    gpu = SimulatedGpu()
    meter = NvmlPowerMeter(gpu, interval_s=1e-3)

    def lost() -> Power:
        raise Unavailable("power: the GPU was lost")

    with meter.sampling():
        gpu.power = lost
        with pytest.raises(Unavailable, match="power: the GPU was lost"):
            for _ in range(1000):
                meter.read_mj()
                time.sleep(1e-3)


@pytest.mark.parametrize("kind, step_s", [("instant", 0.1), ("usage", 1.0)])
def test_the_kind_of_power_is_recorded(kind, step_s):
    meter = NvmlPowerMeter(SimulatedGpu(power_kind=kind))
    assert (meter.name, meter.step_s) == (f"nvml-power-{kind}", step_s)


# RAPL


def rapl_zone(powercap, zone: str, name: str, energy_uj: int, wrap_uj: int = 1_000_000):
    folder = powercap / zone
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", wrap_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_rapl_adds_up_packages_and_nothing_twice(tmp_path):
    first = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1000)
    second = rapl_zone(tmp_path, "intel-rapl:1", "package-1", 2000)
    core = rapl_zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = rapl_zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = find_meter(CPU, powercap=tmp_path)
    before_mj = meter.read_mj()
    (first / "energy_uj").write_text("4000")
    (second / "energy_uj").write_text("7000")
    for other in (core, platform):
        (other / "energy_uj").write_text("900000")
    assert meter.name == "rapl"
    assert meter.read_mj() - before_mj == pytest.approx(3 + 5)


@given(
    wrap_uj=st.integers(1000, 10**9),
    steps=st.lists(st.floats(0, 0.9), min_size=1, max_size=20),
    start=st.floats(0, 0.99),
)
@settings(max_examples=50, deadline=None)
def test_rapl_wraps_around(tmp_path_factory, wrap_uj, steps, start):
    powercap = tmp_path_factory.mktemp("powercap")
    true_uj = int(start * wrap_uj)
    zone = rapl_zone(powercap, "intel-rapl:0", "package-0", true_uj, wrap_uj)
    meter = RaplMeter((zone,), NO_CONTAMINATION)
    began_uj = true_uj
    for step in steps:
        true_uj += int(step * wrap_uj)
        (zone / "energy_uj").write_text(str(true_uj % wrap_uj))
        assert meter.read_mj() == pytest.approx((true_uj - began_uj) / 1e3)


def test_rapl_that_may_not_be_read(tmp_path, monkeypatch):
    zone = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read_text = type(zone).read_text

    # Not chmod: a test that runs as root could still read it.
    def refuse(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(type(zone), "read_text", refuse)
    with pytest.raises(Unavailable, match=r"^RAPL is not readable \(permission denied\)$"):
        find_meter(CPU, powercap=tmp_path)


def test_rapl_that_vanishes_leaves_no_figure(tmp_path):
    zone = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = find_meter(CPU, powercap=tmp_path)
    (zone / "energy_uj").unlink()
    gpu = SimulatedGpu()
    reading = measure_energy(nothing, meter, QUICK, gpu.clock, gpu.sleep)
    assert reading.energy_mj is None and reading.reason.startswith("RAPL: ")


@pytest.mark.parametrize("share, has_figure", [(0.01, True), (0.3, False)])
def test_rapl_beside_other_load(tmp_path, share, has_figure):
    gpu = SimulatedGpu()
    zone = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 0, 10**12)
    others = Contamination(others_s=lambda: share * gpu.now_s)
    meter = RaplMeter((zone,), others, gpu.clock)

    def launch(number: int) -> None:
        gpu.pass_time(number * 1e-3, 40.0)

    def read_all_uj():
        gpu.pass_time(1e-5, 40.0)
        return [round(gpu.true_mj * 1e3)]

    meter._read_all_uj = read_all_uj
    reading = measure_energy(launch, meter, QUICK, gpu.clock, gpu.sleep)
    if has_figure:
        assert reading.energy_mj == pytest.approx(40.0, rel=0.02)
    else:
        assert reading.reason == "RAPL: other processes used 30% of all CPUs meanwhile"


def test_no_rapl(tmp_path):
    with pytest.raises(Unavailable, match=r"^RAPL is not exposed on this machine$"):
        find_meter(CPU, powercap=tmp_path)


# Which meter


@pytest.fixture
def gpu(monkeypatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    monkeypatch.setattr("profiler.meters.open_probe", lambda uuid, nvml: simulated)
    return simulated


def test_the_counter_is_preferred(gpu):
    assert find_meter(CUDA).name == "nvml-counter"


def test_power_where_there_is_no_counter(gpu):
    gpu.has_counter = False
    assert find_meter(CUDA).name == "nvml-power-instant"


def test_a_partitioned_gpu_has_no_meter(gpu):
    gpu.is_mig = True
    with pytest.raises(Unavailable, match=r"^MIG: the counter covers the whole GPU$"):
        find_meter(CUDA)


def test_a_shared_gpu_has_no_meter(gpu):
    gpu.others = (41, 42)
    with pytest.raises(Unavailable, match=r"^other processes run on this GPU \(41, 42\)$"):
        find_meter(CUDA)


def test_a_gpu_without_uuid_or_driver_has_no_meter():
    with pytest.raises(Unavailable, match="UUID"):
        find_meter(CUDA.model_copy(update={"uuid": None}))

    class NoDriver:
        class NVMLError(Exception):
            pass

        class NVMLError_LibraryNotFound(NVMLError):
            pass

        def nvmlInit(self):
            raise self.NVMLError_LibraryNotFound

    with pytest.raises(Unavailable, match=r"^no NVIDIA driver$"):
        find_meter(CUDA, NoDriver())


def test_a_gpu_whose_meters_may_not_be_read_has_none():
    nvml = FakeNvml(H100 | dict.fromkeys(METERS, failing(pynvml.NVML_ERROR_NO_PERMISSION)))
    with pytest.raises(Unavailable, match="power: permission denied"):
        find_meter(H100_INFO, nvml)


def test_a_driver_that_vanishes_under_load_leaves_no_figure():
    gpu = SimulatedGpu()
    answers = dict(H100)
    meter = find_meter(H100_INFO, FakeNvml(answers))
    meter.check = None

    def launch(number: int) -> None:
        gpu.launch(number)
        vanished = failing(pynvml.NVML_ERROR_UNINITIALIZED)
        counted_mj = 123_456 + gpu.launched if gpu.now_s < 3.0 else vanished
        answers["nvmlDeviceGetTotalEnergyConsumption"] = counted_mj

    def sleep(seconds: float) -> None:
        answers["nvmlDeviceGetTotalEnergyConsumption"] += 1
        gpu.sleep(seconds)

    reading = measure_energy(launch, meter, QUICK, gpu.clock, sleep)
    assert reading == EnergyReading(reason="energy counter: the NVIDIA driver vanished")


def test_the_gpu_that_was_measured_is_the_one_that_is_metered():
    nvml = FakeNvml(H100 | {"nvmlDeviceGetTotalEnergyConsumption": 1}, SECOND_H100)
    second = H100_INFO.model_copy(update={"uuid": SECOND_H100["nvmlDeviceGetUUID"]})
    assert find_meter(H100_INFO, nvml).read_mj() == 1
    assert find_meter(second, nvml).read_mj() == 123_456
    elsewhere = H100_INFO.model_copy(update={"uuid": "GPU-ffff"})
    with pytest.raises(Unavailable, match="GPU-ffff: no such GPU"):
        find_meter(elsewhere, nvml)
