"""Energy meters of this machine: NVML's counter, NVML's power integrated, RAPL.

A meter is cumulative and updates in steps. It is asked for while a device is measured; where it
cannot be read, or reads more than this process's load, it says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from profiler.contamination import Contamination, host_contamination
from profiler.device import DeviceInfo
from profiler.nvml import Probe, Unavailable, open_probe

# RAPL cannot tell processes apart: beyond this share of all CPUs, others are no background.
_LARGEST_OTHERS_SHARE = 0.05


class Meter(Protocol):
    """A cumulative energy meter; ``profiler.energy_trace`` has one that plays back a recording.

    Attributes:
        name: Goes to the store as ``energy_source``.
        step_s: Longest time that it takes to follow a change, in s.
        check: A second meter of the same device, to be read beside; None where there is none.
    """

    name: str
    step_s: float
    check: Meter | None

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
    """NVML's energy counter, checked by the power where that can be read too."""

    name = "nvml-counter"
    step_s = 0.1

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.check: Meter | None
        try:
            self.check = NvmlPowerMeter(probe)
        except Unavailable:
            self.check = None

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

    check: Meter | None = None

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

    They cover all that runs on the processor: a steady other load counts only in the gross
    figure, and a large one leaves no figure. The counters wrap around; read them at least once a
    minute.

    Source: Linux kernel, Documentation/power/powercap/powercap.rst.
    """

    name = "rapl"
    # The counters themselves update every 1 ms.
    step_s = 0.01
    check: Meter | None = None

    def __init__(
        self,
        packages: tuple[Path, ...],
        contamination: Contamination | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._packages = packages
        self._contamination = contamination or host_contamination()
        self._clock = clock
        self._ranges_uj = [_read_uj(package / "max_energy_range_uj") for package in packages]
        self._last_uj = self._read_all_uj()
        self._total_uj = 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Makes sure afterwards that the processor was ours, but for a background."""
        start_s, before_s = self._clock(), self._contamination.others_s()
        yield
        others_s = self._contamination.others_s() - before_s
        if others_s > _LARGEST_OTHERS_SHARE * (self._clock() - start_s):
            share = others_s / (self._clock() - start_s)
            raise Unavailable(f"RAPL: other processes used {share:.0%} of all CPUs meanwhile")

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
