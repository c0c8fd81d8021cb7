"""Traces that no device wrote: a GPU's counter and sensor as the literature describes them.

The counter updates every 20 to 100 ms, in whole mJ; the sensor updates every 100 ms with the mean
of the last quarter of that time. Both are read every ms, as the recorder would.

Source: Yang, Adamek and Armour, Part-time Power Measurements, 2023.
"""

import random
from collections.abc import Callable
from itertools import accumulate

from profiler.energy_trace import Trace, record

_READ_S = 1e-3
_SENSOR_READS = 100


def gpu_like_trace(watts_at: Callable[[float], float], seconds: float, seed: int = 0) -> Trace:
    """A trace of a load that draws ``watts_at(t_s)``; it says of itself that it is generated."""
    rng = random.Random(seed)
    watts = [watts_at(step * _READ_S) for step in range(round(seconds / _READ_S) + 2)]
    true_mj = [0.0, *accumulate(each * _READ_S * 1e3 for each in watts)]
    now, update, counter_mj, sensor_w = 0, 0, 0.0, watts[0]

    def read() -> tuple[float, float]:
        nonlocal now, update, counter_mj, sensor_w
        if now >= update:
            counter_mj = float(round(true_mj[now]))
            update = now + rng.randint(20, 100)
        if now and now % _SENSOR_READS == 0:
            seen = _SENSOR_READS // 4
            sensor_w = (true_mj[now] - true_mj[now - seen]) / (seen * _READ_S * 1e3)
        now += 1
        return counter_mj, round(sensor_w, 3)

    trace = record(read, seconds, "GPU-like, of no device", clock=lambda: now * _READ_S)
    return Trace("generated", trace.t_s, trace.energy_mj, trace.power_w, trace.about)
