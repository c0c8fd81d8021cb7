"""Measured energy of a launch, from a cumulative meter.

Meters update in steps: NVML's energy counter every 20 to 100 ms. So a window of launches runs
from one step to another, under load all the time, and is long against a step. Nothing here is
modelled; where no meter can be read the figure is None and the reason is given.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from profiler.device import DeviceInfo
from profiler.nvml import Probe, Unavailable, open_probe

# A window is at least this many steps of the meter long, and a batch this small a part of one.
_STEPS_PER_WINDOW = 20
_BATCHES_PER_STEP = 20


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
    """

    energy_mj: float | None = None
    energy_net_mj: float | None = None
    window_s: float | None = None
    source: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        missing = self.energy_mj is None or self.energy_net_mj is None
        if missing != bool(self.reason):
            raise ValueError("reason is given exactly when a figure is missing")


class Meter(Protocol):
    """A cumulative energy meter; ``profiler.energy_trace`` has one that plays back a recording.

    Attributes:
        name: Goes to the store as ``energy_source``.
        step_s: Longest time that it takes to follow a change, in s.
    """

    name: str
    step_s: float

    def sampling(self) -> AbstractContextManager[Any]:
        """Holds while the meter is read.

        Raises:
            Unavailable: If what it would read is not this process's load alone.
        """

    def read_mj(self) -> float:
        """Energy in mJ since any fixed moment.

        Raises:
            Unavailable: If it cannot be read, or no longer.
        """


def _require_gpu_alone(probe: Probe) -> None:
    if probe.mig():
        raise Unavailable("MIG: the counter covers the whole GPU")
    others = probe.other_processes()
    if others:
        raise Unavailable(f"other processes run on this GPU ({', '.join(map(str, others))})")


