import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.workload import linear
from profiler.compare import ComparisonError, compare, judge
from profiler.device import DeviceInfo
from profiler.store import Measurement, create_store

CPU = DeviceInfo(kind="cpu", name="Some CPU", threads=1, cores=2)
OTHER = DeviceInfo(kind="cpu", name="Other CPU", threads=1, cores=8)
SWAPPED = {"FASTER": "SLOWER", "SLOWER": "FASTER", "SAME": "SAME", "AMBIGUOUS": "AMBIGUOUS"}


def row(latency_ms, spread=0.01, m=8, lowering="mult.panels", device=CPU, **fields):
    workload = linear("mult_fp32", m, 64, 64)
    figures = {"latency_ms": latency_ms}
    if latency_ms is None:
        figures |= {"status": "contended", "reason": "3 of 20 samples clean"}
    elif spread is not None:
        figures["latency_low_ms"] = latency_ms * (1 - spread)
        figures["latency_high_ms"] = latency_ms * (1 + spread)
    return Measurement(
        workload=workload,
        subject=workload.label,
        device=device,
        lowering=lowering,
        energy_reason="no counter",
        **figures | fields,
    )


@pytest.mark.parametrize(
    "new_ms, spread, verdict",
    [
        (1.0, 0.01, "SAME"),
        (1.03, 0.02, "SAME"),  # overlapping, within the threshold
        (1.03, 0.001, "SAME"),  # surely slower, too little to matter
        (1.2, 0.01, "SLOWER"),
        (1.06, 0.001, "SLOWER"),
        (0.8, 0.01, "FASTER"),
        (1.2, 0.2, "AMBIGUOUS"),
        (0.8, 0.2, "AMBIGUOUS"),
    ],
)
def test_verdict_from_medians_and_intervals(new_ms, spread, verdict):
    (found,) = compare([row(1.0, spread)], [row(new_ms, spread)])
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(new_ms)
    assert found.low < found.ratio < found.high


def test_the_threshold_decides_what_matters():
    old, new = [row(1.0)], [row(1.2)]
    assert compare(old, new, threshold=0.25)[0].verdict == "SAME"
    assert compare(old, new, threshold=0.19)[0].verdict == "SLOWER"
    with pytest.raises(ValueError, match="threshold"):
        compare(old, new, threshold=0.0)


figures = st.floats(1e-4, 1e4)
spreads = st.floats(0, 0.5)


@given(figures, figures, spreads, spreads)
def test_swapping_the_runs_swaps_the_verdict(a_ms, b_ms, a_spread, b_spread):
    a, b = [row(a_ms, a_spread)], [row(b_ms, b_spread)]
    there, back = compare(a, b)[0], compare(b, a)[0]
    assert back.verdict == SWAPPED[there.verdict]


@given(figures, spreads)
def test_a_run_is_the_same_as_itself(latency_ms, spread):
    rows = [row(latency_ms, spread)]
    assert compare(rows, rows)[0].verdict == "SAME"


@given(st.floats(0.01, 100), st.floats(0.01, 1), st.floats(1, 100), st.floats(0.001, 0.5))
def test_slower_only_above_the_threshold_and_outside_the_interval(ratio, down, up, threshold):
    verdict = judge(ratio, ratio * down, ratio * up, threshold)
    if verdict == "SLOWER":
        assert ratio >= 1 + threshold
        assert ratio * down > 1
    if verdict == "AMBIGUOUS":
        assert ratio * down <= 1 <= ratio * up


def test_keys_are_matched_whatever_their_order():
    old = [row(1.0, m=8), row(2.0, m=16), row(3.0, m=8, lowering="mult.dot")]
    old.append(row(4.0, m=8, cache="cold"))
    new = [row(side.latency_ms * 2, m=side.workload.m, lowering=side.lowering, cache=side.cache)
           for side in reversed(old)]  # fmt: skip
    found = compare(old, new)
    assert [comparison.a_ms for comparison in found] == [1.0, 2.0, 3.0, 4.0]
    assert [comparison.ratio for comparison in found] == [2.0] * 4


