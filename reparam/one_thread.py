"""Torch's own operators on one thread while a deployed model runs.

A worker of torch's spins for milliseconds after each of its operators, on the cores that the
workers of our kernels need. What is left to torch in a deployed model is too little to be worth it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Has torch use one thread, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _OneThread:
    def __init__(self) -> None:
        self._before: list[int] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        # A compiled model has its number of threads in its code.
        if not torch.compiler.is_compiling():
            self._before.append(torch.get_num_threads())
            torch.set_num_threads(1)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._before and not torch.compiler.is_compiling():
            torch.set_num_threads(self._before.pop())


def torch_on_one_thread_(model: nn.Module) -> None:
    """Has torch use one thread in each forward pass of a model, and as many as before after it."""
    guard = _OneThread()
    model.register_forward_pre_hook(guard.enter)
    model.register_forward_hook(guard.leave, always_call=True)
