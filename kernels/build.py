"""Workload + lowering + target -> Kernel."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Read once, when TVM's runtime starts. Binding its threads to cores would bind the caller's too.
os.environ.setdefault("TVM_BIND_THREADS", "0")
# The most that set_threads can ask for; TVM's own choice is half of the cores.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
# About 1 ms. By default an idle worker spins for some 50 ms, on the core that torch's needs.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "5000")

import torch
import tvm
from torch import Tensor
from tvm import tirx

from kernels.lowerings import add, cuda, mult, panel_gemm, shift
from kernels.packing import pack_linear
from kernels.records import known_records, lookup
from kernels.reference import Operands
from kernels.targets import KernelTarget, cpu_target
from kernels.workload import Workload


class BuildError(ValueError):
    """A kernel that cannot be built."""


@dataclass(frozen=True)
class Lowering:
    """One way to compute some forms on one kind of target, by one of several schedules.

    Attributes:
        target: Kind of target.
        forms: What it computes.
        define: The program for a family.
        schedule_space: Values of each parameter of its schedule; empty where nothing can be chosen.
        default_schedule: For a shape that nobody has tuned.
    """

    target: str
    forms: tuple[str, ...]
    define: Callable[[Workload, KernelTarget], tirx.PrimFunc]
    schedule_space: Callable[[KernelTarget], dict[str, tuple[int, ...]]] = lambda target: {}
    default_schedule: Callable[[Workload, KernelTarget], dict[str, int]] = lambda w, target: {}


_PANELS = (panel_gemm.schedule_space, panel_gemm.default_schedule)

LOWERINGS: dict[str, Lowering] = {
    "mult.panels": Lowering("llvm", ("mult_fp32",), mult.panels, *_PANELS),
    "mult.dot": Lowering("llvm", ("mult_int8",), mult.dot, *_PANELS),
    "shift.panels": Lowering("llvm", ("shift_fp32",), shift.panels, *_PANELS),
    "shift.dot": Lowering("llvm", ("shift_int8",), shift.dot, *_PANELS),
    "shift.nibbles": Lowering("llvm", ("shift_int4",), shift.nibbles, *_PANELS),
    "add.buckets": Lowering("llvm", ("add_kv_pm1", "add_kv_01"), add.buckets),
    "add.buckets_split": Lowering("llvm", ("add_kv_pm1", "add_kv_01"), add.buckets_split),
    "add.tables": Lowering("llvm", ("add_qkv_pm1", "add_qkv_01"), add.tables),
    "add.tables_split": Lowering("llvm", ("add_qkv_pm1", "add_qkv_01"), add.tables_split),
    "mult.cuda": Lowering("cuda", ("mult_fp32",), cuda.mult_panels),
    "mult.cuda_dot": Lowering("cuda", ("mult_int8",), cuda.dot),
    "shift.cuda": Lowering("cuda", ("shift_fp32",), cuda.shift_panels),
    "shift.cuda_dot": Lowering("cuda", ("shift_int8",), cuda.dot),
    "add.cuda": Lowering(
        "cuda", ("add_kv_pm1", "add_kv_01", "add_qkv_pm1", "add_qkv_01"), cuda.add_rows
    ),
}


@dataclass(frozen=True)
class Kernel:
    """A product that can be launched on torch tensors without a copy.

    Attributes:
        workload: What it computes; the dynamic sizes are those of the operands at each launch.
        lowering: How, by name.
        is_baseline: True for another project's implementation.
        pack: Operands -> arguments of ``launch`` without the output; weights are packed here,
            once, activations stay fp32.
        launch: ``launch(*arguments, out)`` on torch's current stream.
        exact: False for a baseline that rounds otherwise than its form declares.
        schedule: The values of its lowering's parameters; empty where there are none.
    """

    workload: Workload
    lowering: str
    is_baseline: bool
    pack: Callable[[Operands], tuple[Any, ...]]
    launch: Callable[..., None]
    exact: bool = True
    schedule: Mapping[str, int] = field(default_factory=dict)

    def allocate(self, operands: Operands) -> Tensor:
        """An output for these operands: ``(m, n)`` of a linear, ``(b, m, n)`` else."""
        x, n = operands.x, self.workload.n
        if self.workload.kind == "linear":
            return x.new_empty(x.shape[0], n)
        rows = x.shape[2] if self.workload.kind == "kv" else x.shape[1]
        return x.new_empty(x.shape[0], rows, n)

    def __call__(self, operands: Operands) -> Tensor:
        """Packs, allocates and launches: for checks, not for timing."""
        out = self.allocate(operands)
        self.launch(*self.pack(operands), out)
        return out


def set_threads(threads: int) -> None:
    """Sets the CPU threads of TVM and of torch, for all kernels of this process."""
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    torch.set_num_threads(threads)


def lowerings(workload: Workload, target: str = "llvm") -> list[str]:
    """Names of our lowerings that compute a workload's form on a kind of target."""
    return [
        name
        for name, lowering in LOWERINGS.items()
        if lowering.target == target and workload.form in lowering.forms
    ]


