import pytest

from profiler.accounting import Accounting, rate, relative_half_width
from profiler.device import DeviceInfo
from profiler.measurement import Measurement

DEVICE = DeviceInfo(kind="cpu", name="Synthetic CPU", threads=1)


def row(half_width, latency_ms=1.0):
    failed = {} if latency_ms else {"status": "failed", "reason": "broke"}
    return Measurement(
        subject="a",
        device=DEVICE,
        lowering="x",
        latency_ms=latency_ms,
        latency_low_ms=latency_ms and latency_ms * (1 - half_width),
        latency_high_ms=latency_ms and latency_ms * (1 + half_width),
        energy_reason="no meter",
        **failed,
    )


def test_the_harness_is_what_is_neither_building_nor_sampling_nor_energy():
    accounting = Accounting({"building": 10.0, "checking": 5.0, "sampling": 60.0, "energy": 5.0})
    where, _ = accounting.lines(100.0, [])
    assert "25.0 s, 25.0%" in where and "checking 5.0 s" in where


def test_charges_add_up_also_when_the_work_fails():
    accounting = Accounting()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), accounting.charge("building"):
            raise ZeroDivisionError
    with accounting.charge("sampling"):
        pass
    assert set(accounting.seconds) == {"building", "sampling"}
    assert all(seconds > 0 for seconds in accounting.seconds.values())


def test_the_rate_counts_figures_and_how_many_are_precise():
    rows = [row(0.01), row(0.02 - 1e-9), row(0.03), row(0.5, None)]
    assert relative_half_width(rows[2]) == pytest.approx(0.03)
    assert relative_half_width(rows[3]) is None
    assert rate(30.0, rows) == "3 rows measured, 6 a minute; within ±2%: 2 rows, 4 a minute, 67%"
    assert "0 rows measured" in rate(30.0, [])
