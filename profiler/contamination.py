"""Time that this machine lost to others while something was measured, as counters that only grow.

An involuntary context switch alone does not say whether 5 µs or 40 ms were lost, and a quiet
machine makes some 20 a second. The scheduler's run-queue delay says how long it was.

Source: Linux Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat; proc_stat(5).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from profiler.shared_core import CoreShare

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STAT = Path("/proc/stat")
_SCHEDSTAT = Path("/proc/self/schedstat")


def _never() -> float:
    return 0.0


@dataclass(frozen=True)
class Contamination:
    """Counters of the time lost to others.

    Attributes:
        waited_s: Time that threads of this process were ready and had no CPU; read per sample.
        stolen_s: Time that the hypervisor gave to other guests; read per burst, since it is
            counted in ticks of 10 ms.
        others_s: CPU time of all other processes, divided by the number of CPUs; in ticks too, so
            that it means something over a whole measurement only.
        core_share: No counter: how fast the core works now beside its fastest, 0 to 1; read before
            and after each sample. None: nobody looks. See ``profiler.shared_core``.
        clock_rate: Nor this: how fast the CPU's clock is now; read before the rest and after the
            samples of each burst. None: nobody looks. See ``profiler.clock``.
    """

    waited_s: Callable[[], float] = _never
    stolen_s: Callable[[], float] = _never
    others_s: Callable[[], float] = _never
    core_share: Callable[[], float] | None = None
    clock_rate: Callable[[], float] | None = None


NO_CONTAMINATION = Contamination()


@cache
def host_contamination() -> Contamination:
    """Counters of this machine, the same ones at each call.

    Where the scheduler's delays cannot be read, each involuntary switch counts as 1 ms.
    """
    has_stat = _STAT.is_file()
    return Contamination(
        waited_s=RunQueueDelay() if _SCHEDSTAT.is_file() else _involuntary_switches_ms,
        stolen_s=_steal_s if has_stat else _never,
        others_s=_others_s if has_stat else _never,
        core_share=CoreShare(),
    )


class RunQueueDelay:
    """Run-queue delay of this process in s, summed over its threads, those that ended included.

    Its files stay open: opening them at each reading would take 45 µs instead of 6 (six threads),
    time that no sample and no kernel is running.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._delays_ns: dict[str, int] = {}

    def __call__(self) -> float:
        """Reads the counter."""
        threads = os.listdir("/proc/self/task")  # noqa: PTH208 a Path each would take as long again
        for ended in self._files.keys() - set(threads):
            os.close(self._files.pop(ended))
        for thread in threads:
            try:
                if thread not in self._files:
                    path = f"/proc/self/task/{thread}/schedstat"
                    self._files[thread] = os.open(path, os.O_RDONLY)
                reading = os.pread(self._files[thread], 64, 0)
            except OSError:  # the thread ended since the listing
                continue
            self._delays_ns[thread] = int(reading.split()[1])
        return sum(self._delays_ns.values()) / 1e9


def _involuntary_switches_ms() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw / 1e3


def _ticks() -> list[int]:
    with _STAT.open() as stat:
        return [int(field) for field in stat.readline().split()[1:]]


def _steal_s() -> float:
    return _ticks()[7] / _TICKS_PER_S


def _others_s() -> float:
    user, nice, system, _idle, _waiting, irq, softirq, *_ = _ticks()
    busy_s = (user + nice + system + irq + softirq) / _TICKS_PER_S
    return (busy_s - time.process_time()) / (os.cpu_count() or 1)
