"""How much of its core this process has, beside what another guest takes of it.

Two threads of one core share its front end, its units and its first caches. A virtual machine is
not told when the other thread is a stranger's: no counter moves, the clock stays, and yet kernels
take 1.4 to 2 times as long for milliseconds or seconds. Short pieces of work that need all of a
core show it: one of an interpreter, many instructions at a time, and one of arithmetic on vectors.

What all of a core is has to be seen as well: not in the fastest look of all, which is of a moment
when the clock was high and gets faster the longer one looks, but in one that a few are faster than.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

# The best of so many: what an interrupt or a cold cache does to one of them is not meant.
_TRIES = 3
# For so long as a stranger rarely works without a pause.
_FIRST_LOOKS, _BETWEEN_S = 100, 3e-3
_ROWS = 48
# From this share on nothing is missing; and how long the core is left to itself where something is.
_WHOLE, _SETTLES_S = 0.9, 3e-4
# Of all looks, how many are faster than what counts as all of a core; and how finely they are told
# apart, in parts of their length.
_FASTER, _FINENESS = 0.03, 0.005


def _works() -> list[Callable[[], Any]]:
    factor, out = np.ones((2, _ROWS, _ROWS), dtype=np.float32)
    return [lambda: sum(range(300)), partial(np.matmul, factor, factor, out=out)]


class CoreShare:
    """Speed of the core that this thread is on, over that of a whole one: 0 to 1.

    A look takes some 15 µs, and 300 more where something is missing.

    Args:
        works: Pieces of work of a few µs.
        clock: Seconds.
        pause: Sleeps so many seconds.
    """

    def __init__(
        self,
        works: Sequence[Callable[[], Any]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        self._works = _works() if works is None else list(works)
        self._clock = clock
        self._lengths = [_Lengths() for _ in self._works]
        for _ in range(_FIRST_LOOKS):
            self()
            pause(_BETWEEN_S)

    def __call__(self) -> float:
        """Looks once, and once more where something is missing.

        After AMX a core is slower by up to a third for 60 to 300 µs: no neighbour does that.
        """
        share = self._look()
        if share < _WHOLE:
            start = self._clock()
            while self._clock() - start < _SETTLES_S:
                self._works[0]()
            share = max(share, self._look())
        return share

    def _look(self) -> float:
        share = 1.0
        for work, lengths in zip(self._works, self._lengths):
            taken_s = min(self._seconds(work) for _ in range(_TRIES))
            lengths.note(taken_s)
            share = min(share, lengths.shortest_s / taken_s)
        return share

    def _seconds(self, work: Callable[[], Any]) -> float:
        start = self._clock()
        work()
        return self._clock() - start


class _Lengths:
    """How long a piece of work took so far, and the short length that only few looks are below."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._looks = self._below = 0
        self._place: int | None = None

    def note(self, taken_s: float) -> None:
        """Counts one more."""
        place = math.floor(math.log(taken_s) / _FINENESS)
        self._looks += 1
        self._counts[place] += 1
        if self._place is None:
            self._place = place
        self._below += place < self._place
        while self._below > _FASTER * self._looks:
            self._place -= 1
            self._below -= self._counts[self._place]
        while self._below + self._counts[self._place] <= _FASTER * self._looks:
            self._below += self._counts[self._place]
            self._place += 1

    @property
    def shortest_s(self) -> float:
        """In s; infinite before the first."""
        return math.inf if self._place is None else math.exp((self._place + 0.5) * _FINENESS)
