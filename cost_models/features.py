"""Workload and DeviceInfo -> the numbers that the latency models see. Pure functions.

What is computed from sizes is plain arithmetic: it takes one workload's whole numbers as well as
arrays of many workloads', and a lookup costs no array.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.forms import FORMS
from kernels.workload import DTYPE_BITS, Workload
from profiler.device import DeviceInfo

# Numbers, or arrays of them.
Numbers = Any

# Everything is in octaves (log2), so that one length scale means one factor at every size.
FEATURES: tuple[str, ...] = ("b", "m", "k", "n")

# What bounds the training shapes: each size, and the work and traffic. Those two cut the corners
# off the box of sizes: shapes large in every direction at once although no measured one was.
EXTENTS: tuple[str, ...] = (*FEATURES, "macs", "traffic_bytes")


class Sizes(NamedTuple):
    """Sizes of one workload, or ``(rows,)`` arrays of those of many."""

    b: Numbers
    m: Numbers
    k: Numbers
    n: Numbers

    def take(self, which: NDArray[np.int64]) -> Sizes:
        """Some of the rows, in the order asked for."""
        return Sizes(*(np.asarray(column)[which] for column in self))


def sizes_of(workloads: Sequence[Workload]) -> Sizes:
    """Sizes of some workloads as arrays ``(rows,)``."""
    rows = np.array([(w.b, w.m, w.k, w.n) for w in workloads], dtype=float).reshape(-1, 4)
    return Sizes(*rows.T)


@dataclass(frozen=True)
class FormFacts:
    """What of a form the models count: how wide its operands are, and what it does beside.

    Attributes:
        kind: As ``Workload.kind``.
        products: Dense products in one launch.
        x_bytes, w_bytes, out_bytes: Bytes of an element as it lies in memory.
        extra_bytes: Bytes of parameters for each output channel of a linear.
        prepares: Whether a linear quantises or rounds its rows before it multiplies.
        x_dtype_bytes: Bytes of an element of x at the width that it is multiplied in.
        decodes: Whether a weight is stored otherwise than it is multiplied.
    """

    kind: str
    products: int
    x_bytes: float
    w_bytes: float
    out_bytes: float
    extra_bytes: int
    prepares: bool
    x_dtype_bytes: float
    decodes: bool


@functools.cache
def form_facts(form: str) -> FormFacts:
    """Facts of a form by name in FORMS."""
    probe = Workload(m=1, k=1, n=1, **FORMS[form])
    inside = {"quantise", "pack", "cast"} & set(probe.fused)
    x_bits = DTYPE_BITS[probe.out_dtype if inside else probe.x_dtype]
    w_bits = DTYPE_BITS[probe.w_dtype]
    if probe.coded == "x" and not inside:
        x_bits = probe.code_bits
    if probe.coded == "w":
        w_bits = probe.code_bits
    linear = probe.kind == "linear"
    # ±2^-6 … ±2^0, times 64, are int8 weights as they are.
    whole = (probe.x_dtype, probe.code_bits, probe.exponent_min) == ("int8", 8, -6)
    return FormFacts(
        kind=probe.kind,
        products=2 if probe.kind == "attention" else 1,
        x_bytes=x_bits / 8,
        w_bytes=w_bits / 8,
        out_bytes=DTYPE_BITS[probe.out_dtype] / 8,
        extra_bytes=4 * (("scale" in probe.fused) + ("bias" in probe.fused)) if linear else 0,
        prepares=bool({"quantise", "cast"} & set(probe.fused)),
        x_dtype_bytes=DTYPE_BITS[probe.x_dtype] / 8,
        decodes=probe.coded == "w" and not whole,
    )


def macs(sizes: Sizes, facts: FormFacts) -> Numbers:
    """Multiply-accumulates, as ``Workload.macs``."""
    return sizes.b * sizes.m * sizes.k * sizes.n * facts.products


def weight_bytes(sizes: Sizes, facts: FormFacts) -> Numbers:
    """Bytes of the second operand of one launch, up to a byte of rounding."""
    b, m, k, n = sizes
    if facts.kind == "linear":
        return n * k * facts.w_bytes + n * facts.extra_bytes
    if facts.kind == "attention":
        return b * m * (n * facts.w_bytes + k * facts.x_bytes)
    return b * k * n * facts.w_bytes


def traffic_bytes(sizes: Sizes, facts: FormFacts) -> Numbers:
    """Compulsory memory traffic, as ``Workload.traffic_bytes`` up to a byte of rounding."""
    b, m, k, n = sizes
    x_and_out = b * m * (k * facts.x_bytes + n * facts.out_bytes)
    return x_and_out + weight_bytes(sizes, facts)


def extents(sizes: Sizes, facts: FormFacts) -> tuple[Numbers, ...]:
    """What a workload is held against the hull of the training shapes by: EXTENTS, in order."""
    return (*sizes, macs(sizes, facts), traffic_bytes(sizes, facts))


def hull_of(workloads: Sequence[Workload]) -> dict[str, tuple[float, float]]:
    """Least and largest of EXTENTS among some workloads of one form, in octaves."""
    values = extents(sizes_of(workloads), form_facts(workloads[0].form))
    return {
        name: (float(np.log2(column.min())), float(np.log2(column.max())))
        for name, column in zip(EXTENTS, values)
    }


def hull_around(
    one: dict[str, tuple[float, float]], other: dict[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """The least hull that holds two."""
    return {
        name: (min(low, other[name][0]), max(high, other[name][1]))
        for name, (low, high) in one.items()
    }


def points_of(sizes: Sizes) -> NDArray[np.float64]:
    """Sizes in octaves, ``(rows, 4)`` in the order of FEATURES."""
    return np.log2(np.stack([np.atleast_1d(size) for size in sizes], axis=1).astype(float))


def shape_group(workload: Workload) -> str:
    """Rows that are held out together: those of one form and widths, at all token counts.

    A kernel is compiled for its widths and told the tokens at each launch: a model that has seen
    one token count of some widths has seen the kernel.
    """
    return group_name(workload.form, workload.kind, workload.m, workload.k, workload.n)


def shape_groups(workloads: Sequence[Workload]) -> NDArray[np.str_]:
    """The group of each, ``(rows,)``."""
    return np.array([shape_group(workload) for workload in workloads])


def group_name(form: str, kind: str, m: int, k: int, n: int) -> str:
    """The shape group of a form, of that kind, at some sizes."""
    return f"{form} {m if kind == 'kv' else k}x{n}"


def parallel_units(device: DeviceInfo) -> int:
    """Units of a device that share the tiles of a product: threads or multiprocessors."""
    return max(1, device.threads if device.kind == "cpu" else device.cores)
