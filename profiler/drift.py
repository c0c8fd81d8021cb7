"""What two runs differ by although nothing was changed. Pure functions.

Within a run latencies are good to a few tenths of a percent; between runs the same binary moves by
5 %, by 26 % at worst: clocks, neighbours, where memory lies. The rows of other projects'
implementations (torch, of the same version in both runs) did not change, so their shift is that
movement: the controls. Those of the same product were measured in the same rounds as the row in
question and moved with it, so their median is taken off its shift; what they scatter by then is
how far an unchanged row still strays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

# Without controls: between jobs latencies of unchanged code were seen to differ by so much.
UNCONTROLLED = 0.26
FEWEST_CONTROLS = 3


@dataclass(frozen=True)
class Drift:
    """How the controls of two runs moved.

    Attributes:
        shifts: Log ratio B / A of each control.
        groups: For each control, what was measured in the same rounds as it.
    """

    shifts: Mapping[Hashable, float]
    groups: Mapping[Hashable, Hashable]

    @property
    def known(self) -> bool:
        """Whether there are controls enough to say anything."""
        return len(self.shifts) >= FEWEST_CONTROLS

    def expected(self, key: Hashable, group: Hashable) -> float:
        """Log ratio by which an unchanged row would have moved; 0 where nothing is known.

        The median of the controls in its group but itself, else of all controls.
        """
        if not self.known:
            return 0.0
        nearby = [
            self.shifts[control] for control in self._members.get(group, ()) if control != key
        ]
        everywhere = (shift for control, shift in self.shifts.items() if control != key)
        return statistics.median(nearby or everywhere)

    @cached_property
    def _members(self) -> dict[Hashable, list[Hashable]]:
        members: dict[Hashable, list[Hashable]] = {}
        for control, group in self.groups.items():
            members.setdefault(group, []).append(control)
        return members

    @cached_property
    def left(self) -> np.ndarray:
        """What is left of each control's shift, as if it were a row like any other."""
        return np.array(
            [
                shift - self.expected(control, self.groups[control])
                for control, shift in self.shifts.items()
            ]
        )

    @property
    def scatter(self) -> float:
        """Root mean square of what is left."""
        return float(np.sqrt(np.mean(np.square(self.left))))

    def half_width(self) -> float:
        """Log ratio within which 95 % of unchanged rows stay."""
        return self._exceeded_with(0.05) if self.known else math.log1p(UNCONTROLLED)

    def floor(self, rows: int) -> float:
        """Relative difference that with 95 % none of so many unchanged rows exceeds.

        By Student's t for as many controls as there are (few make a high floor), and at least
        what any control itself strayed by, since the tails are heavy.
        """
        if not self.known:
            return UNCONTROLLED
        farthest = float(np.abs(self.left).max())
        return math.expm1(max(self._exceeded_with(0.05 / max(rows, 1)), farthest))

    def _exceeded_with(self, chance: float) -> float:
        return float(stats.t.ppf(1 - chance / 2, len(self.shifts) - 1)) * self.scatter

    def in_words(self) -> str:
        """One line for people."""
        if not self.known:
            return (
                f"{len(self.shifts)} controls, too few to tell drift from change: "
                f"differences below {UNCONTROLLED:.0%} say nothing"
            )
        moved = np.expm1(list(self.shifts.values()))
        return (
            f"{len(self.shifts)} controls moved by {moved.min():+.1%} to {moved.max():+.1%}, "
            f"median {np.median(moved):+.1%}; taken off product by product, "
            f"it leaves them {math.expm1(self.scatter):.1%} apart (rms)"
        )
