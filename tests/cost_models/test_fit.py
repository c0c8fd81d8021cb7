import re
import sys

import pytest

from cost_models import fit as fit_module
from cost_models.fit import app, fit
from cost_models.fit_result import FitResult
from cost_models.held_out import is_locked
from cost_models.latency_table import LatencyTable
from cost_models.work import Work
from kernels.workload import Workload, linear
from profiler.command_line import BadInput, run
from profiler.store import CLOCK_RATE, create_store


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cost_models.fit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run(app)
    return stopped.value.code


def of(result, lowering):
    return next(fit for fit in result.fits if fit.lowering == lowering)


@pytest.mark.parametrize("lowering", ["shift.tiled", "add.rows", "torch.fp32"])
def test_held_out_errors_on_a_known_law(fitted, lowering):
    found = of(fitted[1], lowering)
    assert found.rows_test >= 2
    assert found.mape <= 10
    assert found.within_10_percent >= 60
    assert found.mape < max(2.0, found.mape_nearest)


def test_better_than_a_roofline_where_the_law_has_tiles(fitted):
    found = of(fitted[1], "shift.tiled")
    assert found.mape < found.mape_roofline
    assert found.interval_coverage >= 60


def test_test_rows_are_not_trained_on(sweep, fitted):
    """Another figure in a held-out row must leave every other prediction as it was."""
    before = of(fitted[1], "shift.tiled")
    held = next(point for point in before.points if point.split == "test")
    changed = [
        row.model_copy(update={"latency_ms": row.latency_ms * 50, "latency_high_ms": 1e9})
        if row.subject == held.label and row.lowering == "shift.tiled"
        else row
        for row in sweep
    ]
    rows = [row for row in changed if row.lowering == "shift.tiled"]
    after = of(fit(rows, "s", seed=0)[1], "shift.tiled")
    assert after.mape > before.mape
    assert [p.predicted_ms for p in after.points] == [p.predicted_ms for p in before.points]


def test_rows_beyond_what_was_learned_are_told_apart(measure, sweep):
    """What the table calls extrapolated does not hide how right the predicted rows are."""
    rows = [row for row in sweep if row.lowering == "shift.tiled"]
    n = next(n for n in range(1, 16) if is_locked(linear("shift_int8", 1, 64, n)))
    far = [measure(linear("shift_int8", m, 64, n), 50.0) for m in (49, 196, 784)]
    before, after = (of(fit(some, "s")[1], "shift.tiled") for some in (rows, [*rows, *far]))
    assert after.inside == before.inside
    assert after.outside.rows == (before.outside.rows if before.outside else 0) + len(far)
    assert after.outside.mape > (before.outside.mape if before.outside else 0)
    for found, inside in ((after.inside, True), (after.outside, False)):
        some = [p for p in after.points if p.split == "test" and (p.octaves_outside == 0) == inside]
        errors = [abs(p.predicted_ms / p.measured_ms - 1) for p in some]
        if found is None:
            assert not some
        else:
            assert found.mape == pytest.approx(100 * sum(errors) / len(errors))


def test_every_row_is_accounted_for(sweep, fitted):
    table, result = fitted
    assert len(table.entries) == sum(row.latency_ms is not None for row in sweep)
    assert result.skipped.keys() == {"mult_fp32 mult.tiled", "mult_bf16 mult.bf16"}
    assert "2 rows" in result.skipped["mult_fp32 mult.tiled"]
    assert "no such instruction" in result.skipped["mult_bf16 mult.bf16"]
    for found in result.fits:
        assert len(found.points) == found.rows_train + found.rows_test
        assert sum(point.split == "test" for point in found.points) == found.rows_test


def test_the_table_never_learned_from_the_held_out_rows(fitted):
    table, result = fitted
    model = next(m for m in table.models if m.lowering == "shift.tiled")
    found = of(result, "shift.tiled")
    assert len(model.points) == found.rows_train
    assert len(found.points) == found.rows_train + found.rows_test


def test_energy_is_labelled(measure):
    counted = measure(linear("shift_int8", 49, 64, 64), 1.0, energy_mj=2.5, energy_reason=None)
    missing = measure(linear("shift_int8", 196, 64, 64), 1.0)
    unknown = measure(Workload(primitive="mult", m=2, k=2, n=2, x_dtype="uint8"), 1.0)
    table, _ = fit([counted, missing, unknown], "s")
    counted, missing, unknown = (
        next(e for e in table.entries if e.workload == row.workload)
        for row in (counted, missing, unknown)
    )
    assert (counted.energy_mj, counted.energy_source) == (2.5, "measured")
    assert missing.energy_mj > 0 and missing.energy_source == "modelled"
    assert "no counter on this machine" in missing.energy_reason
    assert unknown.energy_mj is None and "mult_uint8" in unknown.energy_reason