class NvmlCounterMeter:
    """NVML's energy counter."""

    name = "nvml-counter"
    step_s = 0.1

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Makes sure before and after that the GPU was ours alone."""
        _require_gpu_alone(self._probe)
        yield
        _require_gpu_alone(self._probe)

    def read_mj(self) -> float:
        """The counter in mJ."""
        return self._probe.energy_mj()


class NvmlPowerMeter:
    """NVML's power, sampled in a thread and integrated by the trapezoidal rule.

    For GPUs without an energy counter. Its name says which power: ``nvml-power-instant``, or
    ``nvml-power-usage`` which may be averaged over 1 s.
    """

    def __init__(
        self,
        probe: Probe,
        interval_s: float = 0.02,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        kind = probe.power().kind
        self.name = f"nvml-power-{kind}"
        self.step_s = {"instant": 0.1, "usage": 1.0}[kind]
        self._probe = probe
        self._interval_s = interval_s
        self._clock = clock
        self._energy_mj = 0.0
        self._last: tuple[float, float] | None = None
        self._failure: Unavailable | None = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Samples in a thread, and makes sure that the GPU was ours alone."""
        _require_gpu_alone(self._probe)
        self._last = self._failure = None
        self.sample()
        ended = threading.Event()
        thread = threading.Thread(target=self._sample_until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        _require_gpu_alone(self._probe)

    def _sample_until(self, ended: threading.Event) -> None:
        while not ended.wait(self._interval_s):
            try:
                self.sample()
            except Unavailable as error:
                self._failure = error
                return

    def sample(self) -> None:
        """Takes one sample and adds the trapezoid since the last one."""
        watts, now_s = self._probe.power().watts, self._clock()
        if self._last is not None:
            last_s, last_watts = self._last
            self._energy_mj += (watts + last_watts) / 2 * (now_s - last_s) * 1e3
        self._last = (now_s, watts)

    def read_mj(self) -> float:
        """The integral in mJ, up to the last sample."""
        if self._failure is not None:
            raise self._failure
        return self._energy_mj


class RaplMeter:
    """RAPL's package counters, all packages added up.

    They cover all that runs on the processor: other load counts in, a steady one only in the
    gross figure. The counters wrap around; read them at least once a minute.

    Source: Linux kernel, Documentation/power/powercap/powercap.rst.
    """

    name = "rapl"
    # The counters themselves update every 1 ms.
    step_s = 0.01

    def __init__(self, packages: tuple[Path, ...]) -> None:
        self._packages = packages
        self._ranges_uj = [_read_uj(package / "max_energy_range_uj") for package in packages]
        self._last_uj = self._read_all_uj()
        self._total_uj = 0

    def sampling(self) -> AbstractContextManager[Any]:
        """Needs nothing."""
        return nullcontext()

    def _read_all_uj(self) -> list[int]:
        return [_read_uj(package / "energy_uj") for package in self._packages]

    def read_mj(self) -> float:
        """Energy in mJ since the meter was made."""
        now_uj = self._read_all_uj()
        for now, last, wrap in zip(now_uj, self._last_uj, self._ranges_uj):
            self._total_uj += now - last if now >= last else now - last + wrap
        self._last_uj = now_uj
        return self._total_uj / 1e3


def _read_uj(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise Unavailable("RAPL is not readable (permission denied)") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"RAPL: {path} cannot be read ({error})") from error


def _is_package(zone: Path) -> bool:
    # The other zones (core, dram, psys) count again what the packages count, or what lies beside.
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def find_meter(
    device: DeviceInfo, nvml: Any = None, powercap: Path = Path("/sys/class/powercap")
) -> Meter:
    """The best meter that this machine has for a device.

    Args:
        device: Who is to be measured; a GPU is found by its UUID.
        nvml: Stands in for the module ``pynvml``.
        powercap: Where Linux shows RAPL.

    Raises:
        Unavailable: If there is none; the message is the reason.
    """
    if device.kind == "cpu":
        packages = tuple(filter(_is_package, sorted(powercap.glob("intel-rapl:*"))))
        if not packages:
            raise Unavailable("RAPL is not exposed on this machine")
        return RaplMeter(packages)
    if device.uuid is None:
        raise Unavailable("the GPU's UUID is not known")
    probe = open_probe(device.uuid, nvml)
    _require_gpu_alone(probe)
    try:
        probe.energy_mj()
    except Unavailable:
        return NvmlPowerMeter(probe)
    return NvmlCounterMeter(probe)


def measure_energy(
    launch: Callable[[int], None],
    meter: Meter,
    settings: EnergySettings,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    rng: random.Random | None = None,
) -> EnergyReading:
    """Measures the energy of a launch. The GPU or CPU has to be left alone meanwhile.

    Args:
        launch: ``launch(number)`` runs that many launches and returns when they are done.
        meter: From ``find_meter``.
        settings: How long to measure.
        clock: Time in s.
        sleep: Waits that many s.
        rng: Draws the random pauses before the windows.

    Returns:
        Gross and net energy of one launch, or the reason why there is none.
    """
    rng = rng or random.Random()
    energy_mj = window_s = 0.0
    launches = 0
    try:
        with meter.sampling():
            idle_mw = _idle_power_mw(meter, settings.idle_s, clock, sleep)
            batch = _batch(launch, meter.step_s / _BATCHES_PER_STEP, clock)
            for _ in range(settings.windows):
                # Launches in step with the sensor would show it always the same phase.
                sleep(rng.uniform(0, meter.step_s))
                window = _window(launch, batch, meter, settings.window_s, clock)
                energy_mj += window[0]
                window_s += window[1]
                launches += window[2]
    except Unavailable as error:
        return EnergyReading(reason=str(error))
    gross_mj = energy_mj / launches
    net_mj = gross_mj - idle_mw * window_s / launches
    if net_mj <= 0:
        return EnergyReading(
            energy_mj=gross_mj,
            window_s=window_s,
            source=meter.name,
            reason="net: the launches draw no more than the idle power",
        )
    return EnergyReading(gross_mj, net_mj, window_s, meter.name)


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
    meter: Meter,
    window_s: float,
    clock: Callable[[], float],
) -> tuple[float, float, int]:
    """Energy in mJ, length in s and launches of one window, under load from step to step.

    Both ends are noticed up to one batch late, which cancels out but for that batch's jitter.
    """
    launches = 0

    def work(number: int = batch) -> None:
        nonlocal launches
        launch(number)
        launches += number

    lead_in_end_s = clock() + meter.step_s
    while clock() < lead_in_end_s:
        work()
    start_mj, start_s = _next_step(meter, work, clock)
    launches = 0
    end_s = start_s + max(window_s, _STEPS_PER_WINDOW * meter.step_s)
    # Reading the meter leaves the device idle for a moment: not inside the window.
    while clock() < end_s:
        work(batch * _BATCHES_PER_STEP)
    end_mj, end_s = _next_step(meter, work, clock)
    return _growth_mj(meter, start_mj, end_mj), end_s - start_s, launches


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
