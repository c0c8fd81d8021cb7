"""Workload + lowering + target -> Kernel."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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

from kernels.compilation import compile_program, runnable
from kernels.forms import AROUND, FORMS
from kernels.lowerings import add, cuda, cuda_add, cuda_linear, panel_gemm
from kernels.lowerings.arithmetic import AMX, ARITHMETIC
from kernels.packing import pack_linear
from kernels.records import known_records, lookup
from kernels.reference import Operands
from kernels.targets import KernelTarget, cpu_target
from kernels.workload import Workload

_GPU_ALIGNMENT = 16


class BuildError(ValueError):
    """A kernel that cannot be built."""


@dataclass(frozen=True)
class Lowering:
    """One way to compute some forms on one kind of target, by one of several schedules.

    Attributes:
        target: Kind of target.
        forms: What it computes.
        define: The program for a family, by a schedule.
        schedule_space: Values of each parameter of its schedule; empty where nothing can be chosen.
        default_schedule: For a shape that nobody has tuned.
        memory: ``memory(workload, schedule, arguments)``: tensors that a launch needs beside its
            arguments, before the last of them, which is the output.
        around: What of a linear's neighbours it can do as well.
        oldest_architecture: The first ``sm_XY`` that can run it.
        amx: Whether a CPU needs AMX for it.
    """

    target: str
    forms: tuple[str, ...]
    define: Callable[[Workload, KernelTarget, Mapping[str, int]], tirx.PrimFunc]
    schedule_space: Callable[[KernelTarget], dict[str, tuple[int, ...]]] = lambda target: {}
    default_schedule: Callable[[Workload, KernelTarget], dict[str, int]] = lambda w, target: {}
    memory: Callable[..., tuple[Tensor, ...]] = lambda workload, schedule, arguments: ()
    around: tuple[str, ...] = ()
    oldest_architecture: int = 0
    amx: bool = False

    def runs_on(self, target: KernelTarget) -> bool:
        """Whether a target of its kind has the instructions."""
        return target.architecture >= self.oldest_architecture and target.amx >= self.amx

    @property
    def needs(self) -> str:
        """What a target of its kind may lack."""
        return "AMX" if self.amx else f"sm_{self.oldest_architecture} or later"


def _unscheduled(define: Callable[[Workload, KernelTarget], tirx.PrimFunc]) -> Callable:
    """A definition that leaves nothing to choose."""
    return lambda workload, target, schedule: define(workload, target)


def _forms(name: str) -> tuple[str, ...]:
    """The forms of one product: both alphabets, both types."""
    return tuple(form for form in FORMS if form.startswith(name))


def _panels(form: str) -> Lowering:
    """A linear by the CPU schedules of ``panel_gemm``."""
    define = partial(panel_gemm.linear_panels, ARITHMETIC[form])
    space, default = panel_gemm.schedule_space, panel_gemm.default_schedule
    return Lowering("llvm", (form,), define, space, default, around=AROUND)


def _amx(*forms: str) -> Lowering:
    """The same by AMX, of forms that it multiplies alike."""
    define = partial(panel_gemm.linear_panels, AMX[forms[0]])
    space, default = panel_gemm.amx_schedule_space, panel_gemm.amx_default_schedule
    return Lowering("llvm", forms, define, space, default, around=AROUND, amx=True)


_ATTENTION = tuple(name for name, form in FORMS.items() if form["w_layout"] == "kn")
_GROUPS = (add.schedule_space, add.default_schedule)
_TILES = (cuda_linear.schedule_space, cuda_linear.default_schedule)

# Of several that a target can run, a form is built by the first.
LOWERINGS: dict[str, Lowering] = {
    "mult.amx_pairs": _amx("mult_bf16"),
    "mult.amx_dot": _amx("mult_int8", "mult_int7"),
    "shift.amx_pairs": _amx("shift_bf16"),
    "shift.amx_dot": _amx("shift_int8"),
    "shift.amx_planes": _amx("shift_int8_wide"),
    "shift.amx_nibbles": _amx("shift_int4"),
    "add.amx_bits": _amx("add_int8"),
    "mult.panels": _panels("mult_fp32"),
    "mult.pairs": _panels("mult_bf16"),
    "mult.dot": _panels("mult_int8"),
    "mult.small_dot": _panels("mult_int7"),
    "shift.panels": _panels("shift_fp32"),
    "shift.pairs": _panels("shift_bf16"),
    "shift.dot": _panels("shift_int8"),
    "shift.planes": _panels("shift_int8_wide"),
    "shift.nibbles": _panels("shift_int4"),
    "add.bits": _panels("add_int8"),
    "add.buckets": Lowering("llvm", _forms("add_kv"), add.buckets, *_GROUPS),
    "add.buckets_split": Lowering(
        "llvm", _forms("add_kv"), partial(add.buckets, split=True), *_GROUPS
    ),
    "add.tables": Lowering("llvm", _forms("add_qkv"), add.tables, *_GROUPS),
    "add.tables_split": Lowering(
        "llvm", _forms("add_qkv"), partial(add.tables, split=True), *_GROUPS
    ),
    "add.both": Lowering("llvm", _forms("add_attention"), add.both, *_GROUPS),
    "add.both_split": Lowering(
        "llvm", _forms("add_attention"), partial(add.both, split=True), *_GROUPS
    ),
    "mult.cuda": Lowering("cuda", ("mult_fp32",), _unscheduled(cuda.mult_panels)),
    "mult.cuda_pairs": Lowering(
        "cuda", ("mult_bf16",), cuda_linear.bf16, *_TILES, oldest_architecture=80
    ),
    "mult.cuda_dot": Lowering(
        "cuda", ("mult_int8", "mult_int7"), cuda_linear.int8, *_TILES, cuda_linear.memory
    ),
    "shift.cuda": Lowering("cuda", ("shift_fp32",), _unscheduled(cuda.shift_panels)),
    "shift.cuda_pairs": Lowering(
        "cuda", ("shift_bf16",), cuda_linear.pow2, *_TILES, oldest_architecture=80
    ),
    "shift.cuda_dot": Lowering(
        "cuda", ("shift_int8",), cuda_linear.int8, *_TILES, cuda_linear.memory
    ),
    "shift.cuda_nibbles": Lowering(
        "cuda", ("shift_int4",), cuda_linear.nibbles, *_TILES, cuda_linear.memory
    ),
    "add.cuda_split": Lowering(
        "cuda", _ATTENTION, cuda_add.product, memory=cuda_add.memory, oldest_architecture=80
    ),
    # For GPUs whose tensor cores know no bf16.
    "add.cuda": Lowering(
        "cuda",
        ("add_kv_pm1", "add_kv_01", "add_qkv_pm1", "add_qkv_01"),
        _unscheduled(cuda.add_rows),
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
            return x.new_empty(x.shape[0], n, dtype=getattr(torch, self.workload.out_dtype))
        rows = x.shape[2] if self.workload.kind == "kv" else x.shape[1]
        return x.new_empty(x.shape[0], rows, n)

    def __call__(self, operands: Operands) -> Tensor:
        """Packs, allocates and launches: for checks, not for timing."""
        out = self.allocate(operands)
        self.launch(*self.pack(operands), out)
        return out


# What torch begins with; from then on set_threads decides, whatever torch is told beside.
_threads = torch.get_num_threads()


def set_threads(threads: int) -> None:
    """Sets the CPU threads of TVM and of torch, for all kernels of this process."""
    global _threads
    kernels_of_this_thread(threads)
    torch.set_num_threads(threads)
    _threads = threads


def kernels_of_this_thread(threads: int) -> None:
    """Sets the CPU threads of kernels that are launched by this thread of Python's alone."""
    tvm.get_global_func("runtime.config_threadpool")(1, threads)


