"""GELU of a vector, in the exact form: ``x * Phi(x)``.

Source:
    Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv 1606.08415).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, ROUNDS, at, fill, local, places
from kernels.targets import KernelTarget

# erf(x) = x * P(x²) / Q(x²) for |x| <= 4, beyond which erf is 1 in fp32. Minimax in the relative
# error (2.8e-8 in exact arithmetic, 4e-7 absolute in fp32), by linear programming.
_ERF_LIMIT = 4.0
_ERF_P = (
    1.1283791392723093,
    0.1935199774813859,
    0.0530984303447896,
    0.003882401887158593,
    0.0002845689321088033,
    1.9872158175276997e-06,
)
_ERF_Q = (
    1.0,
    0.5048351656071605,
    0.11533968298987322,
    0.015205163595795334,
    0.0011853983706093384,
    3.7424988252648504e-05,
)
# Phi(|x|) - 1/2 by pieces around 0, h, 2h, …: a polynomial of the fifth order each, whose error
# (2.7e-8) is less than half of the last place of what it is added to. In the last piece, which what
# is larger is brought to, it is 1/2.
_PIECE = 0.375
_ORDER = 5


def gelu(target: KernelTarget) -> Callable[[Any], Any]:
    """``gelu(target)(x)`` of a vector of ``LANES``, fp32.

    Where 16 numbers are one register the coefficients of a piece are looked up, one instruction a
    coefficient, and nothing is divided.
    """
    return _by_pieces if target.vector_bits == LANES * 32 else _by_quotient


def _every(number: float) -> Any:
    return fill(T.float32(number), LANES)


def _held(value: Any) -> Any:
    """A vector that is computed once."""
    held = local(LANES)
    T.buffer_store(held, value, [at(0, LANES)])
    return held[at(0, LANES)]


def _by_quotient(x: Any) -> Any:
    def polynomial(coefficients: tuple[float, ...], square: Any) -> Any:
        total = _every(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            total = total * square + _every(coefficient)
        return total

    x = _held(x)
    limited = tirx.min(x * _every(0.5**0.5), _every(_ERF_LIMIT))
    scaled = _held(tirx.max(limited, _every(-_ERF_LIMIT)))
    square = _held(scaled * scaled)
    ratio = polynomial(_ERF_P, square) / polynomial(_ERF_Q, square)
    return x * (_every(0.5) + _every(0.5) * scaled * ratio)


def _by_pieces(x: Any) -> Any:
    """``x / 2 + |x| (Phi(|x|) - 1/2)``: an odd function needs no sign."""
    x = _held(x)
    bits = tirx.reinterpret(f"int32x{LANES}", x)
    magnitude = _held(
        tirx.reinterpret(
            f"float32x{LANES}", tirx.bitwise_and(bits, fill(tirx.const(0x7FFFFFFF, "int32"), LANES))
        )
    )
    scaled = _held(tirx.min(magnitude * _every(1 / _PIECE), _every(LANES - 1.0)))
    rounded = _held(scaled + _every(ROUNDS))
    piece = tirx.reinterpret(f"int32x{LANES}", rounded)
    within = _held(scaled - (rounded - _every(ROUNDS)))
    total = None
    for coefficients in _pieces()[::-1]:
        entries = [T.float32(entry) for entry in coefficients]
        table = tirx.Shuffle(entries, places(LANES))
        found = T.call_llvm_pure_intrin(
            f"float32x{LANES}", "llvm.x86.avx512.permvar.sf.512", table, piece
        )
        total = found if total is None else _held(total * within + found)
    return x * _every(0.5) + magnitude * total


@functools.cache
def _pieces() -> list[list[float]]:
    """Coefficients from the constant on, each of all pieces; in units of a piece from its middle.

    Interpolated at Chebyshev's nodes.
    """
    nodes = np.cos((2 * np.arange(_ORDER + 1) + 1) * np.pi / (2 * (_ORDER + 1))) / 2
    pieces = []
    for piece in range(LANES - 1):
        values = [0.5 * math.erf((piece + node) * _PIECE / 2**0.5) for node in nodes]
        pieces.append(
            np.polynomial.Polynomial.fit(nodes, values, _ORDER, [-0.5, 0.5]).convert().coef
        )
    last = np.zeros(_ORDER + 1)
    last[0] = 0.5
    return np.array([*pieces, last]).T.tolist()
