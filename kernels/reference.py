"""What each workload means, in NumPy float64: the oracle of every test and every sweep."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from kernels.packing import (
    INT8_MAX,
    LinearParameters,
    quantise_weight,
)
from kernels.workload import Workload

_EPS = 2.0**-23
_EPS_BF16 = 2.0**-7
# The largest product that is checked as a whole; of a larger one, random rows.
_WHOLE_MACS = 500_000_000
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Operands:
    """Inputs of one workload, before any packing.

    Attributes:
        x: Linear ``(m, k)``; KᵀV ``(b, k, m)`` and Q(KᵀV) ``(b, m, k)``: numbers whose sign is the
            code. As all operands in the workload's out_dtype.
        parameters: Of a linear.
        values: Of an attention product: ``(b, k, n)``; of both in one ``(b, m, n)``.
        norm: Of a linear after a layer norm: ``(2k + 1,)``, weight, bias and epsilon.
        residual: Of a linear that something is added to: ``(m, n)``.
        keys: Of both attention products in one: ``(b, m, k)``, beside the queries in x.
        weight: Of a linear: the fp32 weight ``(n, k)`` that was written in its form's alphabet.
    """

    x: Tensor
    parameters: LinearParameters | None = None
    values: Tensor | None = None
    weight: Tensor | None = None
    keys: Tensor | None = None
    norm: Tensor | None = None
    residual: Tensor | None = None

    def to(self, device: str) -> Operands:
        """The same operands on another device."""
        p = self.parameters
        if p is not None:
            moved = (p.values.to(device), p.scale.to(device), p.bias.to(device))
            return Operands(self.x.to(device), LinearParameters(p.form, *moved), weight=self.weight)
        assert self.values is not None
        keys = None if self.keys is None else self.keys.to(device)
        return Operands(self.x.to(device), values=self.values.to(device), keys=keys)


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
        norm = residual = None
        if "layer_norm" in w.fused:
            norm = torch.cat((1 + 0.1 * normal(w.k), 0.1 * normal(w.k), torch.tensor([1e-6])))
        if "residual" in w.fused:
            residual = normal(w.m, w.n)
        parameters = quantise_weight(w.form, weight, bias)
        return Operands(x, parameters, weight=weight, norm=norm, residual=residual)
    dtype = getattr(torch, w.out_dtype)

    def coded(*shape: int) -> Tensor:
        x = normal(*shape).to(dtype)
        # A zero once in some million draws: ours takes its code for 0 or -1, torch's for +1.
        return x.masked_fill_(x == 0, 1.0)

    if w.kind == "attention":
        x, keys = coded(w.b, w.m, w.k), coded(w.b, w.m, w.k)
        return Operands(x, values=normal(w.b, w.m, w.n).to(dtype), keys=keys)
    x = coded(w.b, w.k, w.m) if w.x_layout == "km" else coded(w.b, w.m, w.k)
    return Operands(x, values=normal(w.b, w.k, w.n).to(dtype))


def _quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes in ±127 and the scale per row, by the fp32 steps that the kernels declare."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(INT8_MAX) / largest, np.float32(0))
    codes = np.rint(x * inverse.astype(np.float32))
    return codes.astype(np.float64), largest.astype(np.float64) / INT8_MAX


def _codes(x: Tensor, alphabet: str) -> np.ndarray:
    positive = x.cpu().float().numpy() > 0
    return np.where(positive, 1.0, -1.0 if alphabet == "pm1" else 0.0)


def _attention_oracle(workload: Workload, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    assert operands.values is not None
    values = operands.values.cpu().double().numpy()
    # Bucket differences pass through sums of all values, whichever the code.
    magnitude = np.abs(values).sum(axis=1, keepdims=True)
    terms = values.shape[1] + 8
    if workload.kind == "attention":
        assert operands.keys is not None
        values = _codes(operands.keys, workload.alphabet).swapaxes(1, 2) @ values
        magnitude, terms = workload.k * magnitude, terms + workload.k
    codes = _codes(operands.x, workload.alphabet)
    result = (codes.swapaxes(1, 2) if workload.x_layout == "km" else codes) @ values
    bound = np.broadcast_to(2 * terms * _EPS * magnitude, result.shape)
    if workload.out_dtype == "bfloat16":
        bound = bound + _EPS_BF16 / 2 * np.abs(result)
    return result, bound


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
    if workload.kind != "linear":
        return _attention_oracle(workload, operands)
    parameters = operands.parameters
    assert parameters is not None
    values, scale, bias = (
        t.cpu().double().numpy() for t in (parameters.values, parameters.scale, parameters.bias)
    )
    x = operands.x.cpu().numpy()
    off_by = 0.0
    if operands.norm is not None:
        x = _normalised(x, operands.norm.cpu().double().numpy())
        # The kernel's mean and variance are sums of k numbers.
        off_by = (workload.k + 16) * _EPS
    if "quantise" in workload.fused:
        codes, x_scale = _quantised(x)
        product = (codes @ values.T) * x_scale * scale
        result = product + bias
        # Sums of whole numbers are exact; only the epilogue rounds.
        bound = 8 * _EPS * (np.abs(product) + np.abs(bias)) + off_by * np.abs(product)
        if off_by:
            # A code this close to the middle between two may come out as either.
            exact = x / np.where(x_scale > 0, x_scale, 1)
            undecided = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < off_by * (INT8_MAX + 8)
            bound = bound + (undecided.astype(float) @ np.abs(values).T) * x_scale * scale
    else:
        exact = torch.from_numpy(x).to(getattr(torch, workload.x_dtype)).double().numpy()
        magnitude = (np.abs(exact) @ np.abs(values).T) * scale + np.abs(bias)
        result = (exact @ values.T) * scale + bias
        bound = ((workload.k + 8) * _EPS + off_by) * magnitude
        if off_by and workload.x_dtype == "bfloat16":
            # Where the fp32 number is off, its bf16 may be the neighbour.
            bound = bound + _EPS_BF16 * magnitude
    if "gelu" in workload.fused:
        # Its slope is below 1.13; erf itself is good to 4e-7.
        result, bound = _gelu(result), 1.13 * bound + 5e-7 * np.abs(result)
    if operands.residual is not None:
        added = operands.residual.cpu().double().numpy()
        result, bound = result + added, bound + _EPS * (np.abs(result) + np.abs(added))
    return result, bound


def _normalised(x: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Layer norm in float64, rounded to fp32."""
    k = x.shape[1]
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + norm[2 * k])
    return (centred / deviation * norm[:k] + norm[k : 2 * k]).astype(np.float32)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * ndtr(x)


