"""The only NVML import of the suite: which GPU, and a probe that reads it.

NVML counts GPUs by PCI bus and knows nothing of CUDA_VISIBLE_DEVICES, so a GPU is found once by
its CUDA index and from then on named by its UUID.

Source: NVML API reference manual (device queries, field values, clocks event reasons).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from profiler.command_line import BadInput
from profiler.device import DeviceError, DeviceInfo, software_versions


class Unavailable(RuntimeError):
    """A figure that this machine does not give; the message is the reason, for people."""


_REASONS = {
    "NVMLError_DriverNotLoaded": "no NVIDIA driver",
    "NVMLError_FunctionNotFound": "the NVIDIA driver is too old",
    "NVMLError_GpuIsLost": "the GPU was lost",
    "NVMLError_LibraryNotFound": "no NVIDIA driver",
    "NVMLError_NoPermission": "permission denied",
    "NVMLError_NotFound": "no such GPU",
    "NVMLError_NotSupported": "not supported by this GPU",
    "NVMLError_Uninitialized": "the NVIDIA driver vanished",
}

# Idling is no throttling: an unused GPU reports it all the time.
_THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability limit",
}
# Those that are somebody's choice: a clock that was set is low, and steady.
CHOSEN_CLOCKS = frozenset({"application clocks", "display clocks"})

# NVML counts FP32 cores, DeviceInfo multiprocessors.
# Source: CUDA C++ programming guide, technical specifications by compute capability.
_CORES_PER_MULTIPROCESSOR = {
    "sm_60": 64,
    "sm_61": 128,
    "sm_70": 64,
    "sm_75": 64,
    "sm_80": 64,
    "sm_86": 128,
    "sm_87": 128,
    "sm_89": 128,
    "sm_90": 128,
    "sm_100": 128,
    "sm_120": 128,
}


@dataclass(frozen=True)
class Power:
    """A power reading in W.

    Attributes:
        watts: Draw of the GPU with its memory.
        kind: ``instant``, or ``usage`` where the driver has no such field: that one is averaged
            over 1 s on Ampere (except GA100) and later.
    """

    watts: float
    kind: Literal["instant", "usage"]


@dataclass(frozen=True)
class Probe:
    """Reads one GPU. Every method raises Unavailable where NVML gives no figure.

    Attributes:
        nvml: The module ``pynvml``, initialised.
        handle: NVML's handle of the GPU or MIG instance.
    """

    nvml: Any
    handle: Any

    def ask(self, what: str, function: str, *arguments: Any) -> Any:
        """Calls an NVML function on this GPU.

        Raises:
            Unavailable: With ``what`` and the reason in words.
        """
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError as error:
            raise Unavailable(f"{what}: {_reason(error)}") from error

    def energy_mj(self) -> float:
        """Energy since the driver was loaded, in mJ; updated every 20 to 100 ms."""
        return float(self.ask("energy counter", "nvmlDeviceGetTotalEnergyConsumption"))

    def power(self) -> Power:
        """Power now, instantaneous where the driver tells it apart from the average."""
        field = self.nvml.NVML_FI_DEV_POWER_INSTANT
        try:
            (answer,) = self.ask("instant power", "nvmlDeviceGetFieldValues", [field])
        except Unavailable:
            answer = None
        if answer is not None and answer.nvmlReturn == self.nvml.NVML_SUCCESS:
            return Power(answer.value.uiVal / 1e3, "instant")
        return Power(self.ask("power", "nvmlDeviceGetPowerUsage") / 1e3, "usage")

    def sm_clock_mhz(self) -> float:
        """Present clock of the multiprocessors in MHz."""
        return float(self.ask("SM clock", "nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_SM))

    def full_sm_clock_mhz(self) -> float:
        """Clock in MHz that the multiprocessors keep under load when nothing throttles them.

        The application clock where one is set, else the maximum.
        """
        sm = self.nvml.NVML_CLOCK_SM
        highest = float(self.ask("maximum SM clock", "nvmlDeviceGetMaxClockInfo", sm))
        try:
            return min(highest, self.ask("SM clock", "nvmlDeviceGetApplicationsClock", sm))
        except Unavailable:
            return highest

    def throttle_reasons(self) -> tuple[str, ...]:
        """What holds the clocks below their maximum at present; empty when nothing does."""
        # The older of this function's two names: every driver has it.
        mask = self.ask("throttle reasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return tuple(name for bit, name in _THROTTLE_REASONS.items() if mask & bit)

    def other_processes(
        self, own_pid: int | None = None, exists: Callable[[int], bool] = psutil.pid_exists
    ) -> tuple[int, ...]:
        """Process ids that compute on this GPU beside this process.

        The graphics of a desktop do not count: their draw is part of the idle power.
        """
        own_pid = os.getpid() if own_pid is None else own_pid
        listed = {
            process.pid for process in self.ask("processes", "nvmlDeviceGetComputeRunningProcesses")
        }
        foreign = listed - {own_pid}
        if own_pid not in listed:
            # The driver knows no PID namespaces: in a container it lists this process under the
            # host's number, which does not exist here.
            foreign -= set([pid for pid in sorted(foreign) if not exists(pid)][:1])
        return tuple(sorted(foreign))

    def mig(self) -> bool:
        """Whether the GPU is partitioned, or this is one of its partitions."""
        nvml = self.nvml
        try:
            partition = bool(nvml.nvmlDeviceIsMigDeviceHandle(self.handle))
            return partition or (
                nvml.nvmlDeviceGetMigMode(self.handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
            )
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return False
        except nvml.NVMLError as error:
            raise Unavailable(f"MIG: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return _REASONS.get(type(error).__name__) or f"NVML says {error}"


def _connect(nvml: Any) -> Any:
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        # NVML counts its initialisations: a second one costs nothing.
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise Unavailable(_reason(error)) from error
    return nvml


def open_probe(uuid: str, nvml: Any = None) -> Probe:
    """The probe of the GPU or MIG instance of that UUID.

    Args:
        uuid: As NVML writes it (``GPU-…``), or without that prefix, as torch does.
        nvml: Stands in for the module ``pynvml``.

    Raises:
        Unavailable: If there is no driver or no such GPU.
    """
    nvml = _connect(nvml)
    uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        return Probe(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError as error:
        raise Unavailable(f"{uuid}: {_reason(error)}") from error


def visible_uuids(nvml: Any = None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """UUIDs of the GPUs that CUDA shows, in the order of ``cuda:0``, ``cuda:1``, ….

    Without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA puts the fastest first, and that order is known
    here only where all GPUs are of one model.

    Raises:
        Unavailable: If there is no driver, or the GPUs cannot be listed.
        DeviceError: If the order cannot be known.

    Source: CUDA C++ programming guide, CUDA environment variables.
    """
    nvml = _connect(nvml)
    try:
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
        ]
        uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
        models = {nvml.nvmlDeviceGetName(handle) for handle in handles}
    except nvml.NVMLError as error:
        raise Unavailable(f"list of GPUs: {_reason(error)}") from error
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    entries = [str(index) for index in range(len(uuids))] if chosen is None else chosen.split(",")
    found = []
    for entry in (entry.strip() for entry in entries):
        match = _match(entry, uuids)
        # CUDA shows the devices before the first entry that it does not know.
        if match is None:
            break
        found.append(match)
        by_number = entry.isdigit() and len(models) > 1
        if by_number and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            raise DeviceError(
                "--device: the GPUs differ in model, so their order is not known; "
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
            )
    return found


def _match(entry: str, uuids: list[str]) -> str | None:
    if entry.isdigit():
        return uuids[int(entry)] if int(entry) < len(uuids) else None
    if entry.startswith("MIG-"):
        return entry
    matches = [uuid for uuid in uuids if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def gpu_count(nvml: Any = None, environment: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that CUDA shows; 0 without a driver.

    Raises:
        DeviceError: If there are several and their order cannot be known.
    """
    try:
        return len(visible_uuids(nvml, environment))
    except Unavailable:
        return 0


