"""Tuning end to end: what it writes, how it goes on, what it refuses."""

import os
import signal
from dataclasses import replace
from functools import partial

import pytest

from kernels.build import LOWERINGS
from kernels.records import RecordError, load_records
from kernels.targets import cpu_target
from profiler import tune
from profiler.command_line import run
from profiler.contamination import NO_CONTAMINATION
from profiler.model_workloads import ModelError
from profiler.samples import Timing, TimingSettings

SHORT = TimingSettings(
    sample_ms=0.05, rest_ms=0, warmup_ms=0, burst_ms=0.1, rounds_min=6, precision=1, max_time_s=0.1
)
TOML = """
forms = ["mult_fp32", "shift_fp32"]
[[shapes]]
m = 20
k = 16
n = 32
"""
ATTENTION = """
[[shapes]]
kind = "attention"
b = 1
tokens = 700
bits = 16
n = 8
"""


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command on one shape in two forms: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "tiny.toml"
    config.write_text(TOML)

    def call(*arguments):
        options = ["--config", str(config), "--threads", "1", "--out", "r.jsonl", *arguments]
        monkeypatch.setattr("sys.argv", ["tune", *options])
        with pytest.raises(SystemExit) as exit_:
            run(tune.app, (ModelError, RecordError))
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def interruptible():
    """What a shell runs in the background starts with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def latencies(monkeypatch):
    """In place of the clock: schedule -> latency in ms, here the best is 6 rows."""

    def time(launch_of, schedules, settings):
        found = []
        for s in schedules:
            ms = 1.0 + abs(s["tile_rows"] - 6) + s["panels_outer"]
            found.append(
                Timing(
                    latency_ms=ms,
                    samples_kept=8,
                    samples_discarded=0,
                    stop_reason="precision",
                    bursts_ms=(ms,) * 8,
                    rounds_ms=(ms,) * 8,
                )
            )
        return found

    monkeypatch.setattr(tune, "time", time)


def test_one_real_workload_is_tuned_and_resumed(command, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "_SEARCH", SHORT)
    monkeypatch.setattr(tune, "_RECORD", SHORT)
    # The machine that runs the tests may be busy; what comes of that is tested below.
    calm = partial(tune.measure_interleaved, contamination=NO_CONTAMINATION)
    monkeypatch.setattr(tune, "measure_interleaved", calm)
    (tmp_path / "tiny.toml").write_text(TOML.replace(', "shift_fp32"', ""))
    code, out, _ = command()
    assert code == 0 and "geometric mean of 1" in " ".join(out.split())
    (record,) = load_records(tmp_path / "r.jsonl")
    assert record.lowering == "mult.panels" and (record.tokens, record.threads) == (20, 1)
    assert 0 < record.latency_ms <= record.default_latency_ms
    monkeypatch.setattr(tune, "tune_one", None)
    code, out, _ = command()
    assert code == 0 and "geometric mean of 1" in " ".join(out.split())


def test_the_fastest_schedule_is_recorded_for_each_linear(command, latencies, tmp_path):
    code, out, _ = command()
    assert code == 0
    found = load_records(tmp_path / "r.jsonl")
    assert {record.family.form for record in found} == {"mult_fp32", "shift_fp32"}
    for record in found:
        space = LOWERINGS[record.lowering].schedule_space(cpu_target())
        if 6 in space["tile_rows"]:
            assert record.schedule == {"tile_rows": 6, "panels_outer": 0}
            assert record.latency_ms == 1
            assert "tile_rows=6 panels_outer=0" in out


def test_an_interruption_leaves_whole_records_and_the_next_run_goes_on(
    command, latencies, monkeypatch, tmp_path, interruptible
):
    tune_one, done = tune.tune_one, []

    def interrupted(task, *args):
        if done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(task)
        return tune_one(task, *args)

    monkeypatch.setattr(tune, "tune_one", interrupted)
    code, _, err = command()
    assert code == 130 and "go on" in err
    first = load_records(tmp_path / "r.jsonl")
    assert len(first) == 1
    monkeypatch.setattr(tune, "tune_one", tune_one)
    assert command()[0] == 0
    both = load_records(tmp_path / "r.jsonl")
    assert both[:1] == first and len(both) == 2


def test_a_winner_of_the_search_that_fails_the_last_comparison_is_dropped(
    command, latencies, monkeypatch, tmp_path
):
    time = tune.time

    def flattering(launch_of, schedules, settings):
        timings = time(launch_of, schedules, settings)
        return timings if settings is tune._SEARCH else [timings[0]] * len(timings)

    monkeypatch.setattr(tune, "time", flattering)
    command()
    for record in load_records(tmp_path / "r.jsonl"):
        known = LOWERINGS[record.lowering]
        assert record.schedule == known.default_schedule(record.family, cpu_target())
        assert record.latency_ms == record.default_latency_ms


def test_a_busy_machine_gives_no_record_and_says_so(command, monkeypatch, tmp_path, contended):
    monkeypatch.setattr(
        tune, "time", lambda launch_of, schedules, settings: [contended] * len(schedules)
    )
    code, out, _ = command()
    assert code == 0
    assert out.count(contended.reason) == 2
    assert not (tmp_path / "r.jsonl").exists()


def test_a_wrong_kernel_is_never_timed(command, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "checker", lambda *operands: lambda out: (3.0, False))
    monkeypatch.setattr(tune, "measure_interleaved", None)
    code, out, _ = command()
    assert code == 0 and "wrong: off by 3" in out
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:0"], "error: --device cuda:0: only the CPU's"),
        (["--threads", "x"], "error: --threads x: must be"),
        (["--model", "pvt_v2_b0"], "error: --config and --model: give one"),
        (["--batch", "8"], "error: --batch 8: applies to --model"),
        (["--out", "tiny.toml"], "error: tiny.toml: line 1: is no JSON"),
        (["--out", "."], "error: .: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, arguments, message):
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = command(*arguments)
    assert code == 2 and err.startswith(message) and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_groups_of_attention_products_are_tuned_from_their_own_default(
    command, monkeypatch, tmp_path
):
    seen = []

    def time(launch_of, schedules, settings):
        seen.extend(schedules)
        timing = {"samples_kept": 8, "samples_discarded": 0, "stop_reason": "precision"}
        return [
            Timing(latency_ms=ms, bursts_ms=(ms,) * 8, rounds_ms=(ms,) * 8, **timing)
            for ms in (float(schedule["group_bits"]) for schedule in schedules)
        ]

    monkeypatch.setattr(tune, "time", time)
    (tmp_path / "tiny.toml").write_text(ATTENTION)
    assert command()[0] == 0
    records = load_records(tmp_path / "r.jsonl")
    assert len(records) == 6 and {record.schedule["group_bits"] for record in records} == {4}
    # The default of 700 tokens, not of the family, which stands for any number.
    assert {record.default_latency_ms for record in records} == {6.0}


def test_workloads_without_a_choice_are_bad_input(command, monkeypatch):
    fixed = {
        name: replace(lowering, schedule_space=lambda target: {})
        for name, lowering in LOWERINGS.items()
    }
    monkeypatch.setattr(tune, "LOWERINGS", fixed)
    code, _, err = command()
    assert code == 2 and err == "error: tiny: none of its workloads leaves a schedule to choose\n"
