"""A device that is none: its kernels give what the oracle says and take the time that is told."""

from dataclasses import dataclass, field

import torch

from kernels.build import Kernel
from kernels.reference import oracle
from kernels.targets import KernelTarget
from profiler.device import DeviceInfo
from profiler.energy import EnergyReading
from profiler.samples import Timing, TimingSettings


def timing(latency_ms: float) -> Timing:
    """Without any noise."""
    return Timing(
        latency_ms=latency_ms,
        latency_low_ms=latency_ms,
        latency_high_ms=latency_ms,
        latency_p10_ms=latency_ms,
        latency_p90_ms=latency_ms,
        samples_kept=8,
        samples_discarded=0,
        stop_reason="precision",
        bursts_ms=(latency_ms,) * 8,
        rounds_ms=(latency_ms,) * 8,
        samples_ms=(latency_ms,) * 8,
    )


@dataclass
class SimulatedSite:
    """A GPU with one kernel of ours for each form, and torch's for those of ``torchs``.

    Attributes:
        torchs: Baselines by form.
        builds, binds: Called with each lowering; may raise.
        times: Timing of a candidate by its name and the state of the caches.
        built, timed: What was asked for; ``timed`` as (names, state of the caches).
    """

    torchs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    builds: object = lambda lowering: None
    binds: object = lambda lowering: None
    times: object = lambda name, cache: timing(1.0)
    memory_bytes: int = 0
    built: list = field(default_factory=list)
    timed: list = field(default_factory=list)

    @property
    def device(self) -> DeviceInfo:
        return DeviceInfo(
            kind="cuda", name="Simulated", uuid="GPU-1", isa="sm_90", memory_bytes=self.memory_bytes
        )

    @property
    def target(self) -> KernelTarget:
        return KernelTarget("cuda", "sm_90")

    def prepare(self) -> None:
        self.built, self.timed = [], []

    def kernels(self, workload, compiled):
        names = self.torchs.get(workload.form, ())
        return [(f"ours.{workload.form}", False), *((name, True) for name in names)]

    def build(self, workload, lowering, is_baseline):
        self.built.append(lowering)
        self.builds(lowering)
        return Kernel(workload, lowering, is_baseline, lambda operands: (operands,), None)

    def run(self, kernel, operands):
        return torch.from_numpy(oracle(kernel.workload, operands)[0]).float()

    def bind(self, kernel, operands):
        self.binds(kernel.lowering)
        return kernel

    def time(self, launches, settings: TimingSettings, cache):
        self.timed.append((sorted(launches), cache))
        return {name: self.times(name, cache) for name in launches}

    def roofs(self, settings):
        return {}

    def launch_overheads(self, settings):
        return {}

    def energy_s(self):
        return 10.0

    def energy(self, launch):
        return EnergyReading(2.0, 1.0, 15.0, "simulated", windows_mj=(2.0, 2.0))