def gpu_indices(device: str) -> list[int]:
    """CUDA's numbers of the GPUs that ``cuda``, ``cuda:N`` or ``all`` stands for.

    Raises:
        BadInput: If it stands for none.
    """
    if device == "all":
        if not (count := gpu_count()):
            raise BadInput("--device all: no GPU is visible here")
        return list(range(count))
    index = device.removeprefix("cuda").removeprefix(":") or "0"
    if not device.startswith("cuda") or not index.isdecimal():
        raise BadInput(f"--device {device}: must be cpu, cuda:N or all")
    return [int(index)]


def cuda_info(
    index: int, nvml: Any = None, environment: Mapping[str, str] = os.environ
) -> DeviceInfo:
    """The GPU ``cuda:index``. What NVML does not give is left at DeviceInfo's default.

    Args:
        index: CUDA's number, so after CUDA_VISIBLE_DEVICES.
        nvml: Stands in for the module ``pynvml``.
        environment: Where the CUDA variables are read.

    Raises:
        DeviceError: If there is no driver, no such GPU or no telling which one it is.
    """
    try:
        nvml = _connect(nvml)
        uuids = visible_uuids(nvml, environment)
        if not 0 <= index < len(uuids):
            raise DeviceError(f"--device cuda:{index}: no such GPU, CUDA shows {len(uuids)}")
        probe = open_probe(uuids[index], nvml)
        return _describe(probe, uuids[index])
    except Unavailable as error:
        raise DeviceError(f"--device cuda:{index}: {error}") from error


def _describe(probe: Probe, uuid: str) -> DeviceInfo:
    nvml = probe.nvml
    isa = "sm_{}{}".format(*probe.ask("capability", "nvmlDeviceGetCudaComputeCapability"))
    per_multiprocessor = _CORES_PER_MULTIPROCESSOR.get(isa)
    fp32_cores = _optional(probe, "nvmlDeviceGetNumGpuCores")
    memory = _optional(probe, "nvmlDeviceGetMemoryInfo")
    limit_mw = _optional(probe, "nvmlDeviceGetPowerManagementLimit")
    ecc = _optional(probe, "nvmlDeviceGetEccMode")
    try:
        mig = probe.mig()
    except Unavailable:
        mig = None
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        cuda_version = nvml.nvmlSystemGetCudaDriverVersion_v2()
    except nvml.NVMLError as error:
        raise Unavailable(f"driver version: {_reason(error)}") from error
    return DeviceInfo(
        kind="cuda",
        name=probe.ask("name", "nvmlDeviceGetName"),
        uuid=uuid,
        isa=isa,
        cores=fp32_cores // per_multiprocessor if fp32_cores and per_multiprocessor else 0,
        memory_bytes=memory.total if memory else 0,
        sm_clock_mhz=_optional(probe, "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        memory_clock_mhz=_optional(probe, "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
        power_limit_w=None if limit_mw is None else limit_mw / 1e3,
        ecc=None if ecc is None else bool(ecc[0]),
        mig=mig,
        driver=driver,
        cuda=f"{cuda_version // 1000}.{cuda_version % 1000 // 10}",
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        software=software_versions(),
    )


def _optional(probe: Probe, function: str, *arguments: Any) -> Any:
    try:
        return probe.ask(function, function, *arguments)
    except Unavailable:
        return None
