"""What a layer or a whole model does: the products that a latency table knows, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    "far_weight_bytes": "of those of a layer, what a core's own cache does not keep between passes",
}

_PRODUCTS, _COUNT = "products", "count."

_OF_PYTHON = {"calls", "operators"}
# Of x86 server cores of today, second level.
_PRIVATE_CACHE_BYTES = 2**21


def far_bytes(held: float) -> float:
    """What a core's own cache misses of bytes that are read over and over.

    Nothing up to half of the cache, all from twice of it on.
    """
    return held * min(max(held / _PRIVATE_CACHE_BYTES - 0.5, 0.0) / 1.5, 1.0)


class WorkError(ValueError):
    """Details of a row that describe no work; the message names the key."""


@dataclass(frozen=True)
class Work:
    """One forward pass.

    Attributes:
        products: How often each product is computed, in its canonical form.
        counts: By name in COUNTS; what is absent is 0.
    """

    products: Mapping[Workload, int]
    counts: Mapping[str, float]

    def details(self) -> dict[str, Any]:
        """As details of a store's row."""
        products = ";".join(
            f"{number}*{w.form}:{w.b}x{w.m}x{w.k}x{w.n}" for w, number in self.products.items()
        )
        return {_PRODUCTS: products} | {_COUNT + name: n for name, n in self.counts.items()}

    @property
    def planned(self) -> Work:
        """The same launched by a plan: no operator through Python.

        What is left of a launch is part of each kernel's own latency.
        """
        beside = {n: count for n, count in self.counts.items() if n not in _OF_PYTHON}
        return Work(self.products, beside)

    @classmethod
    def of_details(cls, details: Mapping[str, Any]) -> Work:
        """Inverse of ``details``.

        Raises:
            WorkError: If there is none, or something else.
        """
        text = details.get(_PRODUCTS)
        if not isinstance(text, str):
            raise WorkError(f"{_PRODUCTS}: is missing")
        counts = {
            name.removeprefix(_COUNT): value
            for name, value in details.items()
            if name.startswith(_COUNT)
        }
        for name, value in counts.items():
            if name not in COUNTS or not isinstance(value, int | float) or value < 0:
                raise WorkError(f"{_COUNT}{name}: is no count that is known")
        try:
            products = dict(_product(part) for part in text.split(";") if part)
        except (ValueError, KeyError, WorkloadError) as error:
            raise WorkError(f"{_PRODUCTS}: {text!r} is no list of products") from error
        return cls(products, counts)


def _product(text: str) -> tuple[Workload, int]:
    number, _, rest = text.partition("*")
    form, _, sizes = rest.partition(":")
    b, m, k, n = (int(size) for size in sizes.split("x"))
    return Workload(b=b, m=m, k=k, n=n, **FORMS[form]), int(number)
