"""Layer norm of tokens where no linear behind it does it."""

from __future__ import annotations

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import copy_row, normalised
from kernels.lowerings.emit import argument, program
from kernels.targets import KernelTarget


def layer_norm(k: int, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, norm, out)``: each row alone, on all threads.

    Shapes: x and out ``(m, k)``, norm ``(2k + 1,)`` as for
    ``kernels.lowerings.activations.normalise_row``; all fp32.

    Args:
        k: Features of a row.
        target: The CPU.
    """

    def body() -> None:
        m = T.int32()
        x = argument("x", (m, k), "float32")
        norm = argument("norm", (2 * k + 1,), "float32")
        out = argument("out", (m, k), "float32")
        with T.parallel(0, m) as row:
            copy_row(*normalised(x, row, k, norm), k, out, row)

    return program(body)