def _sample(workload: Workload, operands: Operands) -> Tensor | None:
    """Random rows (linear) or batch entries where all are too many; None for all."""
    if workload.macs <= _WHOLE_MACS:
        return None
    size = workload.m if workload.kind == "linear" else workload.b
    count = (
        _CHECKED_ROWS if workload.kind == "linear" else max(1, _WHOLE_MACS * size // workload.macs)
    )
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count]


def _cut(operands: Operands, rows: Tensor | None) -> Operands:
    """Operands of some rows or batch entries alone."""
    if rows is None:
        return operands
    values = None if operands.values is None else operands.values[rows]
    keys = None if operands.keys is None else operands.keys[rows]
    residual = None if operands.residual is None else operands.residual[rows]
    return replace(operands, x=operands.x[rows], values=values, keys=keys, residual=residual)


def checker(workload: Workload, operands: Operands) -> Callable[[Tensor], tuple[float, bool]]:
    """What compares outputs for the same operands with the oracle, which is asked once.

    Returns:
        ``check(out)``: the largest absolute error, and whether every element is within its
        rounding bound.
    """
    rows = _sample(workload, operands)
    result, bound = oracle(workload, _cut(operands, rows))

    def check(out: Tensor) -> tuple[float, bool]:
        if out.numel() == 0:
            return 0.0, True
        error = np.abs((out if rows is None else out[rows]).cpu().double().numpy() - result)
        return float(error.max()), bool((error <= bound + 1e-30).all())

    return check


def max_abs_error(workload: Workload, operands: Operands, out: Tensor) -> tuple[float, bool]:
    """Compares a kernel's output with the oracle; see ``checker``."""
    return checker(workload, operands)(out)


def relative_error(workload: Workload, operands: Operands, out: Tensor) -> float | None:
    """How far a linear's form is from the fp32 product that it stands for.

    Beside ``max_abs_error``, which asks whether a kernel computes what its form declares, this
    says what the form itself loses by its alphabet and its types.

    Returns:
        Root mean square of the difference from ``x Wᵀ + bias`` with the weight before it was
        written in the alphabet, over that of the product; None for attention products.
    """
    rows = _sample(workload, operands)
    operands, out = _cut(operands, rows), out if rows is None else out[rows]
    if operands.weight is None or operands.parameters is None or out.numel() == 0:
        return None
    product = operands.x.cpu().double() @ operands.weight.double().T
    product += operands.parameters.bias.cpu().double()
    difference = out.cpu().double() - product
    return float(difference.square().mean().sqrt() / product.square().mean().sqrt())
