"""How much of its core this process has, beside what another guest takes of it.

Two threads of one core share its front end, its units and its first caches. A virtual machine is
not told when the other thread is a stranger's: no counter moves, the clock stays, and yet kernels
take 1.4 to 2 times as long for milliseconds or seconds. Short pieces of work that need all of a
core show it: one of an interpreter, many instructions at a time, and one of arithmetic on vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

# The best of so many: what an interrupt or a cold cache does to one of them is not meant.
_TRIES = 3
# For so long as a stranger rarely works without a pause.
_FIRST_LOOKS, _BETWEEN_S = 100, 3e-3
_ROWS = 48


def _works() -> list[Callable[[], Any]]:
    factor, out = np.ones((2, _ROWS, _ROWS), dtype=np.float32)
    return [lambda: sum(range(300)), partial(np.matmul, factor, factor, out=out)]


class CoreShare:
    """Speed of the core that this thread is on, over the fastest seen: 0 to 1; takes some 15 µs.

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
        self._fastest_s = [float("inf")] * len(self._works)
        for _ in range(_FIRST_LOOKS):
            self()
            pause(_BETWEEN_S)

    def __call__(self) -> float:
        """Looks once."""
        share = 1.0
        for place, work in enumerate(self._works):
            taken_s = min(self._seconds(work) for _ in range(_TRIES))
            self._fastest_s[place] = min(self._fastest_s[place], taken_s)
            share = min(share, self._fastest_s[place] / taken_s)
        return share

    def _seconds(self, work: Callable[[], Any]) -> float:
        start = self._clock()
        work()
        return self._clock() - start
