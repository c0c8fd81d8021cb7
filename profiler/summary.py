"""The table that ends a sweep: who won each product, against whom, and what shift brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import geometric_mean, median

from rich.table import Table

from profiler.store import Measurement


def by_product(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Groups the rows of primitives that compute the same product on the same terms."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for row in rows:
        if row.kind == "primitive" and row.workload is not None:
            terms = f" {row.cache}" if row.cache == "cold" else ""
            groups[f"{row.workload.product}{terms}"].append(row)
    return dict(groups)


def fastest(rows: Sequence[Measurement], is_baseline: bool) -> Measurement | None:
    """The row with the lowest latency among ours or among the baselines."""
    found = [row for row in rows if row.is_baseline == is_baseline and row.latency_ms is not None]
    return min(found, key=lambda row: row.latency_ms or 0.0, default=None)


def _us(row: Measurement | None) -> str:
    return "—" if row is None or row.latency_ms is None else f"{row.latency_ms * 1e3:.1f}"


def _speedup(row: Measurement | None) -> str:
    if row is None or row.details.get("speedup") is None:
        return "—"
    value, low, high = (row.details[f"speedup{end}"] for end in ("", "_low", "_high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _roof(row: Measurement | None) -> str:
    share = row.details.get("roofline_share") if row else None
    return "—" if share is None else f"{100 * float(share):.0f} %"


def _shift_over_int8(rows: Sequence[Measurement], form: str) -> str:
    for row in rows:
        of_form = row.workload is not None and row.workload.form == form
        if of_form and row.details.get("shift_over_int8_mult") is not None:
            ends = (row.details[f"shift_over_int8_mult{end}"] for end in ("", "_low", "_high"))
            return "{:.2f} [{:.2f}, {:.2f}]".format(*ends)
    return "—"


def summary_table(rows: Sequence[Measurement], title: str) -> Table:
    """One line a product; ratios are from interleaved rounds, with their 95 % intervals."""
    table = Table(title=title, caption="speed-up: fastest baseline ÷ our fastest, above 1 we win")
    headings = ("product", "our fastest", "µs", "of roof", "baseline", "µs", "speed-up")
    for name in (*headings, "int8 shift ÷ int8 mult", "int4 shift ÷ int8 mult"):
        table.add_column(name, justify="left" if name in ("product", "our fastest") else "right")
    for product, group in by_product(rows).items():
        ours, baseline = fastest(group, False), fastest(group, True)
        failed = [row.lowering for row in group if row.is_baseline and row.latency_ms is None]
        against = baseline.lowering if baseline else "none"
        table.add_row(
            product,
            ours.lowering if ours else "none",
            _us(ours),
            _roof(ours),
            f"{against} ({', '.join(failed)} failed)" if failed else against,
            _us(baseline),
            _speedup(ours),
            _shift_over_int8(group, "shift_int8"),
            _shift_over_int8(group, "shift_int4"),
        )
    return table


def headlines(rows: Sequence[Measurement]) -> list[str]:
    """Geometric means over the products, one line a question; none where nothing was measured."""
    lines = []
    for form, question in _QUESTIONS.items():
        against_fp32, against_best, shares = [], [], []
        for group in by_product(rows).values():
            ours = fastest(
                [row for row in group if row.workload and row.workload.form in form], False
            )
            best = fastest(group, True)
            fp32 = fastest([row for row in group if row.lowering == "torch.fp32"], True)
            if ours and best and fp32 and ours.latency_ms and best.latency_ms and fp32.latency_ms:
                against_best.append(best.latency_ms / ours.latency_ms)
                against_fp32.append(fp32.latency_ms / ours.latency_ms)
                if ours.details.get("roofline_share") is not None:
                    shares.append(float(ours.details["roofline_share"] or 0))
        if against_best:
            roof = f", {100 * median(shares):.0f} % of the roof (median)" if shares else ""
            lines.append(
                f"{question}: {geometric_mean(against_fp32):.2f}× torch fp32"
                f" (least {min(against_fp32):.2f}), {geometric_mean(against_best):.2f}× torch's"
                f" fastest (least {min(against_best):.2f}), {len(against_best)} products{roof}"
            )
    return lines


_QUESTIONS = {
    ("add_kv_pm1", "add_qkv_pm1", "add_kv_01", "add_qkv_01"): "add",
    ("shift_int8",): "shift, int8",
    ("shift_int4",): "shift, 4-bit codes",
    ("mult_int8",): "our own mult, int8",
    ("mult_fp32",): "our own mult, fp32",
}


def problems(rows: Sequence[Measurement]) -> list[str]:
    """One line for each row without a figure."""
    return [
        f"{row.subject}, {row.lowering}: {row.status}: {row.reason}"
        for row in rows
        if row.latency_ms is None
    ]
