import json
import subprocess
import sys
from pathlib import Path

import gate
import pytest
from gate import GateError, Run, compare_pairs, measure, parse_run, unpaired
from hypothesis import given
from hypothesis import strategies as st


def runs(*medians_ms, case="mult", device="d1"):
    return [Run(device, "/src", {case: median_ms}) for median_ms in medians_ms]


def report(*medians_s, device="d1", source="/src"):
    return {
        "benchmarks": [
            {
                "name": f"case{index}",
                "stats": {"median": median_s},
                "extra_info": {"device": device, "source": source},
            }
            for index, median_s in enumerate(medians_s)
        ]
    }


def verdict(bases, heads, threshold=0.05):
    (judged,) = compare_pairs(bases, heads, threshold)
    return judged.verdict


def test_the_ratio_is_taken_within_each_pair():
    """The machine slows down threefold meanwhile; head is 20 % slower all along."""
    drift = [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    (judged,) = compare_pairs(runs(*drift), runs(*(1.2 * level for level in drift)))
    assert judged.ratio == pytest.approx(1.2)
    assert (judged.low, judged.high) == pytest.approx((1.2, 1.2))
    assert judged.verdict == "SLOWER"


def test_verdicts():
    base = runs(*[1.0] * 6)
    assert verdict(base, runs(*[1.0] * 6)) == "SAME"
    assert verdict(base, runs(1.03, 1.02, 1.03, 1.02, 1.01, 1.03)) == "SAME"
    assert verdict(base, runs(1.10, 1.12, 1.09, 1.11, 1.10, 1.08)) == "SLOWER"
    assert verdict(base, runs(0.90, 0.91, 0.89, 0.90, 0.92, 0.90)) == "FASTER"
    assert verdict(base, runs(1.10, 1.12, 0.99, 1.11, 1.10, 1.08)) == "AMBIGUOUS"
    assert verdict(base, runs(*[1.1] * 6), threshold=0.2) == "SAME"


@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=20), st.floats(0.001, 0.5))
def test_swapping_the_sides_never_makes_both_slower(ratios, threshold):
    base, head = runs(*[1.0] * len(ratios)), runs(*ratios)
    assert [verdict(base, head, threshold), verdict(head, base, threshold)].count("SLOWER") <= 1


def test_only_cases_of_every_run_are_judged_and_the_others_are_named():
    bases = [Run("d1", "/src", {"a": 1.0, "gone": 1.0}) for _ in range(5)]
    heads = [Run("d1", "/src", {"new": 1.0, "a": 1.0}) for _ in range(5)]
    assert [judged.case for judged in compare_pairs(bases, heads)] == ["a"]
    assert unpaired(bases, heads) == {"base": ["gone"], "head": ["new"]}


@pytest.mark.parametrize(
    "bases, heads, message",
    [
        ([], [], "no pairs"),
        (runs(1.0, 1.0), runs(1.0), "no pairs"),
        (runs(1.0), runs(1.0, device="d2"), "different devices were measured: d1, d2"),
        (runs(1.0, case="a"), runs(1.0, case="b"), "no case in common"),
    ],
)
def test_what_cannot_be_compared_fails(bases, heads, message):
    with pytest.raises(GateError, match=message):
        compare_pairs(bases, heads)


def test_a_report_is_read_in_ms():
    content = report(0.001, 0.5)
    content["benchmarks"][1]["param"] = "mult"
    assert parse_run(content, "head") == Run("d1", "/src", {"case0": 1.0, "mult": 500.0})


@pytest.mark.parametrize("content", [{}, {"benchmarks": []}, {"benchmarks": None}])
def test_a_report_without_figures_fails(content):
    with pytest.raises(GateError, match="base measured nothing"):
        parse_run(content, "base")


def test_a_report_must_say_who_was_measured():
    mixed = {"benchmarks": [*report(1)["benchmarks"], *report(1, device="d2")["benchmarks"]]}
    with pytest.raises(GateError, match="2 devices instead of one"):
        parse_run(mixed, "head")
    with pytest.raises(GateError, match="0 devices instead of one"):
        parse_run({"benchmarks": [{"name": "a", "stats": {"median": 1.0}}]}, "head")


BENCHMARK = """
import pytest

def test_kernel(benchmark):
    benchmark.extra_info["device"] = "d1"
    benchmark.extra_info["source"] = {source!r}
    {first}
    benchmark.pedantic(lambda: sum(range(100)), rounds=5)
"""


@pytest.fixture
def tree(tmp_path):
    def write(first="pass", source=tmp_path):
        path = tmp_path / gate.BENCHMARKS
        path.parent.mkdir(parents=True)
        path.write_text(BENCHMARK.format(source=str(source), first=first))
        return tmp_path

    return write


def test_a_tree_is_measured_by_its_own_benchmarks(tree, tmp_path):
    found = measure("head", tree(), tmp_path / "report.json")
    assert found.device == "d1"
    assert found.medians_ms["test_kernel"] > 0


@pytest.mark.parametrize(
    "first, message",
    [
        ("pytest.skip('no compiler')", "head measured nothing"),
        ("assert False, 'the result is wrong'", "head failed its benchmarks: .*result is wrong"),
    ],
)
def test_a_skipped_or_failed_benchmark_fails(tree, tmp_path, first, message):
    with pytest.raises(GateError, match=message):
        measure("head", tree(first), tmp_path / "report.json")


def test_measuring_the_code_of_another_tree_fails(tree, tmp_path):
    with pytest.raises(GateError, match="base measured the code of /elsewhere instead of"):
        measure("base", tree(source="/elsewhere"), tmp_path / "report.json")


def test_a_tree_without_benchmarks_measured_nothing(tmp_path):
    with pytest.raises(GateError, match=r"base measured nothing: it has no .*bench_kernels\.py"):
        measure("base", tmp_path, tmp_path / "report.json")


def command(*arguments):
    script = Path(gate.__file__)
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=60
    )


def test_an_unknown_base_is_bad_input():
    done = command("--base", "no-such-commit")
    assert done.returncode == 2
    assert done.stderr == "error: --base no-such-commit: no such commit\n"


@pytest.mark.parametrize(
    "head, code", [([1.0] * 6, 0), ([1.5] * 6, 1), ([0.5] * 6, 0), ([2.0, 0.9] * 3, 0)]
)
def test_the_command_exits_1_on_slower_only(monkeypatch, capsys, head, code):
    monkeypatch.setattr(gate, "measure_pairs", lambda *_: (runs(*[1.0] * 6), runs(*head)))
    monkeypatch.setattr(sys, "argv", ["gate"])
    with pytest.raises(SystemExit) as exit_:
        gate.run(gate.app)
    assert exit_.value.code == code
    assert "mult" in capsys.readouterr().out


def test_the_command_fails_in_one_line_when_a_side_measured_nothing(monkeypatch, capsys):
    def nothing(*_):
        return parse_run(json.loads("{}"), "base")

    monkeypatch.setattr(gate, "measure_pairs", nothing)
    monkeypatch.setattr(sys, "argv", ["gate"])
    with pytest.raises(SystemExit) as exit_:
        gate.run(gate.app)
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "gate failed: base measured nothing: no benchmark ran\n"
