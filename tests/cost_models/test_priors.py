"""Models of other devices answer where a device was not measured, and nowhere else."""

import math

import numpy as np
import pytest

from cost_models.features import (
    FEATURES,
    Sizes,
    form_facts,
    hull_of,
    points_of,
    shape_group,
    sizes_of,
)
from cost_models.fit import app, fit
from cost_models.fitted_model import changed
from cost_models.held_out import held_out, is_locked, split_keys, validate
from cost_models.latency_table import LatencyTable, TableError
from cost_models.models import LearnedLatency
from cost_models.priors import extrapolate_by_, outward_folds, priors_of, without
from cost_models.training_rows import Row
from kernels.workload import linear
from profiler.command_line import run
from profiler.store import create_store

WIDE = [(k, n) for k in (32, 128, 512, 2048) for n in (32, 128, 512, 2048)]
NARROW = [(64, 64), (64, 96), (96, 64), (128, 128), (128, 64), (96, 96), (128, 96)]
FAR = [linear("shift_int8", m, k, n) for m in (49, 196) for k, n in ((1024, 1024), (1920, 512))]
NEAR = [linear("shift_int8", 120, 80, 80), linear("shift_int8", 150, 100, 70)]


def _truth(law, workload, rate=1.0):
    """What does not fit a cache costs more: few small widths show where that begins, and no end."""
    missed = min(max(workload.traffic_bytes / 2**20 - 0.05, 0) / 0.5, 1)
    return law(workload, rate) + 5e-6 / rate * workload.traffic_bytes * missed


def _rows(measure, law, widths, rate, bend=lambda workload: 1.0):
    workloads = [linear("shift_int8", m, k, n) for m in (49, 100, 196) for k, n in widths]
    return [
        measure(w, _truth(law, w, rate) * bend(w) * (1 + 0.01 * ((w.k + w.n + w.m) % 3 - 1)))
        for w in workloads
    ]


@pytest.fixture(scope="module")
def prior(measure, law, tmp_path_factory):
    """Table of a device that is 3 times as fast."""
    path = tmp_path_factory.mktemp("prior") / "fast.json"
    fit(_rows(measure, law, WIDE, 3.0), "fast")[0].save(path)
    return str(path)


@pytest.fixture(scope="module")
def both(measure, law, prior):
    """Fits of few rows, without and with that prior."""
    rows = _rows(measure, law, NARROW, 1.0)
    return fit(rows, "slow"), fit(rows, "slow", priors=[prior])


def _error(table, law, workloads):
    found = [table.lookup(w).latency_ms / _truth(law, w) - 1 for w in workloads]
    return float(np.abs(found).mean())


def test_what_lies_beyond_is_answered_by_the_other_device(both, prior, law):
    (alone, _), (table, result) = both
    assert [one.beyond for one in result.fits] == [prior]
    assert _error(table, law, FAR) < 0.25 < 0.4 < _error(alone, law, FAR)
    for workload in FAR:
        found = table.lookup(workload)
        assert found.source == "extrapolated"
        assert found.low_ms < _truth(law, workload) < found.high_ms
        with pytest.raises(TableError, match="outside the measured shapes"):
            table.lookup(workload, strict=True)


def test_what_lies_inside_is_answered_by_the_devices_own_rows(both):
    (alone, _), (table, _) = both
    for workload in NEAR:
        assert table.lookup(workload) == alone.lookup(workload)
        assert table.lookup(workload).source == "predicted"


@pytest.mark.parametrize(("size", "step"), [("m", 1), ("k", 1), ("m", -1)])
def test_no_step_is_where_the_other_takes_over_or_is_given_up(both, size, step):
    model = both[1][0].models[0]
    for hull in (model.hull, model.beyond.hull):
        edge = round(2 ** hull[size][step > 0])
        at, over = (
            model.predict(linear("shift_int8", **{"m": 100, "k": 90, "n": 90} | {size: value}))
            for value in (edge, edge + step)
        )
        assert over.latency_ms == pytest.approx(at.latency_ms, rel=0.04)
        assert over.high_ms / over.low_ms == pytest.approx(at.high_ms / at.low_ms, rel=0.04)


