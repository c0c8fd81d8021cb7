import pytest

from kernels.workload import attention, linear
from profiler.device import DeviceInfo
from profiler.roofline import roofline_share
from profiler.store import Measurement
from profiler.summary import by_product, fastest, headlines, problems, summary_table

DEVICE = DeviceInfo(kind="cpu", name="Synthetic CPU", threads=1)


def _row(workload, lowering, latency_ms, is_baseline=False, **details):
    failed = {} if latency_ms else {"status": "failed", "reason": "broke"}
    return Measurement(
        workload=workload,
        subject=workload.label,
        device=DEVICE,
        lowering=lowering,
        is_baseline=is_baseline,
        latency_ms=latency_ms,
        energy_reason="no meter",
        details=details,
        **failed,
    )


def _rows():
    kv, _ = attention(2, 49, 16, 32)
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
