import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import (
    DEVICE,
    fit_result,
    latency_table,
    measurements,
    primitive_row,
    write_run,
    write_store,
)

from kernels.workload import attention
from profiler.store import Measurement
from reports import growth_section, layer_section, noise_section, where_section
from reports.accuracy_section import on_front
from reports.build import compose
from reports.growth_section import exponent
from reports.html import table_behind
from reports.map_plots import HEAT_ENDS, cell_edges, heat
from reports.palette import HEAT
from reports.prediction_section import prediction
from reports.run_folder import load_run

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    costs, gains = zip(*points)
    front = [point for point, is_on in zip(points, on_front(costs, gains)) if is_on]
    assert front
    for cost, gain in points:
        assert any(c <= cost and g >= gain for c, g in front)
    for cost, gain in front:
        assert not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)


@given(st.floats(0.3, 2.5), st.floats(1e-4, 10), st.integers(3, 8))
def test_a_power_is_found_exactly(power, factor, count):
    tokens = [2**i for i in range(4, 4 + count)]
    found = exponent(tokens, [factor * t**power for t in tokens])
    assert found.value == pytest.approx(power, abs=1e-6)
    assert found.low <= found.value <= found.high and found.high - found.low < 1e-4


def test_two_lengths_give_no_interval_and_noise_widens_it():
    assert exponent([64, 256], [1, 4]).low is None
    noisy = exponent([64, 128, 256, 512], [1, 2.4, 3.7, 8.5])
    assert noisy.low < 1 < noisy.high and noisy.high - noisy.low > 0.1


def test_a_ratio_has_the_colour_of_its_class():
    assert heat(1.0) == HEAT[2] and heat(0.1) == HEAT[0] and heat(99) == HEAT[-1]
    steps = [HEAT.index(heat(end * 1.0001)) for end in HEAT_ENDS]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_cells_touch_and_hold_their_values():
    values = np.geomspace(16, 4096, 9)
    low, high = cell_edges(values)
    assert (low < values).all() and (values < high).all()
    assert np.allclose(low[1:], high[:-1]) and math.isclose(high[0] / low[0], high[-1] / low[-1])


def _run(path, rows):
    return load_run(write_store(path, rows))


def test_the_heat_map_has_own_mult_and_every_form(tmp_path):
    picture = where_section.where(_run(tmp_path, measurements())).pictures[0]
    columns = set(picture.data.column)
    assert {"shift_int8", where_section.OWN_MULT, where_section.ADD} <= columns
    own = picture.data[picture.data.column == where_section.OWN_MULT]
    assert set(own.against) == {"mult.dot"} and set(own.ours) == {"shift.dot"}
    assert len(own) == 5


def test_the_map_behind_the_marks_is_the_tables():
    # The synthetic table has no models: nothing but its own shapes is known, so nothing is drawn.
    assert len(where_section._modelled(latency_table(measurements()))) == 0


def test_growth_needs_three_lengths_and_takes_our_fastest(tmp_path):
    rows = []
    for tokens in (64, 256, 1024):
        workload = attention(4, tokens, 16, 32).both
        rows.append(primitive_row(workload, "add.both", tokens / 1000))
        rows.append(primitive_row(workload, "add.both_split", tokens / 500))
        rows.append(primitive_row(workload, "torch.fp32", tokens**2 / 1e5, True))
    section = growth_section.growth(_run(tmp_path / "three", rows))
    found = {str(row[0]).split(",")[1].strip(): row[-1].value for row in section.tables[0].rows}
    assert found["ours"] == pytest.approx(1) and found["torch.fp32"] == pytest.approx(2)
    few = growth_section.growth(_run(tmp_path / "two", rows[:6]))
    assert not few.pictures and "three sequence lengths" in few.lead[0]


def test_two_cards_of_one_name_are_two_series():
    cards = [DEVICE.model_copy(update={"kind": "cuda", "name": "H0", "uuid": u}) for u in "ab"]
    rows = [
        primitive_row(attention(8, tokens, 16, 32).kv, "add.tables", ms * tokens, device=card)
        for card, ms in zip(cards, (1e-3, 2e-3))
        for tokens in (256, 512, 1024)
    ]
    found = growth_section.series_of(rows)
    assert len(found) == 2 and all(", H0" in name for name in found)
    assert sorted(points[0].latency_ms for points in found.values()) == [0.256, 0.512]
    assert {point.series for points in found.values() for point in points} == set(found)


