"""One process a device: all build and check at once, and none measures before all have."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

_LOOK_FOR_PARENT_S = 2.0

Work = Callable[..., None]


def one_each(work: Work, devices: Sequence[str], *arguments: Any) -> list[str]:
    """Runs ``work(device, ready, *arguments)`` in a process for each device.

    ``work`` calls ``ready()`` when it has built and checked everything: it returns once all the
    others have too or have ended, so that no compiler and no oracle runs beside a clock.

    Args:
        work: A function that a new process can import.
        devices: One process each.
        arguments: Handed to each; plain values.

    Returns:
        The devices whose process failed.
    """
    context = get_context("spawn")
    all_ready = context.Event()
    workers, waiting = {}, set()
    for device in devices:
        ours, theirs = context.Pipe(duplex=False)
        workers[device] = context.Process(
            target=_work,
            args=(work, device, theirs, all_ready, *arguments),
            name=device,
            daemon=True,
        )
        workers[device].start()
        theirs.close()
        waiting.add(ours)
    while waiting:
        # Its end of the pipe is written when a worker is ready, and closed when it ends.
        waiting -= set(wait(list(waiting)))
    all_ready.set()
    for worker in workers.values():
        worker.join()
    return [device for device, worker in workers.items() if worker.exitcode != 0]


def _work(work: Work, device: str, told: Connection, all_ready: Any, *arguments: Any) -> None:
    def ready() -> None:
        told.send(None)
        parent = parent_process()
        while not all_ready.wait(_LOOK_FOR_PARENT_S):
            if parent is None or not parent.is_alive():
                raise SystemExit(1)

    end_with_parent()
    work(device, ready, *arguments)


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, however that was killed.

    A daemon is ended by a parent that ends by itself or by Ctrl-C, and by no other.
    """
    Thread(target=_follow_parent, name="end with parent", daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
