import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.workload import linear
from profiler.compare import ComparisonError, app, compare
from profiler.device import DeviceInfo
from profiler.store import Measurement, create_store

SOFTWARE = {"python": "3.11", "torch": "2.15"}
CPU = DeviceInfo(kind="cpu", name="Some CPU", threads=1, cores=2, software=SOFTWARE)
OTHER = DeviceInfo(kind="cpu", name="Other CPU", threads=1, cores=8, software=SOFTWARE)
SWAPPED = {"FASTER": "SLOWER", "SLOWER": "FASTER", "SAME": "SAME", "AMBIGUOUS": "AMBIGUOUS"}


def row(latency_ms, noise=0.002, m=8, lowering="mult.panels", device=CPU, bursts=10, **fields):
    """A row whose ten bursts scatter by ``noise`` around its median."""
    workload = linear("mult_fp32", m, 64, 64)
    figures = {"latency_ms": latency_ms}
    if latency_ms is None:
        figures |= {"status": "contended", "reason": "3 of 20 samples clean"}
    else:
        seed = zlib.crc32(f"{latency_ms} {m} {lowering}".encode())
        scatter = np.random.default_rng(seed).normal(0, noise, bursts)
        figures["bursts_ms"] = tuple(latency_ms * np.exp(scatter - np.median(scatter)))
    return Measurement(
        workload=workload,
        subject=workload.label,
        device=device,
        lowering=lowering,
        energy_reason="no counter",
        **figures | fields,
    )


def control(latency_ms, name="torch.fp32", **options):
    return row(latency_ms, lowering=name, is_baseline=True, **options)


def controls(factor=1.0, sizes=(8, 16, 32), **options):
    """Torch's rows beside ours, all moved by a factor."""
    return [control(3.0 * factor, f"torch.{i}", m=m, **options) for m in sizes for i in range(3)]


def verdicts(old, new, **options):
    found, _ = compare(old, new, **options)
    return {it.subject.split("x")[1]: it.verdict for it in found if it.lowering == "mult.panels"}


def verdict(factor, old_noise=0.002, new_noise=0.002, **options):
    old, new = row(1.0, old_noise), row(factor, new_noise)
    (found,) = verdicts([old, *controls()], [new, *controls()], **options).values()
    return found


@pytest.mark.parametrize(
    "factor, noise, expected",
    [
        (1.0, 0.002, "SAME"),
        (1.03, 0.002, "SAME"),  # surely slower, too little to matter
        (1.07, 0.002, "SLOWER"),
        (1.2, 0.002, "SLOWER"),
        (0.8, 0.002, "FASTER"),
        (1.06, 0.2, "AMBIGUOUS"),
        (0.94, 0.2, "AMBIGUOUS"),
    ],
)
def test_verdict_where_nothing_drifted(factor, noise, expected):
    assert verdict(factor, noise, noise) == expected


def test_the_threshold_decides_what_matters():
    assert verdict(1.2, threshold=0.25) == "SAME"
    assert verdict(1.2, threshold=0.18) == "SLOWER"
    with pytest.raises(ValueError, match="threshold"):
        verdict(1.2, threshold=0.0)


@pytest.mark.parametrize("drift", [0.7, 1.15, 1.5])
def test_what_moved_torch_as_well_is_taken_off(drift):
    old, same, slower = row(1.0), row(drift), row(1.1 * drift)
    assert verdicts([old, *controls()], [same, *controls(drift)]) == {"8": "SAME"}
    assert verdicts([old, *controls()], [slower, *controls(drift)]) == {"8": "SLOWER"}
    found, _ = compare([old, *controls()], [slower, *controls(drift)])
    assert found[0].drift == pytest.approx(drift)
    assert found[0].ratio == pytest.approx(1.1, rel=5e-3)


def test_drift_is_taken_off_product_by_product():
    """In B the machine was slow while the product of 16 tokens was measured."""
    old = [row(1.0, m=m) for m in (8, 16, 32)] + controls()
    new = [row(1.0, m=8), row(1.3, m=16), row(1.2, m=32)]
    new += controls(sizes=(8, 32)) + controls(1.3, sizes=(16,))
    assert verdicts(old, new) == {"8": "SAME", "16": "SAME", "32": "SLOWER"}


