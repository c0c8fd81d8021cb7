"""Energy traces: what a meter read over time, as CSV, recorded or generated, and their playback."""

from __future__ import annotations

import csv
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, get_args

from profiler.command_line import BadInput
from profiler.nvml import Unavailable

Origin = Literal["recorded", "generated"]

_COLUMNS = ["t_s", "energy_mj", "power_w"]


@dataclass(frozen=True)
class Trace:
    """A meter's readings over time: a cumulative energy, or a power.

    Attributes:
        origin: ``recorded`` from a device or ``generated`` by a program.
        t_s: Times in s, rising.
        energy_mj: Counter in mJ at each time; None for a trace of power.
        power_w: Power in W at each time; None for a trace of a counter.

    Raises:
        ValueError: If lengths differ, times do not rise, or not exactly one of both is given.
    """

    origin: Origin
    t_s: tuple[float, ...]
    energy_mj: tuple[float, ...] | None = None
    power_w: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.origin not in get_args(Origin):
            raise ValueError(f"origin: must be recorded or generated, got {self.origin!r}")
        if (self.energy_mj is None) == (self.power_w is None):
            raise ValueError("energy_mj, power_w: exactly one of them has to be given")
        values = self.energy_mj or self.power_w or ()
        if len(self.t_s) < 2 or len(values) != len(self.t_s):
            raise ValueError("t_s: at least two times are needed, and a reading for each")
        if not all(map(math.isfinite, self.t_s + values)):
            raise ValueError("t_s: times and readings have to be finite")
        if any(later <= earlier for earlier, later in pairwise(self.t_s)):
            raise ValueError("t_s: times have to rise")

    @property
    def length_s(self) -> float:
        """Time from the first to the last reading."""
        return self.t_s[-1] - self.t_s[0]

    @cached_property
    def cumulative_mj(self) -> tuple[float, ...]:
        """The counter, or the power integrated by the trapezoidal rule, in mJ."""
        if self.power_w is None:
            return self.energy_mj or ()
        return tuple(accumulate(_trapezoids_mj(self.t_s, self.power_w), initial=0.0))

    @cached_property
    def step_s(self) -> float:
        """Longest time between two changes of the counter."""
        changes = [
            t_s
            for t_s, (before, after) in zip(self.t_s[1:], pairwise(self.cumulative_mj))
            if after != before
        ]
        gaps = [later - earlier for earlier, later in pairwise([self.t_s[0], *changes])]
        return max(gaps, default=self.length_s)

    def energy_mj_at(self, elapsed_s: float) -> float | None:
        """The counter in mJ that long after the first reading; None past the last one."""
        if elapsed_s > self.length_s:
            return None
        return self.cumulative_mj[bisect_right(self.t_s, self.t_s[0] + elapsed_s) - 1]


def _trapezoids_mj(t_s: Sequence[float], power_w: Sequence[float]) -> list[float]:
    return [
        (t1 - t0) * (p0 + p1) / 2 * 1e3
        for (t0, t1), (p0, p1) in zip(pairwise(t_s), pairwise(power_w))
    ]


def save_trace(trace: Trace, path: Path) -> None:
    """Writes a trace as CSV; its first line says whether it is recorded or generated."""
    empty = ("",) * len(trace.t_s)
    with path.open("w", newline="") as file:
        file.write(_header(trace.origin) + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(zip(trace.t_s, trace.energy_mj or empty, trace.power_w or empty))


def load_trace(path: Path) -> Trace:
    """Reads a trace written by ``save_trace``, or by hand.

    Raises:
        BadInput: Naming the file and the line or column that is wrong.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    if lines[:1] not in [[_header(origin)] for origin in get_args(Origin)]:
        raise BadInput(f"{path}: line 1 must be {_header('recorded')!r}, or generated")
    if lines[1:2] != [",".join(_COLUMNS)]:
        raise BadInput(f"{path}: line 2 must be {','.join(_COLUMNS)}")
    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for number, row in enumerate(csv.reader(lines[2:]), start=3):
        if len(row) != len(_COLUMNS):
            raise BadInput(f"{path}: line {number} has {len(row)} columns, not {len(_COLUMNS)}")
        for name, text in zip(_COLUMNS, row):
            try:
                columns[name] += [float(text)] if text else []
            except ValueError:
                raise BadInput(f"{path}: line {number}, {name}: {text!r} is no number") from None
    try:
        return Trace(
            origin="recorded" if lines[0] == _header("recorded") else "generated",
            t_s=tuple(columns["t_s"]),
            energy_mj=tuple(columns["energy_mj"]) or None,
            power_w=tuple(columns["power_w"]) or None,
        )
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def _header(origin: Origin) -> str:
    return f"# energy trace, {origin}"


class ReplayMeter:
    """Plays back a trace: at ``start + t`` it reads what was noted at ``t``."""

    name = "replay"

    def __init__(self, trace: Trace, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trace = trace
        self._clock = clock
        self._start_s: float | None = None
        self.step_s = trace.step_s

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Starts the playback."""
        self._start_s = self._clock()
        yield

    def read_mj(self) -> float:
        """What the trace had counted by now, in mJ."""
        if self._start_s is None:
            self._start_s = self._clock()
        energy_mj = self._trace.energy_mj_at(self._clock() - self._start_s)
        if energy_mj is None:
            raise Unavailable(f"the trace ends after {self._trace.length_s:g} s")
        return energy_mj
