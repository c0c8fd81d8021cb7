"""What a model does in one pass: the steps that compute something, in a flat list.

Views and allocations are no steps: a tensor of a plan is where it is from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.launches import Launch, noted

_aten = torch.ops.aten
_ALLOCATE = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
# What makes a tensor like another one, in another layout or type.
_COPY = {_aten.clone, _aten._to_copy, _aten.contiguous, _aten._reshape_copy}


class PlanError(ValueError):
    """A model that cannot be planned."""


@dataclass(frozen=True)
class Step:
    """One call; tensors in it are those of the traced pass.

    Attributes:
        run: A kernel, or an operator of torch's.
        given: Positional arguments.
        named: Others.
        into: Tensors that the results are copied to, where the call cannot write them itself.
        is_kernel: Whether it is one of ours.
    """

    run: Callable[..., Any]
    given: tuple[Any, ...]
    named: Mapping[str, Any] = field(default_factory=dict)
    into: tuple[Tensor, ...] = ()
    is_kernel: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All that it reads or writes."""
        leaves = tree_leaves((self.given, dict(self.named), self.into))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Trace:
    """A pass.

    Attributes:
        steps: In order.
        x: The input, a tensor of its own.
        out: The result.
        made: Addresses of the storages that the pass made, ``x``'s among them.
        alive: Keeps them apart from each other.
    """

    steps: list[Step]
    x: Tensor
    out: Tensor
    made: set[int]
    alive: list[Any]


def storage_of(tensor: Tensor) -> int:
    """By which tensors that share memory are known."""
    return tensor.untyped_storage()._cdata


def trace_pass(model: Callable[[Tensor], Any], example: Tensor) -> Trace:
    """Runs a model, or a layer, once and notes what it does.

    Args:
        model: Deployed, in evaluation mode, on the CPU; one tensor in and one out.
        example: Its input.

    Raises:
        PlanError: If what it does depends on more than the shape of its input, or it gives
            something else than one tensor.
    """
    if example.device.type != "cpu":
        raise PlanError(f"the input is on {example.device}: plans are of the CPU")
    x = example.detach().clone()
    watch = _Watch(x)
    with torch.no_grad(), noted(watch.launched), watch:
        out = model(x)
    if not isinstance(out, Tensor):
        raise PlanError(f"the model gives {type(out).__name__}, not one tensor")
    return Trace(watch.steps, x, out, watch.made, watch.alive)


class _Watch(TorchDispatchMode):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.made = {storage_of(x)}
        self.alive: list[Any] = [x]

    def launched(self, launch: Launch) -> None:
        """Notes a kernel of ours."""
        self.steps.append(Step(*launch, is_kernel=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        found = func(*args, **named)
        self._note(func, args, named, found)
        return found

    def _note(self, func: Any, args: tuple[Any, ...], named: dict[str, Any], found: Any) -> None:
        results = [result for result in tree_leaves(found) if result is not None]
        if not all(isinstance(result, Tensor) for result in results):
            raise PlanError(f"{func} looks at numbers: what follows may depend on the input")
        if torch.Tag.nondeterministic_seeded in func.tags and _drops(func, args, named):
            raise PlanError(f"{func} draws random numbers")
        if torch.Tag.dynamic_output_shape in func.tags and not _by_positions(func, args):
            raise PlanError(f"{func} gives as much as the input says")
        self.alive.append(found)
        seen = {storage_of(leaf) for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)}
        new = [result for result in results if storage_of(result) not in seen]
        self.made |= {storage_of(result) for result in new}
        if func._schema.is_mutable:
            self.steps.append(Step(func, args, named))
        elif new and func.overloadpacket not in _ALLOCATE:
            self.steps.append(_writing(func, args, named, results))


def _drops(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether an operator that may draw random numbers does: attention without dropout does not."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | dict(named)
    defaults = {one.name: one.default_value for one in func._schema.arguments}
    return (defaults | given).get("dropout_p") != 0


def _by_positions(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it indexes by integers: what that gives is as large as they are many."""
    masks = (torch.bool, torch.uint8)
    return func is _aten.index.Tensor and not any(
        index is not None and index.dtype in masks for index in args[1]
    )


def _writing(func: Any, args: tuple[Any, ...], named: dict[str, Any], results: list[Any]) -> Step:
    """A step that writes its results where they are."""
    if func.overloadpacket in _COPY:
        return Step(_aten.copy_.default, (results[0], args[0]))
    variant = getattr(func.overloadpacket, "out", None)
    if len(results) == 1 and variant is not None and _same_arguments(func, variant):
        return Step(variant, args, {**named, "out": results[0]})
    return Step(func, args, named, tuple(results))


def _same_arguments(func: Any, variant: Any) -> bool:
    own = [argument.name for argument in func._schema.arguments]
    others = [argument.name for argument in variant._schema.arguments if not argument.is_out]
    return own == others and [a.name for a in variant._schema.arguments if a.is_out] == ["out"]
