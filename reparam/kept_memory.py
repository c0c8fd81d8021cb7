"""Freed memory stays with the process, in huge pages where the system has them.

glibc gives freed memory at the top of its heap, and large arrays at once, back to the system. The
next forward pass faults it in again, page by page: of pvt_v2_b0 with 8 images 22,000 faults a pass,
a fifth to a third of its time. And weights and activations in pages of 4 KiB are more than a core
finds the addresses of by itself: on a virtual machine, which looks up twice, that takes a twentieth
to a sixth of a pass on an Intel Xeon, and nothing on an AMD Zen 3 (``tests/prove/huge_pages.py``).
Torch's originals are spared all that as well.

Source: mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
# What older versions of glibc take at most.
_LARGEST_THRESHOLD = 32 << 20
_HUGE_PAGE = 2 << 20
# Such that the heap grows by it, where glibc takes the threshold and where it does not.
_PIECE, _SMALL_PIECE = 1 << 30, 16 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Has this process keep what it frees, and lie in huge pages with all it allocates from now on.

    Returns:
        Whether the C library can; one that is not glibc may not.
    """
    try:
        glibc = ctypes.CDLL("libc.so.6")
        mallopt = glibc.mallopt
    except (OSError, AttributeError):
        return False
    if mallopt(_M_MMAP_THRESHOLD, _NEVER):
        piece = _PIECE
    elif mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD):
        piece = _SMALL_PIECE
    else:
        return False
    if not mallopt(_M_TRIM_THRESHOLD, _NEVER):
        return False
    _prefer_huge_pages(glibc, piece)
    return True


def _prefer_huge_pages(glibc: ctypes.CDLL, size: int) -> None:
    """Grows the heap by half of the memory and asks for huge pages there; nothing is touched yet.

    What the heap grows by later is as the system has it.
    """
    glibc.malloc.restype, glibc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    glibc.free.restype, glibc.free.argtypes = None, (ctypes.c_void_p,)
    glibc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pieces = []
    for _ in range(memory // 2 // size):
        piece = glibc.malloc(size)
        if piece is None:
            break
        begin = -(-piece // _HUGE_PAGE) * _HUGE_PAGE
        glibc.madvise(begin, piece + size - begin, mmap.MADV_HUGEPAGE)
        pieces.append(piece)
    for piece in reversed(pieces):
        glibc.free(piece)
