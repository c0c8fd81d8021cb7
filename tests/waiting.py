"""Waiting for another process, not for a time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], bool], limit_s: float = 120) -> None:
    """Returns once something holds; fails if it does not within a limit."""
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
