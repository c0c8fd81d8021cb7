"""One measured row of a latency table, and how its workload is written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from cost_models.fitted_model import STRICT, Positive
from kernels.workload import Workload

EnergySource = Literal["measured", "modelled"]


def _to_workload(value: Any) -> Workload:
    if isinstance(value, Workload):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a workload, as written by Workload.to_dict")
    if not isinstance(value.get("fused", []), list | tuple):
        raise ValueError("fused: must be a list of names")
    try:
        workload = Workload.from_dict(value)
        hash(workload)
    except TypeError as error:
        raise ValueError(f"a field is of a wrong type ({error})") from error
    return workload


def _workload_schema() -> dict[str, Any]:
    return {**TypeAdapter(Workload).json_schema(), "additionalProperties": False}


class Entry(BaseModel):
    """One measured workload and lowering.

    Attributes:
        latency_ms, low_ms, high_ms: Median and its 95 % confidence interval.
        weight_bytes: Stored parameters; None if the store has none.
        is_baseline: True for an implementation of another project.
        energy_mj, energy_source, energy_reason: As in Estimate.
        on_shared_core: Whether another guest of the host worked on the same core: such a figure is
            1.2 to 1.8 times that of a core of its own (``profiler.shared_core``).
    """

    model_config = STRICT

    workload: Annotated[
        Workload,
        PlainValidator(_to_workload),
        PlainSerializer(lambda value: value.to_dict()),
        WithJsonSchema(_workload_schema()),
    ]
    lowering: str
    is_baseline: bool
    latency_ms: Positive
    low_ms: Positive
    high_ms: Positive
    weight_bytes: Annotated[int, Field(ge=0)] | None
    energy_mj: Positive | None
    energy_source: EnergySource | None
    energy_reason: str | None
    # Left out where it is false: tables of before keep their bytes and their hash.
    on_shared_core: bool = Field(default=False, exclude_if=lambda shared: not shared)

    @model_validator(mode="after")
    def _honest(self) -> Entry:
        if not self.low_ms <= self.latency_ms <= self.high_ms:
            raise ValueError("latency_ms: lies outside low_ms and high_ms")
        if (self.energy_mj is None) != (self.energy_source is None):
            raise ValueError("energy_source: is given exactly with energy_mj")
        if (self.energy_source == "measured") != (self.energy_reason is None):
            raise ValueError("energy_reason: is needed exactly where energy is not measured")
        return self
