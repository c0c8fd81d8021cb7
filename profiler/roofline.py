"""What bounds every kernel of a machine, measured in the same run: roofs and launch overhead."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kernels import baselines
from kernels.build import Kernel, build, set_threads
from kernels.peaks import peaks
from kernels.reference import random_operands
from kernels.workload import Workload, linear
from profiler.device import DeviceInfo
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved

# What a form's products are bounded by when its operands are in the caches.
_ROOF = {"float32": "fma_fp32", "bfloat16": "dot_bf16", "int8": "dot_int8"}

# 256 multiply-accumulates: some ns.
_SMALLEST = linear("mult_fp32", m=1, k=16, n=16)


def measure_roofs(device: DeviceInfo, settings: TimingSettings) -> dict[str, float]:
    """Multiply-accumulates (``fma_fp32``, ``dot_int8``) and bytes (``copy``) per ms of this CPU.

    A roof that could not be measured, because other processes were in the way, is absent.
    """
    found = peaks(device.threads, device.last_level_cache_bytes)
    timings = measure_interleaved({peak.name: peak.launch for peak in found}, settings)
    return {
        peak.name: peak.amount / latency_ms
        for peak in found
        if (latency_ms := timings[peak.name].latency_ms)
    }


def roofline_share(
    workload: Workload, latency_ms: float | None, roofs: Mapping[str, float]
) -> float | None:
    """Share of the arithmetic roof that a linear reaches; None for other products or no roof.

    Args:
        workload: What ran.
        latency_ms: How long it took.
        roofs: From ``measure_roofs``.
    """
    roof = roofs.get(_ROOF.get(workload.x_dtype, ""))
    if workload.kind != "linear" or not roof or not latency_ms:
        return None
    return workload.macs / latency_ms / roof


def measure_launch_overheads(device: DeviceInfo, settings: TimingSettings) -> dict[str, float]:
    """What a launch costs on this CPU whatever it computes, in ms: ``ours`` and ``torch``.

    On a CPU a launch returns when it is done, so that its overhead is part of every latency. Here
    it is measured apart, as the latency of a product of 256 multiply-accumulates through the same
    calls. What could not be measured, because other processes were in the way, is absent.
    """
    set_threads(device.threads)
    launches = {
        "ours": _launch(build(_SMALLEST)),
        "torch": _launch(baselines.baseline(_SMALLEST, "torch.fp32")),
    }
    timings = measure_interleaved(launches, settings)
    return {runtime: timing.latency_ms for runtime, timing in timings.items() if timing.latency_ms}


def _launch(kernel: Kernel) -> Callable[[], None]:
    operands = random_operands(_SMALLEST)
    arguments = (*kernel.pack(operands), kernel.allocate(operands))
    return lambda: kernel.launch(*arguments)
