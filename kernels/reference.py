"""What each workload means, in NumPy float64: the oracle of every test and every sweep."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.packing import INT8_MAX, LinearParameters, quantise_weight
from kernels.workload import Workload

_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}
# The largest product that is checked as a whole; of a larger one, random rows.
_WHOLE_MACS = 500_000_000
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Operands:
    """Inputs of one workload, before any packing.

    Attributes:
        x: fp32. Linear ``(m, k)``; KᵀV ``(b, k, m)`` and Q(KᵀV) ``(b, m, k)``: numbers whose sign
            is the code.
        parameters: Of a linear.
        values: Of an attention product: fp32 ``(b, k, n)``.
    """

    x: Tensor
    parameters: LinearParameters | None = None
    values: Tensor | None = None

    def to(self, device: str) -> Operands:
        """The same operands on another device."""
        p = self.parameters
        if p is not None:
            moved = (p.values.to(device), p.scale.to(device), p.bias.to(device))
            return Operands(self.x.to(device), LinearParameters(p.form, *moved))
        assert self.values is not None
        return Operands(self.x.to(device), values=self.values.to(device))


def random_operands(workload: Workload, seed: int = 0) -> Operands:
    """Fresh random operands: normal activations and values, normal weights of variance 1/k.

    Forms of one product get the same weight and activations for the same seed.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(workload.product.encode()))
    w = workload

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if w.kind == "linear":
        x, weight, bias = normal(w.m, w.k), normal(w.n, w.k) * w.k**-0.5, normal(w.n)
        return Operands(x, quantise_weight(w.form, weight, bias))
    x = normal(w.b, w.k, w.m) if w.x_layout == "km" else normal(w.b, w.m, w.k)
    # A zero once in some million draws: ours takes its code for 0 or -1, torch's copysign for +1.
    x.masked_fill_(x == 0, 1.0)
    return Operands(x, values=normal(w.b, w.k, w.n))


def _quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes in ±127 and the scale per row, by the fp32 steps that the kernels declare."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(INT8_MAX) / largest, np.float32(0))
    codes = np.rint(x * inverse.astype(np.float32))
    return codes.astype(np.float64), largest.astype(np.float64) / INT8_MAX


def _codes(x: np.ndarray, alphabet: str) -> np.ndarray:
    positive = x > 0
    return np.where(positive, 1.0, -1.0 if alphabet == "pm1" else 0.0)


def oracle(workload: Workload, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """The exact result and the error that rounding may cause.

    Args:
        workload: What to compute; its sizes must be those of the operands.
        operands: As made by ``random_operands``.

    Returns:
        The float64 result, ``(m, n)`` for a linear and ``(b, m, n)`` else, and a bound of the same
        shape: the standard one for a sum of k products (Higham, Accuracy and Stability of
        Numerical Algorithms, section 3.1) in the type that the workload computes in.
    """
    x = operands.x.cpu().numpy()
    if workload.kind != "linear":
        assert operands.values is not None
        codes = _codes(x, workload.alphabet)
        if workload.x_layout == "km":
            codes = codes.swapaxes(1, 2)
        values = operands.values.cpu().double().numpy()
        result = codes @ values
        # Bucket differences pass through sums of all values, whichever the code.
        magnitude = np.broadcast_to(np.abs(values).sum(axis=1, keepdims=True), result.shape)
        return result, 2 * (workload.k + 8) * _EPS["float32"] * magnitude
    parameters = operands.parameters
    assert parameters is not None
    values, scale, bias = (
        t.cpu().double().numpy() for t in (parameters.values, parameters.scale, parameters.bias)
    )
    if "quantise" in workload.fused:
        codes, x_scale = _quantised(x)
        product = (codes @ values.T) * x_scale * scale
        # Sums of whole numbers are exact; only the epilogue rounds.
        return product + bias, 8 * _EPS["float32"] * (np.abs(product) + np.abs(bias))
    exact = x.astype(np.float64)
    magnitude = (np.abs(exact) @ np.abs(values).T) * scale + np.abs(bias)
    inputs = 4 * _EPS[workload.x_dtype] if workload.x_dtype != "float32" else 0.0
    bound = ((workload.k + 8) * _EPS["float32"] + inputs) * magnitude
    return (exact @ values.T) * scale + bias, bound


def sampled(workload: Workload, operands: Operands, out: Tensor) -> tuple[Operands, Tensor]:
    """Operands and output cut to random rows (linear) or batch entries where all are too many."""
    if workload.macs <= _WHOLE_MACS:
        return operands, out
    size = workload.m if workload.kind == "linear" else workload.b
    count = (
        _CHECKED_ROWS if workload.kind == "linear" else max(1, _WHOLE_MACS * size // workload.macs)
    )
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count]
    values = None if operands.values is None else operands.values[rows]
    return Operands(operands.x[rows], operands.parameters, values), out[rows]


def max_abs_error(workload: Workload, operands: Operands, out: Tensor) -> tuple[float, bool]:
    """Compares a kernel's output with the oracle.

    Returns:
        The largest absolute error, and whether every element is within its rounding bound.
    """
    operands, out = sampled(workload, operands, out)
    if out.numel() == 0:
        return 0.0, True
    result, bound = oracle(workload, operands)
    error = np.abs(out.cpu().double().numpy() - result)
    return float(error.max()), bool((error <= bound + 1e-30).all())
