"""How much of a core there is, by work of a known length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.shared_core import CoreShare, _Lengths


class Machine:
    """A clock that only work advances: two units, each of its own speed."""

    def __init__(self):
        self.now_s, self.slowdowns, self.pauses = 0.0, [1.0, 1.0], 0

    def work(self, unit, us):
        def run():
            self.now_s += us / 1e6 * self.slowdowns[unit]

        return run

    def pause(self, seconds):
        self.pauses += 1
        # A neighbour leaves while we look for the first time.
        self.slowdowns = [1.0, 1.0] if self.pauses > 50 else [2.0, 1.5]


def test_the_unit_that_is_shared_most_counts():
    machine = Machine()
    works = [machine.work(0, 2.0), machine.work(1, 4.0)]
    look = CoreShare(works, lambda: machine.now_s, machine.pause)
    assert look() == pytest.approx(1.0, abs=0.01)
    machine.slowdowns = [1.1, 1.6]
    assert look() == pytest.approx(1 / 1.6, rel=0.01)
    machine.slowdowns = [1.0, 1.0]
    assert look() == pytest.approx(1.0, abs=0.01)


def test_what_amx_leaves_behind_is_waited_for_and_a_neighbour_is_not():
    machine, over_s = Machine(), 0.0

    def work():
        machine.now_s += 2e-6 * (1.5 if machine.now_s < over_s else 1.0)

    look = CoreShare([work], lambda: machine.now_s, machine.pause)
    over_s = machine.now_s + 1e-4
    assert look() == pytest.approx(1.0, abs=0.01)
    over_s = machine.now_s + 1.0
    assert look() == pytest.approx(1 / 1.5, rel=0.01)


def test_one_interrupt_is_no_neighbour():
    machine = Machine()
    lengths = iter([0.0] * 3 * 100 + [5e-5, 0.0, 0.0])

    def work():
        machine.now_s += 2e-6 + next(lengths)

    assert CoreShare([work], lambda: machine.now_s, machine.pause)() == pytest.approx(1.0, abs=0.01)


@given(st.integers(0, 2**32), st.floats(0.0, 0.5))
def test_a_few_fast_looks_are_not_all_of_a_core(seed, shared):
    """Of a clock that is high for a moment, however long one looks; nor are many slow ones."""
    generator = np.random.default_rng(seed)
    lengths, looks = _Lengths(), 2000
    fast, slow = looks // 50, int(looks * shared)
    factors = [0.85] * fast + [1.5] * slow + [1.0] * (looks - fast - slow)
    for factor in generator.permutation(factors):
        lengths.note(2e-6 * factor * generator.uniform(1.0, 1.02))
    assert lengths.shortest_s == pytest.approx(2e-6, rel=0.03)


@given(st.lists(st.floats(1e-7, 1e-3), min_size=1, max_size=300))
def test_few_looks_are_below_the_short_length(taken_s):
    lengths = _Lengths()
    for each in taken_s:
        lengths.note(each)
    assert lengths.shortest_s == pytest.approx(
        np.quantile(taken_s, 0.03, method="inverted_cdf"), rel=0.01
    )


def test_this_machine_has_a_share():
    look = CoreShare()
    assert all(0 < look() <= 1 for _ in range(20))
