"""Two runs against each other: SAME, FASTER, SLOWER or AMBIGUOUS, key by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, run
from profiler.store import Measurement, open_store

Verdict = Literal["SAME", "FASTER", "SLOWER", "AMBIGUOUS"]
Key = tuple[str, str, str, str]

VERDICTS: dict[Verdict, str] = {
    "SLOWER": "bold red",
    "FASTER": "green",
    "AMBIGUOUS": "yellow",
    "SAME": "dim",
}

app = typer.Typer(add_completion=False)


class ComparisonError(BadInput):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """One key of two runs.

    Attributes:
        subject, lowering, cache, device: What was measured, how and where, for people.
        a_ms, b_ms: Measured medians; None where a run has no figure.
        ratio: b / a; None where either is missing. ``low`` and ``high`` are the outermost ratios
            that the two 95 % intervals allow.
        verdict: Of b against a; None with a ``reason``.
        reason: Why there is no verdict.
    """

    subject: str
    lowering: str
    cache: str
    device: str
    a_ms: float | None = None
    b_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Verdict | None = None
    reason: str | None = None


def judge(ratio: float, low: float, high: float, threshold: float) -> Verdict:
    """The verdict on a ratio of latencies, new to old, with its interval.

    SAME when the ratio is within the threshold, be the difference sure or not: it is too small to
    matter. From the threshold on AMBIGUOUS when 1 is inside the interval (the two latencies'
    intervals overlap), else SLOWER or FASTER. The threshold is a factor in both directions (1.05
    and 1/1.05 for 0.05), so that swapping the runs swaps the verdicts.

    Raises:
        ValueError: If the threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold: must be above 0, got {threshold}")
    matters = max(ratio, 1 / ratio) >= 1 + threshold
    if not matters:
        return "SAME"
    if low <= 1 <= high:
        return "AMBIGUOUS"
    return "SLOWER" if ratio > 1 else "FASTER"


def compare(
    a: Sequence[Measurement],
    b: Sequence[Measurement],
    threshold: float = 0.05,
    across_devices: bool = False,
) -> list[Comparison]:
    """Compares two runs by workload (or layer or model), lowering, cache state and device.

    Args:
        a: The old run.
        b: The new run.
        threshold: Least relative difference that matters.
        across_devices: Match rows of different devices with equal kind and threads.

    Returns:
        One Comparison for each key of either run, in the order of a, then of b.

    Raises:
        ComparisonError: If a run has two rows for one key, the runs share no device, or no key.
    """
    of_a, of_b = (_by_key(rows, name, across_devices) for rows, name in ((a, "A"), (b, "B")))
    if not across_devices and a and b:
        _require_common_device(a, b)
    if not of_a.keys() & of_b.keys():
        raise ComparisonError(f"nothing in common: A has {len(of_a)} keys, B has {len(of_b)}")
    return [_compare_rows(of_a.get(key), of_b.get(key), threshold) for key in {**of_a, **of_b}]


def _by_key(rows: Sequence[Measurement], name: str, across_devices: bool) -> dict[Key, Measurement]:
    keys = [_key(row, across_devices) for row in rows]
    for key, count in Counter(keys).items():
        if count > 1:
            row = rows[keys.index(key)]
            raise ComparisonError(
                f"{name}: {count} rows for {row.subject}, {row.lowering}, {row.cache}"
                + (" on several devices; compare one device at a time" if across_devices else "")
            )
    return dict(zip(keys, rows))


def _key(row: Measurement, across_devices: bool) -> Key:
    subject = row.workload.key if row.workload else f"{row.kind}:{row.subject}"
    place = f"{row.device.kind}, {row.device.threads} threads"
    return subject, row.lowering, row.cache, place if across_devices else row.device.fingerprint


def _require_common_device(a: Sequence[Measurement], b: Sequence[Measurement]) -> None:
    devices_a, devices_b = ({row.device.fingerprint: row.device for row in rows} for rows in (a, b))
    if devices_a.keys() & devices_b.keys():
        return
    labels = [
        "; ".join(f"{device.label} {fingerprint}" for fingerprint, device in devices.items())
        for devices in (devices_a, devices_b)
    ]
    raise ComparisonError(
        f"different devices: A on {labels[0]}; B on {labels[1]}; --across-devices compares them"
    )


def _compare_rows(a: Measurement | None, b: Measurement | None, threshold: float) -> Comparison:
    row = a or b
    assert row is not None
    a_ms, b_ms = (side.latency_ms if side else None for side in (a, b))
    about = Comparison(
        subject=row.subject,
        lowering=row.lowering,
        cache=row.cache,
        device=row.device.label,
        a_ms=a_ms,
        b_ms=b_ms,
    )
    if a is None or b is None or a_ms is None or b_ms is None:
        return replace(about, reason=_why_missing(a, b))
    ratio = b_ms / a_ms
    edges = (a.latency_low_ms, a.latency_high_ms, b.latency_low_ms, b.latency_high_ms)
    if None in edges:
        return replace(about, ratio=ratio, reason="no interval stored")
    a_low, a_high, b_low, b_high = (edge for edge in edges if edge is not None)
    low, high = b_low / a_high, b_high / a_low
    verdict = judge(ratio, low, high, threshold)
    return replace(about, ratio=ratio, low=low, high=high, verdict=verdict)


def _why_missing(a: Measurement | None, b: Measurement | None) -> str:
    reasons = []
    for name, row in (("A", a), ("B", b)):
        if row is None:
            reasons.append(f"not in {name}")
        elif row.latency_ms is None:
            reasons.append(f"no figure in {name} ({row.status}: {row.reason})")
    return "; ".join(reasons)


def table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons for people, those against first and those without verdict last."""
    order = [*VERDICTS, None]
    shown = Table(title="B against A, measured medians in ms", title_justify="left")
    for heading in ("subject", "lowering", "cache", "A", "B", "B / A", "verdict"):
        numeric = heading in ("A", "B", "B / A")
        shown.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in sorted(comparisons, key=lambda row: order.index(row.verdict)):
        shown.add_row(
            row.subject,
            row.lowering,
            row.cache,
            *(f"{value:.4g}" if value else "–" for value in (row.a_ms, row.b_ms)),
            f"{row.ratio:.3f}" if row.ratio else "–",
            row.verdict or row.reason,
            style=VERDICTS[row.verdict] if row.verdict else "",
        )
    return shown


def _load(location: str) -> list[Measurement]:
    with closing(open_store(location)) as store:
        return list(store.rows())


@app.command()
def main(
    a: Annotated[str, typer.Argument(help="Old measurements: a store's file or URL.")],
    b: Annotated[str, typer.Argument(help="New measurements.")],
    threshold: Annotated[
        float, typer.Option(help="Least relative difference that matters.", min=1e-6)
    ] = 0.05,
    across_devices: Annotated[
        bool, typer.Option("--across-devices", help="Compare runs of different devices.")
    ] = False,
) -> None:
    """Compares two measurement stores and says where B is SLOWER or FASTER than A.

    For each workload, lowering and cache state measured in both, from medians and 95 % intervals:

    - medians closer than the threshold: SAME

    - else intervals that overlap: AMBIGUOUS

    - else FASTER or SLOWER

    What only one store has is listed without a verdict. Exit code: 0 done, 1 something is SLOWER,
    2 bad input (different devices without --across-devices, nothing in common).
    """
    comparisons = compare(_load(a), _load(b), threshold, across_devices)
    console = Console()
    console.print(table(comparisons))
    counts = Counter(row.verdict or "without verdict" for row in comparisons)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    if counts["SLOWER"]:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app)
