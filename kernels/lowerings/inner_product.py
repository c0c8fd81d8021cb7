"""The instructions at the heart of a linear: multiply one group of inputs, add to 16 sums.

Each unit takes sixteen output channels at a time: fp32 by fused multiply-add, bf16 in pairs, int8
in fours. Where the target has no instruction for a group, plain arithmetic gives the same sums.
AMX does sixteen rows and sixteen groups in one instruction (``kernels.lowerings.amx``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.byte_dot import ByteDot, byte_dot
from kernels.lowerings.emit import LANES, fill
from kernels.packing import BF16_GROUP, DOT_GROUP, INT8_MAX
from kernels.targets import KernelTarget

# TVM widens every bfloat16 operand to fp32 before LLVM sees it, also those of an instruction that
# exists to take them. So the two functions are handed to LLVM as they are, and take the bits.
_LLVM_BF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @shiftadd_dot_bf16(<16 x float> %sum, <16 x i32> %x, <16 x i32> %w)
    alwaysinline {
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}
"""


@dataclass(frozen=True)
class Unit:
    """One way to multiply and add.

    Attributes:
        group: Neighbouring inputs that one step consumes.
        inputs: Type that it reads them as: codes as int8, or 128 more as uint8; bf16 as int16.
        total: Type of the sums.
        weights: Type of a vector of ``LANES * group`` weights, as ``multiply`` takes it.
        multiply: ``multiply(sums, x, weights)``: sums and x are ``LANES`` wide; x holds the
            group of one row, as fp32 or as int32 bits, in each lane.
        llvm: Functions in LLVM's language that ``multiply`` calls, or what decodes its weights.
        amx: The instruction, where it is one of AMX's; ``multiply`` is then of no use.
    """

    group: int
    inputs: str
    total: str
    weights: str
    multiply: Callable[[Any, Any, Any], Any]
    llvm: str | None = None
    amx: str | None = None


def _i32(value: int) -> Any:
    return fill(tirx.const(value, "int32"), LANES)


def fma() -> Unit:
    """fp32 += fp32 × fp32."""
    return Unit(1, "float32", "float32", "float32", lambda sums, x, weights: sums + x * weights)


def int8_dot(target: KernelTarget, largest_weight: int = INT8_MAX) -> Unit:
    """int32 += int8 × int8, or uint8 × int8, four a lane, without saturation.

    Args:
        target: The CPU.
        largest_weight: In magnitude; small ones are multiplied faster where there is no VNNI.
    """

    def arithmetic(sums: Any, x: Any, weights: Any) -> Any:
        lanes = tirx.reinterpret("int32x16", weights)
        for g in range(DOT_GROUP):
            code = tirx.bitwise_and(tirx.shift_right(x, _i32(8 * g)), _i32(255))
            up = tirx.shift_left(lanes, _i32(24 - 8 * g))
            sums = sums + code * tirx.shift_right(up, _i32(24))
        return sums

    found = byte_dot(target, largest_weight) or ByteDot("uint8", arithmetic)
    return Unit(DOT_GROUP, found.inputs, "int32", "int8", found.multiply)


def bf16_dot(target: KernelTarget) -> Unit:
    """fp32 += bf16 × bf16, two a lane.

    Source:
        Intel SDM, VDPBF16PS (rounds to nearest even, takes denormals for zero).
    """

    def instruction(sums: Any, x: Any, weights: Any) -> Any:
        pairs = tirx.reinterpret("int32x16", weights)
        return T.call_extern("float32x16", "shiftadd_dot_bf16", sums, x, pairs)

    def arithmetic(sums: Any, x: Any, weights: Any) -> Any:
        pairs = tirx.reinterpret("int32x16", weights)
        for widen in (
            lambda bits: tirx.shift_left(bits, _i32(16)),
            lambda bits: tirx.bitwise_and(bits, _i32(-0x10000)),
        ):
            left, right = (tirx.reinterpret("float32x16", widen(bits)) for bits in (x, pairs))
            sums = sums + left * right
        return sums

    if target.bf16_dot:
        return Unit(BF16_GROUP, "int16", "float32", "int16", instruction, _LLVM_BF16)
    return Unit(BF16_GROUP, "int16", "float32", "int16", arithmetic)


def _by_tiles(sums: Any, x: Any, weights: Any) -> Any:
    raise AssertionError("AMX multiplies tiles, not vectors")


def amx_int8(target: KernelTarget) -> Unit:
    """int32 += uint8 × int8, in tiles.

    Source:
        Intel SDM, TDPBUSD.
    """
    return Unit(DOT_GROUP, "uint8", "int32", "int8", _by_tiles, amx="tdpbusd")


def amx_bf16(target: KernelTarget) -> Unit:
    """fp32 += bf16 × bf16, in tiles.

    Source:
        Intel SDM, TDPBF16PS (rounds to nearest even, takes denormals for zero).
    """
    return Unit(BF16_GROUP, "int16", "float32", "int16", _by_tiles, amx="tdpbf16ps")
