"""What the CPU that we run on can do. Standard library only: whoever asks stays light."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Linux's names of what this CPU can do, as x86 (flags) or Arm (Features); empty elsewhere."""
    try:
        info = _CPUINFO.read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()
