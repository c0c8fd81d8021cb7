"""The recorder's command on a GPU that is none; its file is thrown away."""

import time

import pytest
from fake_nvml import H100, FakeNvml

from profiler import energy_recorder
from profiler.energy_trace import load_trace, summary
from profiler.meters import find_meter
from profiler.nvml import cuda_info, open_probe


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    def call(answers, *options):
        nvml = FakeNvml(answers)
        patch = monkeypatch.setattr
        patch(energy_recorder, "cuda_info", lambda index: cuda_info(index, nvml, {}))
        patch(energy_recorder, "find_meter", lambda device: find_meter(device, nvml))
        patch(energy_recorder, "open_probe", lambda uuid: open_probe(uuid, nvml))
        path = tmp_path / "trace.csv"
        recorded = ["--record", str(path), "--seconds", "0.3"]
        patch("sys.argv", ["energy", *(() if "--show" in options else recorded), *options])
        with pytest.raises(SystemExit) as exit_:
            energy_recorder.run(energy_recorder.app)
        return exit_.value.code, path, capsys.readouterr()

    return call


class Counting(dict):
    """200 W, shown by the counter at each reading."""

    def __getitem__(self, name):
        if name == "nvmlDeviceGetTotalEnergyConsumption":
            return round(time.perf_counter() * 200e3)
        return super().__getitem__(name)


def test_both_meters_of_a_gpu_are_recorded_with_who_it_was(command):
    code, path, written = command(Counting(H100))
    assert code == 0, written.err
    trace = load_trace(path)
    assert trace.origin == "recorded"
    assert "NVIDIA H100 (fake)" in trace.about and "GPU-aaaa1111-0000" in trace.about
    assert trace.about.endswith("load: none")
    assert set(trace.power_w) == {310.0}
    assert trace.cumulative_mj("counter")[-1] > trace.cumulative_mj("counter")[0]
    # A recording of 0.3 s in which the machine pauses has another ratio, and says so.
    ratio = summary(trace)[-1]
    assert ratio.startswith("power integrated / counter: ") and ratio in written.out
    assert "windows of 5 s: no figure, the trace ends after" in written.out


def test_a_meter_that_vanishes_midway_writes_nothing(command):
    answers = Counting(H100)
    readings = iter(range(10))

    class Vanishing(Counting):
        def __getitem__(self, name):
            if name == "nvmlDeviceGetTotalEnergyConsumption" and next(readings, None) is None:
                raise FakeNvml(H100).NVMLError_GpuIsLost
            return super().__getitem__(name)

    code, path, written = command(Vanishing(answers))
    assert code == 2
    assert (
        written.err.splitlines()[-1] == "error: --device cuda:0: energy counter: the GPU was lost"
    )
    assert not list(path.parent.iterdir())


def test_unavailable_is_a_reason_and_no_traceback(command):
    code, path, written = command(H100 | {"nvmlDeviceGetMigMode": [1, 1]})
    assert code == 2
    assert "MIG: the counter covers the whole GPU" in written.err
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--show", "x.csv", "--load"], "--load"),
        (["--show", "x.csv", "--seconds", "3"], "--seconds"),
        (["--show", "x.csv", "--device", "cpu"], "--device"),
        (["--device", "all"], "--device all"),
        (["--device", "cuda:²"], "--device cuda:²"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_an_option_that_cannot_apply_is_bad_input(command, options, named):
    code, path, written = command(H100, *options)
    assert code == 2 and not list(path.parent.iterdir())
    assert written.err.startswith(f"error: {named}") and written.err.count("\n") == 1