def get_threads() -> int:
    """CPU threads of our kernels; torch's may be fewer for a while (``reparam.one_thread``)."""
    return _threads


def lowerings(workload: Workload, target: KernelTarget | None = None) -> list[str]:
    """Names of our lowerings that compute a workload on a target, or on this machine's CPU."""
    target = target or cpu_target()
    return [name for name in _known(workload, target) if LOWERINGS[name].runs_on(target)]


def superseded(workload: Workload, target: KernelTarget) -> list[str]:
    """Those of ``lowerings`` whose form a target has a faster unit for."""
    able = lowerings(workload, target)
    by_tiles = [name for name in able if LOWERINGS[name].amx]
    return [name for name in able if name not in by_tiles] if by_tiles else []


def _known(workload: Workload, target: KernelTarget) -> list[str]:
    """Those for its kind of target, whatever instructions it has."""
    around = set(workload.fused) & set(AROUND)
    return [
        name
        for name, lowering in LOWERINGS.items()
        if lowering.target == target.name
        and workload.form in lowering.forms
        and around <= set(lowering.around)
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
    if schedule is None:
        schedule = LOWERINGS[lowering].default_schedule(family, target)
    return _compiled(lowering, family, target, _checked(lowering, target, schedule))


def _checked(
    lowering: str, target: KernelTarget, schedule: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    if not _is_schedule(schedule, LOWERINGS[lowering].schedule_space(target)):
        raise BuildError(f"{lowering}: no schedule of its on {target.chip}: {dict(schedule)}")
    return tuple(sorted(schedule.items()))


def _is_schedule(schedule: Mapping[str, int], space: Mapping[str, tuple[int, ...]]) -> bool:
    return schedule.keys() == space.keys() and all(schedule[key] in space[key] for key in space)


@functools.cache
def _compiled(
    lowering: str, family: Workload, target: KernelTarget, schedule: tuple[tuple[str, int], ...]
) -> tvm.runtime.Executable:
    return compile_program(LOWERINGS[lowering].define(family, target, dict(schedule)), target)


@functools.cache
def _runnable(
    lowering: str, family: Workload, target: KernelTarget, schedule: tuple[tuple[str, int], ...]
) -> Callable[..., None]:
    """The same for this machine's CPU."""
    return runnable(LOWERINGS[lowering].define(family, target, dict(schedule)), target)


def arguments(operands: Operands) -> tuple[Tensor, ...]:
    """What a kernel of ours is launched on, without its output: weights are packed here."""
    if operands.parameters is not None:
        o = operands
        given = [tensor for tensor in (o.norm, o.residual) if tensor is not None]
        return operands.x, *pack_linear(operands.parameters), *given
    assert operands.values is not None
    keys = () if operands.keys is None else (operands.keys,)
    return operands.x, *keys, operands.values


def best_schedule(workload: Workload, lowering: str, target: KernelTarget) -> dict[str, int]:
    """The schedule of the nearest tuning record, else the default one.

    Records of schedules that a lowering has no more are warned about and left out.
    """
    threads = get_threads() if target.name == "llvm" else 0
    known, found = LOWERINGS[lowering], known_records(target.chip)
    space = known.schedule_space(target)
    foreign = [r for r in found if r.lowering == lowering and not _is_schedule(r.schedule, space)]
    if foreign:
        warnings.warn(f"tuning records of {lowering} ignored: of an older schedule", stacklevel=2)
        found = tuple(record for record in found if record not in foreign)
    record = lookup(found, workload.alone, lowering, target.chip, threads)
    return known.default_schedule(workload, target) if record is None else record.schedule


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
    known, able = _known(workload, target), lowerings(workload, target)
    if not able:
        raise BuildError(f"{workload.form}: no lowering for {target.name} ({target.chip})")
    lowering = lowering or able[0]
    if lowering in known and lowering not in able:
        raise BuildError(f"{lowering}: needs {LOWERINGS[lowering].needs}, this is {target.chip}")
    if lowering not in known:
        names = ", ".join(known) or "none"
        raise BuildError(
            f"{lowering}: no lowering of {workload.form} on {target.name}; known: {names}"
        )
    if schedule is None:
        schedule = best_schedule(workload, lowering, target)
    if target.name == "cuda":
        main = compiled(lowering, workload.family, target, schedule)["main"]
        memory = functools.partial(LOWERINGS[lowering].memory, workload, schedule)
        launch = _also_without_tokens(_on_gpu(main, memory))
    else:
        main = _runnable(lowering, workload.family, target, _checked(lowering, target, schedule))
        launch = main if workload.kind == "linear" else _also_without_tokens(main)
    return Kernel(workload, lowering, False, arguments, launch, schedule=schedule)


def _on_gpu(
    main: Callable[..., None], memory: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
) -> Callable[..., None]:
    """Gives each launch memory of torch's, which a CUDA graph keeps for its replays.

    It refuses addresses that a GPU would not read 16 bytes from: an error on the GPU would end all
    further work of the process.
    """

    def launch(*arguments: Tensor) -> None:
        for place, argument in enumerate(arguments):
            if argument.data_ptr() % _GPU_ALIGNMENT:
                raise ValueError(
                    f"argument {place}: begins at no multiple of {_GPU_ALIGNMENT} bytes; clone it"
                )
        main(*arguments[:-1], *memory(arguments), arguments[-1])

    return launch


def _also_without_tokens(main: Callable[..., None]) -> Callable[..., None]:
    """Serves operands without elements, whose strides torch and TVM define differently."""

    def launch(x: Tensor, *arguments: Tensor) -> None:
        if x.numel():
            main(x, *arguments)
        else:
            arguments[-1].zero_()

    return launch
