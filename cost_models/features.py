"""Workload and DeviceInfo -> the numbers that the latency models see. Pure functions."""

from __future__ import annotations

import math

from kernels.workload import Workload
from profiler.device import DeviceInfo

# Everything is in octaves (log2), so that one length scale means one factor at every size.
FEATURES: tuple[str, ...] = ("b", "m", "k", "n")


def features(workload: Workload) -> dict[str, float]:
    """What the learned model sees of a workload: its sizes in octaves, by name in FEATURES."""
    return {name: math.log2(getattr(workload, name)) for name in FEATURES}


def parallel_units(device: DeviceInfo) -> int:
    """Units of a device that share the tiles of a product: threads or multiprocessors."""
    return max(1, device.threads if device.kind == "cpu" else device.cores)


def executed_macs(workload: Workload, tile: tuple[int, int], units: int) -> int:
    """Multiply-accumulates that a device is busy for, idle parts of it included.

    The output is cut into tiles, the last ones overhang, and the units work through the tiles in
    waves of which the last leaves some units idle.

    Args:
        workload: Any workload.
        tile: Rows and columns of the output that one unit computes at a time.
        units: Units that work at once.

    Source: NVIDIA, Matrix Multiplication Background User's Guide, tile and wave quantisation.
    """
    rows, columns = math.ceil(workload.m / tile[0]), math.ceil(workload.n / tile[1])
    waves = math.ceil(workload.b * rows * columns / units)
    return waves * units * tile[0] * tile[1] * workload.k


# What bounds the training shapes: each size, and the work and traffic. Those two cut the corners
# off the box of sizes: shapes large in every direction at once although no measured one was.
EXTENTS: tuple[str, ...] = (*FEATURES, "macs", "traffic_bytes")


def extents(workload: Workload) -> dict[str, float]:
    """Position of a workload against the hull of the training shapes: EXTENTS in octaves."""
    return {name: math.log2(getattr(workload, name)) for name in EXTENTS}
