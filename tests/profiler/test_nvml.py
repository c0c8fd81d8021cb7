"""NVML through a stand-in for the module pynvml: no GPU is needed, none is measured."""

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest
from fake_nvml import H100, SECOND_H100, T4, FakeNvml, failing

from profiler.device import DeviceError
from profiler.nvml import Probe, Unavailable, cuda_info, gpu_count, open_probe, visible_uuids


def probe(**answers) -> Probe:
    return open_probe(H100["nvmlDeviceGetUUID"], FakeNvml(H100 | answers))


def test_the_fake_has_no_function_that_the_real_module_lacks():
    functions = {name for name in (*H100, *vars(FakeNvml)) if name.startswith("nvml")}
    for name in functions:
        assert callable(getattr(pynvml, name)), name
    fake, real = FakeNvml.nvmlDeviceGetFieldValues, pynvml.nvmlDeviceGetFieldValues
    assert len(inspect.signature(fake).parameters) == 1 + len(inspect.signature(real).parameters)


def test_a_gpu_is_described():
    info = cuda_info(0, FakeNvml(H100), {})
    assert (info.kind, info.name, info.uuid) == ("cuda", "NVIDIA H100 (fake)", "GPU-aaaa1111-0000")
    assert (info.isa, info.cores, info.threads) == ("sm_90", 132, 0)
    assert (info.power_limit_w, info.sm_clock_mhz, info.memory_clock_mhz) == (700, 1980, 2619)
    assert (info.ecc, info.mig, info.driver, info.cuda) == (True, False, "570.86.10", "12.8")
    assert info.memory_bytes == 80 * 2**30


def test_what_the_gpu_does_not_tell_is_none_and_not_zero():
    unsupported = failing(pynvml.NVML_ERROR_NOT_SUPPORTED)
    names = ("PowerManagementLimit", "MaxClockInfo", "EccMode", "NumGpuCores")
    silent = H100 | {f"nvmlDeviceGet{name}": unsupported for name in names}
    info = cuda_info(0, FakeNvml(silent), {})
    assert info.power_limit_w is info.sm_clock_mhz is info.memory_clock_mhz is info.ecc is None


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["GPU-bbbb2222-0000"]),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, ["GPU-bbbb2222-0000", "GPU-aaaa1111-0000"]),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ["GPU-aaaa1111-0000"]),
        ({"CUDA_VISIBLE_DEVICES": "7,0"}, []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, ["GPU-bbbb2222-0000"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, []),
        ({"CUDA_VISIBLE_DEVICES": "MIG-dddd"}, ["MIG-dddd"]),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(environment, expected):
    nvml = FakeNvml(H100, SECOND_H100)
    assert visible_uuids(nvml, environment) == expected
    assert gpu_count(nvml, environment) == len(expected)


def test_cuda_index_is_mapped_to_the_right_gpu():
    info = cuda_info(0, FakeNvml(H100, SECOND_H100), {"CUDA_VISIBLE_DEVICES": "1"})
    assert info.uuid == "GPU-bbbb2222-0000"


def test_gpus_of_several_models_need_a_known_order():
    nvml = FakeNvml(T4, H100)
    with pytest.raises(DeviceError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        cuda_info(0, nvml, {})
    assert cuda_info(1, nvml, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).uuid == "GPU-aaaa1111-0000"
    by_uuid = {"CUDA_VISIBLE_DEVICES": "GPU-cccc3333-0000"}
    assert cuda_info(0, nvml, by_uuid).name == "Tesla T4 (fake)"


@pytest.mark.parametrize("index", [-1, 1])
def test_a_gpu_that_is_not_there_is_one_clear_line(index):
    with pytest.raises(DeviceError, match=rf"--device cuda:{index}: no such GPU, CUDA shows 1$"):
        cuda_info(index, FakeNvml(H100), {})


def test_without_a_driver():
    nvml = FakeNvml(init=failing(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert gpu_count(nvml) == 0
    with pytest.raises(DeviceError, match=r"^--device cuda:0: no NVIDIA driver$"):
        cuda_info(0, nvml)


def test_importing_needs_neither_driver_nor_pynvml():
    code = "import sys, profiler.nvml; sys.exit('pynvml' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_torch_style_uuid_is_accepted():
    assert open_probe("aaaa1111-0000", FakeNvml(H100)).energy_mj() == 123_456
    with pytest.raises(Unavailable, match="GPU-ffff: no such GPU"):
        open_probe("ffff", FakeNvml(H100))


def test_instant_power_is_preferred_and_the_kind_is_told():
    power = probe().power()
    assert (power.watts, power.kind) == (310, "instant")
    old = probe(nvmlDeviceGetFieldValues=failing(pynvml.NVML_ERROR_NOT_SUPPORTED)).power()
    assert (old.watts, old.kind) == (250, "usage")


@pytest.mark.parametrize(
    "code, reason",
    [
        (pynvml.NVML_ERROR_NOT_SUPPORTED, "not supported by this GPU"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "permission denied"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "the GPU was lost"),
        (pynvml.NVML_ERROR_UNINITIALIZED, "the NVIDIA driver vanished"),
        (pynvml.NVML_ERROR_TIMEOUT, "NVML says Timeout"),
    ],
)
def test_every_failure_has_a_reason(code, reason):
    with pytest.raises(Unavailable, match=f"energy counter: {reason}"):
        probe(nvmlDeviceGetTotalEnergyConsumption=failing(code)).energy_mj()


def test_clock_and_throttling():
    assert probe().sm_clock_mhz() == 1755
    assert probe().throttle_reasons() == ()
    throttled = probe(nvmlDeviceGetCurrentClocksThrottleReasons=0x1 | 0x4 | 0x40)
    assert throttled.throttle_reasons() == ("software power cap", "hardware thermal slowdown")


def processes(*pids: int) -> Probe:
    return probe(nvmlDeviceGetComputeRunningProcesses=[SimpleNamespace(pid=pid) for pid in pids])


@pytest.mark.parametrize(
    "listed, others",
    [
        ((), ()),
        ((7,), ()),
        ((7, 8), (8,)),
        ((8,), (8,)),
        # 9000 and 9001 are numbers of another PID namespace.
        ((9000,), ()),
        ((9000, 9001), (9001,)),
        ((7, 9000), (9000,)),
        ((8, 9000), (8,)),
    ],
)
def test_other_processes(listed, others):
    assert processes(*listed).other_processes(own_pid=7, exists=lambda pid: pid < 100) == others


def test_this_process_is_not_another():
    assert processes(os.getpid()).other_processes() == ()


def test_mig():
    assert not probe().mig()
    assert probe(nvmlDeviceGetMigMode=[1, 1]).mig()
    assert probe(nvmlDeviceIsMigDeviceHandle=pynvml.c_uint(1)).mig()
    assert not probe(nvmlDeviceGetMigMode=failing(pynvml.NVML_ERROR_NOT_SUPPORTED)).mig()
    with pytest.raises(Unavailable, match="MIG: permission denied"):
        probe(nvmlDeviceGetMigMode=failing(pynvml.NVML_ERROR_NO_PERMISSION)).mig()
