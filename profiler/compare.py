"""Two runs against each other: SAME, FASTER, SLOWER or AMBIGUOUS, key by key.

Two runs are two jobs, which differ by more than what was changed. ``profiler.drift`` takes off
what the rows show that cannot have changed, and the noise floor says how much is left.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, run
from profiler.drift import Drift
from profiler.samples import FEWEST_BURSTS
from profiler.store import Measurement, open_store
from profiler.verdicts import Effect, Verdict, holm, judge, separate_effect

Key = tuple[str, str, str, str]

VERDICTS: dict[Verdict, str] = {
    "SLOWER": "bold red",
    "FASTER": "green",
    "AMBIGUOUS": "yellow",
    "SAME": "dim",
}

# What an implementation of another project is made of: of equal versions it is a control.
_CONTROL_SOFTWARE = ("python", "torch")

app = typer.Typer(add_completion=False)


class ComparisonError(BadInput):
    """Runs that cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """One key of two runs.

    Attributes:
        subject, lowering, cache, device: What was measured, how and where, for people.
        a_ms, b_ms: Measured medians; None where a run has no figure.
        drift: Factor by which an unchanged row would have moved.
        ratio: b / a with the drift taken off; None where there is no verdict.
        low, high: 95 % interval of it, what unchanged rows stray by included.
        floor: Relative difference below which nothing is called a difference.
        p_value: Of the rank test, corrected for all rows that were compared.
        verdict: Of b against a; None with a ``reason``.
        reason: Why there is no verdict.
    """

    subject: str
    lowering: str
    cache: str
    device: str
    a_ms: float | None = None
    b_ms: float | None = None
    drift: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    p_value: float | None = None
    verdict: Verdict | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Pair:
    """The rows of one key; either may be missing, or have no figure."""

    key: Key
    a: Measurement | None
    b: Measurement | None

    @property
    def has_figures(self) -> bool:
        return bool(self.a and self.a.latency_ms and self.b and self.b.latency_ms)

    @property
    def is_control(self) -> bool:
        """Whether it cannot have changed: another project's code, of equal version."""
        if not (self.has_figures and self.a and self.b and self.a.is_baseline):
            return False
        a, b = (row.device.software for row in (self.a, self.b))
        return all(a.get(name) == b.get(name) for name in _CONTROL_SOFTWARE)

    @property
    def group(self) -> tuple[str, ...]:
        """What was measured in the same rounds."""
        row = self.a or self.b
        assert row is not None
        return (row.workload.product if row.workload else row.kind, *self.key[2:])

    @property
    def shift(self) -> float:
        """Log ratio b / a of the medians."""
        assert self.a and self.b and self.a.latency_ms and self.b.latency_ms
        return math.log(self.b.latency_ms / self.a.latency_ms)

    def effect(self, drift: Drift) -> Effect | None:
        """With the drift taken off; None with too few bursts."""
        assert self.a and self.b
        factor = math.exp(drift.expected(self.key, self.group))
        a_ms, b_ms = ([ms for ms in row.bursts_ms if ms] for row in (self.a, self.b))
        effect = separate_effect(a_ms, [ms / factor for ms in b_ms])
        return effect and effect.widened(drift.half_width())


def compare(
    a: Sequence[Measurement],
    b: Sequence[Measurement],
    threshold: float = 0.05,
    across_devices: bool = False,
) -> tuple[list[Comparison], Drift]:
    """Compares two runs by workload (or layer or model), lowering, cache state and device.

    Args:
        a: The old run, read with its samples.
        b: The new run, likewise.
        threshold: Least relative difference that matters.
        across_devices: Match rows of different devices with equal kind and threads. Nothing can
            be taken off then: other devices do not drift, they differ.

    Returns:
        One Comparison for each key of either run, in the order of a, then of b; and the drift.

    Raises:
        ComparisonError: If a run has two rows for one key, the runs share no device, or no key.
    """
    of_a, of_b = (_by_key(rows, name, across_devices) for rows, name in ((a, "A"), (b, "B")))
    if not across_devices and a and b:
        _require_common_device(a, b)
    if not of_a.keys() & of_b.keys():
        raise ComparisonError(f"nothing in common: A has {len(of_a)} keys, B has {len(of_b)}")
    pairs = [_Pair(key, of_a.get(key), of_b.get(key)) for key in {**of_a, **of_b}]
    controls = [] if across_devices else [pair for pair in pairs if pair.is_control]
    drift = Drift({it.key: it.shift for it in controls}, {it.key: it.group for it in controls})
    return _judged(pairs, drift, threshold), drift


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


