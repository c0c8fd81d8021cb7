"""The same workloads through torch, as Kernels: from the same fp32 inputs to the same fp32 outputs.

Weights are converted once, outside the timing, as ours are; activations are converted inside.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

# Read when torch.compile is first used. A pool of processes would stay behind, beside the timings.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch import Tensor

from kernels.build import BuildError, Kernel
from kernels.forms import AROUND
from kernels.packing import INT8_MAX
from kernels.reference import Operands
from kernels.workload import Workload


@dataclass(frozen=True)
class Baseline:
    """One way in which torch computes a form.

    Attributes:
        pack: Operands -> arguments of ``launch`` without the output.
        launch: ``launch(*arguments, out)``.
        exact: False where it rounds otherwise than the form declares, so that the oracle's bound
            does not apply.
        compiled: Through ``torch.compile``, at the first launch, for these sizes and this number
            of threads. Needs a C++ compiler.
        device: ``cpu`` or ``cuda`` where it is for such devices alone.
    """

    pack: Callable[[Operands], tuple[Any, ...]]
    launch: Callable[..., None]
    exact: bool = True
    compiled: bool = False
    device: str | None = None


def _weight(dtype: torch.dtype, operands: Operands) -> tuple[Tensor, ...]:
    parameters = operands.parameters
    assert parameters is not None
    weight, bias = parameters.weight.to(dtype), parameters.bias.to(dtype)
    return operands.x, weight.t(), bias


def _linear_fp32(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias, x, weight, out=out)


def _linear_tf32(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """In the tensor cores' own format, which is a switch of the whole process.

    A CUDA graph keeps the kernel that was chosen when it was captured.
    """
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        torch.addmm(bias, x, weight, out=out)
    finally:
        matmul.fp32_precision = before


def _linear_rounded(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """In the weight's type of 16 bits."""
    out.copy_(torch.addmm(bias, x.to(weight.dtype), weight))


def _int8_weight(operands: Operands) -> tuple[Tensor, ...]:
    p = operands.parameters
    assert p is not None
    return operands.x, p.values.to(torch.int8).t(), p.scale, p.bias


def _linear_int_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> None:
    largest = x.abs().amax(dim=1, keepdim=True)
    codes = torch.round(x * (INT8_MAX / largest)).to(torch.int8)
    product = torch._int_mm(codes, weight)
    torch.addcmul(bias, product, largest * (1 / INT8_MAX) * scale, out=out)


def _linear_int_mm_fused(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out: Tensor
) -> None:
    """As ``_linear_int_mm`` with the result copied, since the compiler takes no ``out=``."""
    largest = x.abs().amax(dim=1, keepdim=True)
    codes = torch.round(x * (INT8_MAX / largest)).to(torch.int8)
    product = torch._int_mm(codes, weight)
    out.copy_(product * (largest * (1 / INT8_MAX) * scale) + bias)


def _dynamic_weight(operands: Operands) -> tuple[Any, ...]:
    p = operands.parameters
    assert p is not None
    zeros = torch.zeros_like(p.scale, dtype=torch.long)
    weight = torch.quantize_per_channel(p.weight, p.scale.double(), zeros, 0, torch.qint8)
    return operands.x, torch.ops.quantized.linear_prepack(weight, p.bias)


def _linear_dynamic(x: Tensor, packed: object, out: Tensor) -> None:
    # As torch's own module: activations of 8 bits saturate on CPUs without VNNI.
    out.copy_(torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True))


def _attention(operands: Operands) -> tuple[Tensor, ...]:
    assert operands.values is not None
    keys = () if operands.keys is None else (operands.keys,)
    return operands.x, *keys, operands.values


def _codes(x: Tensor, alphabet: str) -> Tensor:
    if alphabet == "pm1":
        return torch.copysign(torch.ones((), dtype=x.dtype), x)
    return (x > 0).to(x.dtype)


