"""Products on the ordinary cores of NVIDIA GPUs: an expression each, scheduled by TVM's dlight.

For fp32 linears, and for attention where tensor cores know no bf16. Weights are packed as for the
CPU. Not yet run on a GPU; see ``cuda_linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import te, tirx
from tvm.s_tir import dlight

from kernels.packing import PANEL
from kernels.targets import KernelTarget
from kernels.workload import Workload

_SIGN_AND_EXPONENT = -0x40000001
_MANTISSA_BITS = 23
_SIGN_BIT = -0x80000000


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _schedule(arguments: list[Any], target: KernelTarget) -> tirx.PrimFunc:
    function = te.create_prim_func(arguments).with_attr("global_symbol", "main")
    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    with target.tvm:
        module = dlight.ApplyDefaultSchedule(*rules)(tvm.IRModule({"main": function}))
    return module["main"]


def _sum(extent: Any, term: Callable[[Any], Any]) -> Callable[..., Any]:
    """``te.compute``'s function of the sum over i of ``term(i)(*place)``."""
    if isinstance(extent, int) and extent == 1:
        # dlight adds the bias twice to a sum of a single term.
        return term(0)
    i = te.reduce_axis((0, extent), name="i")
    return lambda *place: te.sum(term(i)(*place), axis=i)


def _fp32_linear(
    workload: Workload, target: KernelTarget, w_dtype: str, decode: Callable[[Any], Any]
) -> tirx.PrimFunc:
    k, n = workload.k, workload.n
    m, panels = tirx.Var("m", "int32"), -(-n // PANEL)
    x = te.placeholder((m, k), "float32", name="x")
    w = te.placeholder((panels, k, PANEL), w_dtype, name="w")
    scale = te.placeholder((panels * PANEL,), "float32", name="scale")
    bias = te.placeholder((panels * PANEL,), "float32", name="bias")

    def term(kk: Any) -> Callable[..., Any]:
        return lambda i, j: x[i, kk] * decode(w[j // PANEL, kk, j % PANEL])

    total = te.compute((m, n), _sum(k, term), name="total")
    scaled = "scale" in workload.fused
    out = te.compute(
        (m, n), lambda i, j: total[i, j] * (scale[j] if scaled else 1.0) + bias[j], name="out"
    )
    return _schedule([x, w, *([scale] if scaled else []), bias, out], target)


def mult_panels(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """fp32 weights."""
    return _fp32_linear(workload, target, "float32", lambda stored: stored)


def shift_panels(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """One-byte codes of ±2^p, unpacked to fp32 in registers."""

    def decode(code: Any) -> Any:
        moved = tirx.shift_left(code.astype("int32"), _i32(_MANTISSA_BITS))
        return tirx.reinterpret("float32", tirx.bitwise_and(moved, _i32(_SIGN_AND_EXPONENT)))

    return _fp32_linear(workload, target, "int8", decode)


def add_rows(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """KᵀV and Q(KᵀV): each value added, subtracted or left out by the sign of its code.

    Without a branch and without a vector of booleans, which nvcc would not take.
    """
    n = workload.n
    b, tokens = tirx.Var("b", "int32"), tirx.Var("tokens", "int32")
    kv = workload.kind == "kv"
    bits = workload.m if kv else workload.k
    source = te.placeholder((b, tokens, bits), "float32", name="source")
    values = te.placeholder((b, tokens if kv else bits, n), "float32", name="values")

    def term(r: Any) -> Callable[..., Any]:
        def signed(batch: Any, i: Any, j: Any) -> Any:
            code = source[batch, r, i] if kv else source[batch, i, r]
            bits_of_code = tirx.reinterpret("int32", code)
            not_positive = tirx.bitwise_or(bits_of_code, bits_of_code - _i32(1))
            value = tirx.reinterpret("int32", values[batch, r, j])
            if workload.alphabet == "pm1":
                word = tirx.bitwise_xor(value, tirx.bitwise_and(not_positive, _i32(_SIGN_BIT)))
            else:
                # By xor: nvcc has no ~ for vectors.
                kept = tirx.bitwise_xor(tirx.shift_right(not_positive, _i32(31)), _i32(-1))
                word = tirx.bitwise_and(value, kept)
            return tirx.reinterpret("float32", word)

        return signed

    terms = tokens if kv else bits
    shape = (b, bits if kv else tokens, n)
    return _schedule([source, values, te.compute(shape, _sum(terms, term), name="out")], target)