def test_measured_energy_has_a_model_of_its_own(sweep):
    def energy_mj(workload):
        return workload.macs * 4e-9 + workload.traffic_bytes * 1e-7

    rows = [
        row.model_copy(update={"energy_mj": energy_mj(row.workload), "energy_reason": None})
        for row in sweep
        if row.lowering == "shift.tiled"
    ]
    table, _ = fit(rows, "s")
    (model,) = table.energy_models
    assert model.lowering == "shift.tiled"
    asked = linear("shift_int8", 300, 300, 300)
    found = table.lookup(asked)
    assert found.energy_mj == pytest.approx(energy_mj(asked), rel=0.15)
    assert found.energy_source == "modelled" and "energies of this device" in found.energy_reason


def test_layers_and_models_that_were_measured_give_overheads(measure, sweep):
    rows = [
        measure(
            None,
            2.0 + 0.1 * layers,
            kind="model",
            subject=name,
            lowering="deployed",
            details={"model": name, **Work({}, {"operators": layers, "calls": 1.0}).details()},
        )
        for name, layers in (("a", 8), ("b", 12), ("c", 20))
    ]
    table, _ = fit([*sweep, *rows], "s")
    (found,) = table.overheads
    counts = {"operators": 10, "calls": 1}
    assert found.latency_ms(2.0, counts) == pytest.approx(2.0 + 3.0, rel=0.02)
    assert fit(sweep, "s")[0].overheads is None


def test_rounds_in_common_say_how_our_forms_compare(measure, sweep):
    """Rows of different minutes would say something else, or nothing."""
    ratios = [(0.8, 1.0), (0.5, 0.9)]
    rows = []
    for i, (over_int8, over_int7) in enumerate(ratios):
        workload = linear("shift_int8", m=8, k=16, n=64 * (i + 1))
        ends = ("", "_low", "_high")
        details = {f"shift_over_int8_mult{end}": over_int8 for end in ends}
        details |= {f"shift_over_int7_mult{end}": over_int7 for end in ends}
        rows.append(measure(workload, 1.0, "shift.dot", details=details))
    cold = rows[0].model_copy(update={"cache": "cold", "details": {}})
    table, _ = fit([*sweep, *rows, cold], "s")
    shift, mult = table.own_speeds["shift_int8"], table.own_speeds["mult_int7"]
    assert (shift.least, shift.most, shift.products) == (1.25, 2.0, 2)
    assert shift.mean == pytest.approx((1.25 * 2) ** 0.5)
    assert (mult.least, mult.most) == pytest.approx((1.25, 1.8))
    assert not fit(sweep, "s")[0].own_speeds
    without = table.model_copy(update={"own_speeds": {}})
    assert LatencyTable.model_validate(table.model_dump()).sha256 == table.sha256
    assert without.sha256 != table.sha256


def test_cold_rows_layers_and_rows_without_an_interval_are_left_out(measure, sweep):
    workload = linear("shift_int8", 49, 64, 64)
    rows = [
        measure(workload, 9.0, cache="cold"),
        measure(workload, 8.0, latency_low_ms=None),
        measure(linear("shift_int8", 50, 64, 64), 8.0, latency_low_ms=8.5),
        measure(None, 7.0, kind="layer", lowering="deployed"),
    ]
    with pytest.raises(BadInput, match="has a latency"):
        fit(rows, "s")
    table, _ = fit([*rows, sweep[0]], "s")
    assert [entry.latency_ms for entry in table.entries] == [sweep[0].latency_ms]


def test_the_command_writes_both_files(store, monkeypatch, capsys):
    assert command(monkeypatch, "--store", store) == 0
    table = LatencyTable.load(store.parent / "latency_table.json")
    result = FitResult.load(store.parent / "fit.json")
    assert table.store == result.store == store.name
    assert table.created_at == result.created_at
    shown = capsys.readouterr().out
    assert "shift.tiled" in shown and "%" in shown and "mult.bf16: no usable row" in shown
    assert not list(store.parent.glob("*.part"))


