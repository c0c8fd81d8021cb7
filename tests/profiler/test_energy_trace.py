"""Traces and their replay; every trace here is generated and says so."""

import pytest
from simulated_gpu import SimulatedGpu

from profiler.command_line import BadInput
from profiler.energy import EnergyReading
from profiler.energy_trace import ReplayMeter, Trace, load_trace, save_trace


def generated_trace(kind: str, seconds: float = 60.0, watts: float = 200.0) -> Trace:
    """A made-up trace of constant power, read every 50 ms. Recorded from no device."""
    t_s = tuple(step * 0.05 for step in range(round(seconds / 0.05) + 1))
    if kind == "power_w":
        return Trace("generated", t_s, power_w=(watts,) * len(t_s))
    return Trace("generated", t_s, energy_mj=tuple(7e4 + watts * t * 1e3 for t in t_s))


@pytest.mark.parametrize("kind", ["energy_mj", "power_w"])
def test_a_replayed_trace_yields_its_joules(kind):
    gpu = SimulatedGpu(launch_s=1e-3, now_s=1e4, next_update_s=1e4)
    meter = ReplayMeter(generated_trace(kind), gpu.clock)
    reading = gpu.measure(meter)
    assert meter.step_s == pytest.approx(0.05)
    assert reading.source == "replay"
    assert reading.energy_mj == pytest.approx(200 * 1e-3 * 1e3, rel=0.01)


def test_a_trace_that_is_too_short_leaves_no_figure():
    gpu = SimulatedGpu()
    reading = gpu.measure(ReplayMeter(generated_trace("energy_mj", seconds=3.0), gpu.clock))
    assert reading == EnergyReading(reason="the trace ends after 3 s")


@pytest.mark.parametrize("kind", ["energy_mj", "power_w"])
def test_a_trace_survives_its_file_with_its_origin(tmp_path, kind):
    trace = generated_trace(kind, seconds=1.0)
    save_trace(trace, tmp_path / "trace.csv")
    assert load_trace(tmp_path / "trace.csv") == trace
    assert (tmp_path / "trace.csv").read_text().startswith("# energy trace, generated\n")


HEADER = "# energy trace, recorded\nt_s,energy_mj,power_w\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1 must be"),
        ("t_s,energy_mj,power_w\n0,1,\n1,2,\n", "line 1 must be"),
        ("# energy trace, recorded\nt,e\n", "line 2 must be t_s,energy_mj,power_w"),
        (HEADER + "0,1\n", "line 3 has 2 columns, not 3"),
        (HEADER + "0,1,\n1,many,\n", "line 4, energy_mj: 'many' is no number"),
        (HEADER + "0,1,\n", "at least two times"),
        (HEADER + "0,1,\n1,,\n", "a reading for each"),
        (HEADER + "0,1,\n0,2,\n", "times have to rise"),
        (HEADER + "0,1,\n1,inf,\n", "have to be finite"),
        (HEADER + "0,1,5\n1,2,5\n", "exactly one"),
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