def _judged(pairs: Sequence[_Pair], drift: Drift, threshold: float) -> list[Comparison]:
    """All verdicts at once: the more rows, the surer each has to be."""
    effects = {pair.key: pair.effect(drift) for pair in pairs if pair.has_figures}
    known = {key: effect for key, effect in effects.items() if effect}
    p_values = dict(zip(known, holm([effect.p_value for effect in known.values()])))
    floor = drift.floor(len(known))
    return [
        _with_verdict(pair, known[pair.key], p_values[pair.key], drift, floor, threshold)
        if pair.key in known
        else replace(_about(pair), reason=_why_not(pair))
        for pair in pairs
    ]


def _with_verdict(
    pair: _Pair, effect: Effect, p_value: float, drift: Drift, floor: float, threshold: float
) -> Comparison:
    within = [row.noise_floor or 0.0 for row in (pair.a, pair.b) if row]
    floor = max(floor, *within)
    return replace(
        _about(pair),
        drift=math.exp(drift.expected(pair.key, pair.group)),
        ratio=effect.ratio,
        low=effect.low,
        high=effect.high,
        floor=floor,
        p_value=p_value,
        verdict=judge(effect, p_value, threshold, floor),
    )


def _about(pair: _Pair) -> Comparison:
    row = pair.a or pair.b
    assert row is not None
    return Comparison(
        subject=row.subject,
        lowering=row.lowering,
        cache=row.cache,
        device=row.device.label,
        a_ms=pair.a.latency_ms if pair.a else None,
        b_ms=pair.b.latency_ms if pair.b else None,
    )


def _why_not(pair: _Pair) -> str:
    reasons = []
    for name, row in (("A", pair.a), ("B", pair.b)):
        if row is None:
            reasons.append(f"not in {name}")
        elif row.latency_ms is None:
            reasons.append(f"no figure in {name} ({row.status}: {row.reason})")
        elif sum(ms is not None for ms in row.bursts_ms) < FEWEST_BURSTS:
            reasons.append(f"fewer than {FEWEST_BURSTS} bursts stored in {name}")
    return "; ".join(reasons)


def table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons for people, those against first and those without verdict last."""
    order = [*VERDICTS, None]
    shown = Table(title="B against A, measured medians in ms", title_justify="left")
    for heading in ("subject", "lowering", "cache"):
        shown.add_column(heading, overflow="fold")
    for heading in ("A", "B", "B / A, drift taken off", "floor"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict", overflow="fold")
    for row in sorted(comparisons, key=lambda row: order.index(row.verdict)):
        shown.add_row(
            row.subject,
            row.lowering,
            row.cache,
            *(f"{value:.4g}" if value else "–" for value in (row.a_ms, row.b_ms)),
            f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]" if row.ratio else "–",
            f"{row.floor:.1%}" if row.floor is not None else "–",
            row.verdict or row.reason,
            style=VERDICTS[row.verdict] if row.verdict else "",
        )
    return shown


def _load(location: str) -> list[Measurement]:
    with closing(open_store(location)) as store:
        return list(store.rows(samples=True))


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

    For each workload, lowering and cache state measured in both:

    - SLOWER, FASTER: sure by a rank test on the bursts, corrected for the number of rows (Holm),
    and apart by at least the threshold and the noise floor.

    - SAME: the whole 95 % interval of the ratio is closer to 1 than that.

    - AMBIGUOUS: neither was shown.

    Two runs are two jobs, and the machine drifts between them. The rows of torch, unchanged from
    A to B, show by how much: that is taken off, product by product, and what they scatter by
    afterwards is the noise floor. Without such rows it is 26 %. To find a change of a few
    percent, use `make bench`, which measures both sides in turns in one job.

    What only one store has is listed without a verdict. Exit code: 0 done, 1 something is SLOWER,
    2 bad input (different devices without --across-devices, nothing in common).
    """
    comparisons, drift = compare(_load(a), _load(b), threshold, across_devices)
    # Piped into a file there is no terminal to ask for its width.
    console = Console() if sys.stdout.isatty() else Console(width=170)
    console.print(table(comparisons))
    console.print(drift.in_words(), markup=False, highlight=False)
    counts = Counter(row.verdict or "without verdict" for row in comparisons)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    if counts["SLOWER"]:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app)
