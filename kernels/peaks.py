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
from kernels.lowerings.emit import LANES, argument, at, fill, local, program
from kernels.lowerings.panel_gemm import VECTORS, dot_groups, largest_tile_rows
from kernels.packing import DOT_GROUP
from kernels.targets import KernelTarget, cpu_target

_STEPS = 20_000


@dataclass(frozen=True)
class Peak:
    """A launch and what it does.

    Attributes:
        name: ``fma_fp32``, ``dot_int8`` or ``copy``.
        unit: ``MAC`` or ``byte``.
        amount: Multiply-accumulates or bytes of one launch.
        launch: Runs once on the threads that were set.
    """

    name: str
    unit: str
    amount: float
    launch: Callable[[], object]


def _accumulate(target: KernelTarget, dtype: str) -> tirx.PrimFunc:
    """As many sums as a micro-kernel keeps in registers, each added to ``_STEPS`` times."""
    sums_count = largest_tile_rows(target) * VECTORS

    def body() -> None:
        tasks = T.int32()
        seed = argument("seed", (tasks, LANES * DOT_GROUP), dtype)
        out = argument("out", (tasks, LANES), "float32" if dtype == "float32" else "int32")
        with T.parallel(0, tasks) as task:
            total = "float32" if dtype == "float32" else "int32"
            sums, factor = local(sums_count * LANES, total), local(LANES * DOT_GROUP, dtype)
            T.buffer_store(factor, seed[task, at(0, LANES * DOT_GROUP)], [at(0, LANES * DOT_GROUP)])
            for i in range(sums_count):
                # Different from each other, lest the compiler see that one would do for all.
                T.buffer_store(sums, fill(tirx.const(i, total), LANES), [at(i * LANES, LANES)])
            with T.serial(0, _STEPS):
                for i in range(sums_count):
                    where = at(i * LANES, LANES)
                    if dtype == "float32":
                        vector = factor[at(0, LANES)]
                        T.buffer_store(sums, sums[where] * vector + vector, [where])
                    else:
                        weights = factor[at(0, LANES * DOT_GROUP)]
                        four = tirx.reinterpret("int32", factor[at(0, DOT_GROUP)])
                        value = dot_groups(target, sums[where], four, weights)
                        T.buffer_store(sums, value, [where])
            merged = local(LANES, total)
            T.buffer_store(merged, sums[at(0, LANES)], [at(0, LANES)])
            for i in range(1, sums_count):
                value = merged[at(0, LANES)] + sums[at(i * LANES, LANES)]
                T.buffer_store(merged, value, [at(0, LANES)])
            T.buffer_store(out, merged[at(0, LANES)], [task, at(0, LANES)])

    return program(body)


@functools.cache
def _compiled(dtype: str, target: KernelTarget) -> Callable[..., None]:
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        module = tvm.IRModule({"main": _accumulate(target, dtype)})
        return tvm.compile(module, target=target.tvm)["main"]


def _arithmetic(name: str, dtype: str, threads: int, target: KernelTarget) -> Peak:
    main = _compiled(dtype, target)
    whole = torch.rand(threads, LANES * DOT_GROUP)
    seed = whole if dtype == "float32" else (127 * whole).to(torch.int8)
    out = torch.empty(threads, LANES, dtype=torch.float32 if dtype == "float32" else torch.int32)
    group = 1 if dtype == "float32" else DOT_GROUP
    macs = threads * _STEPS * largest_tile_rows(target) * VECTORS * LANES * group
    return Peak(name, "MAC", macs, lambda: main(seed, out))


def peaks(threads: int, last_level_cache_bytes: int | None) -> list[Peak]:
    """The roofs of this CPU for a number of threads, to be timed like any kernel.

    Args:
        threads: CPU threads.
        last_level_cache_bytes: A copy of four times as much goes to main memory.
    """
    set_threads(threads)
    target = cpu_target()
    source = torch.rand((last_level_cache_bytes or 2**25) * 4 // 4)
    copy = torch.empty_like(source)
    return [
        _arithmetic("fma_fp32", "float32", threads, target),
        _arithmetic("dot_int8", "int8", threads, target),
        Peak("copy", "byte", 2.0 * 4 * source.numel(), lambda: copy.copy_(source)),
    ]
