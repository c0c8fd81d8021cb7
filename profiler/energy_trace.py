"""Energy traces: what a device's meters read over time, as CSV, recorded or generated; playback."""

from __future__ import annotations

import csv
import math
import statistics
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from profiler.command_line import BadInput
from profiler.meters import Meter
from profiler.nvml import Unavailable
from profiler.whole_file import whole_file

Origin = Literal["recorded", "generated"]
Kind = Literal["counter", "power"]

# NVML's power may be an average over the last second.
_SLOWEST_SENSOR_S = 1.0

_COLUMNS = ["t_s", "energy_mj", "power_w"]


@dataclass(frozen=True)
class Trace:
    """Readings over time: a cumulative energy, a power, or both at the same times.

    Attributes:
        origin: ``recorded`` from a device or ``generated`` by a program.
        t_s: Times in s, rising.
        energy_mj: Counter in mJ at each time; None where there was none.
        power_w: Power in W at each time; None where there was none.
        about: What was recorded, in one line: device, driver, load.

    Raises:
        ValueError: If lengths differ, times do not rise, or there are no readings.
    """

    origin: Origin
    t_s: tuple[float, ...]
    energy_mj: tuple[float, ...] | None = None
    power_w: tuple[float, ...] | None = None
    about: str = ""

    def __post_init__(self) -> None:
        if self.origin not in get_args(Origin):
            raise ValueError(f"origin: must be recorded or generated, got {self.origin!r}")
        if "\n" in self.about:
            raise ValueError("about: must be one line")
        columns = [values for values in (self.energy_mj, self.power_w) if values is not None]
        if not columns:
            raise ValueError("energy_mj, power_w: at least one of them has to be given")
        if len(self.t_s) < 2 or any(len(values) != len(self.t_s) for values in columns):
            raise ValueError("t_s: at least two times are needed, and a reading for each")
        if not all(math.isfinite(value) for values in (self.t_s, *columns) for value in values):
            raise ValueError("t_s: times and readings have to be finite")
        if any(later <= earlier for earlier, later in pairwise(self.t_s)):
            raise ValueError("t_s: times have to rise")

    @property
    def length_s(self) -> float:
        """Time from the first to the last reading."""
        return self.t_s[-1] - self.t_s[0]

    def cumulative_mj(self, kind: Kind) -> tuple[float, ...] | None:
        """The counter, or the power integrated by the trapezoidal rule, in mJ."""
        if kind == "counter" or self.power_w is None:
            return self.energy_mj if kind == "counter" else None
        return tuple(accumulate(_trapezoids_mj(self.t_s, self.power_w), initial=0.0))

    def gaps_s(self, kind: Kind) -> list[float]:
        """Times between one change of the reading and the next; the first from the start on."""
        readings = self.energy_mj if kind == "counter" else self.power_w
        changes = [
            t_s
            for t_s, (before, after) in zip(self.t_s[1:], pairwise(readings or ()))
            if after != before
        ]
        return [later - earlier for earlier, later in pairwise([self.t_s[0], *changes])]


def _trapezoids_mj(t_s: Sequence[float], power_w: Sequence[float]) -> list[float]:
    return [
        (t1 - t0) * (p0 + p1) / 2 * 1e3
        for (t0, t1), (p0, p1) in zip(pairwise(t_s), pairwise(power_w))
    ]


