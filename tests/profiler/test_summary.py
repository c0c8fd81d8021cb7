import pytest
from rich.console import Console

from kernels.workload import attention, linear
from profiler.device import DeviceInfo
from profiler.passes import PASS_SPREAD, pass_lines
from profiler.roofline import roofline_share
from profiler.store import Measurement
from profiler.summary import (
    by_product,
    fastest,
    headlines,
    noise_line,
    overhead_lines,
    own_mult_lines,
    problems,
    shared_lines,
    summary_table,
)

DEVICE = DeviceInfo(kind="cpu", name="Synthetic CPU", threads=1)


def _row(workload, lowering, latency_ms, is_baseline=False, noise_floor=None, **details):
    failed = {} if latency_ms else {"status": "failed", "reason": "broke"}
    return Measurement(
        workload=workload,
        subject=workload.label,
        device=DEVICE,
        lowering=lowering,
        is_baseline=is_baseline,
        latency_ms=latency_ms,
        energy_reason="no meter",
        noise_floor=noise_floor,
        details=details,
        **failed,
    )


def _rows():
    kv = attention(2, 49, 16, 32).kv
    return [
        _row(linear("shift_int8", 8, 16, 32), "shift.dot", 1.0, roofline_share=0.5),
        _row(linear("mult_int8", 8, 16, 32), "mult.dot", 1.0),
        _row(linear("mult_fp32", 8, 16, 32), "torch.fp32", 8.0, True),
        _row(linear("mult_bf16", 8, 16, 32), "torch.bf16", 2.0, True),
        _row(kv, "add.buckets", 1.0),
        _row(kv, "torch.fp32", 3.0, True),
        _row(kv, "torch.bf16", None, True),
    ]


def test_forms_of_one_product_are_set_against_each_other():
    groups = by_product(_rows())
    assert sorted(len(group) for group in groups.values()) == [3, 4]
    assert fastest(_rows()[:4], True).lowering == "torch.bf16"


def test_headlines_are_ratios_to_fp32_and_to_the_fastest():
    add, shift, mult = headlines(_rows())
    assert "3.00× torch fp32" in add
    assert "8.00× torch fp32" in shift and "2.00× torch's fastest" in shift
    assert "50 % of the roof" in shift and "roof" not in mult
    assert headlines([]) == []


def test_the_shift_is_set_against_our_own_mult_of_each_width():
    """By ratios of the same rounds: those of two medians would say 1."""
    ratios = ({"int8": 0.5, "int7": 2.0}, {"int8": 0.125})
    rows = [
        _row(
            linear("shift_int8", 8, 16, 64 * (i + 1)),
            "shift.dot",
            1.0,
            **{
                f"shift_over_{types}_mult{end}": ratio
                for types, ratio in found.items()
                for end in ("", "_low", "_high")
            },
        )
        for i, found in enumerate(ratios)
    ]
    rows += [_row(linear("mult_int8", 8, 16, 64), "mult.dot", 1.0)]
    eight, seven = own_mult_lines([*_rows(), *rows])
    assert eight == "shift, int8: 4.00× our own mult, int8 (least 2.00, most 8.00), 2 products"
    assert seven == "shift, int8: 0.50× our own mult, int7 (least 0.50, most 0.50), 1 products"
    assert own_mult_lines([]) == []


def test_a_failed_baseline_is_named():
    assert problems(_rows()) == ["add_kv_pm1 kv 2x16x49x32 pm1, torch.bf16: failed: broke"]
    assert summary_table(_rows(), "title").row_count == 2


def test_share_of_the_roof_is_of_the_forms_own_arithmetic():
    roofs = {"fma_fp32": 100.0, "dot_int8": 400.0}
    workload = linear("shift_int8", 10, 20, 30)
    assert roofline_share(workload, 30.0, roofs) == pytest.approx(6000 / 30 / 400)
    assert roofline_share(workload, None, roofs) is None
    assert roofline_share(workload, 30.0, {}) is None
    assert roofline_share(attention(1, 2, 3, 4)[0], 30.0, roofs) is None


def _ratio_rows(ratio, floor):
    """Ours and torch's, that far apart, in a sweep with that noise floor."""
    ends = {"speedup": ratio, "speedup_low": ratio - 0.01, "speedup_high": ratio + 0.01}
    return [
        _row(linear("shift_int8", 8, 16, 32), "shift.dot", 1.0, noise_floor=floor, **ends),
        _row(linear("mult_fp32", 8, 16, 32), "torch.fp32", ratio, True, noise_floor=floor),
    ]


def _printed(rows):
    console = Console(width=300, record=True)
    console.print(summary_table(rows, "title"))
    return console.export_text()


@pytest.mark.parametrize(
    ("ratio", "floor", "shown"),
    [
        (1.03, 0.05, "≈ 1"),
        (0.97, 0.05, "≈ 1"),
        (1.06, 0.05, "1.06"),
        (0.94, 0.05, "0.94"),
        (1.03, None, "1.03"),
    ],
)
def test_no_difference_below_the_noise_floor_is_called_one(ratio, floor, shown):
    rows = _ratio_rows(ratio, floor)
    assert f"{shown} [{ratio - 0.01:.2f}, {ratio + 0.01:.2f}]" in _printed(rows)
    (headline,) = headlines(rows)
    assert f"{shown}× torch fp32" in headline
    hidden = int(shown == "≈ 1")
    expected = (
        "not measured" if floor is None else f"5.0% (a kernel against itself); it hides {hidden}"
    )
    assert expected in noise_line(rows)


def test_the_table_says_what_the_alphabet_of_the_fastest_shift_loses():
    rows = _rows()
    assert "(int8)" not in _printed(rows)
    rows[0] = rows[0].model_copy(update={"relative_error": 0.142})
    assert "14.2% (int8)" in _printed(rows)
    faster = _row(linear("shift_int4", 8, 16, 32), "shift.nibbles", 0.5)
    rows.append(faster.model_copy(update={"relative_error": 0.151}))
    assert "15.1% (int4)" in _printed(rows) and "14.2%" not in _printed(rows)


def test_figures_of_a_shared_core_are_counted():
    rows = _rows()
    assert shared_lines(rows) == []
    rows[0] = rows[0].model_copy(update={"details": {"own_core": False}})
    (line,) = shared_lines(rows)
    assert line.startswith(f"1 of {len(rows)} figures")


def test_it_is_said_how_far_passes_lie_apart():
    rows = [_row(linear("mult_fp32", m, 16, 32), "mult.panels", 1.0) for m in range(1, 12)]
    assert pass_lines(rows) == []
    apart = [
        row.model_copy(update={"details": {PASS_SPREAD: i / 100}}) for i, row in enumerate(rows)
    ]
    (line,) = pass_lines(apart)
    assert "half of the rows within 5.0%, 90 % 9.0%" in line


def test_launch_overheads_are_told_apart():
    rows = [
        _row(linear("mult_fp32", 8, 16, 32), "mult.panels", 1.0, launch_overhead_ms=0.0005),
        _row(linear("mult_fp32", 8, 16, 32), "torch.fp32", 1.0, True, launch_overhead_ms=0.00125),
    ]
    assert overhead_lines(rows) == [
        "launch overhead, part of each latency: ours 0.50 µs, torch 1.25 µs"
    ]
    assert overhead_lines(_rows()) == []
