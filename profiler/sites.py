"""Where kernels run, and how they are timed there: this machine's CPU or one of its GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import baselines
from kernels.build import Kernel, build, lowerings, set_threads
from kernels.reference import Operands
from kernels.targets import KernelTarget, TargetError, cpu_target, cuda_target
from kernels.workload import Workload
from profiler.clock import clock_rate
from profiler.device import DeviceError, DeviceInfo
from profiler.energy import (
    EnergyReading,
    EnergySettings,
    Unavailable,
    find_meter,
    measure_energy,
    measuring_s,
)
from profiler.roofline import measure_launch_overheads, measure_roofs
from profiler.samples import Timing, TimingSettings
from profiler.timing import cache_flush, measure_interleaved
from profiler.timing_cuda import SHORTEST_SAMPLE_MS, TorchStream, filling_graph, measure_cuda

Launch = Callable[[], object]

_UNKNOWN_CACHE_BYTES = 2**25


class Site(Protocol):
    """One device, as a sweep uses it; its launches are its own affair."""

    @property
    def device(self) -> DeviceInfo:
        """Who it is."""

    @property
    def target(self) -> KernelTarget:
        """What its kernels are built for."""

    def prepare(self) -> None:
        """Before the first kernel is built."""

    def kernels(self, workload: Workload, compiled: bool) -> list[tuple[str, bool]]:
        """What can compute a workload there: lowerings by name, True for a baseline."""

    def build(self, workload: Workload, lowering: str, is_baseline: bool) -> Kernel:
        """One of them."""

    def run(self, kernel: Kernel, operands: Operands) -> Tensor:
        """Its output, for the check."""

    def bind(self, kernel: Kernel, operands: Operands) -> Any:
        """A launch on operands that lie there already, into a fixed output."""

    def time(
        self, launches: Mapping[str, Any], settings: TimingSettings, cache: str
    ) -> dict[str, Timing]:
        """All launches by one clock, interleaved, with hot or cold caches."""

    def roofs(self, settings: TimingSettings) -> dict[str, float]:
        """What it can do at most, by the same clock; empty where that is not measured."""

    def launch_overheads(self, settings: TimingSettings) -> dict[str, float]:
        """What a launch costs whatever it computes, in ms: ``ours``, ``torch``; else empty."""

    def energy_s(self) -> float | None:
        """About how long the energy of one launch takes to measure; None without a meter."""

    def energy(self, launch: Any) -> EnergyReading:
        """Measured energy of a launch, or why there is none."""


@dataclass(frozen=True)
class LocalSite:
    """A device that torch sees; ``torch_device`` is ``cpu`` or ``cuda:N``."""

    device: DeviceInfo
    target: KernelTarget
    torch_device: str

    def prepare(self) -> None:
        """Sets the number of CPU threads."""
        if self.device.kind == "cpu":
            set_threads(self.device.threads)

    def kernels(self, workload: Workload, compiled: bool) -> list[tuple[str, bool]]:
        """Our lowerings and torch's baselines, with or without those of ``torch.compile``."""
        kind = self.device.kind
        ours = [(name, False) for name in lowerings(workload, self.target)]
        return ours + [(name, True) for name in baselines.names(workload, compiled, kind)]

    def build(self, workload: Workload, lowering: str, is_baseline: bool) -> Kernel:
        """A kernel of ours or of torch."""
        if is_baseline:
            return baselines.baseline(workload, lowering)
        return build(workload, lowering, self.target)

    def run(self, kernel: Kernel, operands: Operands) -> Tensor:
        """Its output, where it was computed."""
        return kernel(operands.to(self.torch_device))

    def bind(self, kernel: Kernel, operands: Operands) -> Launch:
        """A launch without any copy."""
        operands = operands.to(self.torch_device)
        arguments = (*kernel.pack(operands), kernel.allocate(operands))
        launch = kernel.launch
        return lambda: launch(*arguments)

    def time(
        self, launches: Mapping[str, Launch], settings: TimingSettings, cache: str
    ) -> dict[str, Timing]:
        """By the host's clock on a CPU, by events on a GPU."""
        if self.device.kind == "cuda":
            l2_bytes = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
            with torch.cuda.device(self.torch_device):
                return measure_cuda(launches, settings, l2_bytes if cache == "cold" else None)
        last_level_bytes = self.device.last_level_cache_bytes or _UNKNOWN_CACHE_BYTES
        flush = cache_flush(last_level_bytes) if cache == "cold" else None
        rate = partial(clock_rate, self.device.threads or 1)
        return measure_interleaved(launches, settings, flush=flush, clock_rate=rate)

    def roofs(self, settings: TimingSettings) -> dict[str, float]:
        """Those of a CPU; a GPU's are not measured yet."""
        return measure_roofs(self.device, settings) if self.device.kind == "cpu" else {}

    def launch_overheads(self, settings: TimingSettings) -> dict[str, float]:
        """Those of a CPU; on a GPU each kernel's own is in its row."""
        on_cpu = self.device.kind == "cpu"
        return measure_launch_overheads(self.device, settings) if on_cpu else {}

    def energy_s(self) -> float | None:
        """Where there is a meter."""
        try:
            return measuring_s(find_meter(self.device), EnergySettings())
        except Unavailable:
            return None

    def energy(self, launch: Launch) -> EnergyReading:
        """By NVML or RAPL, where they can be read.

        On a GPU of CUDA graphs, as its latency: launched one by one, short kernels leave it idle
        for most of a window, and that would be charged to them.
        """
        try:
            meter = find_meter(self.device)
        except Unavailable as error:
            return EnergyReading(reason=str(error))
        if self.device.kind == "cpu":
            return measure_energy(partial(_repeat, launch), meter, EnergySettings())
        with torch.cuda.device(self.torch_device):
            stream = TorchStream()
            replay, held = filling_graph(launch, SHORTEST_SAMPLE_MS, stream)

            def replays(number: int) -> None:
                _repeat(replay, number)
                stream.synchronise()

            return measure_energy(replays, meter, EnergySettings(), held=held)


def _repeat(launch: Launch, number: int) -> None:
    for _ in range(number):
        launch()


def cpu_site(device: DeviceInfo, chip: str | None = None) -> LocalSite:
    """This machine's CPU, with kernels built for it or for a lesser chip by LLVM's name."""
    return LocalSite(device, cpu_target(chip), "cpu")


def cuda_site(device: DeviceInfo, index: int) -> LocalSite:
    """A GPU by CUDA's number.

    Raises:
        DeviceError: If no kernels can be built for its architecture.
    """
    try:
        return LocalSite(device, cuda_target(device.isa), f"cuda:{index}")
    except TargetError as error:
        raise DeviceError(f"--device cuda:{index}: {error}") from error