def test_layers_and_models_are_matched_by_name():
    fields = {"energy_reason": "no counter", "latency_low_ms": 1.0, "latency_high_ms": 1.0}
    rows = [
        Measurement(kind=kind, subject="vit", device=CPU, lowering="x", latency_ms=1.0, **fields)
        for kind in ("layer", "model")
    ]
    assert [found.verdict for found in compare(rows, rows)] == ["SAME", "SAME"]


def test_what_one_run_lacks_is_listed_without_a_verdict():
    old = [row(1.0, m=8), row(1.0, m=16), row(1.0, m=32), row(1.0, m=64, spread=None)]
    new = [row(1.0, m=8), row(None, m=16), row(1.0, m=48), row(1.0, m=64)]
    found = {comparison.subject.split("x")[1]: comparison for comparison in compare(old, new)}
    assert found.keys() == {"8", "16", "32", "48", "64"}
    assert {m for m, comparison in found.items() if comparison.verdict} == {"8"}
    assert found["16"].reason == "no figure in B (contended: 3 of 20 samples clean)"
    assert found["16"].b_ms is None
    assert found["32"].reason == "not in B"
    assert found["48"].reason == "not in A"
    assert found["64"].reason == "no interval stored"


def test_different_devices_are_refused_unless_asked_for():
    old, new = [row(1.0)], [row(1.2, device=OTHER)]
    with pytest.raises(ComparisonError, match=r"different devices: A on Some CPU.*B on Other CPU"):
        compare(old, new)
    assert compare(old, new, across_devices=True)[0].verdict == "SLOWER"


def test_across_devices_keeps_thread_counts_apart():
    two_threads = CPU.model_copy(update={"threads": 2})
    other_two = OTHER.model_copy(update={"threads": 2})
    old = [row(1.0), row(0.5, device=two_threads)]
    new = [row(1.0, device=OTHER), row(0.5, device=other_two)]
    assert [found.ratio for found in compare(old, new, across_devices=True)] == [1.0, 1.0]
    with pytest.raises(ComparisonError, match=r"A: 2 rows.*several devices"):
        compare([row(1.0), row(1.0, device=OTHER)], new, across_devices=True)


def test_nothing_in_common_is_refused():
    with pytest.raises(ComparisonError, match="nothing in common: A has 1 keys, B has 1"):
        compare([row(1.0, m=8)], [row(1.0, m=16)])
    with pytest.raises(ComparisonError, match="nothing in common"):
        compare([], [])


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "profiler.compare", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def stored(tmp_path):
    def write(name, *rows):
        path = tmp_path / f"{name}.sqlite"
        store = create_store(path)
        for each in rows:
            store.put(each)
        store.close()
        return path

    return write


def test_command_exits_1_exactly_when_something_is_slower(stored):
    old = stored("old", row(1.0, m=8), row(1.0, m=16))
    new = stored("new", row(1.0, m=8), row(1.5, m=16))
    worse, better = command(old, new), command(new, old)
    assert worse.returncode == 1, worse.stderr
    assert "1 SAME, 1 SLOWER" in worse.stdout
    assert better.returncode == 0, better.stderr
    assert "1 FASTER, 1 SAME" in better.stdout


def test_command_refuses_what_cannot_be_compared_in_one_line(stored, tmp_path):
    old, other = stored("old", row(1.0)), stored("other", row(2.0, device=OTHER))
    text = tmp_path / "text.sqlite"
    text.write_text("not a database at all, but long enough to be read as one" * 20)
    for arguments, named in [
        ((old, other), "different devices"),
        ((old, stored("elsewhere", row(1.0, m=16))), "nothing in common"),
        ((old, tmp_path / "absent.sqlite"), "absent.sqlite"),
        ((text, old), "text.sqlite"),
    ]:
        done = command(*arguments)
        assert done.returncode == 2
        assert named in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert command(old, other, "--across-devices").returncode == 1
