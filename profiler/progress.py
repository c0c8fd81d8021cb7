"""What a long command shows while it works: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import current_process, parent_process
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")

_LINE_EVERY_S = 15.0

# Piped into a file there is no terminal to ask for its width.
console = Console() if sys.stdout.isatty() else Console(width=170)


def track(label: str, items: Sequence[Item], step: Callable[[Item], Result]) -> Iterator[Result]:
    """Applies a step to each item and shows how far it is and how long it will take.

    A worker among several writes lines with its name: bars would overwrite each other.

    Args:
        label: What the step does.
        items: What it is applied to.
        step: One item at a time.
    """
    if not items:
        return
    if parent_process() is not None:
        yield from _with_lines(f"{current_process().name}: {label}", items, step)
    elif not console.is_terminal:
        yield from _with_lines(label, items, step)
    else:
        columns = (
            TextColumn(f"{label:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            for item in progress.track(items):
                yield step(item)


def _with_lines(
    label: str, items: Sequence[Item], step: Callable[[Item], Result]
) -> Iterator[Result]:
    start = spoken = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield step(item)
        now = time.monotonic()
        if done == len(items):
            said = f" in {now - start:.1f} s"
        elif now - spoken >= _LINE_EVERY_S:
            spoken = now
            said = f", {(now - start) / done * (len(items) - done):.0f} s left"
        else:
            continue
        console.print(f"{label}: {done} of {len(items)}{said}", markup=False, highlight=False)
