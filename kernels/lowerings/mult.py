"""Products by multiplication: what shift and add are measured against."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx

from kernels.lowerings.emit import LANES
from kernels.lowerings.inner_product import bf16_dot, fma, int8_dot
from kernels.lowerings.panel_gemm import Stored, linear_panels
from kernels.packing import BF16_GROUP, DOT_GROUP
from kernels.targets import KernelTarget
from kernels.workload import Workload


def panels(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """fp32 weights by fused multiply-add."""
    return linear_panels(workload, target, schedule, fma(), Stored("float32", LANES))


def pairs(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """bf16 weights by dot products of pairs."""
    stored = Stored("int16", LANES * BF16_GROUP)
    return linear_panels(workload, target, schedule, bf16_dot(target), stored)


def dot(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """int8 weights by integer dot products."""
    stored = Stored("int8", LANES * DOT_GROUP)
    return linear_panels(workload, target, schedule, int8_dot(target), stored)
