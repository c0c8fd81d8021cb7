"""Section on growth with tokens: latency over sequence length, with fitted exponents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from profiler.store import Measurement
from reparam.scaling_result import FIT_FROM
from reports import map_plots
from reports.comparisons import form_of, latency
from reports.formats import (
    Cell,
    bytes_cell,
    count_cell,
    ends,
    milliseconds_cell,
    missing,
    short_label,
    significant,
)
from reports.html import MAX_MARKS, Picture, Section, Table
from reports.run_folder import SWEEP, RunFolder

FEWEST_LENGTHS = 3
MAX_SERIES = 8


@dataclass(frozen=True)
class Exponent:
    """How latency grows: ``latency ∝ tokens ** value``, with its 95 % interval."""

    value: float
    low: float | None
    high: float | None


def exponent(tokens: Sequence[float], latency_ms: Sequence[float]) -> Exponent:
    """Least squares on logarithms; the interval is Student's.

    Raises:
        ValueError: With fewer than two different numbers of tokens.
    """
    fit = stats.linregress(np.log(tokens), np.log(latency_ms))
    if len(tokens) < FEWEST_LENGTHS:
        return Exponent(float(fit.slope), None, None)
    half = float(stats.t.ppf(0.975, len(tokens) - 2) * fit.stderr)
    return Exponent(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)


def growth(run: RunFolder) -> Section:
    """By how much more with more tokens, and with which exponent."""
    title = "Growth with tokens"
    if run.rows is None:
        return Section("growth", title, missing=run.absence("measurements.sqlite"))
    series = series_of(run.rows)
    if not series:
        return Section(
            "growth",
            title,
            (
                "No attention product of this run was measured at three sequence lengths or more. "
                'A sweep with [[shapes]] kind = "attention" and a list of tokens makes it.',
            ),
        )
    exponents = {
        name: exponent([row.tokens for row in rows], [row.latency_ms for row in rows])
        for name, rows in series.items()
    }
    frame = pd.DataFrame([vars(row) for rows in series.values() for row in rows])
    drawn = list(series)[:MAX_SERIES]
    table = Table(
        "Fitted exponents: latency grows with tokens to this power",
        ("series", "lengths", "from", "to", "exponent"),
        tuple(
            (
                name,
                count_cell(len(series[name])),
                count_cell(min(row.tokens for row in series[name])),
                count_cell(max(row.tokens for row in series[name])),
                Cell(significant(found.value), found.value, None, ends(found)),
            )
            for name, found in exponents.items()
        ),
        is_open=len(series) <= MAX_SERIES,
        note="Measured latencies, least squares on logarithms, 95 % interval. Linear attention "
        "tends to 1, softmax attention to 2 where its products dominate; short sequences lie "
        "below, since a launch costs the same at any length.",
    )
    part = f" {len(drawn)} of {len(series)} series." if len(drawn) < len(series) else ""
    alt = "; ".join(f"{name}: exponent {significant(one.value)}" for name, one in exponents.items())
    picture = Picture(
        "growth",
        "Latency over sequence length",
        map_plots.growth,
        frame[frame.series.isin(drawn)].head(MAX_MARKS),
        alt,
        "Logarithmic on both axes: a straight line is a power of the number of tokens, its slope "
        f"the exponent.{part}",
    )
    return Section("growth", title, (), (picture,), (table,), (SWEEP,))


def scaling(run: RunFolder) -> Section:
    """By how much less than softmax attention, in latency and memory, with more tokens."""
    title = "Add attention against softmax attention"
    found = run.scaling
    if found is None:
        return Section("scaling", title, missing=run.absence("scaling.json"))
    known = [(row, row.latency_ms) for row in found.rows]
    frame = pd.DataFrame(
        [
            vars(_Point(row.way, row.tokens, figure.value, figure.low, figure.high))
            for row, figure in known
            if figure is not None
        ]
    )
    lead = "; ".join(
        f"{way} grows with tokens to the power of {significant(value)}"
        for way, value in found.exponents().items()
    )
    pictures = (
        ()
        if frame.empty
        else (
            Picture(
                "scaling",
                "Latency of an attention over its tokens",
                map_plots.growth,
                frame,
                lead or "too few lengths for exponents",
                "From queries, keys and values to the result, all ways in turns.",
            ),
        )
    )
    table = Table(
        f"Attention of {found.heads} heads of {found.head_dim} features, batch 1",
        ("way", "tokens", "latency", "peak memory"),
        tuple(
            (
                row.way,
                count_cell(row.tokens),
                milliseconds_cell(figure) if figure else missing(row.reason),
                bytes_cell(row.peak_bytes, row.reason),
            )
            for row, figure in known
        ),
        note="Memory is the largest sum of tensors alive at once beside the input.",
    )
    sentence = (f"From {FIT_FROM} tokens on {lead}.",) if lead else ()
    return Section("scaling", title, sentence, pictures, (table,), (found.command,))


@dataclass(frozen=True)
class _Point:
    series: str
    tokens: int
    latency_ms: float
    latency_low_ms: float | None
    latency_high_ms: float | None


def series_of(rows: Sequence[Measurement]) -> dict[str, list[_Point]]:
    """Attention products that differ in their number of tokens alone, by what they share.

    Of our lowerings the fastest at each length; each baseline by itself. Longest series first.
    """
    found: dict[tuple[str, str], dict[int, _Point]] = {}
    for row in rows:
        workload = row.workload
        if row.status != "ok" or row.cache != "hot" or not workload or workload.kind == "linear":
            continue
        bits = workload.m if workload.kind == "kv" else workload.k
        who = row.lowering if row.is_baseline else "ours"
        name = (
            f"{form_of(row)}, {who}, {workload.b} × {bits} bits × {workload.n}, "
            f"{short_label(row.device)}"
        )
        series = (name, row.device.fingerprint)
        figure = latency(row)
        point = _Point(name, workload.tokens, figure.value, figure.low, figure.high)
        best = found.setdefault(series, {}).get(point.tokens)
        if best is None or point.latency_ms < best.latency_ms:
            found[series][point.tokens] = point
    names = Counter(name for name, _ in found)
    long: dict[str, list[_Point]] = {}
    for (name, fingerprint), points in found.items():
        if len(points) < FEWEST_LENGTHS:
            continue
        # Two cards of one kind have one name.
        unique = name if names[name] == 1 else f"{name} {fingerprint[:6]}"
        ordered = sorted(points.values(), key=lambda point: point.tokens)
        long[unique] = [replace(point, series=unique) for point in ordered]
    return dict(sorted(long.items(), key=lambda item: -len(item[1])))
