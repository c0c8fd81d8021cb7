"""Freed memory stays with the process, as runtimes that plan their memory have it.

glibc gives freed memory at the top of its heap, and large arrays at once, back to the system. The
next forward pass faults it in again, page by page: of pvt_v2_b0 with 8 images 22,000 faults a pass,
a fifth to a third of its time. Torch's originals have more of them, and are spared them as well.

Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
# What older versions of glibc take at most.
_LARGEST_THRESHOLD = 32 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Has this process keep what it frees, for all that it allocates from now on.

    Returns:
        Whether the C library can; one that is not glibc may not.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    from_heap = mallopt(_M_MMAP_THRESHOLD, _NEVER) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    return bool(from_heap and mallopt(_M_TRIM_THRESHOLD, _NEVER))
