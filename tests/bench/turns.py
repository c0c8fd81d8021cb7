"""Processes that measure in turns: one burst of the first, one of the second, and so on.

Figures of two processes that run one after the other differ by what the machine did meanwhile;
those of bursts 20 ms apart do not. Each process builds all that it measures, says what that is
(one line of JSON), is told what all have in common, and then asks before each burst. It gets the
word when every other process waits. Standard library only: it runs in the trees of both sides.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "GATE_TURNS"

_ASKS, _GOES = b".", b"g"
# Importing and building all kernels takes some 10 s; a burst some 20 ms.
_PATIENCE_S = 600.0


class OutOfStep(RuntimeError):
    """A process ended before the others, or answers no more; ``side`` says which."""

    def __init__(self, side: str, message: str) -> None:
        super().__init__(f"{side} {message}")
        self.side = side


# In the process that measures


def agree(names: Sequence[str]) -> list[str]:
    """Those of the names that every process can measure; all of them where none else does."""
    if VARIABLE not in os.environ:
        return list(names)
    reads, writes = _descriptors()
    os.write(writes, json.dumps(list(names)).encode() + b"\n")
    return json.loads(_line(reads))


def wait_for_turn() -> None:
    """Returns when no other process measures; at once where none else does."""
    if VARIABLE not in os.environ:
        return
    reads, writes = _descriptors()
    os.write(writes, _ASKS)
    if os.read(reads, 1) != _GOES:
        raise SystemExit("the gate has gone")


def _descriptors() -> tuple[int, int]:
    reads, writes = os.environ[VARIABLE].split(",")
    return int(reads), int(writes)


def _line(reads: int) -> str:
    received = b""
    while not received.endswith(b"\n"):
        byte = os.read(reads, 1)
        if not byte:
            raise EOFError
        received += byte
    return received.decode()


# In the process that gives the word


@dataclass(frozen=True)
class Side:
    """A process that measures in turns."""

    name: str
    process: subprocess.Popen[str]
    reads: int
    writes: int

    def names(self) -> list[str]:
        """What it can measure."""
        self._await()
        try:
            return json.loads(_line(self.reads))
        except EOFError:
            raise OutOfStep(self.name, "ended before it measured anything") from None

    def tell(self, names: Sequence[str]) -> None:
        """What it is to measure."""
        os.write(self.writes, json.dumps(list(names)).encode() + b"\n")

    def asks(self) -> bool:
        """Waits until it asks for a turn; False when it has ended instead."""
        self._await()
        return os.read(self.reads, 1) == _ASKS

    def goes(self) -> None:
        """Gives it the word."""
        os.write(self.writes, _GOES)

    def _await(self) -> None:
        ready, _, _ = select.select([self.reads], [], [], _PATIENCE_S)
        if not ready:
            raise OutOfStep(self.name, f"has not answered for {_PATIENCE_S:g} s")

    def end(self) -> str:
        """Ends it if it still runs, and returns what it wrote."""
        os.close(self.writes)
        written, _ = self.process.communicate()
        os.close(self.reads)
        return written


def start(name: str, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Side:
    """Starts a process that measures in turns."""
    its_reads, our_writes = os.pipe()
    our_reads, its_writes = os.pipe()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **variables, VARIABLE: f"{its_reads},{its_writes}"},
        pass_fds=(its_reads, its_writes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(its_reads)
    os.close(its_writes)
    return Side(name, process, our_reads, our_writes)


def take_turns(
    sides: Sequence[Side],
    wanted: Container[str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, list[str]]:
    """Gives all sides the word in turns, until they have ended.

    The order swaps from round to round, so that a steady drift cancels.

    Args:
        sides: Started.
        wanted: What is to be measured; None for all that the sides have in common.
        progress: Called after each round.

    Returns:
        What each side, by name, could have measured.

    Raises:
        OutOfStep: If one ends before the others.
    """
    names = {side.name: side.names() for side in sides}
    common = [
        name
        for name in names[sides[0].name]
        if all(name in it for it in names.values()) and (wanted is None or name in wanted)
    ]
    for side in sides:
        side.tell(common)
    asking = {side.name: side.asks() for side in sides}
    order = list(sides)
    while all(asking.values()):
        for side in order:
            side.goes()
            asking[side.name] = side.asks()
        order.reverse()
        progress()
    if any(asking.values()):
        raise OutOfStep(next(name for name, asks in asking.items() if not asks), "ended early")
    return names
