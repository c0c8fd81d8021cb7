import math

import numpy as np
import pytest

from profiler.drift import UNCONTROLLED, Drift


def drift_of(shifts_by_group):
    shifts = {(group, i): s for group, each in shifts_by_group.items() for i, s in enumerate(each)}
    return Drift(shifts, {key: key[0] for key in shifts})


def test_a_row_is_expected_to_move_as_the_controls_beside_it():
    drift = drift_of({"x": [0.10, 0.12, 0.30], "y": [-0.05, -0.05]})
    assert drift.expected("row", "x") == pytest.approx(0.12)
    assert drift.expected("row", "y") == pytest.approx(-0.05)
    assert drift.expected("row", "elsewhere") == pytest.approx(0.10)


def test_a_control_is_not_held_against_itself():
    drift = drift_of({"x": [0.10, 0.30], "y": [0.5]})
    assert drift.expected(("x", 0), "x") == pytest.approx(0.30)
    assert drift.expected(("y", 0), "y") == pytest.approx(0.20)


@pytest.mark.parametrize("shifts", [{}, {"x": [0.1]}, {"x": [0.1, 0.2]}])
def test_too_few_controls_say_nothing(shifts):
    drift = drift_of(shifts)
    assert drift.expected("row", "x") == 0.0
    assert drift.floor(rows=10) == UNCONTROLLED
    assert math.expm1(drift.half_width()) == pytest.approx(UNCONTROLLED)
    assert "too few" in drift.in_words() and "26%" in drift.in_words()


def test_the_floor_grows_with_the_rows_and_with_fewer_controls():
    random = np.random.default_rng(0)
    many = drift_of({i: random.normal(0, 0.01, 2) for i in range(50)})
    few = drift_of({i: random.normal(0, 0.01, 2) for i in range(2)})
    assert 0.02 < many.floor(rows=1) <= many.floor(rows=300) < 0.08
    assert few.floor(rows=300) > 2 * many.floor(rows=300)


def test_nothing_is_called_different_that_strayed_no_farther_than_a_control():
    drift = drift_of({i: [0.0, 0.0, 0.0] for i in range(100)} | {"odd": [0.0, 0.0, 0.3]})
    assert drift.floor(rows=1) == pytest.approx(math.expm1(0.3))


def test_runs_that_did_not_drift_leave_no_floor():
    drift = drift_of({"x": [0.0, 0.0], "y": [0.0, 0.0]})
    assert drift.floor(rows=100) == drift.half_width() == 0.0


def test_the_floor_holds_the_chance_of_any_false_difference():
    """Rows and controls of 30 products, each product with a drift of its own."""
    random = np.random.default_rng(1)
    trials, alarms = 200, 0
    for _ in range(trials):
        common = random.normal(-0.04, 0.05, 30)
        controls = common[:, None] + random.normal(0, 0.015, (30, 3))
        rows = common[:, None] + random.normal(0, 0.015, (30, 4))
        drift = drift_of(dict(enumerate(controls)))
        expected = np.array([drift.expected("row", product) for product in range(30)])
        limit = math.log1p(drift.floor(rows=rows.size))
        alarms += np.abs(rows - expected[:, None]).max() > limit
    assert alarms / trials <= 0.08
