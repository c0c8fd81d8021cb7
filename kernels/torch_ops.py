"""The kernels as torch operators, for deployed models.

``torch.ops.shiftadd.linear``, ``.add_kv`` and ``.add_qkv`` take fp32 tensors of any number of
tokens, also none; a kernel is built at the first call of its family and kept.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.build import Kernel, build, set_threads
from kernels.targets import KernelTarget, cpu_target, cuda_target
from kernels.workload import attention, linear

__all__ = ["linear_kernel", "set_threads"]

# Shorter sequences take less time than a second thread needs to wake up.
_SPLIT_TOKENS = 512

_library = torch.library.Library("shiftadd", "DEF")
_library.define("linear(Tensor x, Tensor[] packed, str form, int n) -> Tensor")
_library.define("add_kv(Tensor k, Tensor v, str alphabet) -> Tensor")
_library.define("add_qkv(Tensor q, Tensor kv, str alphabet) -> Tensor")


def _target(device: torch.device) -> KernelTarget:
    if device.type == "cpu":
        return cpu_target()
    major, minor = torch.cuda.get_device_capability(device)
    return cuda_target(f"sm_{major}{minor}")


@functools.cache
def linear_kernel(form: str, k: int, n: int, device: torch.device) -> Kernel:
    """The kernel of a linear form for any number of tokens."""
    return build(linear(form, 1, k, n), target=_target(device))


@functools.cache
def _attention_kernel(
    product: str, bits: int, n: int, alphabet: str, device: torch.device, split: bool
) -> Kernel:
    kv, qkv = attention(1, 1, bits, n, alphabet)
    name = {"kv": "add.buckets", "qkv": "add.tables"}[product] + "_split" * split
    lowering = name if device.type == "cpu" else None
    return build(kv if product == "kv" else qkv, lowering, _target(device))


def _too_few_heads(x: Tensor) -> bool:
    """Whether threads would idle unless each sequence is cut into chunks."""
    return x.shape[0] < torch.get_num_threads() and x.shape[1] >= _SPLIT_TOKENS


def _linear(x: Tensor, packed: list[Tensor], form: str, n: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(rows.shape[0], n)
    kernel = linear_kernel(form, rows.shape[1], n, rows.device)
    kernel.launch(rows, *packed, out)
    return out.view(*x.shape[:-1], n)


def _linear_fake(x: Tensor, packed: list[Tensor], form: str, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _add_kv(k: Tensor, v: Tensor, alphabet: str) -> Tensor:
    out = v.new_empty(k.shape[0], k.shape[2], v.shape[2])
    split = _too_few_heads(k)
    kernel = _attention_kernel("kv", k.shape[2], v.shape[2], alphabet, k.device, split)
    kernel.launch(k.contiguous(), v.contiguous(), out)
    return out


def _add_kv_fake(k: Tensor, v: Tensor, alphabet: str) -> Tensor:
    return v.new_empty(k.shape[0], k.shape[2], v.shape[2])


def _add_qkv(q: Tensor, kv: Tensor, alphabet: str) -> Tensor:
    out = kv.new_empty(q.shape[0], q.shape[1], kv.shape[2])
    split = _too_few_heads(q)
    kernel = _attention_kernel("qkv", q.shape[2], kv.shape[2], alphabet, q.device, split)
    kernel.launch(q.contiguous(), kv.contiguous(), out)
    return out


def _add_qkv_fake(q: Tensor, kv: Tensor, alphabet: str) -> Tensor:
    return kv.new_empty(q.shape[0], q.shape[1], kv.shape[2])


for _name, _implementation, _fake in (
    ("linear", _linear, _linear_fake),
    ("add_kv", _add_kv, _add_kv_fake),
    ("add_qkv", _add_qkv, _add_qkv_fake),
):
    _library.impl(_name, _implementation, "CPU")
    _library.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"shiftadd::{_name}", _fake, lib=_library)
