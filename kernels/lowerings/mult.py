"""Products by multiplication: what shift and add are measured against."""

from __future__ import annotations

from tvm import tirx

from kernels.lowerings.panel_gemm import dot_panels, fma_panels
from kernels.targets import KernelTarget
from kernels.workload import Workload


def panels(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """fp32 weights by fused multiply-add."""
    return fma_panels(workload, target, "float32", lambda stored: stored)


def dot(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """int8 weights by integer dot products."""
    return dot_panels(workload, target)
