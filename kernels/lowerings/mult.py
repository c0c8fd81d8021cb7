"""Products by multiplication: what shift and add are measured against."""

from __future__ import annotations

from kernels.lowerings.emit import LANES
from kernels.lowerings.inner_product import amx_bf16, amx_int8, bf16_dot, fma, int8_dot
from kernels.lowerings.panel_product import Arithmetic, Stored
from kernels.packing import BF16_GROUP, DOT_GROUP, INT8_MAX
from kernels.targets import KernelTarget


def panels(target: KernelTarget) -> Arithmetic:
    """fp32 weights by fused multiply-add."""
    return Arithmetic(fma(), Stored("float32", LANES))


def pairs(target: KernelTarget) -> Arithmetic:
    """bf16 weights by dot products of pairs."""
    return Arithmetic(bf16_dot(target), Stored("int16", LANES * BF16_GROUP))


def dot(target: KernelTarget, largest_weight: int = INT8_MAX) -> Arithmetic:
    """int8 weights by integer dot products; small ones are faster where there is no VNNI."""
    return Arithmetic(int8_dot(target, largest_weight), Stored("int8", LANES * DOT_GROUP))


def amx_pairs(target: KernelTarget) -> Arithmetic:
    """bf16 weights by AMX."""
    return Arithmetic(amx_bf16(target), Stored("int16", LANES * BF16_GROUP))


def amx_dot(target: KernelTarget) -> Arithmetic:
    """int8 weights by AMX."""
    return Arithmetic(amx_int8(target), Stored("int8", LANES * DOT_GROUP))
