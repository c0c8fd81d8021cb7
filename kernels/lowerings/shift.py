"""Products by powers of two: mult's schedules, with other weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from kernels.lowerings.byte_dot import byte_table
from kernels.lowerings.emit import LANES, fill, places
from kernels.lowerings.inner_product import Unit, amx_bf16, amx_int8, bf16_dot, fma, int8_dot
from kernels.lowerings.panel_product import Arithmetic, Stored
from kernels.packing import BF16_GROUP, DOT_GROUP, LARGEST_POWER, NIBBLE_RUN, PLANE_EXPONENTS
from kernels.targets import KernelTarget

_RUN = LANES * DOT_GROUP
_FP32_MANTISSA_BITS = 23
_BF16_MANTISSA_BITS = 7
_small_dot = partial(int8_dot, largest_weight=LARGEST_POWER)


def _to_float(bits: int, lanes: int, mantissa_bits: int, codes: Any) -> Any:
    """int8 ``sign << 7 | (p + 127)`` into the bits of ±2^p, by one shift and one mask.

    The sign extension puts the sign in place; the mask takes out the code's own sign bit, which
    has come to lie on the exponent's highest.

    Source:
        IEEE 754 binary32 (and bfloat16): sign, 8 exponent bits, 23 (7) mantissa bits.
    """
    integer = f"int{bits}"
    wide = tirx.Cast(f"{integer}x{lanes}", codes)
    moved = tirx.shift_left(wide, fill(tirx.const(mantissa_bits, integer), lanes))
    sign_and_exponent = -(1 << (bits - 2)) - 1
    return tirx.bitwise_and(moved, fill(tirx.const(sign_and_exponent, integer), lanes))


def _to_fp32(codes: Any) -> Any:
    return tirx.reinterpret(f"float32x{LANES}", _to_float(32, LANES, _FP32_MANTISSA_BITS, codes))


def _to_bf16(codes: Any) -> Any:
    return _to_float(16, LANES * BF16_GROUP, _BF16_MANTISSA_BITS, codes)


def panels(target: KernelTarget) -> Arithmetic:
    """One-byte codes unpacked to fp32 in registers: a quarter of the weight traffic."""
    stored = Stored("int8", LANES, (_to_fp32,))
    return Arithmetic(fma(), stored)


def pairs(target: KernelTarget, unit: Callable[[KernelTarget], Unit] = bf16_dot) -> Arithmetic:
    """One-byte codes unpacked to bf16, in which ±2^p is exact: half of bf16's weight traffic."""
    stored = Stored("int8", LANES * BF16_GROUP, (_to_bf16,))
    return Arithmetic(unit(target), stored)


amx_pairs = partial(pairs, unit=amx_bf16)


def _every(value: int, dtype: str = "int32") -> Any:
    return fill(tirx.const(value, dtype), _RUN)


def _power(exponent: Any, plane: int) -> Any:
    """int32x64: 2^exponent within a plane's seven exponents, else 0."""
    power = tirx.shift_left(_every(1), exponent)
    lowered = tirx.shift_right(power, _every(plane * PLANE_EXPONENTS)) if plane else power
    return tirx.bitwise_and(lowered, _every(127))


def _from_nibbles(target: KernelTarget, packed: Any) -> Any:
    """uint8x32 of two codes ``sign << 3 | p`` each into int8x64 of ±2^p, p = 7 into 0."""
    low = tirx.bitwise_and(packed, fill(tirx.const(15, "uint8"), NIBBLE_RUN // 2))
    high = tirx.shift_right(packed, fill(tirx.const(4, "uint8"), NIBBLE_RUN // 2))
    codes = tirx.Shuffle([low, high], places(NIBBLE_RUN))
    if target.byte_bits:
        values = [sign * (1 << p & 127) for sign in (1, -1) for p in range(8)]
        return byte_table(target, values, tirx.reinterpret("int8x64", codes))
    wide = tirx.Cast("int32x64", codes)
    magnitude = _power(tirx.bitwise_and(wide, _every(7)), 0)
    sign = _every(1) - _every(2) * tirx.shift_right(wide, _every(3))
    return tirx.Cast("int8x64", magnitude * sign)


def nibbles(target: KernelTarget, unit: Callable[[KernelTarget], Unit] = _small_dot) -> Arithmetic:
    """Codes of four bits, looked up in registers on their way to the dot product.

    Half of the weight traffic of int8 for one look-up a panel row and tile.
    """
    stored = Stored("uint8", NIBBLE_RUN // 2, (partial(_from_nibbles, target),))
    return Arithmetic(unit(target), stored)


amx_nibbles = partial(nibbles, unit=amx_int8)


def _from_plane(target: KernelTarget, plane: int) -> Callable[[Any], Any]:
    """int8 codes ``sign << 7 | p`` into ±2^(p - 7 plane), 0 where p is another plane's."""

    def decode(codes: Any) -> Any:
        exponent = tirx.bitwise_and(codes, _every(15, "int8"))
        if target.byte_bits:
            first = plane * PLANE_EXPONENTS
            within = range(first, first + PLANE_EXPONENTS)
            entries = [1 << p - first if p in within else 0 for p in range(16)]
            magnitude = byte_table(target, entries, exponent)
        else:
            magnitude = tirx.Cast("int8x64", _power(tirx.Cast("int32x64", exponent), plane))
        # All ones where the sign is set: flipping all bits and adding one negates.
        negative = tirx.shift_right(codes, _every(7, "int8"))
        return tirx.bitwise_xor(magnitude, negative) - negative

    return decode


def planes(target: KernelTarget, unit: Callable[[KernelTarget], Unit] = _small_dot) -> Arithmetic:
    """Fourteen exponents in one-byte codes: two dot products, of the small and the large powers."""
    decoders = tuple(_from_plane(target, plane) for plane in range(2))
    stored = Stored("int8", _RUN, decoders, 2.0**PLANE_EXPONENTS)
    return Arithmetic(unit(target), stored)


amx_planes = partial(planes, unit=amx_int8)
