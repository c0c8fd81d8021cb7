"""Traces, their recording and replay; every trace here is generated and says so."""

import subprocess
import sys
import threading
import time

import pytest
from generated_traces import gpu_like_trace
from simulated_gpu import SimulatedGpu

from profiler.command_line import BadInput
from profiler.energy import EnergyReading, EnergySettings, measure_energy
from profiler.energy_trace import ReplayMeter, Trace, load_trace, record, save_trace, summary
from profiler.nvml import Unavailable


def generated_trace(kind: str, seconds: float = 60.0, watts: float = 200.0) -> Trace:
    """A made-up trace of constant power, read every 50 ms. Recorded from no device."""
    t_s = tuple(step * 0.05 for step in range(round(seconds / 0.05) + 1))
    if kind == "power_w":
        return Trace("generated", t_s, power_w=(watts,) * len(t_s))
    return Trace("generated", t_s, energy_mj=tuple(7e4 + watts * t * 1e3 for t in t_s))


# Replay


@pytest.mark.parametrize(
    "kind, source, step_s",
    [("energy_mj", "replay-counter", 0.05), ("power_w", "replay-power", 1.0)],
)
def test_a_replayed_trace_yields_its_joules(kind, source, step_s):
    gpu = SimulatedGpu(launch_s=1e-3, now_s=1e4, next_update_s=1e4)
    meter = ReplayMeter(generated_trace(kind), gpu.clock)
    assert meter.step_s == pytest.approx(step_s)
    reading = gpu.measure(meter)
    assert reading.source == source
    assert reading.energy_mj == pytest.approx(200 * 1e-3 * 1e3, rel=0.01)


@pytest.mark.parametrize("watts", [60.0, 300.0])
def test_the_windows_find_the_joules_of_a_gpu_like_trace(watts):
    """Updates every 20 to 100 ms, and a sensor that looks a quarter of the time."""
    trace = gpu_like_trace(lambda t_s: watts, seconds=25.0)
    now_s = [0.0]

    def pass_s(seconds: float) -> None:
        now_s[0] += seconds

    meter = ReplayMeter(trace, lambda: now_s[0])
    reading = measure_energy(
        lambda number: pass_s(number * 1e-3), meter, EnergySettings(), lambda: now_s[0], pass_s
    )
    assert reading.energy_mj == pytest.approx(watts, rel=0.01)
    assert reading.variation < 0.01
    assert (reading.source, reading.check_source) == ("replay-counter", "replay-power")
    assert reading.check_mj == pytest.approx(watts, rel=0.03)
    assert "energy_flag" not in reading.details


def test_a_load_in_step_with_the_sensor_deceives_it_and_is_flagged():
    """Busy for the quarter of each period that the sensor sees, idle else."""
    trace = gpu_like_trace(lambda t_s: 300.0 if t_s % 0.1 > 0.075 else 100.0, seconds=25.0)
    now_s = [0.0]

    def pass_s(seconds: float) -> None:
        now_s[0] += seconds

    meter = ReplayMeter(trace, lambda: now_s[0])
    reading = measure_energy(
        lambda number: pass_s(number * 1e-3), meter, EnergySettings(), lambda: now_s[0], pass_s
    )
    assert reading.energy_mj == pytest.approx(150.0, rel=0.02)
    assert reading.disagreement > 0.5
    assert "replay-power gives +" in reading.details["energy_flag"]


def test_a_trace_that_is_too_short_leaves_no_figure():
    gpu = SimulatedGpu()
    reading = gpu.measure(ReplayMeter(generated_trace("energy_mj", seconds=3.0), gpu.clock))
    assert reading == EnergyReading(reason="the trace ends after 3 s")


def test_a_meter_that_was_not_recorded_cannot_be_replayed():
    with pytest.raises(Unavailable, match="the trace has no power"):
        ReplayMeter(generated_trace("energy_mj"), kind="power")


# Recording


class SimulatedReadings:
    """A counter that steps every 50 ms and a power that stays; reading takes 1 ms."""

    def __init__(self):
        self.now_s = 100.0

    def clock(self):
        return self.now_s

    def read(self):
        self.now_s += 1e-3
        return float(int(self.now_s / 0.05) * 10_000), 200.0


