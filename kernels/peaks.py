"""What the machine can do at most: kernels that only compute, or only move memory.

The roofs under which every other kernel is judged, measured in the same run. Each thread of the
pool computes on its own registers; nothing is loaded in the inner loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tvm
import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.build import set_threads
from kernels.lowerings import amx
from kernels.lowerings.emit import LANES, argument, at, fill, local, program
from kernels.lowerings.inner_product import Unit, amx_bf16, amx_int8, bf16_dot, fma, int8_dot
from kernels.lowerings.panel_gemm import VECTORS, largest_tile_rows
from kernels.targets import KernelTarget, cpu_target

_STEPS = 20_000
# Hundreds of megabytes of cache are a whole socket's: copying four times that takes a second.
_ENOUGH_BYTES = 2**28


@dataclass(frozen=True)
class Peak:
    """A launch and what it does.

    Attributes:
        name: ``fma_fp32``, ``dot_bf16``, ``dot_int8`` or ``copy``; dots by AMX where there is one.
        unit: ``MAC`` or ``byte``.
        amount: Multiply-accumulates or bytes of one launch.
        launch: Runs once on the threads that were set.
    """

    name: str
    unit: str
    amount: float
    launch: Callable[[], object]


def _accumulate(target: KernelTarget, unit: Unit) -> tirx.PrimFunc:
    """As many sums as a micro-kernel keeps in registers, each added to ``_STEPS`` times."""
    sums_count = largest_tile_rows(target) * VECTORS
    width = LANES * unit.group

    def body() -> None:
        tasks = T.int32()
        seed = argument("seed", (tasks, width), unit.weights)
        out = argument("out", (tasks, LANES), unit.total)
        with T.parallel(0, tasks) as task:
            if unit.amx:
                amx.only_multiply(unit.amx, _STEPS, T.address_of(seed[task, 0]))
                return
            sums, factor = local(sums_count * LANES, unit.total), local(width, unit.weights)
            T.buffer_store(factor, seed[task, at(0, width)], [at(0, width)])
            for i in range(sums_count):
                # Different from each other, lest the compiler see that one would do for all.
                start = fill(tirx.const(i, unit.total), LANES)
                T.buffer_store(sums, start, [at(i * LANES, LANES)])
            with T.serial(0, _STEPS):
                for i in range(sums_count):
                    where = at(i * LANES, LANES)
                    inputs = factor[at(0, unit.group)]
                    inputs = tirx.reinterpret("int32", inputs) if unit.group > 1 else inputs
                    weights = factor[at(0, width)]
                    value = unit.multiply(sums[where], fill(inputs, LANES), weights)
                    T.buffer_store(sums, value, [where])
            merged = local(LANES, unit.total)
            T.buffer_store(merged, sums[at(0, LANES)], [at(0, LANES)])
            for i in range(1, sums_count):
                value = merged[at(0, LANES)] + sums[at(i * LANES, LANES)]
                T.buffer_store(merged, value, [at(0, LANES)])
            T.buffer_store(out, merged[at(0, LANES)], [task, at(0, LANES)])

    return program(body, unit.llvm)


_UNITS: dict[str, Callable[[KernelTarget], Unit]] = {
    "fma_fp32": lambda target: fma(),
    "dot_bf16": lambda target: (amx_bf16 if target.amx else bf16_dot)(target),
    "dot_int8": lambda target: (amx_int8 if target.amx else int8_dot)(target),
}


@functools.cache
def _compiled(name: str, target: KernelTarget) -> Callable[..., None]:
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        module = tvm.IRModule({"main": _accumulate(target, _UNITS[name](target))})
        return tvm.compile(module, target=target.tvm)["main"]


def _arithmetic(name: str, threads: int, target: KernelTarget) -> Peak:
    unit, main = _UNITS[name](target), _compiled(name, target)
    seed = torch.rand(threads, LANES * unit.group)
    if unit.weights == "int16":
        seed = seed.bfloat16().view(torch.int16)
    elif unit.weights == "int8":
        seed = (127 * seed).to(torch.int8)
    out = torch.empty(threads, LANES, dtype=getattr(torch, unit.total))
    outputs = largest_tile_rows(target) * VECTORS * LANES
    macs = threads * _STEPS * (amx.MACS[unit.amx] if unit.amx else outputs * unit.group)
    return Peak(name, "MAC", macs, lambda: main(seed, out))


def copied_bytes(last_level_cache_bytes: int) -> int:
    """How much a copy reads, and as much it writes, to go to main memory.

    Four times the last level of the caches, but no more than ``_ENOUGH_BYTES`` unless the cache
    itself holds more.
    """
    return max(last_level_cache_bytes, min(4 * last_level_cache_bytes, _ENOUGH_BYTES))


def peaks(threads: int, last_level_cache_bytes: int | None) -> list[Peak]:
    """The roofs of this CPU for a number of threads, to be timed like any kernel.

    Args:
        threads: CPU threads.
        last_level_cache_bytes: None where unknown; see ``copied_bytes``.
    """
    set_threads(threads)
    target = cpu_target()
    source = torch.rand(copied_bytes(last_level_cache_bytes or 2**25) // 4)
    copy = torch.empty_like(source)
    return [
        *(_arithmetic(name, threads, target) for name in _UNITS),
        Peak("copy", "byte", 2.0 * 4 * source.numel(), lambda: copy.copy_(source)),
    ]
