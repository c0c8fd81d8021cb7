"""The same workloads through torch, as Kernels: from the same fp32 inputs to the same fp32 outputs.

Weights are converted once, outside the timing, as ours are; activations are converted inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.build import BuildError, Kernel
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
    """

    pack: Callable[[Operands], tuple[Any, ...]]
    launch: Callable[..., None]
    exact: bool = True


def _weight(operands: Operands, dtype: torch.dtype) -> tuple[Tensor, ...]:
    parameters = operands.parameters
    assert parameters is not None
    weight, bias = parameters.weight.to(dtype), parameters.bias.to(dtype)
    return operands.x, weight.t(), bias


def _linear_fp32(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias, x, weight, out=out)


def _linear_bf16(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    out.copy_(torch.addmm(bias, x.bfloat16(), weight))


def _int8_weight(operands: Operands) -> tuple[Tensor, ...]:
    p = operands.parameters
    assert p is not None
    return operands.x, p.values.to(torch.int8).t(), p.scale, p.bias


def _linear_int_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> None:
    largest = x.abs().amax(dim=1, keepdim=True)
    codes = torch.round(x * (INT8_MAX / largest)).to(torch.int8)
    product = torch._int_mm(codes, weight)
    torch.addcmul(bias, product, largest * (1 / INT8_MAX) * scale, out=out)


def _dynamic_weight(operands: Operands) -> tuple[Any, ...]:
    p = operands.parameters
    assert p is not None
    zeros = torch.zeros_like(p.scale, dtype=torch.long)
    weight = torch.quantize_per_channel(p.weight, p.scale.double(), zeros, 0, torch.qint8)
    return operands.x, torch.ops.quantized.linear_prepack(weight, p.bias)


def _linear_dynamic(x: Tensor, packed: object, out: Tensor) -> None:
    out.copy_(torch.ops.quantized.linear_dynamic(x, packed, False))


def _attention(operands: Operands) -> tuple[Tensor, ...]:
    assert operands.values is not None
    return operands.x, operands.values


def _attention_launch(dtype: torch.dtype, plus_minus: bool, transpose: bool) -> Callable[..., None]:
    one = torch.ones((), dtype=dtype)

    def launch(x: Tensor, values: Tensor, out: Tensor) -> None:
        codes = torch.copysign(one, x.to(dtype)) if plus_minus else (x > 0).to(dtype)
        left = codes.transpose(1, 2) if transpose else codes
        if dtype == torch.float32:
            torch.matmul(left, values, out=out)
        else:
            out.copy_(torch.matmul(left, values.to(dtype)))

    return launch


def _attention_pair(plus_minus: bool, transpose: bool) -> dict[str, Baseline]:
    def in_dtype(dtype: torch.dtype, exact: bool) -> Baseline:
        return Baseline(_attention, _attention_launch(dtype, plus_minus, transpose), exact)

    return {
        "torch.fp32": in_dtype(torch.float32, True),
        "torch.bf16": in_dtype(torch.bfloat16, False),
    }


# By form, then by name: torch.fp32 is torch's fp32, whatever the product.
BASELINES: dict[str, dict[str, Baseline]] = {
    "mult_fp32": {
        "torch.fp32": Baseline(lambda operands: _weight(operands, torch.float32), _linear_fp32),
    },
    "mult_bf16": {
        "torch.bf16": Baseline(
            lambda operands: _weight(operands, torch.bfloat16), _linear_bf16, exact=False
        ),
    },
    "mult_int8": {
        "torch.int8": Baseline(_int8_weight, _linear_int_mm, exact=False),
        "torch.int8_dynamic": Baseline(_dynamic_weight, _linear_dynamic, exact=False),
    },
    "add_kv_pm1": _attention_pair(plus_minus=True, transpose=True),
    "add_kv_01": _attention_pair(plus_minus=False, transpose=True),
    "add_qkv_pm1": _attention_pair(plus_minus=True, transpose=False),
    "add_qkv_01": _attention_pair(plus_minus=False, transpose=False),
}


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
    return Kernel(workload, name, True, chosen.pack, chosen.launch, chosen.exact)
