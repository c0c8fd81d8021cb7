"""The table that ends a sweep: who won each product, against whom, and what shift brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import geometric_mean, median

from rich.table import Table

from kernels.forms import FORMS
from profiler.interleaved import speed_over
from profiler.measurement import Measurement


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


def noise_floor(rows: Sequence[Measurement]) -> float:
    """The largest noise floor of some rows; 0 where none was measured."""
    return max((row.noise_floor for row in rows if row.noise_floor is not None), default=0.0)


def in_words(ratio: float, floor: float) -> str:
    """A ratio of latencies, or that it is none to speak of.

    Args:
        ratio: Either way round.
        floor: Noise floor: a relative difference below it is not called a difference.
    """
    return "≈ 1" if max(ratio, 1 / ratio) - 1 < floor else f"{ratio:.2f}"


def _us(row: Measurement | None) -> str:
    return "—" if row is None or row.latency_ms is None else f"{row.latency_ms * 1e3:.1f}"


def _ratio(row: Measurement | None, label: str) -> str:
    if row is None or row.details.get(label) is None:
        return "—"
    value, low, high = (float(row.details[f"{label}{end}"] or 0) for end in ("", "_low", "_high"))
    return f"{in_words(value, noise_floor([row]))} [{low:.2f}, {high:.2f}]"


def _roof(row: Measurement | None) -> str:
    share = row.details.get("roofline_share") if row else None
    return "—" if share is None else f"{100 * float(share):.0f} %"


def _of_form(rows: Sequence[Measurement], form: str) -> Measurement | None:
    found = [row for row in rows if row.workload is not None and row.workload.form == form]
    return next((row for row in found if row.details.get("shift_over_int8_mult")), None)


def _lost(rows: Sequence[Measurement]) -> str:
    """Relative error of our fastest shift, which is what its alphabet loses."""
    shifts = [row for row in rows if row.workload and row.workload.primitive == "shift"]
    row = fastest(shifts, False)
    if row is None or row.relative_error is None or row.workload is None:
        return "—"
    return f"{row.relative_error:.1%} ({row.workload.form.removeprefix('shift_')})"


def summary_table(rows: Sequence[Measurement], title: str) -> Table:
    """One line a product; ratios are from interleaved rounds, with their 95 % intervals."""
    caption = (
        "speed-up: fastest baseline ÷ our fastest, above 1 we win; ≈ 1: within the noise floor."
        " Shift's error: RMS against the fp32 product."
    )
    table = Table(title=title, caption=caption)
    headings = ("product", "our fastest", "µs", "of roof", "baseline", "µs", "speed-up")
    shifts = ("int8 shift ÷ int8 mult", "int4 shift ÷ int8 mult", "shift's error")
    for name in (*headings, *shifts):
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
            _ratio(ours, "speedup"),
            _ratio(_of_form(group, "shift_int8"), "shift_over_int8_mult"),
            _ratio(_of_form(group, "shift_int4"), "shift_over_int8_mult"),
            _lost(group),
        )
    return table


def noise_line(rows: Sequence[Measurement]) -> str:
    """What a kernel against itself showed, and how many speed-ups drown in it."""
    floors = sorted({row.noise_floor for row in rows if row.noise_floor is not None})
    if not floors:
        return "noise floor: not measured (contended, or no kernel of ours)"
    speedups = [float(row.details["speedup"] or 1) for row in rows if row.details.get("speedup")]
    hidden = sum(in_words(ratio, floors[-1]) == "≈ 1" for ratio in speedups)
    shown = " to ".join(f"{floor:.1%}" for floor in dict.fromkeys((floors[0], floors[-1])))
    hides = f"; it hides {hidden} of {len(speedups)} speed-ups" if speedups else ""
    return f"noise floor: {shown} (a kernel against itself){hides}"


def shared_lines(rows: Sequence[Measurement]) -> list[str]:
    """How many figures are of a core that a neighbour worked on too; nothing where none is."""
    shared = sum(row.on_shared_core for row in rows)
    if not shared:
        return []
    return [f"{shared} of {len(rows)} figures are of a core that another guest worked on as well"]


def overhead_lines(rows: Sequence[Measurement]) -> list[str]:
    """What a launch costs by itself, which is part of every latency on a CPU."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.device.kind == "cpu" and row.details.get("launch_overhead_ms"):
            runtime = "torch" if row.is_baseline else "ours"
            found[runtime].append(float(row.details["launch_overhead_ms"] or 0))
    each = [f"{name} {median(values) * 1e3:.2f} µs" for name, values in sorted(found.items())]
    return [f"launch overhead, part of each latency: {', '.join(each)}"] if each else []


def headlines(rows: Sequence[Measurement]) -> list[str]:
    """Geometric means over the products, one line a question; none where nothing was measured."""
    lines = []
    for question, forms in _questions().items():
        against_fp32, against_best, shares = [], [], []
        for group in by_product(rows).values():
            ours = fastest(
                [row for row in group if row.workload and row.workload.form in forms], False
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
            floor = noise_floor(rows)
            fp32_mean, fp32_least, best_mean, best_least = (
                in_words(ratio, floor)
                for ratios in (against_fp32, against_best)
                for ratio in (geometric_mean(ratios), min(ratios))
            )
            lines.append(
                f"{question}: {fp32_mean}× torch fp32 (least {fp32_least}), {best_mean}× torch's"
                f" fastest (least {best_least}), {len(against_best)} products{roof}"
            )
    return lines


def own_mult_lines(rows: Sequence[Measurement]) -> list[str]:
    """What the shift itself brings: our int8 shift beside our own mults of a byte a weight.

    Ratios are of interleaved rounds, as the table's.
    """
    lines, floor = [], noise_floor(rows)
    shifts = [row for row in rows if row.workload and row.workload.form == "shift_int8"]
    for types in ("int8", "int7"):
        ratios = [speed.value for row in shifts if (speed := speed_over(row, types))]
        if ratios:
            mean, least, most = (
                in_words(ratio, floor)
                for ratio in (geometric_mean(ratios), min(ratios), max(ratios))
            )
            lines.append(
                f"shift, int8: {mean}× our own mult, {types} (least {least}, most {most}),"
                f" {len(ratios)} products"
            )
    return lines


def _questions() -> dict[str, tuple[str, ...]]:
    """What the headlines are about: add attention as a whole, and each form of a linear."""
    found = {"add": tuple(name for name, form in FORMS.items() if form["w_layout"] == "kn")}
    for primitive, words in (("shift", "shift"), ("add", "add"), ("mult", "our own mult")):
        for name, form in FORMS.items():
            if (form["primitive"], form["w_layout"]) == (primitive, "nk"):
                variant = name.removeprefix(f"{primitive}_").replace("_", " ")
                found[f"{words}, {variant}"] = (name,)
    return found


def problems(rows: Sequence[Measurement]) -> list[str]:
    """One line for each row without a figure."""
    return [
        f"{row.subject}, {row.lowering}: {row.status}: {row.reason}"
        for row in rows
        if row.latency_ms is None
    ]
