"""What a layer or a whole model does: the products that a latency table knows, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from kernels.forms import FORMS
from kernels.workload import Workload, WorkloadError

# What costs time beside the products; an overhead has a price for each.
COUNTS: dict[str, str] = {
    "calls": "of the layer or model: 1",
    "operators": "launched one by one from Python, the products among them",
    "elements": "that operators other than products write",
    "routed": "features that routers read",
    "routed_tokens": "that routers choose an expert for",
    "normalised": "features that a kernel normalises before its product",
    "normalised_tokens": "the tokens of those",
    "activated": "features that a kernel takes a GELU of behind its product",
    "patch_elements": "that are copied into the rows of a convolution",
    "depthwise_macs": "of depthwise convolutions",
    "conv_macs": "of other convolutions",
    "attention_macs": "of softmax attentions",
    "weight_bytes": "of the weights in use: a whole model brings them from afar in each pass",
    "far_weight_bytes": "of those of experts, what a core's own cache does not keep between passes",
    "far_bytes": "of what passes through experts, what lies beyond a core's own cache",
    "memory_bytes": "of what passes through experts, what lies beyond the last cache",
}

_PRODUCTS, _EXPERTS, _COUNT = "products", "experts", "count."

_OF_PYTHON = {"calls", "operators"}
# Of x86 server cores of today: where the second and the last level begin to miss what is used in
# turns, and where they miss all of it.
_PRIVATE_CACHE_BYTES = (2**19, 2**21)
_LAST_LEVEL_BYTES = (2**25, 2**27)
# Tokens of a kernel by AMX whose operands stay with the core, as those of an expert's tasks do.
_TASK_ROWS = 128


def far_counts(weights: float, passed: float) -> dict[str, float]:
    """What a layer of experts brings from afar in each pass.

    Args:
        weights: Bytes of those in use.
        passed: Bytes that are read and written beside.
    """
    beyond_own = _missed(weights + passed, *_PRIVATE_CACHE_BYTES)
    return {
        "far_weight_bytes": weights * beyond_own,
        "far_bytes": passed * beyond_own,
        "memory_bytes": passed * _missed(passed, *_LAST_LEVEL_BYTES),
    }


def _missed(held: float, some: float, everything: float) -> float:
    """Share of accesses that a cache misses: none up to ``some`` bytes, all from the others on."""
    return min(max((held - some) / (everything - some), 0.0), 1.0)


class Answer(Protocol):
    """What a latency table says of a workload, see ``cost_models.latency_table.Estimate``."""

    @property
    def lowering(self) -> str:
        """Whose kernel it is."""


Found = TypeVar("Found", bound=Answer)
Lookup = Callable[[Workload], Found]


def expert_kernels(workload: Workload, lookup: Lookup[Found]) -> list[tuple[int, Found]]:
    """Kernels that take as long as an expert's linear does, and how often each.

    A few tokens at a time pass through all linears of an expert, and what lies between them stays
    in a core's caches. By AMX the products are so fast that a kernel of all tokens mostly waits for
    what it reads and writes: an expert takes as long as kernels of few tokens, one after
    the other. By vectors it takes as long as the kernel of all tokens.

    Args:
        workload: The linear with the tokens that the expert gets.
        lookup: ``LatencyTable.lookup``.
    """
    whole = lookup(workload)
    if ".amx_" not in whole.lowering or workload.m <= _TASK_ROWS:
        return [(1, whole)]
    tasks, rest = divmod(workload.m, _TASK_ROWS)
    found = [(tasks, lookup(workload.with_sizes(m=_TASK_ROWS)))]
    return found + ([(1, lookup(workload.with_sizes(m=rest)))] if rest else [])


class WorkError(ValueError):
    """Details of a row that describe no work; the message names the key."""


@dataclass(frozen=True)
class Work:
    """One forward pass.

    Attributes:
        products: How often each product is computed, in its canonical form.
        counts: By name in COUNTS; what is absent is 0.
        experts: Likewise the products of experts, all of which one kernel computes.
    """

    products: Mapping[Workload, int]
    counts: Mapping[str, float]
    experts: Mapping[Workload, int] = field(default_factory=dict)

    def kernels(self, lookup: Lookup[Found]) -> list[tuple[int, Found]]:
        """What a latency table says of all products, and how often each is computed."""
        found = [(number, lookup(workload)) for workload, number in self.products.items()]
        for workload, number in self.experts.items():
            found += [(number * n, one) for n, one in expert_kernels(workload, lookup)]
        return found

    def details(self) -> dict[str, Any]:
        """As details of a store's row."""
        experts = {_EXPERTS: _text(self.experts)} if self.experts else {}
        counts = {_COUNT + name: number for name, number in self.counts.items()}
        return {_PRODUCTS: _text(self.products)} | experts | counts

    @property
    def planned(self) -> Work:
        """The same launched by a plan: no operator through Python.

        What is left of a launch is part of each kernel's own latency.
        """
        beside = {n: count for n, count in self.counts.items() if n not in _OF_PYTHON}
        return Work(self.products, beside, self.experts)

    @classmethod
    def of_details(cls, details: Mapping[str, Any]) -> Work:
        """Inverse of ``details``.

        Raises:
            WorkError: If there is none, or something else.
        """
        if _PRODUCTS not in details:
            raise WorkError(f"{_PRODUCTS}: is missing")
        counts = {
            name.removeprefix(_COUNT): value
            for name, value in details.items()
            if name.startswith(_COUNT)
        }
        for name, value in counts.items():
            if name not in COUNTS or not isinstance(value, int | float) or value < 0:
                raise WorkError(f"{_COUNT}{name}: is no count that is known")
        named = {key: _listed(key, details.get(key, "")) for key in (_PRODUCTS, _EXPERTS)}
        return cls(named[_PRODUCTS], counts, named[_EXPERTS])


def _text(products: Mapping[Workload, int]) -> str:
    return ";".join(f"{n}*{w.form}:{w.b}x{w.m}x{w.k}x{w.n}" for w, n in products.items())


def _listed(key: str, text: Any) -> dict[Workload, int]:
    try:
        return dict(_product(part) for part in text.split(";") if part)
    except (AttributeError, ValueError, KeyError, WorkloadError) as error:
        raise WorkError(f"{key}: {text!r} is no list of products") from error


def _product(text: str) -> tuple[Workload, int]:
    number, _, rest = text.partition("*")
    form, _, sizes = rest.partition(":")
    b, m, k, n = (int(size) for size in sizes.split("x"))
    return Workload(b=b, m=m, k=k, n=n, **FORMS[form]), int(number)
