"""Search over schedule parameters with an injected measure. No clock, no compiler, no file."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

Schedule = dict[str, int]
Space = Mapping[str, Sequence[int]]
# Latencies in ms of schedules measured against each other; None where there was no figure.
Measure = Callable[[list[Schedule]], Sequence[float | None]]


@dataclass(frozen=True)
class Step:
    """How far a search has come.

    Attributes:
        best: The fastest schedule so far.
        latency_ms: Its latency when it was last measured; None as long as nothing had a figure.
        measured: Schedules tried, the default included.
    """

    best: Schedule
    latency_ms: float | None
    measured: int


def search(
    space: Space,
    default: Schedule,
    measure: Measure,
    *,
    screen: Measure | None = None,
    finalists: int = 3,
    exhaustive_up_to: int = 16,
    together: int = 8,
    least_gain: float = 0.01,
    seed: int = 0,
) -> Iterator[Step]:
    """Looks for the fastest schedule, starting from the default one.

    Small spaces are tried as a whole, larger ones by coordinate descent: one parameter after the
    other through all its values, until a round over all parameters brings nothing. Challengers
    are always measured together with the best so far, so that a drift between two calls of
    ``measure`` favours neither. No schedule challenges twice. Where a cheaper and less exact
    measure is given, only those that are fastest by it go on to the dear one.

    Args:
        space: Values of each parameter.
        default: A schedule of the space.
        measure: Times schedules against each other.
        screen: Likewise, in less time.
        finalists: Challengers of a group that go on from ``screen``.
        exhaustive_up_to: Schedules that are still tried one and all.
        together: Schedules of one call of ``measure``, at least 2.
        least_gain: By what part a challenger must be faster: noise alone moves nothing.
        seed: Decides on the order of the parameters.

    Yields:
        A Step after each call of ``measure``; the last one holds the result.

    Source:
        Successive halving: Jamieson, Talwalkar, arXiv 1502.07943.
    """
    step = Step(default, None, 1)
    tried = [default]
    rng = random.Random(seed)
    while True:
        before = step.best
        for challengers in _rounds(space, exhaustive_up_to, rng):
            fresh = [s for s in challengers(step.best) if s not in tried]
            if screen is not None and len(fresh) > finalists:
                best_first = _screened(fresh, screen)
                fresh, slower = best_first[:finalists], best_first[finalists:]
                tried += slower
            for start in range(0, len(fresh), together - 1):
                group = fresh[start : start + together - 1]
                tried += group
                best, latency_ms = _fastest(step, group, measure, least_gain)
                step = Step(best, latency_ms, len(tried))
                yield step
        if step.best == before:
            break
    if step.measured == 1:
        yield step


def _rounds(
    space: Space, exhaustive_up_to: int, rng: random.Random
) -> list[Callable[[Schedule], list[Schedule]]]:
    """What challenges the best schedule, group after group."""
    everything = [dict(zip(space, values)) for values in product(*space.values())]
    if len(everything) <= exhaustive_up_to:
        return [lambda best: everything]

    def along(name: str) -> Callable[[Schedule], list[Schedule]]:
        return lambda best: [best | {name: value} for value in space[name]]

    return [along(name) for name in rng.sample(sorted(space), len(space))]


def _screened(challengers: list[Schedule], screen: Measure) -> list[Schedule]:
    """The fastest first, those without a figure last."""
    figures = [math.inf if ms is None else ms for ms in screen(challengers)]
    return [challengers[i] for i in sorted(range(len(figures)), key=figures.__getitem__)]


def _fastest(
    step: Step, challengers: list[Schedule], measure: Measure, least_gain: float
) -> tuple[Schedule, float | None]:
    """The winner of one call; the best so far stays where it has no figure to be beaten by."""
    best_ms, *latencies = measure([step.best, *challengers])
    if best_ms is None and step.latency_ms is not None:
        return step.best, step.latency_ms
    figures = [(ms, i) for i, ms in enumerate(latencies) if ms is not None]
    if figures:
        fastest_ms, i = min(figures)
        if best_ms is None or fastest_ms < best_ms * (1 - least_gain):
            return challengers[i], fastest_ms
    return step.best, best_ms
