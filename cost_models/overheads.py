"""What layers and models take beside their kernels, as a latency table keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator

from cost_models.fitted_model import STRICT
from cost_models.work import COUNTS

# A number, or a torch tensor that a gradient flows through.
Number = Any


class LayerOverhead(BaseModel):
    """What measured layers or models take beside their kernels.

    ``latency = factor · kernels + Σ cost · count`` over what ``cost_models.work.COUNTS`` names.

    Attributes:
        kind: ``layer`` or ``model``.
        lowering: Whose: ``deployed``, ``torch``, …; these are never mixed.
        kernel_factor: How many times as long kernels take among others as launched over and over
            on operands that stay near.
        costs_ms: Of one of each count; what is absent costs nothing.
        rows: Rows that it was fitted on.
        models: Models among them.
        mape: Error in percent on each model from the rows of the others; None with one model only.
    """

    model_config = STRICT

    kind: str
    lowering: str
    kernel_factor: float = Field(default=1.0, ge=1)
    costs_ms: dict[str, Annotated[float, Field(ge=0)]]
    rows: int = Field(ge=1)
    models: int = Field(ge=1)
    mape: float | None = Field(ge=0)

    @field_validator("costs_ms")
    @classmethod
    def _of_what_is_counted(cls, costs_ms: dict[str, float]) -> dict[str, float]:
        unknown = costs_ms.keys() - COUNTS.keys()
        if unknown:
            raise ValueError(f"{min(unknown)} is no count; known: {', '.join(COUNTS)}")
        return costs_ms

    def latency_ms(self, kernel_ms: Number, counts: Mapping[str, Number]) -> Number:
        """Latency of a layer or a model in ms; what has no cost, or no count, is left out."""
        costs = self.costs_ms.items()
        beside_ms = sum(cost * counts[name] for name, cost in costs if name in counts)
        return self.kernel_factor * kernel_ms + beside_ms
