"""The products for NVIDIA GPUs: one expression each, scheduled by TVM's dlight rules.

The same packed weights as on the CPU. Not yet run on a GPU: compiled to cubin in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import te, tirx
from tvm.s_tir import dlight

from kernels.packing import DOT_GROUP, INT8_MAX, PANEL
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


def _fp32_linear(
    workload: Workload, target: KernelTarget, w_dtype: str, decode: Callable[[Any], Any]
) -> tirx.PrimFunc:
    k, n = workload.k, workload.n
    m, panels = tirx.Var("m", "int32"), -(-n // PANEL)
    x = te.placeholder((m, k), "float32", name="x")
    w = te.placeholder((panels, k, PANEL), w_dtype, name="w")
    scale = te.placeholder((panels * PANEL,), "float32", name="scale")
    bias = te.placeholder((panels * PANEL,), "float32", name="bias")
    kk = te.reduce_axis((0, k), name="kk")

    def term(i: Any, j: Any) -> Any:
        stored = w[tirx.floordiv(j, PANEL), kk, tirx.floormod(j, PANEL)]
        return te.sum(x[i, kk] * decode(stored), axis=kk)

    total = te.compute((m, n), term, name="total")
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


def dot(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """int8 linears, mult and shift alike: quantise, multiply whole numbers, scale, add the bias."""
    k, n = workload.k, workload.n
    m, panels = tirx.Var("m", "int32"), -(-n // PANEL)
    x = te.placeholder((m, k), "float32", name="x")
    w = te.placeholder((panels, -(-k // DOT_GROUP), PANEL * DOT_GROUP), "int8", name="w")
    scale = te.placeholder((panels * PANEL,), "float32", name="scale")
    bias = te.placeholder((panels * PANEL,), "float32", name="bias")
    # Only the unsigned products of x86 need it; one packing serves all targets.
    offset = te.placeholder((panels * PANEL,), "int32", name="offset")
    kk, kr = te.reduce_axis((0, k), name="kk"), te.reduce_axis((0, k), name="kr")
    largest = te.compute((m,), lambda i: te.max(te.abs(x[i, kr]), axis=kr), name="largest")

    def quantise(i: Any, j: Any) -> Any:
        safe = te.max(largest[i], tirx.const(1e-38, "float32"))
        return tirx.nearbyint(x[i, j] * (tirx.const(INT8_MAX, "float32") / safe)).astype("int8")

    codes = te.compute((m, k), quantise, name="codes")

    def term(i: Any, j: Any) -> Any:
        place = tirx.floormod(j, PANEL) * DOT_GROUP + tirx.floormod(kk, DOT_GROUP)
        weight = w[tirx.floordiv(j, PANEL), tirx.floordiv(kk, DOT_GROUP), place]
        return te.sum(codes[i, kk].astype("int32") * weight.astype("int32"), axis=kk)

    total = te.compute((m, n), term, name="total")

    def finish(i: Any, j: Any) -> Any:
        factor = largest[i] * tirx.const(1.0 / INT8_MAX, "float32") * scale[j]
        return total[i, j].astype("float32") * factor + bias[j]

    out = te.compute((m, n), finish, name="out")
    return _schedule([x, w, scale, bias, offset, out], target)


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
    r = te.reduce_axis((0, tokens if kv else bits), name="r")

    def term(batch: Any, i: Any, j: Any) -> Any:
        code = source[batch, r, i] if kv else source[batch, i, r]
        bits_of_code = tirx.reinterpret("int32", code)
        not_positive = tirx.bitwise_or(bits_of_code, bits_of_code - _i32(1))
        value = tirx.reinterpret("int32", values[batch, r, j])
        if workload.alphabet == "pm1":
            signed = tirx.bitwise_xor(value, tirx.bitwise_and(not_positive, _i32(_SIGN_BIT)))
        else:
            # By xor: nvcc has no ~ for vectors.
            kept = tirx.bitwise_xor(tirx.shift_right(not_positive, _i32(31)), _i32(-1))
            signed = tirx.bitwise_and(value, kept)
        return te.sum(tirx.reinterpret("float32", signed), axis=r)

    out = te.compute((b, bits if kv else tokens, n), term, name="out")
    return _schedule([source, values, out], target)