def compiled(
    lowering: str,
    family: Workload,
    target: KernelTarget,
    schedule: Mapping[str, int] | None = None,
) -> tvm.runtime.Executable:
    """The program of a family, for any target: also one that this machine cannot run.

    Args:
        lowering: A name in LOWERINGS.
        family: ``Workload.family`` of what to compute.
        target: Where it will run.
        schedule: A value for each parameter of the lowering; without one, the default schedule.

    Raises:
        BuildError: If the schedule is none of the lowering's.
    """
    known = LOWERINGS[lowering]
    if schedule is None:
        schedule = known.default_schedule(family, target)
    space = known.schedule_space(target)
    if schedule.keys() != space.keys() or any(schedule[key] not in space[key] for key in space):
        raise BuildError(f"{lowering}: no schedule of its on {target.chip}: {dict(schedule)}")
    return _compiled(lowering, family, target, tuple(sorted(schedule.items())))


@functools.cache
def _compiled(
    lowering: str, family: Workload, target: KernelTarget, schedule: tuple[tuple[str, int], ...]
) -> tvm.runtime.Executable:
    with panel_gemm.scheduled(dict(schedule)):
        function = LOWERINGS[lowering].define(family, target)
    # It would forget which arrays belong on the stack (kernels.lowerings.emit.local).
    keep = {"tirx.disable_storage_rewrite": target.name == "llvm"}
    with tvm.transform.PassContext(config=keep):
        return tvm.compile(tvm.IRModule({"main": function}), target=target.tvm)


def _arguments(operands: Operands) -> tuple[Tensor, ...]:
    if operands.parameters is not None:
        return operands.x, *pack_linear(operands.parameters)
    assert operands.values is not None
    return operands.x, operands.values


def best_schedule(workload: Workload, lowering: str, target: KernelTarget) -> dict[str, int]:
    """The schedule of the nearest tuning record, else the default one."""
    threads = torch.get_num_threads() if target.name == "llvm" else 0
    record = lookup(known_records(target.chip), workload, lowering, target.chip, threads)
    if record is not None:
        return record.schedule
    return LOWERINGS[lowering].default_schedule(workload.family, target)


def build(
    workload: Workload,
    lowering: str | None = None,
    target: KernelTarget | None = None,
    schedule: Mapping[str, int] | None = None,
) -> Kernel:
    """Builds a kernel, or takes it from this process's cache of its family.

    Args:
        workload: What to compute.
        lowering: A name in LOWERINGS; without one, the first for the workload's form.
        target: Where it will run; without one, this machine's CPU.
        schedule: A value for each parameter of the lowering; without one, the best known.

    Raises:
        BuildError: If the lowering is unknown or does not compute this form on this target, or
            the schedule is none of the lowering's.
    """
    target = target or cpu_target()
    known = lowerings(workload, target.name)
    if lowering is None and not known:
        raise BuildError(f"{workload.form}: no lowering for {target.name}")
    lowering = lowering or known[0]
    if lowering not in known:
        names = ", ".join(known) or "none"
        raise BuildError(
            f"{lowering}: no lowering of {workload.form} on {target.name}; known: {names}"
        )
    if schedule is None:
        schedule = best_schedule(workload, lowering, target)
    main = compiled(lowering, workload.family, target, schedule)["main"]
    launch = main if workload.kind == "linear" else _also_without_tokens(main)
    return Kernel(workload, lowering, False, _arguments, launch, schedule=schedule)


def _also_without_tokens(main: Callable[..., None]) -> Callable[..., None]:
    """Serves operands without elements, whose strides torch and TVM define differently."""

    def launch(x: Tensor, values: Tensor, out: Tensor) -> None:
        if x.numel():
            main(x, values, out)
        else:
            out.zero_()

    return launch
