"""A GPU that is none: its power and its counter's steps are given, so its true joules are known."""

import random
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from profiler.energy import EnergyReading, EnergySettings, NvmlCounterMeter, measure_energy
from profiler.nvml import Power, Unavailable

QUICK = EnergySettings(windows=2, window_s=2.0, idle_s=0.5)


@dataclass
class SimulatedGpu:
    """A GPU in simulated time, and the probe that reads it.

    Its counter shows the true energy as of the last of its updates, which come every 20 to
    100 ms, and costs time to read.
    """

    launch_s: float = 1e-4
    idle_w: float = 60.0
    load_w: float = 300.0
    update_s: tuple[float, float] = (0.02, 0.1)
    read_s: float = 1e-3
    fails_at_s: float = float("inf")
    others: tuple[int, ...] = ()
    is_mig: bool = False
    power_kind: str = "instant"
    has_counter: bool = True
    now_s: float = 0.0
    launched: int = 0
    true_mj: float = 5e6
    shown_mj: float = 5e6
    next_update_s: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    history: list[tuple[float, float]] = field(default_factory=list)

    def pass_time(self, seconds: float, watts: float) -> None:
        end_s = self.now_s + seconds
        while self.next_update_s <= end_s:
            self.true_mj += max(0.0, self.next_update_s - self.now_s) * watts * 1e3
            self.now_s = max(self.now_s, self.next_update_s)
            self.shown_mj = round(self.true_mj)
            self.next_update_s += self.rng.uniform(*self.update_s)
        self.true_mj += (end_s - self.now_s) * watts * 1e3
        self.now_s = end_s
        self.history.append((self.now_s, self.true_mj))

    def launch(self, number: int) -> None:
        self.launched += number
        self.pass_time(number * self.launch_s, self.load_w)

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, self.idle_w)

    def clock(self) -> float:
        return self.now_s

    def energy_mj(self) -> float:
        if not self.has_counter:
            raise Unavailable("energy counter: not supported by this GPU")
        if self.now_s >= self.fails_at_s:
            raise Unavailable("energy counter: the GPU was lost")
        self.pass_time(self.read_s, self.idle_w)
        return self.shown_mj

    def power(self) -> Power:
        return Power(self.load_w, self.power_kind)

    def mig(self) -> bool:
        return self.is_mig

    def other_processes(self) -> tuple[int, ...]:
        return self.others

    def measure(self, meter=None, how=QUICK) -> EnergyReading:
        if meter is None:
            meter = NvmlCounterMeter(self)
            # The real one samples in wall time.
            meter.check = None
        return measure_energy(self.launch, meter, how, self.clock, self.sleep, rng=random.Random(1))


@dataclass
class SimulatedSensor:
    """A power sensor that looks only at the last part of each period, integrated without error."""

    gpu: SimulatedGpu
    period_s: float = 0.1
    coverage: float = 0.25
    gain: float = 1.0
    name: str = "simulated-power"
    check: None = None
    integral_mj: float = 0.0
    periods: int = 0

    @property
    def step_s(self) -> float:
        return self.period_s

    def sampling(self):
        self.periods = int(self.gpu.now_s / self.period_s)
        return nullcontext()

    def read_mj(self) -> float:
        times_s, energies_mj = zip(*self.gpu.history)
        while (self.periods + 1) * self.period_s <= self.gpu.now_s:
            self.periods += 1
            end_s = self.periods * self.period_s
            start_s = end_s - self.coverage * self.period_s
            seen_mj = np.diff(np.interp([start_s, end_s], times_s, energies_mj))[0]
            self.integral_mj += self.gain * seen_mj / self.coverage
        return self.integral_mj
