"""What a sweep measures: shapes from a TOML or a model, expanded into workloads."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kernels.forms import FORMS
from kernels.workload import Workload, attention, linear
from profiler.measurement import Cache
from profiler.samples import PRESETS

# Kernels count with 32 bits.
Size = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
Sizes = Size | Annotated[list[Size], Field(min_length=1)]

LINEAR_FORMS = tuple(name for name, form in FORMS.items() if form["w_layout"] == "nk")


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    energy: bool = False


class LinearShape(_Shape):
    """A linear of ``m`` tokens from ``k`` to ``n`` features; a list of m stands for several."""

    kind: Literal["linear"] = "linear"
    m: Sizes
    k: Size
    n: Size

    def workloads(self, forms: tuple[str, ...]) -> list[Workload]:
        """Every m in every form."""
        tokens = self.m if isinstance(self.m, list) else [self.m]
        return [linear(form, m, self.k, self.n) for m, form in product(tokens, forms)]


class AttentionShape(_Shape):
    """The products of linear attention for ``b`` = batch × heads; lists stand for several.

    Attributes:
        products: Which of KᵀV, Q(KᵀV) and the two in one kernel; all of them by default.
    """

    kind: Literal["attention"]
    b: Sizes
    tokens: Sizes
    bits: Size
    n: Size
    alphabet: Literal["pm1", "01"] = "pm1"
    products: tuple[Literal["kv", "qkv", "both"], ...] = Field(("kv", "qkv", "both"), min_length=1)

    def workloads(self, forms: tuple[str, ...]) -> list[Workload]:
        """Every b with every token count; ``forms`` are those of linears and do not apply."""
        batches = self.b if isinstance(self.b, list) else [self.b]
        lengths = self.tokens if isinstance(self.tokens, list) else [self.tokens]
        return [
            getattr(attention(b, tokens, self.bits, self.n, self.alphabet), name)
            for b, tokens in product(batches, lengths)
            for name in self.products
        ]


class SweepConfig(BaseModel):
    """A sweep.

    Attributes:
        description: For people.
        forms: Forms of each linear.
        threads: CPU thread counts, each a device of its own; empty for all cores.
        cache: ``hot``, ``cold`` or both.
        timing: Name of a preset in ``profiler.samples.PRESETS``.
        passes: How often each product is measured, a while apart, within the same time.
        energy: Measure the energy of every shape where the device has a meter, which takes some
            20 s a row; a shape's own ``energy`` asks for that one.
        baselines: Measure torch's kernels beside ours.
        superseded: Measure lowerings of ours too whose form the CPU has a faster unit for.
        compiled_baselines: Measure torch's baselines by ``torch.compile`` as well; needs g++.
        shapes: What to measure.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = ""
    forms: tuple[str, ...] = Field(LINEAR_FORMS, min_length=1)
    threads: tuple[Size, ...] = ()
    cache: tuple[Cache, ...] = Field(("hot",), min_length=1)
    timing: str = "standard"
    passes: Annotated[int, Field(ge=1, le=9)] = 2
    energy: bool = False
    baselines: bool = True
    superseded: bool = True
    compiled_baselines: bool = False
    shapes: tuple[Annotated[LinearShape | AttentionShape, Field(union_mode="smart")], ...] = Field(
        min_length=1
    )

    @model_validator(mode="after")
    def _names_are_known(self) -> SweepConfig:
        for form in self.forms:
            if form not in LINEAR_FORMS:
                raise ValueError(f"forms: {form!r} is none of {', '.join(LINEAR_FORMS)}")
        if len(set(self.cache)) < len(self.cache):
            raise ValueError("cache: names a state twice")
        if self.timing not in PRESETS:
            raise ValueError(f"timing: {self.timing!r} is none of {', '.join(PRESETS)}")
        return self

    @cached_property
    def energy_workloads(self) -> frozenset[Workload]:
        """Those whose energy is asked for."""
        return frozenset(
            workload
            for shape in self.shapes
            if self.energy or shape.energy
            for workload in shape.workloads(self.forms)
        )

    @property
    def workloads(self) -> list[Workload]:
        """All workloads once, in the order of the shapes."""
        found = (workload for shape in self.shapes for workload in shape.workloads(self.forms))
        return list(dict.fromkeys(found))
