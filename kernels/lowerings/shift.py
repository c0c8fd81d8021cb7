"""Products by powers of two: mult's schedules, with other weights."""

from __future__ import annotations

from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, fill
from kernels.lowerings.panel_gemm import dot_panels, fma_panels
from kernels.packing import NIBBLE_RUN
from kernels.targets import KernelTarget
from kernels.workload import Workload

# Sign bit and the eight exponent bits' lower seven: what a sign-extended code leaves in place.
_SIGN_AND_EXPONENT = -0x40000001
_MANTISSA_BITS = 23


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


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


def _from_nibbles(target: KernelTarget, packed: Any) -> Any:
    """uint8x32 of two codes ``sign << 3 | p`` each into int8x64 of ±2^p, p = 7 into 0."""
    low = tirx.bitwise_and(packed, fill(tirx.const(15, "uint8"), NIBBLE_RUN // 2))
    high = tirx.shift_right(packed, fill(tirx.const(4, "uint8"), NIBBLE_RUN // 2))
    codes = tirx.Shuffle([low, high], [_i32(i) for i in range(NIBBLE_RUN)])
    if target.byte_table:
        values = [sign * (1 << p & 127) for sign in (1, -1) for p in range(8)]
        entries = [tirx.const(value, "int8") for value in values]
        row = tirx.Shuffle(entries, [_i32(i) for i in range(len(entries))])
        copies = NIBBLE_RUN // len(entries)
        table = tirx.Shuffle([row] * copies, [_i32(i) for i in range(NIBBLE_RUN)])
        signed = tirx.reinterpret(f"int8x{NIBBLE_RUN}", codes)
        return T.call_llvm_pure_intrin(
            f"int8x{NIBBLE_RUN}", "llvm.x86.avx512.pshuf.b.512", table, signed
        )
    wide = tirx.Cast(f"int32x{NIBBLE_RUN}", codes)

    def every(value: int) -> Any:
        return fill(_i32(value), NIBBLE_RUN)

    power = tirx.shift_left(every(1), tirx.bitwise_and(wide, every(7)))
    magnitude = tirx.bitwise_and(power, every(127))
    sign = every(1) - every(2) * tirx.shift_right(wide, every(3))
    return tirx.Cast(f"int8x{NIBBLE_RUN}", magnitude * sign)


def nibbles(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """Codes of four bits, looked up in registers on their way to the dot product.

    Half of the weight traffic of int8 for one look-up a panel row and tile.
    """
    stored = ("uint8", NIBBLE_RUN // 2)
    return dot_panels(workload, target, stored, lambda packed: _from_nibbles(target, packed))


def dot(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """±2^p held as int8 in the integer dot product: mult's kernel to the instruction."""
    return dot_panels(workload, target)