def refused(monkeypatch, capsys, folder, *arguments):
    """The one line of a refusal, after which nothing was written."""
    before = {path.name for path in folder.iterdir()}
    assert command(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error: .+", message)
    assert {path.name for path in folder.iterdir()} - before <= {
        "measurements.sqlite-wal",
        "measurements.sqlite-shm",
    }
    return message


def test_several_devices_need_a_choice(store, sweep, measure, monkeypatch, capsys):
    other = sweep[0].device.model_copy(update={"threads": 2})
    opened = create_store(store)
    opened.put(measure(linear("shift_int8", 49, 64, 64), 123.0, device=other))
    opened.close()
    message = refused(monkeypatch, capsys, store.parent, "--store", store)
    assert other.fingerprint in message and sweep[0].device.fingerprint in message
    message = refused(monkeypatch, capsys, store.parent, "--store", store, "--device", "beef")
    assert "--device beef" in message and other.fingerprint in message
    out = store.parent / "two"
    assert command(monkeypatch, "--store", store, "--out", out, "--device", other.fingerprint) == 0
    table = LatencyTable.load(out / "latency_table.json")
    assert table.device == other
    assert [entry.latency_ms for entry in table.entries] == [123.0]


def test_bad_stores_are_refused(tmp_path, monkeypatch, capsys):
    missing = tmp_path / "none.sqlite"
    assert "no such store" in refused(monkeypatch, capsys, tmp_path, "--store", missing)
    foreign = tmp_path / "foreign.sqlite"
    foreign.write_text("no database " * 100)
    assert "foreign.sqlite" in refused(monkeypatch, capsys, tmp_path, "--store", foreign)
    empty = tmp_path / "measurements.sqlite"
    create_store(empty).close()
    assert "profiler.sweep" in refused(monkeypatch, capsys, tmp_path, "--store", empty)
    assert "--out" in refused(monkeypatch, capsys, tmp_path, "--store", "sqlite:///x")


def test_nothing_is_written_when_a_fit_fails(store, monkeypatch, capsys):
    def broken(*_arguments):
        raise BadInput("the last model cannot be fitted")

    monkeypatch.setattr(fit_module, "validate", broken)
    refused(monkeypatch, capsys, store.parent, "--store", store)


def test_rows_of_a_shared_core_teach_nothing_where_others_are_enough(measure):
    """A neighbour doubles every third figure; the rows say so, and the model does not learn it."""
    rows = []
    for i, (k, n) in enumerate((k, n) for k in (32, 64, 96, 128) for n in (32, 64, 96, 128)):
        for j, m in enumerate((16, 64, 256)):
            disturbed = (i + j) % 3 == 0
            ms = 1e-6 * m * k * n * (2.0 if disturbed else 1.0)
            details = {"own_core": not disturbed}
            rows.append(measure(linear("shift_int8", m, k, n), ms, details=details))
    table, result = fit(rows, "x")
    (found,) = result.fits
    estimate = table.lookup(linear("shift_int8", 64, 64, 64))
    assert estimate.source == "predicted" and estimate.latency_ms < 1.2e-6 * 64**3
    assert found.rows_shared == 16 and found.rows_train + found.rows_test == 32
    assert found.mape < 5
    few = [row for row in rows if row.on_shared_core][:9]
    few += [row for row in rows if not row.on_shared_core][:5]
    assert table.caution is None and "on_shared_core" not in table.model_dump_json()
    slow, result = fit(few, "x")
    assert result.fits[0].rows_shared == 0
    # No model can do without them: the table says so of each row and of what it predicts.
    assert slow.caution and slow.caution.startswith("9 of 14 measured rows")
    marked = {entry.workload: entry.on_shared_core for entry in slow.entries}
    assert marked == {row.workload: row.on_shared_core for row in few}
    assert slow.lookup(few[0].workload).on_shared_core
    assert not slow.lookup(few[-1].workload).on_shared_core
    assert slow.lookup(linear("shift_int8", 65, 64, 64)).on_shared_core
    assert LatencyTable.model_validate_json(slow.model_dump_json()).sha256 == slow.sha256


def test_clocks_of_before_are_those_of_a_run(measure):
    """Whose loop was slower in one process than in another, the CPU's clock being the same."""
    rows = []
    for name, rate in (("first", 50.0), ("second", 46.0)):
        for k in (32, 64, 96, 128):
            for m in (16, 64):
                workload = linear("shift_int8", m, k, 32 if name == "first" else 64)
                row = measure(workload, 1e-6 * workload.macs, details={"fma_gmacs_per_s": rate})
                rows.append(row.model_copy(update={"run": name}))
    table, _ = fit(rows, "x")
    exact = [1e-6 * row.workload.macs for row in rows]
    assert [entry.latency_ms for entry in table.entries] == pytest.approx(exact)


def test_what_was_measured_at_a_low_clock_is_learned_at_the_full_one(measure):
    """The clock falls for two of three figures."""
    rows, i = [], 0
    for k in (32, 64, 96, 128):
        for n in (32, 64, 96, 128):
            for m in (16, 64, 256):
                part = (1.0, 0.9, 0.8)[i % 3]
                ms = 1e-6 * m * k * n / part
                details = {CLOCK_RATE: 120.0 * part}
                rows.append(measure(linear("shift_int8", m, k, n), ms, details=details))
                i += 1
    table, result = fit(rows, "x")
    assert result.fits[0].mape < 2
    (model,) = table.models
    exact = [1e-6 * row.workload.macs for row in rows]
    assert model.predict_many([row.workload for row in rows]).latency_ms == pytest.approx(
        exact, rel=0.03
    )
    assert [entry.latency_ms for entry in table.entries] == pytest.approx(exact)
