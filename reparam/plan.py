"""A deployed model for inputs of one shape: a flat list of launches in memory planned once.

What modules, operators and torch's allocator take beside the kernels is spent when the plan is
made. Of several images a core may take its own through the whole model, some at a time: no core
then waits for another, and what lies between two layers stays in its caches. Which way is the
fastest is tried out.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kernels.launches import repeated
from kernels.torch_ops import get_threads, kernels_of_this_thread, set_threads
from reparam.one_thread import torch_on_one_thread
from reparam.plan_memory import Life, offsets
from reparam.plan_trace import PlanError, Step, Trace, storage_of, trace_pass

_TRIALS = 5

# Of images into results.
Way = Callable[[Tensor, Tensor], None]


class Plan(nn.Module):
    """A model for inputs of one shape, on as many threads as were set when it was made.

    Callers from several threads wait for each other: what lies between the layers is there once. It
    follows what is written into the model's weights in place, but not tensors that are put in
    their place: a model that was changed so is planned anew.

    Args:
        model: Deployed, in evaluation mode, on the CPU; one tensor in and one out, each image for
            itself.
        example: Its input, ``(images, ...)``.

    Attributes:
        images_at_once: That a core takes through the model; None where all cores share each layer.

    Raises:
        PlanError: If what the model does depends on more than the shape of its input.
    """

    # Memory that is made in inference mode could be written to in no other.
    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self._in_use = threading.Lock()
        trace = trace_pass(model, example)
        # Their shapes and types alone.
        self._x, self._out = (part.to("meta") for part in (trace.x, trace.out))
        ways: dict[int | None, Way] = {None: _together(_Pass.of(trace))}
        # What does not keep the images in front cannot be put together of parts.
        if trace.out.shape[:1] == example.shape[:1]:
            for some in _portions(len(example), get_threads()):
                ways[some] = _apart(model, example, some)
        self.images_at_once = min(ways, key=lambda some: self._seconds(ways[some], example))
        self._way = ways[self.images_at_once]

    def forward(self, x: Tensor) -> Tensor:
        """As the model's."""
        if x.shape != self._x.shape or x.dtype != self._x.dtype:
            raise PlanError(f"x: {tuple(x.shape)}, planned for {tuple(self._x.shape)}")
        out = torch.empty_like(self._out, device="cpu")
        with self._in_use:
            self._way(x, out)
        return out

    def extra_repr(self) -> str:
        """What it is for, and how."""
        some = self.images_at_once
        way = "all threads in each layer" if some is None else f"{some} images a thread at a time"
        return f"{tuple(self._x.shape)}, {way}"

    def _seconds(self, way: Way, example: Tensor) -> float:
        out, taken = torch.empty_like(self._out, device="cpu"), []
        for _ in range(1 + _TRIALS):
            begin = time.perf_counter()
            way(example, out)
            taken.append(time.perf_counter() - begin)
        return min(taken[1:])


def planned(model: nn.Module, example: Tensor) -> nn.Module:
    """The plan of a deployed model; the model itself, with a warning, where there can be none."""
    try:
        return Plan(model, example)
    except PlanError as error:
        warnings.warn(f"not planned: {error}", stacklevel=2)
        return model


