"""How far the latency models of a run are off, over all that they were tested on."""

from __future__ import annotations

from reports import formats
from reports.run_folder import RunFolder


def held_out_mape(run: RunFolder, column: str = "mape") -> float | None:
    """An error column of fit.json, the mean over the held-out rows, in percent."""
    fits = [fit for fit in run.fit.fits if getattr(fit, column) is not None] if run.fit else []
    rows = sum(fit.rows_test for fit in fits)
    return sum(getattr(fit, column) * fit.rows_test for fit in fits) / rows if rows else None


def extrapolated_in_words(run: RunFolder) -> str:
    """The error apart for rows beyond the sizes that were learned from; empty without such."""
    fits = run.fit.fits if run.fit else ()
    inside = [fit.inside for fit in fits if fit.inside]
    outside = [fit.outside for fit in fits if fit.outside]
    if not outside:
        return ""
    parts = [
        f"{formats.percent(sum(one.mape * one.rows for one in part) / rows)} on the {rows} {where}"
        for part, where in (
            (inside, "inside the sizes that were learned from"),
            (outside, "beyond them"),
        )
        if (rows := sum(one.rows for one in part))
    ]
    return ", ".join(parts)
