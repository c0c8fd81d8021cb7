"""Rows of a store that a latency model can be fitted on, by form and lowering, on one device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kernels.workload import Workload
from profiler.command_line import BadInput
from profiler.device import DeviceInfo
from profiler.store import Measurement, full_clock, open_store


@dataclass(frozen=True)
class Row:
    """A hot measurement of one primitive, narrowed to what a model needs.

    Attributes:
        workload: What was measured.
        latency_ms, low_ms, high_ms: At the CPU's full clock (``at_full_clock``).
        measurement: As it was measured.
    """

    workload: Workload
    latency_ms: float
    low_ms: float
    high_ms: float
    measurement: Measurement


Groups = dict[tuple[str, str], list[Row]]

# With fewer of a whole core, a model learns from all.
_ENOUGH_OWN = 6


def read_store(location: str) -> list[Measurement]:
    """All rows of a store.

    Raises:
        StoreError: If it cannot be read.
    """
    source = open_store(location)
    try:
        return list(source.rows())
    finally:
        source.close()


def store_name(location: str) -> str:
    """Name of a store for people: a URL may carry a password before its last slash or after a ?."""
    return location.rpartition("/")[2].partition("?")[0]


def at_full_clock(row: Measurement, full: Mapping[str, float]) -> Measurement:
    """A row as it would be had the clock not been low.

    Neighbours of a virtual machine draw power, and the clock falls by a sixth for seconds or
    minutes. What a core computes takes so much longer; memory does not, and is a little
    overcorrected.

    Args:
        row: With a latency.
        full: The device's, from ``profiler.measurement.full_clock``.
    """
    if row.clock is None:
        return row
    loop, rate = row.clock
    part = rate / full[loop]
    if part >= 1:
        return row
    names = ("latency_ms", "latency_low_ms", "latency_high_ms")
    found = {name: getattr(row, name) for name in names}
    return row.model_copy(update={name: ms * part for name, ms in found.items() if ms is not None})


def of_primitives(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Hot rows of single kernels."""
    return [
        row
        for row in measurements
        if row.kind == "primitive" and row.workload is not None and row.cache == "hot"
    ]


def choose_device(
    rows: Sequence[Measurement], store_name: str, fingerprint: str | None
) -> DeviceInfo:
    """The device to model: one table answers for one device.

    Raises:
        BadInput: If there is none, several and no choice, or not the one chosen.
    """
    found = {row.device.fingerprint: row.device for row in rows}
    if not found:
        raise BadInput(
            f"{store_name}: no hot rows of primitives; measure some with `python -m profiler.sweep`"
        )
    names = "; ".join(f"{key} = {info.label}" for key, info in sorted(found.items()))
    if fingerprint is not None and fingerprint not in found:
        raise BadInput(f"--device {fingerprint}: not in {store_name}; there are: {names}")
    if fingerprint is None and len(found) > 1:
        raise BadInput(f"{store_name}: several devices; choose one with --device: {names}")
    return found[fingerprint or next(iter(found))]


@dataclass(frozen=True)
class Grouped:
    """The rows of a device.

    Attributes:
        groups: By form and lowering.
        shared: Likewise, rows that were left out because another guest of the host slowed their
            core down. A model of the others is nearer than such a figure.
        skipped: By form and lowering in words, why there is no row at all.
    """

    groups: Groups
    shared: Groups
    skipped: dict[str, str]


def group_rows(rows: Iterable[Measurement], device: DeviceInfo) -> Grouped:
    """A device's rows with a latency and its interval by form and lowering, and why not others."""
    groups: Groups = {}
    reasons: dict[tuple[str, str], str] = {}
    of_device = [row for row in rows if row.device.fingerprint == device.fingerprint]
    full = full_clock(of_device)
    for measured in of_device:
        row = at_full_clock(measured, full)
        assert row.workload is not None
        key = (row.workload.form, row.lowering)
        if row.latency_ms is None:
            reasons[key] = f"{row.status}: {row.reason}"
        elif row.latency_low_ms is None or row.latency_high_ms is None:
            reasons[key] = "rows have no confidence interval of their latency"
        elif not 0 < row.latency_low_ms <= row.latency_ms <= row.latency_high_ms:
            reasons[key] = "latency lies outside its confidence interval"
        else:
            groups.setdefault(key, []).append(
                Row(row.workload, row.latency_ms, row.latency_low_ms, row.latency_high_ms, measured)
            )
    skipped = {
        f"{form} {lowering}": f"no usable row; the last one: {reason}"
        for (form, lowering), reason in reasons.items()
        if (form, lowering) not in groups
    }
    parted = {kernel: _parted(some) for kernel, some in sorted(groups.items())}
    kept = {kernel: own for kernel, (own, _) in parted.items()}
    shared = {kernel: left for kernel, (_, left) in parted.items()}
    return Grouped(kept, shared, skipped)


def _parted(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Leaves out what a model can stand for, of ours and of baselines alike: the rest, and those.

    That a core was shared is known from work of its own beside the samples
    (``profiler.shared_core``), not from how far a figure lies from a model.
    """
    own: list[Row] = []
    shared: list[Row] = []
    for row in rows:
        is_shared = row.workload.is_canonical and row.measurement.on_shared_core
        (shared if is_shared else own).append(row)
    enough = sum(row.workload.is_canonical for row in own) >= _ENOUGH_OWN
    return (own, shared) if enough else (rows, [])