def _attention_launch(kind: str, alphabet: str, dtype: torch.dtype) -> Callable[..., None]:
    """One product of linear attention or both, the codes made on the way."""

    def launch(x: Tensor, *others: Tensor) -> None:
        *keys, values, out = others
        codes, values = _codes(x.to(dtype), alphabet), values.to(dtype)
        if keys:
            values = torch.matmul(_codes(keys[0].to(dtype), alphabet).transpose(1, 2), values)
        left = codes.transpose(1, 2) if kind == "kv" else codes
        if dtype == out.dtype and not torch.compiler.is_compiling():
            torch.matmul(left, values, out=out)
        else:
            out.copy_(torch.matmul(left, values))

    return launch


def _attention_baselines(kind: str, alphabet: str) -> dict[str, Baseline]:
    in_fp32 = _attention_launch(kind, alphabet, torch.float32)
    in_bf16 = _attention_launch(kind, alphabet, torch.bfloat16)
    return {
        "torch.fp32": Baseline(_attention, in_fp32),
        "torch.bf16": Baseline(_attention, in_bf16, exact=False),
        "torch.compile.fp32": Baseline(_attention, in_fp32, compiled=True),
        "torch.compile.bf16": Baseline(_attention, in_bf16, exact=False, compiled=True),
    }


_FP32, _FP16, _BF16 = (
    partial(_weight, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
)

# By form, then by name: torch.fp32 is torch's fp32, whatever the product. On a CPU compiled linears
# in fp32 and bf16 are not among them: there is nothing to fuse, and they were 1 to 7 % slower than
# eager's. On a GPU bf16 is three launches, of which two are casts that the compiler may fuse.
BASELINES: dict[str, dict[str, Baseline]] = {
    "mult_fp32": {
        "torch.fp32": Baseline(_FP32, _linear_fp32),
        "torch.tf32": Baseline(_FP32, _linear_tf32, exact=False, device="cuda"),
    },
    "mult_bf16": {
        "torch.bf16": Baseline(_BF16, _linear_rounded, exact=False),
        "torch.fp16": Baseline(_FP16, _linear_rounded, exact=False, device="cuda"),
        "torch.compile.bf16": Baseline(
            _BF16, _linear_rounded, exact=False, compiled=True, device="cuda"
        ),
    },
    "mult_int8": {
        "torch.int8": Baseline(_int8_weight, _linear_int_mm, exact=False),
        "torch.int8_dynamic": Baseline(_dynamic_weight, _linear_dynamic, exact=False, device="cpu"),
        "torch.compile.int8": Baseline(
            _int8_weight, _linear_int_mm_fused, exact=False, compiled=True
        ),
    },
    **{
        f"add_{kind}_{alphabet}{suffix}": _attention_baselines(kind, alphabet)
        for kind in ("kv", "qkv", "attention")
        for alphabet in ("pm1", "01")
        for suffix in ("", "_bf16")
    },
}


def names(workload: Workload, compiled: bool, device: str) -> list[str]:
    """Names of torch's ways to compute a workload on ``cpu`` or ``cuda``.

    With or without the compiled ones. None where a neighbour is fused around a linear: that is
    compared as part of a model.
    """
    if set(workload.fused) & set(AROUND):
        return []
    return [
        name
        for name, known in BASELINES.get(workload.form, {}).items()
        if (compiled or not known.compiled) and known.device in (None, device)
    ]


def baseline(workload: Workload, name: str) -> Kernel:
    """A torch baseline as a Kernel.

    Raises:
        BuildError: If torch has none of that name for the workload's form.
    """
    found = BASELINES.get(workload.form, {})
    if name not in found:
        known = ", ".join(found) or "none"
        raise BuildError(f"{name}: no baseline of {workload.form}; known: {known}")
    chosen = found[name]
    launch = _compile(chosen.launch) if chosen.compiled else chosen.launch
    return Kernel(workload, name, True, chosen.pack, launch, chosen.exact)


def _compile(launch: Callable[..., None]) -> Callable[..., None]:
    """Compiles a function apart from all others.

    What torch has compiled of one code object it looks up at each call, one after the other, and
    from the ninth on it gives up in silence. So each kernel gets a code object of its own.
    """
    alone = types.FunctionType(
        launch.__code__.replace(), launch.__globals__, launch.__name__, None, launch.__closure__
    )
    options: dict[str, Any] = {"cpp.threads": torch.get_num_threads()}
    return torch.compile(alone, dynamic=False, options=options)
