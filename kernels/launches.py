"""Launches of the kernels behind our torch operators, and who wants to know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from tvm_ffi import from_dlpack

Launch = tuple[Callable[..., Any], tuple[Tensor, ...]]

_noted: list[Callable[[Launch], None]] = []


def launch(main: Callable[..., Any], *arguments: Tensor) -> None:
    """Runs a kernel."""
    main(*arguments)
    for note in _noted:
        note((main, arguments))


def repeated(main: Callable[..., Any], *arguments: Tensor) -> Callable[[], None]:
    """A kernel's launches on the same memory again and again, which stays where it is.

    What each tensor is, is asked for once: that took 0.2 us a tensor at each launch.
    """
    return partial(main, *(from_dlpack(argument.detach()) for argument in arguments))


def are_noted() -> bool:
    """Whether someone is told of launches, for whom operators must show what they do."""
    return bool(_noted)


@contextmanager
def noted(note: Callable[[Launch], None]) -> Iterator[None]:
    """Calls ``note`` with each kernel and its arguments, behind each launch of this process."""
    _noted.append(note)
    try:
        yield
    finally:
        _noted.remove(note)
