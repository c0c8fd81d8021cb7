"""From how many tokens on a form pays, by bisection on a latency table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel

from cost_models.layer_cost import STRICT, Cost

# Token counts that are looked at before the crossing is searched for.
_GRID = tuple(2**octave for octave in range(18))

Where = Literal["above", "below", "always", "never", "mixed", "unknown"]


class BreakEven(BaseModel):
    """Where a form is faster than what it replaces, at the widths of a layer.

    Attributes:
        where: ``above`` or ``below`` the token count; ``always`` or ``never`` within the range;
            ``mixed`` if it changes more than once; ``unknown`` with a reason.
        tokens: First count at which the faster one changes, by the medians.
        surely_from: Count of the grid from which on the intervals lie apart; None if they never do.
        first_tokens, last_tokens: Range that the table covers without extrapolating.
        reason: Why it is unknown.
    """

    model_config = STRICT

    where: Where
    tokens: int | None = None
    surely_from: int | None = None
    first_tokens: int | None = None
    last_tokens: int | None = None
    reason: str | None = None


def break_even(costs: Callable[[int], tuple[Cost, Cost]]) -> BreakEven:
    """Searches the token counts that a table covers.

    Args:
        costs: Token count -> cost of the original and of what replaces it.
    """
    known = {m: pair for m in _GRID if _is_inside(pair := costs(m))}
    if not known:
        return BreakEven(where="unknown", reason="the table covers no token count at these widths")
    counts = list(known)
    faster = [_pays(known[m]) for m in counts]
    changes = [i for i in range(1, len(counts)) if faster[i] != faster[i - 1]]
    where: Where = "mixed"
    tokens = None
    if not changes:
        where = "always" if faster[0] else "never"
    else:
        first = changes[0]
        tokens = _crossing(counts[first - 1], counts[first], lambda m: _pays(costs(m)))
        if len(changes) == 1:
            where = "above" if faster[first] else "below"
    sure = _first_of_the_last_run([_surely_pays(known[m]) for m in counts])
    return BreakEven(
        where=where,
        tokens=tokens,
        surely_from=None if sure is None else counts[sure],
        first_tokens=counts[0],
        last_tokens=counts[-1],
    )


def _is_inside(pair: tuple[Cost, Cost]) -> bool:
    return all(cost.source in ("measured", "predicted") for cost in pair)


def _pays(pair: tuple[Cost, Cost]) -> bool:
    original, new = pair
    return (new.latency_ms or 0.0) < (original.latency_ms or 0.0)


def _surely_pays(pair: tuple[Cost, Cost]) -> bool:
    original, new = pair
    return new.high_ms is not None and new.high_ms < original.low_ms


def _crossing(low: int, high: int, pays: Callable[[int], bool]) -> int:
    """Least count above ``low`` that answers as ``high`` does, if it changes once between them."""
    goal = pays(high)
    while high - low > 1:
        middle = (low + high) // 2
        if pays(middle) == goal:
            high = middle
        else:
            low = middle
    return high


def _first_of_the_last_run(flags: list[bool]) -> int | None:
    start = len(flags)
    while start and flags[start - 1]:
        start -= 1
    return start if start < len(flags) else None