def test_an_octave_outside_the_other_one_answers_alone(both):
    model = both[1][0].models[0]
    alone = changed(model, beyond=None)
    far, between = linear("shift_int8", 100, 256, 256), linear("shift_int8", 100, 128, 160)
    assert 0 < model.predict(between).octaves_outside < 1 <= model.predict(far).octaves_outside
    assert model.predict(far).latency_ms == pytest.approx(model.beyond.predict(far).latency_ms)
    ends = sorted(one.predict(between).latency_ms for one in (alone, model.beyond))
    assert ends[0] < model.predict(between).latency_ms < ends[1]


def test_many_are_answered_as_one(both):
    model = both[1][0].models[0]
    between = [linear("shift_int8", 250, 128, 160), linear("shift_int8", 49, 3000, 500)]
    workloads = [*FAR, *NEAR, *between]
    many = model.predict_many(workloads)
    for i, workload in enumerate(workloads):
        one = model.predict(workload)
        assert many.latency_ms[i] == pytest.approx(one.latency_ms)
        # What is left of the variance is computed in single precision.
        ends = pytest.approx((one.low_ms, one.high_ms), rel=1e-5)
        assert (many.low_ms[i], many.high_ms[i]) == ends
        assert many.octaves_outside[i] == pytest.approx(one.octaves_outside)


def test_a_table_with_such_models_is_read_back(both, tmp_path):
    table = both[1][0]
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == table and again.lookup(FAR[0]) == table.lookup(FAR[0])


def test_a_table_with_another_kernels_model_beyond_is_refused(both):
    model = both[1][0].models[0]
    other = changed(model.beyond, lowering="shift.simple")
    with pytest.raises(ValueError, match=r"beyond: is of shift_int8 shift\.simple"):
        changed(model, beyond=other)


def test_a_model_that_is_wrong_here_is_not_trusted(measure, law, prior):
    """On this device everything beyond 64 inputs takes ten times as long."""
    rows = _rows(measure, law, NARROW, 1.0, bend=lambda w: 10.0 if w.k > 64 else 1.0)
    assert [one.beyond for one in fit(rows, "odd", priors=[prior])[1].fits] == [None]


def test_a_model_that_is_right_here_needs_no_other(measure, law, prior):
    """This device has no cache to miss: what is small tells all of what is large."""
    workloads = [linear("shift_int8", m, k, n) for m in (49, 100, 196) for k, n in NARROW]
    rows = [measure(w, law(w) * (1 + 0.01 * ((w.k + w.n + w.m) % 3 - 1))) for w in workloads]
    assert [one.beyond for one in fit(rows, "plain", priors=[prior])[1].fits] == [None]


def test_a_model_that_reaches_no_farther_is_not_chosen(measure, law, prior):
    rows = _rows(measure, law, NARROW, 1.0)
    workloads, latency_ms = [row.workload for row in rows], [row.latency_ms for row in rows]
    (wide,) = LatencyTable.load(prior).models
    model = LearnedLatency("shift_int8", "shift.tiled", False, rows[0].device)
    model.fit(workloads, latency_ms)
    none = changed(wide, hull=model.fitted_.hull)
    little = changed(none, hull=none.hull | {"k": (6.0, 7.5)})
    assert extrapolate_by_(model, workloads, latency_ms, {"none": none}) is None
    several = {"none": none, "little": little, "wide": wide}
    assert extrapolate_by_(model, workloads, latency_ms, several) == "wide"


def test_what_is_left_out_outward_lies_outside():
    workloads = [linear("shift_int8", m, k, n) for m in (49, 100, 196) for k, n in NARROW]
    folds = outward_folds(workloads)
    assert len(folds) == 6
    for train, left in folds:
        hull = hull_of([workloads[i] for i in train])
        octaves = points_of(sizes_of([workloads[i] for i in left]))
        low, high = np.array([hull[name] for name in FEATURES]).T
        assert ((octaves < low) | (octaves > high)).any(axis=1).all()
        assert sorted([*train, *left]) == list(range(len(workloads)))


