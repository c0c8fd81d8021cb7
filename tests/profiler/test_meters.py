"""Each meter, and which one is chosen; simulated devices, no real reading is taken."""

import time

import pynvml
import pytest
from fake_nvml import H100, SECOND_H100, FakeNvml, failing
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import QUICK, SimulatedGpu

from profiler.device import DeviceInfo
from profiler.energy import (
    EnergyReading,
    NvmlPowerMeter,
    RaplMeter,
    find_meter,
    measure_energy,
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
@settings(max_examples=50)
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
