"""Measured energy of a launch, from a cumulative meter.

Meters update in steps: NVML's energy counter every 20 to 100 ms. So a window of launches runs
from one step to another, under load all the time, and is long against a step. Where a device has
two meters both are read and their disagreement is flagged. Nothing here is modelled; where no
meter can be read the figure is None and the reason is given.

The command records a meter at full rate; it lives in ``profiler.energy_recorder``.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from profiler.meters import Meter, NvmlCounterMeter, NvmlPowerMeter, RaplMeter, find_meter
from profiler.nvml import Unavailable

__all__ = [
    "EnergyReading",
    "EnergySettings",
    "Meter",
    "NvmlCounterMeter",
    "NvmlPowerMeter",
    "RaplMeter",
    "Unavailable",
    "find_meter",
    "measure_energy",
    "measuring_s",
]

# A window is at least this many steps of the meter long, and a batch this small a part of one.
_STEPS_PER_WINDOW = 20
_BATCHES_PER_STEP = 20

# Sensors of the same card are known to differ by -5.5 to +10.9 %.
# Source: Yang, Adamek and Armour, Part-time Power Measurements, 2023.
LARGEST_DISAGREEMENT = 0.11


@dataclass(frozen=True)
class EnergySettings:
    """How long to measure.

    Attributes:
        windows: Number of windows; their totals are added up.
        window_s: Length of one at least; a slow meter makes it longer.
        idle_s: How long the idle power is measured beforehand.

    Raises:
        ValueError: If one of them is not above 0.
    """

    windows: int = 3
    window_s: float = 5.0
    idle_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("windows", "window_s", "idle_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be above 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class EnergyReading:
    """Measured energy of one launch; ``reason`` is given exactly when a figure is missing.

    Attributes:
        energy_mj: Gross energy of one launch in mJ.
        energy_net_mj: The same above idle power.
        window_s: Total length of the windows in s.
        source: Name of the meter.
        reason: Why ``energy_mj``, or else ``energy_net_mj``, is None.
        windows_mj: Gross energy of one launch, window by window.
        check_mj: The same as ``energy_mj`` by the second meter; None where there is none.
        check_source: Name of that meter.
    """

    energy_mj: float | None = None
    energy_net_mj: float | None = None
    window_s: float | None = None
    source: str | None = None
    reason: str | None = None
    windows_mj: tuple[float, ...] = ()
    check_mj: float | None = None
    check_source: str | None = None

    def __post_init__(self) -> None:
        missing = self.energy_mj is None or self.energy_net_mj is None
        if missing != bool(self.reason):
            raise ValueError("reason is given exactly when a figure is missing")

    @property
    def variation(self) -> float | None:
        """Coefficient of variation over the windows; None with fewer than two."""
        if len(self.windows_mj) < 2:
            return None
        return statistics.stdev(self.windows_mj) / statistics.mean(self.windows_mj)

    @property
    def disagreement(self) -> float | None:
        """Second meter against the first, as a relative difference."""
        if not self.energy_mj or self.check_mj is None:
            return None
        return self.check_mj / self.energy_mj - 1

    @property
    def details(self) -> dict[str, str | float | None]:
        """Further facts of a row; ``energy_flag`` is there when the meters disagree."""
        facts: dict[str, str | float | None] = {}
        if self.variation is not None:
            facts["energy_cv"] = self.variation
        if self.disagreement is not None:
            facts["energy_check_mj"] = self.check_mj
            facts["energy_check_source"] = self.check_source
            if abs(self.disagreement) > LARGEST_DISAGREEMENT:
                facts["energy_flag"] = (
                    f"{self.check_source} gives {self.disagreement:+.0%} against {self.source}"
                )
        return facts


def measuring_s(meter: Meter, settings: EnergySettings) -> float:
    """About how long ``measure_energy`` takes for one row, to be told before it starts."""
    window_s = max(settings.window_s, _STEPS_PER_WINDOW * meter.step_s)
    # Idle: settling, and a step at either end. A window: the pause, the lead-in, both steps.
    return settings.idle_s + 2 * meter.step_s + settings.windows * (window_s + 2.5 * meter.step_s)


def measure_energy(
    launch: Callable[[int], None],
    meter: Meter,
    settings: EnergySettings,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
    held: int = 1,
) -> EnergyReading:
    """Measures the energy of a launch. The GPU or CPU has to be left alone meanwhile.

    Args:
        launch: ``launch(number)`` runs that many launches and returns when they are done.
        meter: From ``find_meter``.
        settings: How long to measure.
        clock: Time in s.
        sleep: Waits that many s.
        rng: Draws the random pauses before the windows.
        held: Launches of the kernel that each of those holds, where it is a graph of several.

    Returns:
        Gross and net energy of one launch, or the reason why there is none.
    """
    rng = rng or random.Random()
    try:
        with ExitStack() as sampling:
            for each in (meter, meter.check):
                if each is not None:
                    sampling.enter_context(each.sampling())
            idle_mw = _idle_power_mw(meter, settings.idle_s, clock, sleep)
            batch = _batch(launch, meter.step_s / _BATCHES_PER_STEP, clock)
            windows = []
            for _ in range(settings.windows):
                # Launches in step with the sensor would show it always the same phase.
                sleep(rng.uniform(0, meter.step_s))
                windows.append(_window(launch, batch, held, meter, settings.window_s, clock))
    except Unavailable as error:
        return EnergyReading(reason=str(error))
    return _reading(windows, idle_mw, meter)


@dataclass(frozen=True)
class _Window:
    """Energy by the meter and by its check (None where it has none), length and launches."""

    energy_mj: float
    check_mj: float | None
    length_s: float
    launches: int


def _reading(windows: list[_Window], idle_mw: float, meter: Meter) -> EnergyReading:
    launches = sum(window.launches for window in windows)
    window_s = sum(window.length_s for window in windows)
    gross_mj = sum(window.energy_mj for window in windows) / launches
    net_mj = gross_mj - idle_mw * window_s / launches
    checks_mj = [window.check_mj for window in windows if window.check_mj is not None]
    has_check = meter.check is not None and len(checks_mj) == len(windows)
    return EnergyReading(
        energy_mj=gross_mj,
        energy_net_mj=net_mj if net_mj > 0 else None,
        window_s=window_s,
        source=meter.name,
        reason=None if net_mj > 0 else "net: the launches draw no more than the idle power",
        windows_mj=tuple(window.energy_mj / window.launches for window in windows),
        check_mj=sum(checks_mj) / launches if has_check else None,
        check_source=meter.check.name if meter.check and has_check else None,
    )


def _idle_power_mw(
    meter: Meter, idle_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> float:
    def pause() -> None:
        sleep(meter.step_s / _BATCHES_PER_STEP)

    # What ran before has to leave an averaged reading first.
    sleep(meter.step_s)
    start_mj, start_s = _next_step(meter, pause, clock)
    sleep(idle_s)
    end_mj, end_s = _next_step(meter, pause, clock)
    return _growth_mj(meter, start_mj, end_mj) / (end_s - start_s)


def _batch(launch: Callable[[int], None], target_s: float, clock: Callable[[], float]) -> int:
    """Number of launches that take about ``target_s``, at least 1."""
    launch(1)
    number = 1
    while True:
        start_s = clock()
        launch(number)
        elapsed_s = clock() - start_s
        if elapsed_s >= target_s:
            return max(1, round(number * target_s / elapsed_s))
        number *= 2


def _window(
    launch: Callable[[int], None],
    batch: int,
    held: int,
    meter: Meter,
    window_s: float,
    clock: Callable[[], float],
) -> _Window:
    """One window, under load from step to step of the meter.

    Both ends are noticed up to one batch late, which cancels out but for that batch's jitter.
    """
    launches = 0

    def work(number: int = batch) -> None:
        nonlocal launches
        launch(number)
        launches += number * held

    lead_in_end_s = clock() + meter.step_s
    while clock() < lead_in_end_s:
        work()
    start_mj, start_s = _next_step(meter, work, clock)
    check_start_mj = _check_mj(meter)
    launches = 0
    end_s = start_s + max(window_s, _STEPS_PER_WINDOW * meter.step_s)
    # Reading the meter leaves the device idle for a moment: not inside the window.
    while clock() < end_s:
        work(batch * _BATCHES_PER_STEP)
    end_mj, end_s = _next_step(meter, work, clock)
    check_end_mj = _check_mj(meter)
    check_mj = None
    if check_start_mj is not None and check_end_mj is not None:
        check_mj = check_end_mj - check_start_mj
    return _Window(_growth_mj(meter, start_mj, end_mj), check_mj, end_s - start_s, launches)


def _check_mj(meter: Meter) -> float | None:
    """The second meter's reading; a check that fails costs no figure."""
    try:
        return None if meter.check is None else meter.check.read_mj()
    except Unavailable:
        return None


def _next_step(
    meter: Meter, meanwhile: Callable[[], None], clock: Callable[[], float]
) -> tuple[float, float]:
    """Does ``meanwhile`` until the meter advances; returns its reading in mJ and the time in s."""
    before_mj = now_mj = meter.read_mj()
    give_up_s = clock() + _STEPS_PER_WINDOW * meter.step_s
    while now_mj == before_mj:
        if clock() > give_up_s:
            raise Unavailable(f"the {meter.name} meter does not advance")
        meanwhile()
        now_mj = meter.read_mj()
    return now_mj, clock()


def _growth_mj(meter: Meter, start_mj: float, end_mj: float) -> float:
    if end_mj <= start_mj:
        raise Unavailable(f"the {meter.name} meter went backwards")
    return end_mj - start_mj


if __name__ == "__main__":
    from profiler.command_line import run
    from profiler.energy_recorder import app

    run(app)
