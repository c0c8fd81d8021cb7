"""The CPU's clock, as a fixed loop of arithmetic in registers sees it.

A virtual machine does not show its clock, and yet it may fall by a sixth for a quarter of a minute
when neighbours draw power. The loop's sums stay in registers, so that its rate is the clock's: the
same within 0.2 % in ten processes of a Zen 4.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from kernels.peaks import Peak, peaks

_LAUNCHES = 4


@functools.cache
def _loop(threads: int) -> Peak:
    return next(peak for peak in peaks(threads, 1) if peak.name == "fma_fp32")


def clock_rate(threads: int, now: Callable[[], float] = time.perf_counter) -> float:
    """10⁹ multiply-accumulates a second, by the fastest of some short loops.

    Takes a third of a ms.

    Args:
        threads: CPU threads that the loop runs on.
        now: Seconds.
    """
    loop = _loop(threads)
    lengths_s = []
    for _ in range(_LAUNCHES):
        start = now()
        loop.launch()
        lengths_s.append(now() - start)
    return loop.amount / min(lengths_s) / 1e9
