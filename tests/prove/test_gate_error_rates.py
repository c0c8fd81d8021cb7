"""The error rates' script, and the verdicts' own rates on simulated turns; no kernel is timed."""

import json

import gate_error_rates
import numpy as np
import pytest
from gate import Run, compare_runs
from gate_error_rates import error_rate, judge_job, report

CASES = [f"case {index}" for index in range(8)]


def simulated_runs(seed, slowdown=1.1, process_noise=0.008, turn_noise=0.006):
    """Two restarts of four processes; each process is off by its own amount all along.

    The noise is what was seen on a quiet machine, twice as large.
    """
    random = np.random.default_rng(seed)

    def one(factor):
        offsets = random.normal(0, process_noise, len(CASES))
        bursts = factor * np.exp(offsets[:, None] + random.normal(0, turn_noise, (len(CASES), 10)))
        return Run("d1", "/src", {case: tuple(row) for case, row in zip(CASES, bursts)})

    factors = {"base": 1.0, "base again": 1.0, "head": 1.0, "slowed": slowdown}
    return {side: [one(factor) for _ in range(2)] for side, factor in factors.items()}


def test_simulated_error_rates_are_below_three_percent():
    records = [record for job in range(25) for record in judge_job(simulated_runs(job), job)]
    lines, held = report(records, target=0.03)
    assert held, lines
    assert "of 200 verdicts" in lines[0] and "of 25 jobs" in lines[0]


def test_a_gate_that_cannot_see_a_slowdown_misses_it():
    runs = simulated_runs(0, slowdown=1.0)
    misses = [it["verdict"] for it in judge_job(runs, 1) if it["kind"] == "misses"]
    assert "SLOWER" not in misses
    _, held = report(judge_job(runs, 1), target=0.03)
    assert not held


def test_bounds_are_clopper_and_pearsons():
    rate, low, high = error_rate(0, 200)
    assert (rate, low) == (0.0, 0.0)
    assert high == pytest.approx(1 - 0.025 ** (1 / 200))
    assert error_rate(1, 200)[2] < 0.03 < error_rate(2, 200)[2]


def test_an_error_is_listed_with_its_figures():
    runs = simulated_runs(0)
    runs["head"] = runs["slowed"]
    lines, held = report(judge_job(runs, 7), target=0.03)
    assert not held
    assert lines[0].startswith("false alarms on unchanged code: 8 of 8 verdicts, 100.0%")
    assert any("case 3: SLOWER, ratio 1." in line for line in lines)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    jobs = iter(range(1000))
    monkeypatch.setattr(gate_error_rates, "measure_job", lambda *_: simulated_runs(next(jobs)))
    monkeypatch.setattr(gate_error_rates.gate, "export", lambda revision, folder: folder.mkdir())

    def call(*arguments):
        options = ["--out", str(tmp_path), *arguments]
        monkeypatch.setattr("sys.argv", ["gate_error_rates", *options])
        with pytest.raises(SystemExit) as exit_:
            gate_error_rates.run(gate_error_rates.app)
        return exit_.value.code, capsys.readouterr()

    return call


def test_an_interrupted_run_goes_on_where_it_stopped(command, tmp_path):
    code, written = command("--verdicts", "24", "--jobs", "1")
    assert code == 0
    assert "8 of 24 verdicts so far; run the same command again" in written.out
    code, written = command("--verdicts", "24", "--target", "0.2")
    assert code == 0
    assert "0 of 24 verdicts" in written.out
    (path,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["job"] for record in records] == [1] * 16 + [2] * 16 + [3] * 16
    before = path.read_text()
    assert command("--verdicts", "24", "--target", "0.03")[0] == 1  # too few for such a bound
    assert path.read_text() == before


def test_a_file_of_something_else_is_bad_input(command, tmp_path):
    (tmp_path / "error-rates-2-restarts.jsonl").write_text('["no", "verdict"]\n')
    code, written = command()
    assert code == 2
    assert "holds other than the verdicts" in written.err and written.err.count("\n") == 1


def test_turns_of_another_number_make_no_verdict():
    runs = simulated_runs(0)
    short = [Run("d1", "/src", dict.fromkeys(CASES, (1.0,) * 5))] * 2
    with pytest.raises(ValueError, match="make no turns"):
        compare_runs(runs["base"], runs["base again"], short)
