"""The machine's roofs, measured in the same run, and each kernel's share of them."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.peaks import peaks
from kernels.workload import Workload
from profiler.device import DeviceInfo
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved

# What a form's products are bounded by when its operands are in the caches.
_ROOF = {"float32": "fma_fp32", "int8": "dot_int8"}


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
