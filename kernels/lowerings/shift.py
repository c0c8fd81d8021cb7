"""Products by powers of two: mult's schedules, with other weights."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from kernels.lowerings.emit import LANES, fill
from kernels.lowerings.panel_gemm import dot_panels, fma_panels
from kernels.targets import KernelTarget
from kernels.workload import Workload

# Sign bit and the eight exponent bits' lower seven: what a sign-extended code leaves in place.
_SIGN_AND_EXPONENT = -0x40000001
_MANTISSA_BITS = 23


def _to_fp32(codes: Any) -> Any:
    """int8 ``sign << 7 | (p + 127)`` into the fp32 number ±2^p, by one shift and one mask.

    Source:
        IEEE 754 binary32: sign, 8 exponent bits, 23 mantissa bits.
    """
    wide = tirx.Cast(f"int32x{LANES}", codes)
    moved = tirx.shift_left(wide, fill(tirx.const(_MANTISSA_BITS, "int32"), LANES))
    bits = tirx.bitwise_and(moved, fill(tirx.const(_SIGN_AND_EXPONENT, "int32"), LANES))
    return tirx.reinterpret(f"float32x{LANES}", bits)


def panels(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """One-byte codes unpacked to fp32 in registers: a quarter of the weight traffic."""
    return fma_panels(workload, target, "int8", _to_fp32)


def dot(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """±2^p held as int8 in the integer dot product: mult's kernel to the instruction."""
    return dot_panels(workload, target)
