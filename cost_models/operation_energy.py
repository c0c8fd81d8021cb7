"""Modelled energy: operations and memory traffic times published energies per operation.

These are figures of a 45 nm process, not of the device at hand: good for what one form saves
against another, not for absolute joules. Wherever one is shown it is labelled "modelled".
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from kernels.workload import Workload

# Energy per operation in pJ at 45 nm.
# Source: Horowitz, Computing's energy problem, ISSCC 2014, fig. 1.1.9 (mult, add);
# You et al., ShiftAddNet, NeurIPS 2020, table 1 (shift).
UNIT_ENERGY_PJ: dict[str, float] = {
    "mult_float32": 3.7,
    "mult_bfloat16": 1.1,  # published for FP16
    "mult_float16": 1.1,
    "mult_int32": 3.1,
    "mult_int8": 0.2,
    "add_float32": 0.9,
    "add_bfloat16": 0.4,  # published for FP16
    "add_float16": 0.4,
    "add_int32": 0.1,
    "add_int16": 0.05,
    "add_int8": 0.03,
    "shift_float32": 0.13,  # published for a 32-bit integer shift; scaling an exponent costs less
    "shift_bfloat16": 0.13,  # as for float32: none is published for 16 bits
    "shift_int32": 0.13,
    "shift_int8": 0.024,
}

# One memory rule for every primitive: each byte of compulsory traffic, at its stored width, comes
# once from DRAM (640 pJ per 32-bit read) and passes once through an 8 KB SRAM (10 pJ per 64 bits).
# Operands that are read again are charged nothing more: how often depends on the schedule.
# Source: Han et al., Learning both weights and connections, NeurIPS 2015, table 1 (DRAM);
# Horowitz, as above (SRAM).
DRAM_PJ_PER_BYTE = 640 / 4
SRAM_PJ_PER_BYTE = 10 / 8

MJ_PER_PJ = 1e-9


class UnknownOperation(ValueError):
    """A workload whose operations have no published energy."""


class OperationEnergy(NamedTuple):
    """Modelled energy of one launch.

    Attributes:
        compute_mj: Arithmetic alone, accumulations included.
        memory_mj: Compulsory memory traffic alone.
    """

    compute_mj: float
    memory_mj: float

    @property
    def with_memory_mj(self) -> float:
        """Arithmetic and memory traffic."""
        return self.compute_mj + self.memory_mj


class _Prices(NamedTuple):
    """Energies in pJ of a multiply-accumulate, and of what is done to an element beside."""

    mac: float
    output: float
    input: float


@functools.cache
def _prices(primitive: str, x_dtype: str, acc_dtype: str, fused: tuple[str, ...]) -> _Prices:
    """By what of a workload they depend on: a lookup asks for each shape.

    Raises:
        KeyError: On a type whose operations have no published energy.
    """
    product = UNIT_ENERGY_PJ[f"{primitive}_{x_dtype}"] if primitive != "add" else 0.0
    add, mult = UNIT_ENERGY_PJ["add_float32"], UNIT_ENERGY_PJ["mult_float32"]
    return _Prices(
        mac=product + UNIT_ENERGY_PJ[f"add_{acc_dtype}"],
        output=add * ("bias" in fused) + mult * ("scale" in fused),
        input=mult * ("quantise" in fused),
    )


def operation_energy(workload: Workload) -> OperationEnergy:
    """Modelled energy of a workload, compute and memory apart.

    Every multiply-accumulate is charged its multiplication or shift, at the width of x, and one
    accumulation at the width of the accumulator. An add product is charged every accumulation,
    those that {0, 1} codes skip as well. Of what is fused, ``bias``, ``scale`` and ``quantise``
    cost one fp32 operation per element; ``pack`` takes a sign bit and ``cast`` drops bits: free.

    Raises:
        UnknownOperation: On a type whose operations have no published energy.
    """
    kind = (workload.primitive, workload.x_dtype, workload.acc_dtype, workload.fused)
    try:
        prices = _prices(*kind)
    except KeyError as error:
        raise UnknownOperation(f"{workload.label}: no unit energy is known for {error}") from error
    rows = workload.b * workload.m
    beside_pj = rows * (workload.n * prices.output + workload.k * prices.input)
    memory_pj = workload.traffic_bytes * (DRAM_PJ_PER_BYTE + SRAM_PJ_PER_BYTE)
    compute_pj = workload.macs * prices.mac + beside_pj
    return OperationEnergy(compute_pj * MJ_PER_PJ, memory_pj * MJ_PER_PJ)
