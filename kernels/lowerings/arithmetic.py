"""ARITHMETIC and AMX: what multiplies in each form of linear on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kernels.lowerings import add_weights, mult, shift
from kernels.lowerings.panel_product import Arithmetic
from kernels.packing import LARGEST_POWER, WHOLE_WEIGHTS
from kernels.targets import KernelTarget

# By vectors, on any CPU.
ARITHMETIC: dict[str, Callable[[KernelTarget], Arithmetic]] = {
    "mult_fp32": mult.panels,
    "mult_bf16": mult.pairs,
    "mult_int8": mult.dot,
    "mult_int7": partial(mult.dot, largest_weight=WHOLE_WEIGHTS["mult_int7"]),
    "shift_fp32": shift.panels,
    "shift_bf16": shift.pairs,
    # ±2^p held as int8: mult's kernel to the instruction with VNNI, and that of mult_int7 without.
    "shift_int8": partial(mult.dot, largest_weight=LARGEST_POWER),
    "shift_int8_wide": shift.planes,
    "shift_int4": shift.nibbles,
    "add_int8": add_weights.bits,
}
# By tiles, where the CPU has them.
AMX: dict[str, Callable[[KernelTarget], Arithmetic]] = {
    "mult_bf16": mult.amx_pairs,
    "mult_int8": mult.amx_dot,
    "mult_int7": mult.amx_dot,
    "shift_bf16": shift.amx_pairs,
    "shift_int8": mult.amx_dot,
    "shift_int8_wide": shift.amx_planes,
    "shift_int4": shift.amx_nibbles,
    "add_int8": add_weights.amx_bits,
}


def fastest(form: str, target: KernelTarget) -> Arithmetic:
    """What multiplies fastest on a target."""
    known = ARITHMETIC | AMX if target.amx else ARITHMETIC
    return known[form](target)
