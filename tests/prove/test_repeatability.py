import pytest
from repeatability import app, at_equal_clock, disagreements

from kernels.workload import linear
from profiler.command_line import run
from profiler.device import DeviceInfo
from profiler.measurement import CLOCK_RATE
from profiler.store import Measurement, create_store

DEVICE = DeviceInfo(kind="cpu", name="Synthetic CPU", threads=1)


def row(m, latency_ms):
    workload = linear("mult_fp32", m, 8, 8)
    failed = {} if latency_ms else {"status": "contended", "reason": "a neighbour"}
    return Measurement(
        workload=workload,
        subject=workload.label,
        device=DEVICE,
        lowering="mult.panels",
        latency_ms=latency_ms,
        energy_reason="no meter",
        **failed,
    )


def test_differences_are_relative_either_way_and_a_missing_figure_disagrees():
    first = [row(1, 1.0), row(2, 2.0), row(3, 1.0), row(4, None)]
    second = [row(1, 1.04), row(2, 1.6), row(3, None), row(4, None)]
    (differences,) = disagreements(first, second).values()
    assert differences == [pytest.approx(0.04), pytest.approx(0.25), float("inf")]
    assert disagreements(first, second) == disagreements(second, first)


@pytest.mark.parametrize(("shift", "code"), [(1.04, 0), (1.2, 1)])
def test_the_verdict_is_the_exit_code(monkeypatch, capsys, tmp_path, shift, code):
    for name, factor in (("a", 1.0), ("b", shift)):
        store = create_store(tmp_path / name)
        store.put(*(row(m, m * factor) for m in range(1, 11)))
        store.close()
    stores = ("--first", str(tmp_path / "a"), "--second", str(tmp_path / "b"))
    monkeypatch.setattr("sys.argv", ["repeatability", *stores])
    with pytest.raises(SystemExit) as exit_:
        run(app)
    assert exit_.value.code == code
    assert f"two runs agree: {10 * (code == 0)} of 10 rows" in capsys.readouterr().out


def test_at_equal_clock_a_slow_phase_does_not_count():
    fast, slow = row(1, 1.0), row(1, 1.2)
    fast, slow = (
        each.model_copy(update={"details": {CLOCK_RATE: rate}})
        for each, rate in ((fast, 120.0), (slow, 100.0))
    )
    ((raw,),) = disagreements([fast], [slow]).values()
    ((equal,),) = disagreements([fast], [slow], at_equal_clock).values()
    assert (raw, equal) == (pytest.approx(0.2), pytest.approx(0, abs=1e-9))
