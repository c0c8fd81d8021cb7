"""What the machine can do at most: kernels that only compute, or only move memory.

The roofs under which every other kernel is judged, measured in the same run. Each thread of the
pool computes on its own registers; what the inner loop loads stays in the first cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.build import set_threads
from kernels.compilation import runnable
from kernels.lowerings import amx
from kernels.lowerings.emit import LANES, argument, at, fill, local, program
from kernels.lowerings.inner_product import Unit, amx_bf16, amx_int8, bf16_dot, fma, int8_dot
from kernels.lowerings.panel_product import VECTORS
from kernels.lowerings.register_tiles import largest_tile_rows
from kernels.packing import PANEL
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
    """As many sums as a micro-kernel keeps in registers, each added to ``_STEPS`` times.

    Each step's inputs are others, lest the compiler multiply once and only add.
    """
    rows, width = largest_tile_rows(target), LANES * unit.group

    def body() -> None:
        tasks = T.int32()
        seed = argument("seed", (tasks, VECTORS * width), unit.weights)
        out = argument("out", (tasks, LANES), unit.total)
        with T.parallel(0, tasks) as task:
            if unit.amx:
                amx.only_multiply(unit.amx, _STEPS, T.address_of(seed[task, 0]))
                return
            sums = local(rows * PANEL, unit.total)
            weights = [seed[task, at(v * width, width)] for v in range(VECTORS)]
            places = [at(i * LANES, LANES) for i in range(rows * VECTORS)]
            for i, place in enumerate(places):
                T.buffer_store(sums, fill(tirx.const(i, unit.total), LANES), [place])
            with T.serial(0, _STEPS) as step:
                # One address a step: an index of each row's own would take registers from the sums,
                # which on the stack are slow, and in some processes slower than in others.
                first = tirx.floormod(step, width // unit.group)
                for r in range(rows):
                    group = (first + r) * unit.group
                    inputs = seed[task, at(group, unit.group)]
                    inputs = tirx.reinterpret("int32", inputs) if unit.group > 1 else inputs
                    for v in range(VECTORS):
                        place = places[r * VECTORS + v]
                        value = unit.multiply(sums[place], fill(inputs, LANES), weights[v])
                        T.buffer_store(sums, value, [place])
            merged = local(LANES, unit.total)
            T.buffer_store(merged, sums[places[0]], [at(0, LANES)])
            for place in places[1:]:
                T.buffer_store(merged, merged[at(0, LANES)] + sums[place], [at(0, LANES)])
            T.buffer_store(out, merged[at(0, LANES)], [task, at(0, LANES)])

    return program(body, unit.llvm)


_UNITS: dict[str, Callable[[KernelTarget], Unit]] = {
    "fma_fp32": lambda target: fma(),
    "dot_bf16": lambda target: (amx_bf16 if target.amx else bf16_dot)(target),
    # Of small weights, which some CPUs multiply faster: nothing is faster than the roof.
    "dot_int8": lambda target: amx_int8(target) if target.amx else int8_dot(target, 1),
}


@functools.cache
def _multiplies(name: str, target: KernelTarget) -> Callable[..., None]:
    return runnable(_accumulate(target, _UNITS[name](target)), target)


def _arithmetic(name: str, threads: int, target: KernelTarget) -> Peak:
    unit, main = _UNITS[name](target), _multiplies(name, target)
    seed = torch.rand(threads, VECTORS * LANES * unit.group)
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
