"""Energy against simulated devices whose true joules are known; no real reading is taken."""

import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.command_line import BadInput
from profiler.device import DeviceInfo
from profiler.energy import (
    EnergyReading,
    EnergySettings,
    NvmlCounterMeter,
    NvmlPowerMeter,
    RaplMeter,
    find_meter,
    measure_energy,
)
from profiler.energy_trace import ReplayMeter, Trace, load_trace, save_trace
from profiler.nvml import Power, Unavailable

CUDA = DeviceInfo(kind="cuda", name="simulated", uuid="GPU-0")
CPU = DeviceInfo(kind="cpu", name="simulated", threads=1)
QUICK = EnergySettings(windows=2, window_s=2.0, idle_s=0.5)


@dataclass
class SimulatedGpu:
    """A GPU in simulated time, and the probe that reads it.

    Its counter shows the true energy as of the last of its updates, which come every 20 to
    100 ms, and costs time to read.
    """

    launch_s: float = 1e-4
    idle_w: float = 60.0
    load_w: float = 300.0
    update_s: tuple[float, float] = (0.02, 0.1)
    read_s: float = 1e-3
    fails_at_s: float = float("inf")
    others: tuple[int, ...] = ()
    is_mig: bool = False
    power_kind: str = "instant"
    has_counter: bool = True
    now_s: float = 0.0
    launched: int = 0
    true_mj: float = 5e6
    shown_mj: float = 5e6
    next_update_s: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def pass_time(self, seconds: float, watts: float) -> None:
        end_s = self.now_s + seconds
        while self.next_update_s <= end_s:
            self.true_mj += max(0.0, self.next_update_s - self.now_s) * watts * 1e3
            self.now_s = max(self.now_s, self.next_update_s)
            self.shown_mj = round(self.true_mj)
            self.next_update_s += self.rng.uniform(*self.update_s)
        self.true_mj += (end_s - self.now_s) * watts * 1e3
        self.now_s = end_s

    def launch(self, number: int) -> None:
        self.launched += number
        self.pass_time(number * self.launch_s, self.load_w)

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, self.idle_w)

    def clock(self) -> float:
        return self.now_s

    def energy_mj(self) -> float:
        if not self.has_counter:
            raise Unavailable("energy counter: not supported by this GPU")
        if self.now_s >= self.fails_at_s:
            raise Unavailable("energy counter: the GPU was lost")
        self.pass_time(self.read_s, self.idle_w)
        return self.shown_mj

    def power(self) -> Power:
        return Power(self.load_w, self.power_kind)

    def mig(self) -> bool:
        return self.is_mig

    def other_processes(self) -> tuple[int, ...]:
        return self.others

    def measure(self, meter=None, how=QUICK) -> EnergyReading:
        meter = meter or NvmlCounterMeter(self)
        return measure_energy(self.launch, meter, how, self.clock, self.sleep, rng=random.Random(1))


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
    meter = RaplMeter((zone,))
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


def test_no_rapl(tmp_path):
    with pytest.raises(Unavailable, match=r"^RAPL is not exposed on this machine$"):
        find_meter(CPU, powercap=tmp_path)


# Which meter


@pytest.fixture
def gpu(monkeypatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    monkeypatch.setattr("profiler.energy.open_probe", lambda uuid, nvml: simulated)
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


# Traces


def generated_trace(kind: str, seconds: float = 60.0, watts: float = 200.0) -> Trace:
    """A made-up trace of constant power, read every 50 ms. Recorded from no device."""
    t_s = tuple(step * 0.05 for step in range(round(seconds / 0.05) + 1))
    if kind == "power_w":
        return Trace("generated", t_s, power_w=(watts,) * len(t_s))
    return Trace("generated", t_s, energy_mj=tuple(7e4 + watts * t * 1e3 for t in t_s))


@pytest.mark.parametrize("kind", ["energy_mj", "power_w"])
def test_a_replayed_trace_yields_its_joules(kind):
    gpu = SimulatedGpu(launch_s=1e-3, now_s=1e4, next_update_s=1e4)
    meter = ReplayMeter(generated_trace(kind), gpu.clock)
    reading = gpu.measure(meter)
    assert meter.step_s == pytest.approx(0.05)
    assert reading.source == "replay"
    assert reading.energy_mj == pytest.approx(200 * 1e-3 * 1e3, rel=0.01)


def test_a_trace_that_is_too_short_leaves_no_figure():
    gpu = SimulatedGpu()
    reading = gpu.measure(ReplayMeter(generated_trace("energy_mj", seconds=3.0), gpu.clock))
    assert reading == EnergyReading(reason="the trace ends after 3 s")


@pytest.mark.parametrize("kind", ["energy_mj", "power_w"])
def test_a_trace_survives_its_file_with_its_origin(tmp_path, kind):
    trace = generated_trace(kind, seconds=1.0)
    save_trace(trace, tmp_path / "trace.csv")
    assert load_trace(tmp_path / "trace.csv") == trace
    assert (tmp_path / "trace.csv").read_text().startswith("# energy trace, generated\n")


HEADER = "# energy trace, recorded\nt_s,energy_mj,power_w\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1 must be"),
        ("t_s,energy_mj,power_w\n0,1,\n1,2,\n", "line 1 must be"),
        ("# energy trace, recorded\nt,e\n", "line 2 must be t_s,energy_mj,power_w"),
        (HEADER + "0,1\n", "line 3 has 2 columns, not 3"),
        (HEADER + "0,1,\n1,many,\n", "line 4, energy_mj: 'many' is no number"),
        (HEADER + "0,1,\n", "at least two times"),
        (HEADER + "0,1,\n1,,\n", "a reading for each"),
        (HEADER + "0,1,\n0,2,\n", "times have to rise"),
        (HEADER + "0,1,\n1,inf,\n", "have to be finite"),
        (HEADER + "0,1,5\n1,2,5\n", "exactly one"),
    ],
)
def test_a_bad_trace_is_one_line_that_names_file_and_place(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        load_trace(tmp_path / "none.csv")