def record(
    read: Callable[[], tuple[float | None, float | None]],
    seconds: float,
    about: str,
    load: Callable[[], Any] | None = None,
    progress: Callable[[float], Any] = lambda elapsed_s: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Trace:
    """Reads as fast as the device answers. Of equal readings only the first and last are kept.

    Args:
        read: Energy in mJ and power in W, each None where the device does not tell.
        seconds: How long.
        about: What is recorded, in one line.
        load: Called again and again meanwhile, in a thread of its own.
        progress: Told the time now and then.
        clock: Time in s.

    Raises:
        Unavailable: If a reading fails.
        ValueError: If nothing was read twice.
    """
    rows: list[tuple[float, float | None, float | None]] = []
    ended = threading.Event()
    thread = threading.Thread(target=_repeat_until, args=(ended, load), daemon=True)
    thread.start()
    try:
        start_s = told_s = clock()
        while (now_s := clock()) - start_s <= seconds:
            energy_mj, power_w = read()
            # The reading is from between the two looks at the clock.
            row = ((now_s + clock()) / 2 - start_s, energy_mj, power_w)
            if len(rows) > 1 and row[1:] == rows[-1][1:] == rows[-2][1:]:
                rows.pop()
            rows.append(row)
            if now_s - told_s > 0.5:
                progress(now_s - start_s)
                told_s = now_s
    finally:
        ended.set()
        thread.join()
    t_s, energies_mj, powers_w = zip(*rows) if rows else ((), (), ())
    return Trace(
        "recorded",
        t_s,
        None if None in energies_mj else energies_mj,
        None if None in powers_w else powers_w,
        about,
    )


def _repeat_until(ended: threading.Event, load: Callable[[], Any] | None) -> None:
    while load is not None and not ended.is_set():
        load()


def summary(trace: Trace) -> list[str]:
    """How often the readings change and what they add up to, line by line for people."""
    lines = [f"{len(trace.t_s)} readings in {trace.length_s:.1f} s"]
    means_w = {}
    for kind in get_args(Kind):
        total_mj = trace.cumulative_mj(kind)
        if total_mj is None:
            lines.append(f"{kind}: not recorded")
            continue
        means_w[kind] = (total_mj[-1] - total_mj[0]) / trace.length_s / 1e3
        gaps_s = trace.gaps_s(kind)[1:]
        period = "changes hardly ever"
        if gaps_s:
            low, middle, high = min(gaps_s), statistics.median(gaps_s), max(gaps_s)
            period = f"changes every {middle * 1e3:.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})"
        lines.append(f"{kind}: {means_w[kind]:.4g} W on average, {period}")
    if len(means_w) == 2 and means_w["counter"]:
        lines.append(f"power integrated / counter: {means_w['power'] / means_w['counter']:.3f}")
    return lines


def save_trace(trace: Trace, path: Path) -> None:
    """Writes a trace as CSV, all or nothing; the first line says if it is recorded or generated."""
    empty = ("",) * len(trace.t_s)
    with whole_file(path) as part, part.open("w", newline="") as file:
        file.write(f"{_header(trace.origin)}\n# {trace.about}\n")
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
    if not "".join(lines[1:2]).startswith("#"):
        raise BadInput(f"{path}: line 2 must start with # and say what was recorded")
    if lines[2:3] != [",".join(_COLUMNS)]:
        raise BadInput(f"{path}: line 3 must be {','.join(_COLUMNS)}")
    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for number, row in enumerate(csv.reader(lines[3:]), start=4):
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
            about=lines[1].removeprefix("#").strip(),
        )
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def _header(origin: Origin) -> str:
    return f"# energy trace, {origin}"


class ReplayMeter:
    """Plays back a trace: at ``start + t`` it reads what was noted at ``t``.

    The counter where the trace has one, with the power as its check; else the power.
    """

    def __init__(
        self,
        trace: Trace,
        clock: Callable[[], float] = time.perf_counter,
        kind: Kind | None = None,
    ) -> None:
        kind = kind or ("power" if trace.energy_mj is None else "counter")
        readings_mj = trace.cumulative_mj(kind)
        if readings_mj is None:
            raise Unavailable(f"the trace has no {kind}")
        self.name = f"replay-{kind}"
        self.step_s = max(trace.gaps_s(kind), default=trace.length_s)
        if kind == "power":
            # Its integral advances all the time, also where the power stays.
            self.step_s = min(self.step_s, _SLOWEST_SENSOR_S)
        has_check = kind == "counter" and trace.power_w is not None
        self.check: Meter | None = ReplayMeter(trace, clock, "power") if has_check else None
        self._kind = kind
        self._trace = trace
        self._readings_mj = readings_mj
        self._clock = clock
        self._start_s: float | None = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Starts the playback."""
        self._start_s = self._clock()
        yield

    def read_mj(self) -> float:
        """What the trace had counted by now, in mJ."""
        if self._start_s is None:
            self._start_s = self._clock()
        elapsed_s = self._clock() - self._start_s
        if elapsed_s > self._trace.length_s:
            raise Unavailable(f"the trace ends after {self._trace.length_s:g} s")
        t_s = self._trace.t_s[0] + elapsed_s
        if self._kind == "power":
            return float(np.interp(t_s, self._trace.t_s, self._readings_mj))
        return self._readings_mj[bisect_right(self._trace.t_s, t_s) - 1]