def test_a_recording_keeps_every_change_and_drops_what_repeats():
    device = SimulatedReadings()
    trace = record(device.read, 10.0, "a device", clock=device.clock)
    assert trace.origin == "recorded"
    assert trace.about == "a device"
    assert trace.length_s == pytest.approx(10.0, abs=0.01)
    assert 2 * 199 <= len(trace.t_s) <= 2 * 202
    gaps_s = trace.gaps_s("counter")[1:]
    assert min(gaps_s) > 0.047 and max(gaps_s) < 0.053
    assert "counter: 200" in summary(trace)[1] and "changes every 50." in summary(trace)[1]
    assert summary(trace)[-1] == "power integrated / counter: 1.000"


def test_a_load_runs_while_it_is_recorded_and_ends_with_it():
    launched = []
    threads = threading.active_count()
    trace = record(
        lambda: (time.perf_counter(), None),
        0.5,
        "",
        load=lambda: launched.append(time.sleep(1e-3)),
    )
    assert trace.power_w is None
    assert len(launched) > 5
    assert threading.active_count() == threads


def test_a_device_that_vanishes_ends_the_recording():
    def lost():
        raise Unavailable("energy counter: the GPU was lost")

    with pytest.raises(Unavailable, match="lost"):
        record(lost, 1.0, "")


# Files


@pytest.mark.parametrize("kind", ["energy_mj", "power_w"])
def test_a_trace_survives_its_file_with_its_origin(tmp_path, kind):
    trace = generated_trace(kind, seconds=1.0)
    save_trace(trace, tmp_path / "trace.csv")
    assert load_trace(tmp_path / "trace.csv") == trace
    assert (tmp_path / "trace.csv").read_text().startswith("# energy trace, generated\n")


def test_a_trace_of_both_meters_survives_its_file(tmp_path):
    trace = gpu_like_trace(lambda t_s: 250.0, seconds=2.0)
    save_trace(trace, tmp_path / "trace.csv")
    assert load_trace(tmp_path / "trace.csv") == trace
    assert [path.name for path in tmp_path.iterdir()] == ["trace.csv"]


HEADER = "# energy trace, recorded\n# a device\nt_s,energy_mj,power_w\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1 must be"),
        ("t_s,energy_mj,power_w\n0,1,\n1,2,\n", "line 1 must be"),
        ("# energy trace, recorded\nt_s,energy_mj,power_w\n", "line 2 must start with #"),
        ("# energy trace, recorded\n# a\nt,e\n", "line 3 must be t_s,energy_mj,power_w"),
        (HEADER + "0,1\n", "line 4 has 2 columns, not 3"),
        (HEADER + "0,1,\n1,many,\n", "line 5, energy_mj: 'many' is no number"),
        (HEADER + "0,1,\n", "at least two times"),
        (HEADER + "0,1,\n1,,\n", "a reading for each"),
        (HEADER + "0,1,\n0,2,\n", "times have to rise"),
        (HEADER + "0,1,\n1,inf,\n", "have to be finite"),
        (HEADER + "0,1,5\n1,2,\n", "a reading for each"),
        (HEADER + "0,,\n1,,\n", "at least one of them"),
    ],
)
def test_a_bad_trace_is_one_line_that_names_file_and_place(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        load_trace(tmp_path / "none.csv")


# The command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "profiler.energy", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
    )


def test_the_command_sums_up_a_trace(tmp_path):
    save_trace(gpu_like_trace(lambda t_s: 250.0, seconds=25.0), tmp_path / "generated.csv")
    done = command("--show", tmp_path / "generated.csv")
    assert done.returncode == 0, done.stderr
    assert "generated.csv: generated, " in done.stdout
    assert "counter: 2" in done.stdout and "changes every" in done.stdout
    assert "windows of 5 s: 2" in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "--record, --show: give one of them"),
        (("--record", "a.csv", "--show", "b.csv"), "--record, --show: give one of them"),
        (("--record", "/no/such/folder/a.csv"), "cannot write in /no/such/folder"),
        (("--record", "TMP/a.csv", "--device", "tpu"), "--device tpu: must be cpu or cuda:N"),
        (("--record", "TMP/a.csv", "--device", "cuda:7"), "--device cuda:7: no"),
        (("--show", "TMP/none.csv"), "none.csv: cannot be read"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, options, message):
    done = command(*(option.replace("TMP", str(tmp_path)) for option in options))
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