def test_controls_that_scatter_raise_the_floor():
    scatter = np.random.default_rng(0).normal(0, 0.05, 30)
    old = [control(3.0, f"torch.{i}") for i in range(30)]
    new = [control(3.0 * np.exp(e), f"torch.{i}") for i, e in enumerate(scatter)]
    found, drift = compare([row(1.0), *old], [row(1.1), *new])
    assert found[0].floor > 0.1
    assert found[0].verdict == "AMBIGUOUS"
    assert verdicts([row(1.0), *old], [row(1.5), *new]) == {"8": "SLOWER"}
    assert "30 controls moved by" in drift.in_words()


def test_without_controls_only_what_exceeds_any_known_drift_is_a_difference():
    old = [row(1.0, m=m) for m in (8, 16, 32)]
    new = [row(factor, m=m) for factor, m in ((1.0, 8), (1.2, 16), (1.4, 32))]
    assert verdicts(old, new) == {"8": "AMBIGUOUS", "16": "AMBIGUOUS", "32": "SLOWER"}


def test_another_version_of_torch_is_no_control():
    newer = CPU.model_copy(update={"software": SOFTWARE | {"torch": "2.16"}})
    _, drift = compare(controls(), controls(device=newer))
    assert not drift.known
    _, drift = compare(controls(), controls())
    assert drift.known


def test_the_noise_floor_of_either_run_counts():
    quiet, noisy = row(1.0), row(1.08, noise_floor=0.09)
    assert verdicts([quiet, *controls()], [noisy, *controls()]) == {"8": "SAME"}
    found, _ = compare([quiet, *controls()], [noisy, *controls()])
    assert found[0].floor == 0.09


def test_the_more_rows_the_surer_each_has_to_be():
    """Six bursts against six: p = 0.002 at best, enough for a row alone."""
    old, new = row(1.0, bursts=6), row(1.2, bursts=6)
    few, many = controls(sizes=(8,)), controls(sizes=range(8, 40))
    assert verdicts([old, *few], [new, *few]) == {"8": "SLOWER"}
    assert verdicts([old, *many], [new, *many]) == {"8": "AMBIGUOUS"}


@given(st.floats(0.7, 1.4), st.floats(0, 0.1), st.floats(0, 0.1))
@settings(max_examples=40)
def test_swapping_the_runs_swaps_the_verdict(factor, old_noise, new_noise):
    old = [row(1.0, old_noise), *controls()]
    new = [row(factor, new_noise), *controls(1.02)]
    assert verdicts(new, old)["8"] == SWAPPED[verdicts(old, new)["8"]]


def test_a_run_differs_nowhere_from_itself():
    rows = [row(1.0, 0.01, m=m) for m in (8, 16, 32)] + controls()
    assert {it.verdict for it in compare(rows, rows)[0]} == {"SAME"}


def test_unchanged_runs_give_no_alarm():
    """Two runs of 30 products, each product with a drift of its own: 20 times over."""
    random = np.random.default_rng(5)

    def a_run():
        levels = np.exp(random.normal(0, 0.04, 30))
        return [
            make(level * np.exp(random.normal(0, 0.012)), noise=0.005, m=8 * (i + 1), **options)
            for i, level in enumerate(levels)
            for make, options in [
                (row, {}),
                (control, {}),
                (control, {"name": "torch.bf16"}),
            ]
        ]

    alarms = sum(
        any(it.verdict in ("SLOWER", "FASTER") for it in compare(a_run(), a_run())[0])
        for _ in range(20)
    )
    assert alarms <= 3


def test_keys_are_matched_whatever_their_order():
    old = [row(1.0, m=8), row(2.0, m=16), row(3.0, m=8, lowering="mult.dot")]
    old.append(row(4.0, m=8, cache="cold"))
    new = [row(side.latency_ms * 2, m=side.workload.m, lowering=side.lowering, cache=side.cache)
           for side in reversed(old)]  # fmt: skip
    found, _ = compare(old, new)
    assert [comparison.a_ms for comparison in found] == [1.0, 2.0, 3.0, 4.0]
    assert [comparison.ratio for comparison in found] == pytest.approx([2.0] * 4, rel=0.01)


