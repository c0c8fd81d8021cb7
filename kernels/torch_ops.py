"""The kernels as torch operators, for deployed models.

``linear``, ``add_kv``, ``add_qkv`` and ``add_attention``, which are ``torch.ops.shiftadd.linear``
and so on (``kernels.operators``), take tensors of any number of tokens, also none; a kernel is
built at the first call of its family and kept. Linears are fp32 in and out, the attention products
fp32 or bf16. ``kernels.layer_ops`` and ``kernels.expert_ops`` have those of whole layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.build import Kernel, build, get_threads, kernels_of_this_thread, set_threads
from kernels.forms import AROUND
from kernels.launches import launch
from kernels.lowerings.add import LONG_TOKENS
from kernels.operators import operator
from kernels.targets import KernelTarget, cpu_target, cuda_target
from kernels.workload import attention
from kernels.workload import linear as linear_workload

__all__ = [
    "add_attention",
    "add_kv",
    "add_qkv",
    "get_threads",
    "kernels_of_this_thread",
    "last_dimension",
    "linear",
    "linear_kernel",
    "set_threads",
]

# By whether there is each of them.
_AROUND = {
    there: tuple(name for name, used in zip(AROUND, there) if used)
    for there in itertools.product((False, True), repeat=len(AROUND))
}


def _target(device: torch.device) -> KernelTarget:
    if device.type == "cpu":
        return cpu_target()
    major, minor = torch.cuda.get_device_capability(device)
    return cuda_target(f"sm_{major}{minor}")


def last_dimension(place: int) -> Callable[..., Tensor]:
    """What ``torch.compile`` sees of an operator that gives its first argument another width.

    Args:
        place: Of the argument that is that width, or whose last element is.
    """

    def fake(*given: Any) -> Tensor:
        x, n = given[0], given[place]
        out: Tensor = x.new_empty(*x.shape[:-1], n[-1] if isinstance(n, list) else n)
        return out

    return fake


def _tokens_to_build_for(tokens: int, device: torch.device) -> int:
    """On a GPU the next power of two: its schedules depend on how many tiles there are."""
    return 1 if device.type == "cpu" else 1 << max(tokens - 1, 0).bit_length()


@functools.cache
def linear_kernel(
    form: str, k: int, n: int, device: torch.device, around: tuple[str, ...] = (), tokens: int = 1
) -> Kernel:
    """The kernel of a linear form for any number of tokens, with the schedule of that many."""
    workload = linear_workload(form, tokens, k, n, around)
    return build(workload, target=_target(device))


@functools.cache
def _attention_kernel(
    product: str,
    bits: int,
    n: int,
    alphabet: str,
    dtype: str,
    device: torch.device,
    long: bool,
    split: bool,
) -> Kernel:
    tokens = LONG_TOKENS if long else 1
    workload = getattr(attention(1, tokens, bits, n, alphabet, dtype), product)
    name = {"kv": "add.buckets", "qkv": "add.tables", "both": "add.both"}[product]
    lowering = name + "_split" * split if device.type == "cpu" else None
    return build(workload, lowering, _target(device))


def _launch_attention(
    product: str, coded: tuple[Tensor, ...], values: Tensor, out: Tensor, alphabet: str
) -> Tensor:
    """Runs one product on sequences cut into chunks where threads would else idle."""
    (b, tokens, bits), n = coded[0].shape, values.shape[2]
    long = tokens >= LONG_TOKENS
    # A shorter sequence takes less time than a second thread needs to wake up.
    split = long and b < get_threads()
    dtype = str(values.dtype).removeprefix("torch.")
    kernel = _attention_kernel(product, bits, n, alphabet, dtype, values.device, long, split)
    launch(kernel.launch, *(operand.contiguous() for operand in (*coded, values)), out)
    return out


def _linear(
    x: Tensor,
    packed: list[Tensor],
    form: str,
    n: int,
    norm: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    beside = [] if norm is None else [norm]
    if residual is not None:
        beside.append(residual.reshape(-1, n).contiguous())
    around = _AROUND[norm is not None, gelu, residual is not None]
    tokens = _tokens_to_build_for(rows.shape[0], x.device)
    kernel = linear_kernel(form, rows.shape[1], n, x.device, around, tokens)
    launch(kernel.launch, rows, *packed, *beside, out.view(-1, n))
    return out


def _add_kv(k: Tensor, v: Tensor, alphabet: str) -> Tensor:
    return _launch_attention("kv", (k,), v, _add_kv_fake(k, v, alphabet), alphabet)


def _add_kv_fake(k: Tensor, v: Tensor, alphabet: str) -> Tensor:
    return v.new_empty(k.shape[0], k.shape[2], v.shape[2])


def _add_qkv(q: Tensor, kv: Tensor, alphabet: str) -> Tensor:
    return _launch_attention("qkv", (q,), kv, _add_qkv_fake(q, kv, alphabet), alphabet)


def _add_qkv_fake(q: Tensor, kv: Tensor, alphabet: str) -> Tensor:
    return kv.new_empty(q.shape[0], q.shape[1], kv.shape[2])


def _add_attention(q: Tensor, k: Tensor, v: Tensor, alphabet: str) -> Tensor:
    return _launch_attention("both", (q, k), v, _add_attention_fake(q, k, v, alphabet), alphabet)


def _add_attention_fake(q: Tensor, k: Tensor, v: Tensor, alphabet: str) -> Tensor:
    return v.new_empty(v.shape)


_BOTH = ("CPU", "CUDA")
linear = operator(
    "linear(Tensor x, Tensor[] packed, str form, int n, Tensor? norm=None, bool gelu=False,"
    " Tensor? residual=None) -> Tensor",
    _linear,
    last_dimension(3),
    _BOTH,
)
add_kv = operator(
    "add_kv(Tensor k, Tensor v, str alphabet) -> Tensor", _add_kv, _add_kv_fake, _BOTH
)
add_qkv = operator(
    "add_qkv(Tensor q, Tensor kv, str alphabet) -> Tensor", _add_qkv, _add_qkv_fake, _BOTH
)
add_attention = operator(
    "add_attention(Tensor q, Tensor k, Tensor v, str alphabet) -> Tensor",
    _add_attention,
    _add_attention_fake,
    _BOTH,
)
