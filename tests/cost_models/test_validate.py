import sys

import pytest

from cost_models.validate import app
from kernels.workload import linear
from profiler.command_line import run
from profiler.store import create_store


@pytest.mark.parametrize("apart", [False, True])
def test_the_command_answers_for_kernels_transfer_and_speed(
    apart, store, sweep, measure, law, monkeypatch, capsys, tmp_path
):
    other = sweep[0].device.model_copy(update={"threads": 2})
    further = tmp_path / "further.sqlite" if apart else store
    opened = create_store(further)
    for m in (3, 30, 300, 3000):
        for k, n in ((64, 512), (512, 64), (300, 300), (128, 1024), (40, 90)):
            workload = linear("shift_int8", m, k, n)
            opened.put(measure(workload, 0.6 * law(workload), device=other))
    opened.close()
    which = ["--onto", str(further)] if apart else ["--device", sweep[0].device.fingerprint]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["cost_models.validate", "--store", str(store), *which])
    with pytest.raises(SystemExit) as stopped:
        run(app)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for part in ("flops", "roofline", "nearest", "shift.tiled", "Transfer", "2 threads", "lookup"):
        assert part in shown


def test_there_is_no_transfer_to_the_device_itself(store, monkeypatch, capsys):
    arguments = ["cost_models.validate", "--store", str(store), "--onto", str(store)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        run(app)
    assert stopped.value.code == 2
    assert "--onto measurements.sqlite: no hot row of another device" in capsys.readouterr().err