def test_layers_and_models_are_matched_by_name():
    fields = {"energy_reason": "no counter", "bursts_ms": (1.0,) * 6}
    rows = [
        Measurement(kind=kind, subject="vit", device=CPU, lowering="x", latency_ms=1.0, **fields)
        for kind in ("layer", "model")
    ]
    found, _ = compare([*rows, *controls()], [*rows, *controls()])
    assert [it.verdict for it in found[:2]] == ["SAME", "SAME"]


def test_what_one_run_lacks_is_listed_without_a_verdict():
    old = [row(1.0, m=8), row(1.0, m=16), row(1.0, m=32), row(1.0, m=64, bursts=3)]
    new = [row(1.0, m=8), row(None, m=16), row(1.0, m=48), row(1.0, m=64)]
    compared, _ = compare([*old, *controls()], [*new, *controls()])
    found = {it.subject.split("x")[1]: it for it in compared if it.lowering == "mult.panels"}
    assert found.keys() == {"8", "16", "32", "48", "64"}
    assert {m for m, comparison in found.items() if comparison.verdict} == {"8"}
    assert found["16"].reason == "no figure in B (contended: 3 of 20 samples clean)"
    assert found["16"].b_ms is None
    assert found["32"].reason == "not in B"
    assert found["48"].reason == "not in A"
    assert found["64"].reason == "fewer than 6 bursts stored in A"


def test_different_devices_are_refused_unless_asked_for():
    old, new = [row(1.0), *controls()], [row(1.5, device=OTHER), *controls(device=OTHER)]
    with pytest.raises(ComparisonError, match=r"different devices: A on Some CPU.*B on Other CPU"):
        compare(old, new)
    found, drift = compare(old, new, across_devices=True)
    assert found[0].verdict == "SLOWER"
    assert not drift.known


def test_across_devices_keeps_thread_counts_apart():
    two_threads = CPU.model_copy(update={"threads": 2})
    other_two = OTHER.model_copy(update={"threads": 2})
    old = [row(1.0), row(0.5, device=two_threads)]
    new = [row(1.0, device=OTHER), row(0.5, device=other_two)]
    found, _ = compare(old, new, across_devices=True)
    assert [it.ratio for it in found] == pytest.approx([1.0, 1.0])
    with pytest.raises(ComparisonError, match=r"A: 2 rows.*several devices"):
        compare([row(1.0), row(1.0, device=OTHER)], new, across_devices=True)


def test_nothing_in_common_is_refused():
    with pytest.raises(ComparisonError, match="nothing in common: A has 1 keys, B has 1"):
        compare([row(1.0, m=8)], [row(1.0, m=16)])
    with pytest.raises(ComparisonError, match="nothing in common"):
        compare([], [])


def compared(*arguments):
    """By the command, in a process of its own."""
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
    old = stored("old", row(1.0, m=8), row(1.0, m=16), *controls())
    new = stored("new", row(1.0, m=8), row(1.5, m=16), *controls())
    worse, better = compared(old, new), compared(new, old)
    assert worse.returncode == 1, worse.stderr
    assert "10 SAME, 1 SLOWER" in worse.stdout
    assert "9 controls moved by +0.0% to +0.0%" in worse.stdout
    assert better.returncode == 0, better.stderr
    assert "1 FASTER, 10 SAME" in better.stdout


def test_command_refuses_what_cannot_be_compared_in_one_line(command, stored, tmp_path):
    old, other = stored("old", row(1.0)), stored("other", row(2.0, device=OTHER))
    text = tmp_path / "text.sqlite"
    text.write_text("not a database at all, but long enough to be read as one" * 20)
    for arguments, named in [
        ((old, other), "different devices"),
        ((old, stored("elsewhere", row(1.0, m=16))), "nothing in common"),
        ((old, tmp_path / "absent.sqlite"), "absent.sqlite"),
        ((text, old), "text.sqlite"),
    ]:
        code, errors = command(app, *arguments)
        assert code == 2 and named in errors
        assert errors.startswith("error: ") and errors.count("\n") == 1
    assert command(app, old, other, "--across-devices")[0] == 1
