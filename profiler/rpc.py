"""A device on another machine as a site: latency by its own clock, over TVM's RPC."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from kernels.build import Kernel, lowerings
from kernels.reference import Operands
from kernels.remote import Remote, RemoteCall, RemoteError, connect
from kernels.targets import KernelTarget
from kernels.workload import Workload
from profiler.contamination import NO_CONTAMINATION
from profiler.device import DeviceError, DeviceInfo, software_versions
from profiler.energy import EnergyReading
from profiler.samples import Timing, TimingSettings
from profiler.timing import Candidate, Sample, first_warm_up, interleave, launches_per_sample

# What an unknown machine's caches hold at most.
_FLUSH_BYTES = 2**26


@dataclass(frozen=True)
class RemoteSite:
    """One CPU behind a tracker. Only our kernels: torch is not asked of a small device."""

    remote: Remote
    device: DeviceInfo

    @property
    def target(self) -> KernelTarget:
        """What kernels are built for."""
        return self.remote.target

    def prepare(self) -> None:
        """Sets the number of threads there."""
        self.remote.prepare()

    def kernels(self, workload: Workload, compiled: bool) -> list[tuple[str, bool]]:
        """Our lowerings."""
        return [(name, False) for name in lowerings(workload, self.target)]

    def build(self, workload: Workload, lowering: str, is_baseline: bool) -> Kernel:
        """A kernel, built here and loaded there."""
        return self.remote.build(workload, lowering)

    def run(self, kernel: Kernel, operands: Operands) -> Tensor:
        """Its output, computed there."""
        return self.remote.run(kernel, operands)

    def bind(self, kernel: Kernel, operands: Operands) -> RemoteCall:
        """A launch on operands that were uploaded."""
        with self._or_gone():
            return self.remote.bind(kernel, operands)

    def time(
        self, launches: Mapping[str, RemoteCall], settings: TimingSettings, cache: str
    ) -> dict[str, Timing]:
        """By TVM's evaluator there."""
        with self._or_gone():
            return measure_remote(launches, settings, _FLUSH_BYTES if cache == "cold" else 0)

    def roofs(self, settings: TimingSettings) -> dict[str, float]:
        """Not measured there."""
        return {}

    def launch_overheads(self, settings: TimingSettings) -> dict[str, float]:
        """None that counts: the evaluator calls the kernel in a loop of C++."""
        return {}

    def energy_s(self) -> float | None:
        """No meter there is read."""
        return None

    def energy(self, launch: RemoteCall) -> EnergyReading:
        """Not measured there."""
        return EnergyReading(reason="RPC: the meters of a remote device are not read")

    @contextmanager
    def _or_gone(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(
                f"--rpc {self.remote.key}: was lost ({reason}); the same command goes on from here"
            ) from error


def remote_site(
    tracker: str, key: str, threads: int, chip: str | None = None, triple: str | None = None
) -> RemoteSite:
    """Connects; the device's fingerprint is its CPU, its architecture and its key.

    Raises:
        DeviceError: If there is no such tracker or device.
    """
    try:
        remote = connect(tracker, key, threads, chip, triple)
    except RemoteError as error:
        raise DeviceError(f"--rpc {error}") from error
    device = DeviceInfo(
        kind="cpu",
        name=f"{remote.target.chip}, RPC key {key}",
        isa=f"{remote.architecture} {remote.target.chip}",
        threads=threads,
        os=remote.target.triple or "",
        software=software_versions(),
    )
    return RemoteSite(remote, device)


def measure_remote(
    calls: Mapping[str, RemoteCall], settings: TimingSettings, flush_bytes: int = 0
) -> dict[str, Timing]:
    """Times calls against each other by the remote clock.

    What other processes take from that machine is not known here, so only the outlier rule of
    ``summarise`` drops samples. With ``flush_bytes`` each sample is a single launch.
    """
    candidates = {name: _candidate(call, settings, flush_bytes) for name, call in calls.items()}
    return interleave(candidates, settings, time.perf_counter, NO_CONTAMINATION)


def _candidate(call: RemoteCall, settings: TimingSettings, flush_bytes: int) -> Candidate:
    def hot_ms(number: int) -> float:
        return number * call.sample_ms(number)

    hot_number = launches_per_sample(hot_ms, settings.sample_ms)
    plateaued = first_warm_up(lambda: call.sample_ms(hot_number), settings, time.perf_counter)
    number = 1 if flush_bytes else hot_number
    step_ms = number * call.sample_ms(number, flush_bytes)
    return Candidate(
        warm=lambda: call.sample_ms(hot_number),
        sample=lambda: Sample(call.sample_ms(number, flush_bytes)),
        number=number,
        samples_per_burst=max(1, round(settings.burst_ms / step_ms)),
        facts=lambda: {"plateaued": plateaued, "clock": "TVM's time_evaluator there"},
    )
