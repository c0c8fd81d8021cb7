"""Kernels on another machine, over TVM's RPC: built here, uploaded, launched and timed there.

The machine runs ``python -m tvm.exec.rpc_server --tracker HOST:PORT --key KEY`` or the C++ server;
TVM's runtime is all that it needs.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm import rpc
from tvm.target import codegen

from kernels.build import BuildError, Kernel, arguments, best_schedule, compiled, lowerings
from kernels.reference import Operands
from kernels.targets import KernelTarget, cpu_target
from kernels.workload import Workload

_CONNECT_S = 5.0


class RemoteError(ValueError):
    """A device that the tracker does not lend, or that cannot be built for."""


@dataclass(frozen=True)
class RemoteCall:
    """A kernel there with operands and an output that lie there already."""

    module: Any
    device: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        """One launch, by a round trip over the network."""
        self.module["main"](*self.arguments)

    def sample_ms(self, number: int, flush_bytes: int = 0) -> float:
        """Times launches by the machine's own clock, so that the figure contains no network.

        Args:
            number: Launches, after one that is not timed.
            flush_bytes: Overwritten before them; 0 for hot caches.

        Returns:
            Per launch.
        """
        evaluate = self.module.time_evaluator(
            "main", self.device, number=number, repeat=1, cache_flush_bytes=flush_bytes
        )
        return evaluate(*self.arguments).results[0] * 1e3


@dataclass(frozen=True)
class Remote:
    """A session with one machine.

    Attributes:
        key: By which the tracker knows it.
        target: What is built for it.
        threads: CPU threads used there.
    """

    key: str
    target: KernelTarget
    threads: int
    _session: Any
    _modules: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """First part of the machine's triple: ``x86_64``, ``aarch64``."""
        return _architecture(self.target.triple or "")

    def prepare(self) -> None:
        """Sets the number of threads."""
        self._session.get_function("runtime.config_threadpool")(1, self.threads)

    def build(self, workload: Workload, lowering: str) -> Kernel:
        """Builds a kernel here, for there, and loads it there.

        Raises:
            BuildError: If the lowering does not compute this form on that machine.
        """
        if lowering not in lowerings(workload, self.target):
            raise BuildError(f"{lowering}: no lowering of {workload.form} on {self.target.chip}")
        schedule = best_schedule(workload, lowering, self.target)
        identity = f"{lowering} {workload.family.key} {sorted(schedule.items())}"
        # Another architecture's linker is seldom here: it gets objects and links them itself.
        is_kin = self.architecture == _architecture(codegen.llvm_get_system_triple())
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.{'so' if is_kin else 'tar'}"
        if name not in self._modules:
            program = compiled(lowering, workload.family, self.target, schedule)
            with tempfile.TemporaryDirectory() as folder:
                library = Path(folder) / name
                program.export_library(str(library))
                self._session.upload(str(library))
            self._modules[name] = self._session.load_module(name)
        return Kernel(workload, lowering, False, arguments, self._modules[name], schedule=schedule)

    def bind(self, kernel: Kernel, operands: Operands) -> RemoteCall:
        """Uploads operands and an output for a kernel that was built here for there."""
        tensors = (*kernel.pack(operands), kernel.allocate(operands).zero_())
        device = self._session.cpu(0)
        there = tuple(tvm.runtime.tensor(tensor.numpy(), device) for tensor in tensors)
        return RemoteCall(kernel.launch, device, there)

    def run(self, kernel: Kernel, operands: Operands) -> Tensor:
        """Its output, fetched."""
        call = self.bind(kernel, operands)
        call()
        return torch.from_numpy(call.arguments[-1].numpy())


def _architecture(triple: str) -> str:
    return triple.split("-")[0]


def connect(
    tracker: str, key: str, threads: int, chip: str | None = None, triple: str | None = None
) -> Remote:
    """Borrows a machine from a tracker; waits where others hold it.

    Args:
        tracker: ``HOST:PORT``.
        key: Of the machine.
        threads: CPU threads to use there.
        chip: LLVM's name of its CPU; without one, the machine is asked.
        triple: LLVM's name of its platform; likewise.

    Raises:
        RemoteError: If there is no such tracker or machine, or the machine's runtime was built
            without LLVM and so cannot say what it is.
    """
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdecimal():
        raise RemoteError(f"{tracker}: must be HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        session = rpc.connect_tracker(host, int(port))
        known = _keys(session.summary())
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise RemoteError(f"{tracker}: is no RPC tracker that answers ({error})") from error
    if key not in known:
        raise RemoteError(f"{key}: {tracker} has {', '.join(sorted(known)) or 'no device'}")
    try:
        machine = session.request(key)
        chip = chip or machine.get_function("target.llvm_get_system_cpu")()
        triple = triple or machine.get_function("target.llvm_get_system_triple")()
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RemoteError(
            f"{key}: does not say what CPU it has ({reason}); name it by --chip and --triple"
        ) from error
    return Remote(key, cpu_target(chip, triple), threads, machine)


def _keys(summary: dict[str, Sequence[dict[str, str]]]) -> set[str]:
    """Keys of the servers that a tracker lists as ``server:KEY``."""
    return {server["key"].partition(":")[2] for server in summary["server_info"]}
