"""The exponential function of vectors, without a call of a library for each number."""

from __future__ import annotations

import math
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import ROUNDS, at, fill, local, vector_type

_EXP = [math.log(2) ** power / math.factorial(power) for power in range(7)]


def exponential(x: Any, lanes: int) -> Any:
    """``exp(x)`` of x <= 0, to 2e-7 of 1, in vectors.

    ``2^(n + f)``, n a whole number and f within half of one from 0, with the powers of f up to the
    sixth.
    """
    power, rounded, total = local(lanes), local(lanes), local(lanes)
    every = at(0, lanes)

    def each(number: float) -> Any:
        return fill(T.float32(number), lanes)

    T.buffer_store(power, tirx.max(x * each(1 / math.log(2)), each(-126)), [every])
    T.buffer_store(rounded, power[every] + each(ROUNDS), [every])
    T.buffer_store(power, power[every] - (rounded[every] - each(ROUNDS)), [every])
    T.buffer_store(total, each(_EXP[-1]), [every])
    for coefficient in reversed(_EXP[:-1]):
        T.buffer_store(total, total[every] * power[every] + each(coefficient), [every])
    whole = tirx.reinterpret(vector_type("int32", lanes), rounded[every])
    exponent = whole + fill(tirx.const(127, "int32"), lanes)
    bits = tirx.shift_left(exponent, fill(tirx.const(23, "int32"), lanes))
    return total[every] * tirx.reinterpret(vector_type("float32", lanes), bits)
