"""The search, on latencies that are known beforehand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.search import search

SPACE = {"rows": tuple(range(4, 15)), "outer": (0, 1)}
DEFAULT = {"rows": 14, "outer": 0}


class Bench:
    """Measures by a formula and keeps what it was asked for; ``drift`` slows call after call."""

    def __init__(self, latency_ms, drift=0.0):
        self.latency_ms, self.drift, self.calls = latency_ms, drift, []

    def __call__(self, schedules):
        self.calls.append(schedules)
        slower = (1 + self.drift) ** len(self.calls)
        figures = [self.latency_ms(**schedule) for schedule in schedules]
        return [None if ms is None else ms * slower for ms in figures]


def valley(rows, outer):
    return 1 + abs(rows - 7) + 2 * (outer == 0)


def last(*args, **options):
    return list(search(*args, **options))[-1]


@pytest.mark.parametrize("exhaustive_up_to", [16, 100])
def test_finds_the_fastest_and_says_what_it_took(exhaustive_up_to):
    bench = Bench(valley)
    steps = list(search(SPACE, DEFAULT, bench, exhaustive_up_to=exhaustive_up_to))
    assert steps[-1].best == {"rows": 7, "outer": 1} and steps[-1].latency_ms == 1
    assert [step.measured for step in steps] == sorted({step.measured for step in steps})
    asked = {tuple(schedule.items()) for call in bench.calls for schedule in call}
    assert steps[-1].measured == len(asked) <= 22


def test_descent_comes_back_to_a_parameter_once_another_has_moved():
    def crossed(rows, outer):
        return abs(rows - (6 if outer else 12)) + (0 if outer else 10) + 1

    assert last(SPACE, {"rows": 4, "outer": 0}, Bench(crossed)).best == {"rows": 6, "outer": 1}


def test_large_spaces_are_not_tried_as_a_whole():
    space = {name: tuple(range(10)) for name in "abcd"}
    bench = Bench(lambda **schedule: 1 + sum((value - 3) ** 2 for value in schedule.values()))
    step = last(space, dict.fromkeys("abcd", 0), bench)
    assert step.best == dict.fromkeys("abcd", 3)
    assert step.measured < 100


def test_the_best_so_far_is_in_every_comparison_and_none_challenges_twice():
    bench = Bench(valley)
    best, challengers = DEFAULT, []
    for call, step in enumerate(search(SPACE, DEFAULT, bench, together=4)):
        assert bench.calls[call][0] == best and 2 <= len(bench.calls[call]) <= 4
        challengers += [tuple(schedule.items()) for schedule in bench.calls[call][1:]]
        best = step.best
    assert len(challengers) == len(set(challengers))


def test_a_machine_that_slows_down_does_not_favour_what_came_first():
    assert last(SPACE, DEFAULT, Bench(valley, drift=0.5)).best == {"rows": 7, "outer": 1}


def test_a_gain_within_the_noise_moves_nothing():
    nearly = Bench(lambda rows, outer: 1 - 0.0005 * rows)
    assert last(SPACE, {"rows": 4, "outer": 0}, nearly).best == {"rows": 4, "outer": 0}


def test_a_screen_spares_the_dear_measure_and_finds_the_same():
    cheap, dear = Bench(valley), Bench(valley)
    step = last(SPACE, DEFAULT, dear, screen=cheap)
    assert step.best == {"rows": 7, "outer": 1} and step.latency_ms == 1
    assert max(len(call) for call in dear.calls) == 1 + 3
    assert sum(map(len, dear.calls)) < sum(map(len, cheap.calls))


def test_a_screen_that_sees_nothing_decides_nothing():
    def blind(schedules):
        return [None] * len(schedules)

    assert last(SPACE, {"rows": 6, "outer": 1}, Bench(valley), screen=blind).latency_ms <= 2


def test_a_misled_screen_never_makes_it_slower_than_the_default():
    backwards = Bench(lambda rows, outer: 1 / valley(rows, outer))
    assert valley(**last(SPACE, DEFAULT, Bench(valley), screen=backwards).best) <= valley(**DEFAULT)


def test_schedules_without_a_figure_never_win():
    only_odd = Bench(lambda rows, outer: None if rows % 2 == 0 else valley(rows + 1, outer))
    step = last(SPACE, DEFAULT, only_odd)
    assert step.best["rows"] in (5, 7) and step.latency_ms == 2
    nothing = last(SPACE, DEFAULT, Bench(lambda rows, outer: None))
    assert nothing.best == DEFAULT and nothing.latency_ms is None


def test_nothing_to_choose_is_the_default():
    bench = Bench(lambda: 1.0)
    assert last({}, {}, bench).best == {} and bench.calls == []


@given(st.integers(0, 2**32), st.lists(st.floats(0.1, 10), min_size=22, max_size=22))
@settings(max_examples=50)
def test_deterministic_by_seed_and_never_slower_than_the_default(seed, figures):
    def latency_ms(rows, outer):
        return figures[2 * (rows - 4) + outer]

    runs = [list(search(SPACE, DEFAULT, Bench(latency_ms), seed=seed)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert latency_ms(**runs[0][-1].best) <= latency_ms(**DEFAULT)