def test_other_devices_do_not_tell_of_held_out_widths(measure, law, prior):
    """Also where the split holds out more than the names of the widths ask for."""
    every = ((k, n) for k in (64, 80, 96, 128) for n in (64, 80, 96, 128))
    widths = [sizes for sizes in every if not is_locked(linear("shift_int8", 1, *sizes))][:6]
    rows = [
        Row(row.workload, row.latency_ms, row.latency_low_ms, row.latency_high_ms, row)
        for row in _rows(measure, law, widths, 1.0)
    ]
    workloads = [row.workload for row in rows]
    held = {shape_group(w) for w, out in zip(workloads, held_out(split_keys(workloads))) if out}
    assert held and not any(is_locked(w) for w in workloads)
    (known,) = LatencyTable.load(prior).models
    points = points_of(sizes_of(workloads))[:, known.columns].tolist()
    honest, told = (
        changed(
            known,
            points=(*known.points, *map(tuple, points)),
            residuals=(*known.residuals, *(said * (shape_group(w) in held) for w in workloads)),
        )
        for said in (0.0, 0.5)
    )
    found = []
    for one in (honest, told):
        model = LearnedLatency("shift_int8", "shift.tiled", False, rows[0].measurement.device)
        found.append(validate(model, rows, priors={"other": one}))
    assert found[0].beyond == "other" and found[0] == found[1]


def test_only_devices_of_the_same_kind_are_asked(both, prior):
    device = both[0][0].device
    key = ("shift_int8", "shift.tiled")
    assert list(priors_of([prior], device)[key]) == [prior]
    assert not priors_of([prior], device.model_copy(update={"kind": "cuda"}))


def test_a_prior_is_asked_for_what_its_own_device_said(both, tmp_path):
    """What it has from a third one is left out."""
    table = both[1][0]
    table.save(tmp_path / "second.json")
    (found,) = priors_of([str(tmp_path / "second.json")], table.device).values()
    (model,) = found.values()
    assert model.beyond is None and model.points == table.models[0].points


def test_widths_that_are_left_out_are_forgotten(prior):
    (model,) = LatencyTable.load(prior).models
    widths = [(64, 64), (64, 96), (64, 96), (128, 64)]
    learned = changed(
        model,
        length_scales={"k": 1.0, "n": 1.0},
        points=tuple((math.log2(k), math.log2(n)) for k, n in widths),
        residuals=(0.1, 0.2, 0.3, 0.4),
        foreign_rows=2,
    )
    assert without(learned, {"shift_int8 1x1"}) is learned and without(model, {"any"}) is model
    kept = without(learned, {"shift_int8 64x96"})
    assert kept.residuals == (0.1, 0.4) and kept.foreign_rows == 1
    alone = without(learned, {f"shift_int8 {k}x{n}" for k, n in widths})
    workload = linear("shift_int8", 49, 64, 96)
    core_ms = model.core.latency_ms(Sizes(1, 49, 64, 96), form_facts("shift_int8"))
    assert alone.predict(workload).latency_ms == pytest.approx(core_ms)


def test_the_command_takes_a_prior_or_none(measure, law, prior, tmp_path, monkeypatch, capsys):
    store = tmp_path / "rows.sqlite"
    opened = create_store(store)
    for row in _rows(measure, law, NARROW, 1.0):
        opened.put(row)
    opened.close()
    for given, expected in ((prior, True), ("none", False)):
        arguments = ["fit", "--store", str(store), "--prior", given]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            run(app)
        assert not stopped.value.code
        (model,) = LatencyTable.load(tmp_path / "latency_table.json").models
        assert (model.beyond is not None) == expected
    monkeypatch.setattr("sys.argv", ["fit", "--store", str(store), "--prior", "nowhere.json"])
    with pytest.raises(SystemExit) as stopped:
        run(app, (TableError,))
    assert stopped.value.code == 2
    assert "nowhere.json: cannot be read" in " ".join(capsys.readouterr().err.split())
