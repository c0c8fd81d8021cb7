import pytest
from beyond_a_sweep import app, errors

from cost_models.fitted_model import changed
from cost_models.latency_table import LatencyTable, TableError
from cost_models.shipped_rows import shipped_rows
from cost_models.training_rows import choose_device, group_rows, of_primitives
from profiler.command_line import run
from profiler.store import create_store

ZEN3, ZEN4 = "amd-zen3-avx2-2c-1t", "amd-zen4-avx512-2c-1t"
KERNEL = ("shift_fp32", "shift.panels")


def test_only_rows_outside_are_tested_on():
    """A model of small sizes, beside one that has the very model of the device beyond them."""
    rows = of_primitives(shipped_rows(ZEN3))
    rows = group_rows(rows, choose_device(rows, ZEN3, None)).groups[KERNEL]
    models = LatencyTable.load(ZEN3).models
    (whole,) = [m for m in models if (m.form, m.lowering) == KERNEL]
    small = {name: (low, (low + high) / 2) for name, (low, high) in whole.hull.items()}
    core = whole.core.model_copy(
        update={"costs_ms": {name: 2 * ms for name, ms in whole.core.costs_ms.items()}}
    )
    alone = changed(whole, hull=small, core=core)
    found = errors(alone, changed(alone, beyond=whole), rows)
    assert 5 <= found.rows < len(rows)
    assert found.mape[1] < 20 < 80 < found.mape[0]
    assert errors(alone, alone, rows[:2]) is None


def test_a_prior_of_the_device_itself_and_other_rows_are_refused(tmp_path, monkeypatch, capsys):
    store = create_store(tmp_path / "rows.sqlite")
    some = [row for row in shipped_rows(ZEN3) if row.lowering == "shift.panels"]
    store.put(*some)
    store.close()
    for rows, prior, said in (
        (ZEN3, ZEN3, "is of the device itself"),
        (ZEN4, ZEN3, "the store of"),
        ("nowhere", ZEN4, "ships not"),
        (ZEN3, "nowhere.json", "cannot be read"),
    ):
        arguments = ["--store", str(tmp_path / "rows.sqlite"), "--rows", rows, "--prior", prior]
        monkeypatch.setattr("sys.argv", ["beyond_a_sweep", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run(app, (TableError,))
        assert stopped.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
