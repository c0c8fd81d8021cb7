"""Products by ±1: mult's schedules, with weights of one bit that are unpacked in registers.

An eighth of the weight traffic of int8, for two instructions a vector of weights and tile of rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm.script.ir_builder.tirx as T

from kernels.lowerings.emit import LANES
from kernels.lowerings.inner_product import Unit, amx_int8, int8_dot
from kernels.lowerings.panel_product import Arithmetic, Stored
from kernels.packing import BYTE_BITS, DOT_GROUP
from kernels.targets import KernelTarget

_RUN = LANES * DOT_GROUP
_BYTES = _RUN // BYTE_BITS


def _each(value: int) -> str:
    return f"<{', '.join([f'i8 {value}'] * _RUN)}>"


# In LLVM's language, since TVM has no word for bits that choose among the lanes of a vector.
_LLVM_SIGNS = f"""
define linkonce_odr <{_RUN} x i8> @shiftadd_signs_of(<{_BYTES} x i8> %packed) alwaysinline {{
  %set = bitcast <{_BYTES} x i8> %packed to <{_RUN} x i1>
  %signs = select <{_RUN} x i1> %set, <{_RUN} x i8> {_each(1)}, <{_RUN} x i8> {_each(-1)}
  ret <{_RUN} x i8> %signs
}}
"""


def _from_bits(packed: Any) -> Any:
    """uint8x8 of eight bits each into int8x64 of ±1, the lowest bit first."""
    return T.call_extern(f"int8x{_RUN}", "shiftadd_signs_of", packed)


def bits(target: KernelTarget) -> Arithmetic:
    """Codes of one bit, unpacked in registers on their way to the dot product."""
    return _decoded(int8_dot(target, largest_weight=1))


def amx_bits(target: KernelTarget) -> Arithmetic:
    """The same by tiles."""
    return _decoded(amx_int8(target))


def _decoded(unit: Unit) -> Arithmetic:
    return Arithmetic(replace(unit, llvm=_LLVM_SIGNS), Stored("uint8", _BYTES, (_from_bits,)))
