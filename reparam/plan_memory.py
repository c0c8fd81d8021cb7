"""Where the tensors of a plan lie: those whose lives do not meet share one piece of memory.

A pass takes its memory from a small piece that it has just used, which its core's caches still
hold, where an allocator would hand out another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A line of the caches, and a vector.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Life:
    """A piece of memory that is needed from one step to another, both included.

    Attributes:
        size: In bytes.
        first, last: Steps.
    """

    size: int
    first: int
    last: int

    def meets(self, other: Life) -> bool:
        """Whether both are needed at the same time."""
        return self.first <= other.last and other.first <= self.last


def offsets(lives: Mapping[int, Life]) -> tuple[dict[int, int], int]:
    """Places for all of them.

    In the order of their first steps each gets the lowest place that is free while it lives.

    Args:
        lives: By name.

    Returns:
        (offset of each in bytes, size of the whole).
    """
    placed: dict[int, int] = {}
    end = 0
    for name, life in sorted(lives.items(), key=lambda item: (item[1].first, -item[1].size)):
        beside = [
            (placed[other], lives[other].size) for other in placed if lives[other].meets(life)
        ]
        placed[name] = _lowest(sorted(beside), life.size)
        end = max(end, placed[name] + life.size)
    return placed, end


def _lowest(taken: Sequence[tuple[int, int]], size: int) -> int:
    place = 0
    for offset, length in taken:
        if offset >= place + size:
            break
        place = max(place, -(-(offset + length) // _ALIGNMENT) * _ALIGNMENT)
    return place
