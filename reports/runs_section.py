"""Section on several runs or devices side by side, with the verdicts of profiler.compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from profiler.command_line import BadInput
from profiler.compare import Comparison, compare
from reports.formats import Cell, missing, number_cell, percent_cell
from reports.html import Section, Table
from reports.key_figures import key_figures
from reports.run_folder import RunFolder, rows_with_bursts
from reports.verdict import decide

COMPARE = "python -m profiler.compare"


def runs(folders: Sequence[RunFolder]) -> Section:
    """The key figures of each run, and each later run's kernels against the first's."""
    first, *others = folders
    names = _names(folders)
    lead: list[str] = []
    tables = [_key_figures(folders, names)]
    for other, own_name in zip(others, names[1:]):
        name = f"{own_name} against {names[0]}"
        if not first.rows or not other.rows:
            lead.append(f"{name}: not compared, a run has no measurements.sqlite.")
            continue
        same = {row.device.fingerprint for row in first.rows} & {
            row.device.fingerprint for row in other.rows
        }
        try:
            found, drift = compare(
                rows_with_bursts(first.path),
                rows_with_bursts(other.path),
                across_devices=not same,
            )
        except BadInput as error:
            lead.append(f"{name}: not compared: {error}.")
            continue
        counts = Counter(row.verdict or "without a verdict" for row in found)
        words = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        how = drift.in_words() if same else "different devices, so nothing was taken off"
        lead.append(f"{name}: {words} ({how}).")
        tables.append(_verdicts(name, found))
    command = " ".join((COMPARE, *(str(run.path / "measurements.sqlite") for run in folders[:2])))
    return Section("runs", "Side by side", tuple(lead), (), tuple(tables), (command,))


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """Names of the folders, or their paths where two have one name."""
    names = [run.path.resolve().name for run in folders]
    return names if len(set(names)) == len(names) else [str(run.path) for run in folders]


def _key_figures(folders: Sequence[RunFolder], names: Sequence[str]) -> Table:
    columns = [key_figures(run) for run in folders]
    rows: list[tuple[str | Cell, ...]] = [
        ("verdict", *(decide(run).status for run in folders)),
        ("device", *(run.device.label if run.device else "unknown" for run in folders)),
    ]
    rows += [
        (cards[0].label, *(Cell(card.figure, None, card.detail) for card in cards))
        for cards in zip(*columns)
    ]
    return Table(
        "Key figures of each run",
        ("figure", *names),
        tuple(rows),
        is_open=True,
    )


def _verdicts(name: str, found: Sequence[Comparison]) -> Table:
    order = ["SLOWER", "FASTER", "AMBIGUOUS", "SAME", None]
    return Table(
        f"Row by row, {name}",
        ("subject", "lowering", "cache", "first, ms", "other, ms", "ratio", "floor", "verdict"),
        tuple(
            (
                row.subject,
                row.lowering,
                row.cache,
                number_cell(row.a_ms, "no figure", 4),
                number_cell(row.b_ms, "no figure", 4),
                Cell(f"{row.ratio:.3f}", row.ratio, None, f"[{row.low:.3f}, {row.high:.3f}]")
                if row.ratio is not None
                else missing("no verdict"),
                percent_cell(100 * row.floor if row.floor is not None else None, "no verdict"),
                Cell(row.verdict or "none", None, row.reason),
            )
            for row in sorted(found, key=lambda row: order.index(row.verdict))
        ),
        note="A ratio above 1 means that the other run is slower. What torch's unchanged rows "
        "moved by is taken off, where both runs are of one device.",
    )
