import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.held_out import (
    MIN_TEST_ROWS,
    ROWS_FOR_A_TEST,
    TEST_SHARE,
    held_out,
    interval_coverage,
    is_locked,
    mape,
    split_position,
    within_10_percent,
)
from cost_models.models import MIN_ROWS
from kernels.workload import attention, linear

groups = st.lists(st.integers(0, 200).map(str), max_size=60)


@given(st.lists(st.integers(0, 500).map(str), unique=True, max_size=60))
def test_enough_rows_on_both_sides(keys):
    test = held_out(keys)
    assert len(test) == len(keys)
    if sum(test):
        assert len(keys) - sum(test) >= MIN_ROWS
    if len(keys) >= ROWS_FOR_A_TEST:
        assert sum(test) >= MIN_TEST_ROWS


@given(groups, st.randoms())
def test_the_split_ignores_the_order_and_keeps_groups_together(keys, random):
    side = dict(zip(keys, held_out(keys)))
    assert [side[key] for key in keys] == held_out(keys)
    shuffled = random.sample(keys, len(keys))
    assert held_out(shuffled) == [side[key] for key in shuffled]


def test_more_rows_do_not_move_a_row_to_the_other_side():
    keys = [f"shape {i}" for i in range(400)]
    few, many = held_out(keys[:60]), held_out(keys)
    assert many[:60] == few
    assert np.mean(many) == pytest.approx(TEST_SHARE, abs=0.07)


def test_position_is_fixed_for_good():
    assert split_position("shape") == pytest.approx(0.0060568404691518805)


def test_all_token_counts_of_some_widths_are_on_one_side():
    for k, n in ((64, 512), (17, 3000), (320, 1280)):
        sides = {is_locked(linear("shift_int8", m, k, n)) for m in (1, 7, 196, 100_000)}
        assert len(sides) == 1
    sides = {is_locked(attention(b, tokens, 32, 64).both) for b in (1, 8) for tokens in (5, 900)}
    assert len(sides) == 1


def test_errors_by_hand():
    predicted, measured = [110.0, 50.0, 95.0], [100.0, 100.0, 100.0]
    assert mape(predicted, measured) == pytest.approx((10 + 50 + 5) / 3)
    assert interval_coverage([90, 45, 90], [130, 55, 99], measured) == pytest.approx(100 / 3)
    assert within_10_percent(predicted[1:], measured[1:]) == 50


def test_no_rows_no_figure():
    assert mape([], []) is within_10_percent([], []) is interval_coverage([], [], []) is None
