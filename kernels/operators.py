"""Functions on tensors as torch operators, ``torch.ops.shiftadd``, and a short way to them.

Torch's dispatcher takes 10 to 40 µs to call an operator that is written in Python, as long as a
small kernel. So a call goes to the function itself, unless someone must see the operator: a
compiler, an exporter, a profiler, a mode or a tensor that is more than numbers; not while launches
are noted (``kernels.launches``), for then what the function does is to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.launches import are_noted

_library = torch.library.Library("shiftadd", "DEF")


def operator(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    devices: Sequence[str] = ("CPU",),
) -> Callable[..., Any]:
    """Registers an operator.

    Args:
        schema: In torch's language, with its name in front; the first argument is a tensor.
        implementation: Computes it.
        fake: Makes outputs of the right shapes, for compilers and exporters.
        devices: Where it is implemented, as torch's dispatch keys.

    Returns:
        What to call: the same as ``torch.ops.shiftadd.<name>``.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in devices:
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"shiftadd::{name}", fake, lib=_library)
    registered = getattr(torch.ops.shiftadd, name)

    def call(x: Tensor, *given: Any) -> Any:
        if torch.compiler.is_compiling() or (_is_seen(x) and not are_noted()):
            return registered(x, *given)
        return implementation(x, *given)

    call.__name__, call.__doc__ = name, f"``torch.ops.shiftadd.{schema}``"
    return call


def _is_seen(x: Tensor) -> bool:
    return (
        type(x) is not Tensor
        or x.requires_grad
        or is_in_torch_dispatch_mode()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
