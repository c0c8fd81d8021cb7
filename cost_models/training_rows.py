"""Rows of a store that a latency model can be fitted on, by form and lowering, on one device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernels.workload import Workload
from profiler.command_line import BadInput
from profiler.device import DeviceInfo
from profiler.store import Measurement, open_store


@dataclass(frozen=True)
class Row:
    """A hot measurement of one primitive, narrowed to what a model needs."""

    workload: Workload
    latency_ms: float
    low_ms: float
    high_ms: float
    measurement: Measurement


Groups = dict[tuple[str, str], list[Row]]


# With fewer of a whole core, a model learns from all.
_ENOUGH_OWN = 6


def of_whole_cores(rows: Sequence[Row]) -> list[Row]:
    """Rows that another guest of the host did not slow down, where there are enough of them.

    That a core was shared is known from work of its own beside the samples
    (``profiler.shared_core``), not from how far a figure lies from a model.
    """
    own = [row for row in rows if not row.measurement.on_shared_core]
    return own if len(own) >= _ENOUGH_OWN else list(rows)


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


def group_rows(
    rows: Iterable[Measurement], device: DeviceInfo
) -> tuple[dict[tuple[str, str], list[Row]], dict[str, str]]:
    """A device's rows with a latency and its interval by form and lowering, and why not others.

    Returns:
        The groups, and by form and lowering the reason of those that have no row at all.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.device.fingerprint != device.fingerprint:
            continue
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
                Row(row.workload, row.latency_ms, row.latency_low_ms, row.latency_high_ms, row)
            )
    skipped = {
        f"{form} {lowering}": f"no usable row; the last one: {reason}"
        for (form, lowering), reason in reasons.items()
        if (form, lowering) not in groups
    }
    return dict(sorted(groups.items())), skipped