def launches_of(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A layer on one input as a plan launches it, again and again into the same memory.

    Args:
        layer: Of one tensor, on the CPU.
        x: Its input.
    """
    own = _Pass.of(trace_pass(layer, x))
    own.x.copy_(x)
    return own.launch


def _portions(images: int, threads: int) -> Iterator[int]:
    """Images at a time to try: powers of two that leave no core without any."""
    some = 1
    while images > 1 and some * threads <= images:
        yield some
        some *= 2


def _together(whole: _Pass) -> Way:
    """All images at once, all threads in each kernel."""
    threads = get_threads()

    def run(x: Tensor, out: Tensor) -> None:
        with _kernels_on(threads):
            whole.run(x, out)

    return run


def _apart(model: nn.Module, example: Tensor, some: int) -> Way:
    """Some images at a time, those of one thread beside those of another."""
    threads, images = get_threads(), len(example)
    starts = range(0, images, some)
    sizes = {min(some, images - start) for start in starts}
    set_threads(1)
    try:
        passes = [
            {size: _Pass.of(trace_pass(model, example[:size])) for size in sizes}
            for _ in range(threads)
        ]
    finally:
        set_threads(threads)

    def work(
        own: dict[int, _Pass], left: Iterator[int], x: Tensor, out: Tensor, inference: bool
    ) -> None:
        with torch.inference_mode(inference):
            for start in left:
                part = slice(start, min(start + some, images))
                own[part.stop - start].run(x[part], out[part])

    def run(x: Tensor, out: Tensor) -> None:
        # Of the caller's thread alone, and what is made in it no other mode may write to.
        given = iter(starts), x, out, torch.is_inference_mode_enabled()
        others = [_others(threads - 1).submit(work, own, *given) for own in passes[1:]]
        try:
            with _kernels_on(1):
                work(passes[0], *given)
        finally:
            for done in others:
                done.result()

    return run


@contextmanager
def _kernels_on(threads: int) -> Iterator[None]:
    """Has kernels of the caller use some threads and torch one, and as many as are set after it."""
    kernels_of_this_thread(threads)
    try:
        with torch_on_one_thread():
            yield
    finally:
        kernels_of_this_thread(get_threads())


@functools.cache
def _others(threads: int) -> ThreadPoolExecutor:
    """Threads of Python's beside the caller's, in each of which kernels and torch have one."""

    def begin() -> None:
        kernels_of_this_thread(1)
        # Torch takes over what others are told when it is first used by a thread.
        torch.get_num_threads()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    others = ThreadPoolExecutor(threads, "images", begin)
    for begun in [others.submit(time.sleep, 0.01) for _ in range(threads)]:
        begun.result()
    # What the last of them was told is else what later threads of torch's begin with.
    torch.set_num_threads(before)
    return others


@dataclass(frozen=True)
class _Pass:
    """One pass, in memory of its own: ``x``, ``out`` and what lies between."""

    x: Tensor
    out: Tensor
    calls: Sequence[Callable[[], Any]]

    @classmethod
    def of(cls, trace: Trace) -> _Pass:
        """Gives a traced pass its memory."""
        places, size = offsets(_lives(trace))
        memory = torch.empty(size, dtype=torch.uint8).untyped_storage()

        def placed(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor) or storage_of(tensor) not in places:
                return tensor
            begin = places[storage_of(tensor)] // tensor.element_size() + tensor.storage_offset()
            own = torch.empty(0, dtype=tensor.dtype)
            return own.set_(memory, begin, tensor.shape, tensor.stride())

        with torch.no_grad():
            calls = [_call(step, placed) for step in trace.steps]
            return cls(placed(trace.x), placed(trace.out), calls)

    @torch.no_grad()
    def run(self, x: Tensor, out: Tensor) -> None:
        """Takes some images to their results."""
        self.x.copy_(x)
        self.launch()
        out.copy_(self.out)

    @torch.no_grad()
    def launch(self) -> None:
        """Computes ``out`` from ``x``."""
        for call in self.calls:
            call()


def _call(step: Step, placed: Callable[[Any], Any]) -> Callable[[], Any]:
    given, named, into = (tree_map(placed, each) for each in (step.given, step.named, step.into))
    if step.is_kernel:
        return repeated(step.run, *given)
    call = partial(step.run, *given, **named)
    if not into:
        return call

    def copied() -> None:
        results = call()
        for own, result in zip(into, [results] if isinstance(results, Tensor) else results):
            own.copy_(result)

    return copied


def _lives(trace: Trace) -> dict[int, Life]:
    """Of the storages that the pass made, by the steps that touch them."""
    touched: dict[int, list[int]] = {storage_of(trace.x): [-1]}
    sizes: dict[int, int] = {}
    uses = [step.tensors for step in trace.steps]
    for step, tensors in enumerate([[trace.x], *uses, [trace.out]], start=-1):
        for tensor in tensors:
            own = storage_of(tensor)
            if own in trace.made:
                touched.setdefault(own, []).append(step)
                sizes[own] = tensor.untyped_storage().nbytes()
    return {own: Life(sizes[own], min(steps), max(steps)) for own, steps in touched.items()}
