"""Products by ±1: mult's schedules, with weights of one bit that are unpacked in registers.

An eighth of the weight traffic of int8, for three instructions a panel row and tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from kernels.lowerings.emit import LANES, fill
from kernels.lowerings.inner_product import Unit, amx_int8, int8_dot
from kernels.lowerings.panel_product import Arithmetic, Stored
from kernels.packing import BYTE_BITS, DOT_GROUP
from kernels.targets import KernelTarget

_RUN = LANES * DOT_GROUP
_unit_dot = partial(int8_dot, largest_weight=1)


def _from_bits(packed: Any) -> Any:
    """uint8x8 of eight bits each into int8x64 of ±1, the lowest bit first."""
    spread = [tirx.const(place // BYTE_BITS, "int32") for place in range(_RUN)]
    masks = [tirx.const(1 << place % BYTE_BITS, "uint8") for place in range(_RUN)]
    place = [tirx.const(place, "int32") for place in range(_RUN)]
    # A shuffle gives no more lanes than it is given.
    bytes_of = tirx.Shuffle([packed] * BYTE_BITS, spread)
    own = tirx.bitwise_and(bytes_of, tirx.Shuffle(masks, place))
    is_set = own != fill(tirx.const(0, "uint8"), _RUN)
    return tirx.Select(is_set, *(fill(tirx.const(one, "int8"), _RUN) for one in (1, -1)))


def bits(target: KernelTarget, unit: Callable[[KernelTarget], Unit] = _unit_dot) -> Arithmetic:
    """Codes of one bit."""
    return Arithmetic(unit(target), Stored("uint8", _RUN // BYTE_BITS, (_from_bits,)))


amx_bits = partial(bits, unit=amx_int8)
