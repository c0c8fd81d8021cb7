"""How much of a core there is, by work of a known length."""

import pytest

from profiler.shared_core import CoreShare


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
    assert look() == pytest.approx(1.0)
    machine.slowdowns = [1.1, 1.6]
    assert look() == pytest.approx(1 / 1.6)
    machine.slowdowns = [1.0, 1.0]
    assert look() == pytest.approx(1.0)


def test_one_interrupt_is_no_neighbour():
    machine = Machine()
    lengths = iter([0.0] * 3 * 100 + [5e-5, 0.0, 0.0])

    def work():
        machine.now_s += 2e-6 + next(lengths)

    assert CoreShare([work], lambda: machine.now_s, machine.pause)() == pytest.approx(1.0)


def test_this_machine_has_a_share():
    look = CoreShare()
    assert all(0 < look() <= 1 for _ in range(20))