def test_layers_are_measured_against_the_sum_of_their_kernels(tmp_path):
    details = {
        "layer": "blocks.0.mlp",
        "model": "<b>net</b>",
        "batch": 8,
        "kernel_ms": 1.5,
        "tokens.mult": 100,
        "tokens.shift": 300,
    }
    layer = Measurement(
        kind="layer",
        subject="net, blocks.0.mlp",
        device=DEVICE,
        lowering="deployed",
        latency_ms=2.0,
        latency_low_ms=1.9,
        latency_high_ms=2.1,
        weight_bytes=4000,
        peak_memory_bytes=5000,
        energy_reason="none",
        details=details,
    )
    section = layer_section.layers(_run(tmp_path / "with", [layer]))
    row = section.tables[0].rows[0]
    assert row[4].text == "-25.0 %" and row[5].text == "4.00 kB" and row[6].text == "5.00 kB"
    assert row[7] == "mult 100, shift 300"
    assert section.pictures[0].data.predicted_ms[0] == 1.5
    without = layer_section.layers(_run(tmp_path / "without", measurements()))
    assert "--predicted-versus-measured --table" in without.missing


def test_the_noise_floor_is_the_largest_and_missing_says_so(tmp_path):
    rows = measurements()
    assert "was not measured" in noise_section.noise(_run(tmp_path / "none", rows)).lead[0]
    rows[0] = rows[0].model_copy(update={"noise_floor": 0.021})
    rows[1] = rows[1].model_copy(update={"noise_floor": 0.004})
    section = noise_section.noise(_run(tmp_path / "some", rows))
    assert "2.1 %" in section.lead[0]
    assert "100.0 %" in section.lead[1], "all synthetic intervals are ±2 %"


def test_every_mark_points_at_a_row_of_the_table_behind(tmp_path):
    page = compose(load_run(write_run(tmp_path / "run")))
    pictures = [p for part in page.parts for s in part.sections for p in s.pictures]
    assert len(pictures) > 10
    for picture in pictures:
        canvas = picture.draw(picture.data, 860, **picture.options)
        rows = {mark.row for mark in canvas.marks}
        assert rows, picture.name
        assert rows <= set(range(len(table_behind(picture).rows))), picture.name


def test_runs_stand_side_by_side_with_verdicts(tmp_path):
    rows = measurements()
    bursts = tuple(1 + 0.002 * i for i in range(12))
    first = [
        row.model_copy(update={"bursts_ms": tuple(row.latency_ms * b for b in bursts)})
        for row in rows
        if row.latency_ms
    ]
    slow = [
        row
        if row.is_baseline
        else row.model_copy(
            update={
                "latency_ms": row.latency_ms * 2,
                "bursts_ms": tuple(2 * ms for ms in row.bursts_ms),
            }
        )
        for row in first
    ]
    a, b = _run(tmp_path / "a", first), _run(tmp_path / "<i>b", slow)
    section = compose(a, (b,)).parts[0].sections[0]
    assert section.anchor == "runs" and " SLOWER" in section.lead[0]
    assert section.tables[0].columns == ("figure", "a", "<i>b")
    same_name = _run(tmp_path / "c" / "a", first)
    columns = compose(a, (same_name,)).parts[0].sections[0].tables[0].columns
    assert columns == ("figure", str(a.path), str(same_name.path))
    verdicts = section.tables[1].rows
    assert verdicts[0][-1].text == "SLOWER" and verdicts[0][5].value == pytest.approx(2, rel=0.05)
    assert [row[0] for row in section.tables[0].rows][:2] == ["verdict", "device"]
    other = [
        row.model_copy(update={"device": DEVICE.model_copy(update={"name": "Q"})}) for row in slow
    ]
    c = _run(tmp_path / "c", other)
    assert "different devices" in compose(a, (c,)).parts[0].sections[0].lead[0]


def test_rows_that_the_models_left_out_are_counted(tmp_path):
    found = fit_result()
    fits = [fit.model_copy(update={"rows_shared": 3}) for fit in found.fits]
    run = _run(tmp_path, measurements())
    section = prediction(replace(run, fit=found.model_copy(update={"fits": fits})))
    assert any(text.startswith(f"{3 * len(fits)} rows of a core") for text in section.lead)
    assert not any("rows of a core" in text for text in prediction(replace(run, fit=found)).lead)
