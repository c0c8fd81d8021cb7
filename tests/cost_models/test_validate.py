import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.fitted_model import Prediction
from cost_models.models import MIN_ROWS
from cost_models.validate import (
    MIN_TEST_ROWS,
    ROWS_FOR_A_TEST,
    TEST_SHARE,
    held_out,
    interval_coverage,
    mape,
    split_position,
    within_10_percent,
)

groups = st.lists(st.integers(0, 200).map(str), max_size=60)


@given(st.lists(st.integers(0, 500).map(str), unique=True, max_size=60), st.integers(0, 5))
def test_enough_rows_on_both_sides(keys, seed):
    test = held_out(keys, seed)
    assert len(test) == len(keys)
    if sum(test):
        assert len(keys) - sum(test) >= MIN_ROWS
    if len(keys) >= ROWS_FOR_A_TEST:
        assert sum(test) >= MIN_TEST_ROWS


@given(groups, st.integers(0, 5), st.randoms())
def test_the_split_ignores_the_order_and_keeps_groups_together(keys, seed, random):
    side = dict(zip(keys, held_out(keys, seed)))
    assert [side[key] for key in keys] == held_out(keys, seed)
    shuffled = random.sample(keys, len(keys))
    assert held_out(shuffled, seed) == [side[key] for key in shuffled]


def test_more_rows_do_not_move_a_row_to_the_other_side():
    keys = [f"shape {i}" for i in range(400)]
    few, many = held_out(keys[:60], 0), held_out(keys, 0)
    assert many[:60] == few
    assert np.mean(many) == pytest.approx(TEST_SHARE, abs=0.07)
    assert held_out(keys, 1) != many


def test_position_is_fixed_for_good():
    assert split_position("shape", 0) == pytest.approx(0.0060568404691518805)


def test_errors_by_hand():
    predicted = [Prediction(110.0, 90, 130), Prediction(50.0, 45, 55), Prediction(95.0, 90, 99)]
    measured = [100.0, 100.0, 100.0]
    assert mape(predicted, measured) == pytest.approx((10 + 50 + 5) / 3)
    assert interval_coverage(predicted, measured) == pytest.approx(100 / 3)
    assert within_10_percent(predicted[1:], measured[1:]) == 50


def test_no_rows_no_figure():
    assert mape([], []) is within_10_percent([], []) is interval_coverage([], []) is None
