"""Evaluation: intervals that cover what they claim to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reparam.accuracy import paired_difference, predict, top1
from reparam.data import Data


def table(both, only_first, only_second, neither):
    """Predictions of two models with these counts of right answers, and the labels."""
    counts = torch.tensor([both, only_first, only_second, neither])
    first = torch.tensor([1, 1, 0, 0]).repeat_interleave(counts)
    second = torch.tensor([1, 0, 1, 0]).repeat_interleave(counts)
    return first, second, torch.ones_like(first)


def test_top1_is_wilson():
    guesses = torch.zeros(263, dtype=torch.long)
    labels = (torch.arange(263) >= 81).long()
    interval = top1(guesses, labels)
    # Newcombe 1998, table I: 81 of 263.
    assert interval.value == pytest.approx(30.798, abs=1e-3)
    assert (interval.low, interval.high) == pytest.approx((25.53, 36.62), abs=0.01)


def test_all_right_is_not_certain():
    interval = top1(torch.zeros(100), torch.zeros(100))
    assert interval.value == interval.high == 100
    assert 95 < interval.low < 97


def test_paired_difference_is_newcombes_method_10():
    interval = paired_difference(*table(36, 12, 2, 0))
    # Newcombe 1998 (paired), table II.
    assert interval.value == pytest.approx(20)
    assert (interval.low, interval.high) == pytest.approx((5.69, 34.04), abs=0.01)


def test_equal_predictions_leave_an_open_interval():
    interval = paired_difference(*table(440, 0, 0, 10))
    assert interval.value == 0
    assert -1.5 < interval.low < 0 < interval.high < 1.5


def test_paired_interval_covers_the_true_difference():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.90, 0.05, 0.02, 0.03])
    covered = 0
    for _ in range(300):
        cells = torch.multinomial(probabilities, 450, replacement=True, generator=generator)
        interval = paired_difference(*table(*cells.bincount(minlength=4).tolist()))
        covered += interval.low <= 3 <= interval.high
    assert 0.92 <= covered / 300 <= 0.99


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any))
def test_swapping_the_models_mirrors_the_interval(cells):
    both, first, second, neither = cells
    ours = paired_difference(*table(both, first, second, neither))
    theirs = paired_difference(*table(both, second, first, neither))
    assert -100 - 1e-9 <= ours.low <= ours.value <= ours.high <= 100 + 1e-9
    assert ours.low == pytest.approx(-theirs.high, abs=1e-9)
    assert ours.value == pytest.approx(-theirs.value, abs=1e-9)


def test_predict_asks_for_plain_batches_in_evaluation_mode():
    class Echo(nn.Module):
        def forward(self, x):
            assert not self.training
            return nn.functional.one_hot(x.long(), 5).float()

    def batches(split, batch_size, training):
        assert (split, training) == ("test", False)
        for part in torch.arange(5).split(batch_size):
            yield part, torch.zeros_like(part)

    guesses, labels = predict(Echo().train(), Data("toy", 5, {"test": 5}, batches), "test", 2)
    assert guesses.tolist() == [0, 1, 2, 3, 4]
    assert labels.tolist() == [0] * 5
