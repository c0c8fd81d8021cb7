"""Schema of fit.json: how well the latency models do on rows they have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from profiler.device import DeviceInfo
from profiler.whole_file import write_whole


class Point(BaseModel):
    """One row, measured and predicted.

    Attributes:
        split: Whether the model had seen it.
        octaves_outside: How far outside the sizes that the model has learned from, 0 inside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    split: Literal["train", "test"]
    measured_ms: float
    predicted_ms: float
    low_ms: float
    high_ms: float
    octaves_outside: float = 0.0


class PartErrors(BaseModel):
    """Errors on a part of the held-out rows.

    Attributes:
        rows: Number of them, at least 1.
        mape, interval_coverage: As in LoweringFit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    mape: float
    interval_coverage: float


class LoweringFit(BaseModel):
    """The latency model of one form and lowering on one device, with its held-out errors.

    Errors are None where no held-out row was left. Held-out rows are never trained on: the model is
    the very one that the table holds.

    Attributes:
        form, lowering: What was modelled.
        rows_train, rows_test: Sizes of the split.
        rows_shared: Rows left out of both: another guest of the host worked on their core.
        learned_from_shared: Whether the model has learned from those all the same, as from rows of
            another device; none of them is of held-out widths.
        beyond: Name of the table whose model, carried over to this device, answers for what is
            outside; it has not seen the held-out widths either. None where it is this one.
        mape: Mean absolute percentage error on the held-out rows, in percent.
        within_10_percent: Share of held-out rows within ±10 %, in percent.
        interval_coverage: Share of held-out rows inside their 90 % interval, in percent.
        inside: Errors on the held-out rows inside the sizes that the model has learned from, which
            the table calls predicted; None where there is none.
        outside: On the others, which the table calls extrapolated, with a wider interval.
        mape_flops, mape_roofline, mape_nearest: The same error of latency in proportion to the
            work, of a fitted roofline and of the nearest measured neighbour.
        noise_floor: Median noise floor of the rows' sweeps, in percent; None where none was
            measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: str
    lowering: str
    is_baseline: bool
    rows_train: int
    rows_test: int
    rows_shared: int = 0
    learned_from_shared: bool = False
    beyond: str | None = None
    mape: float | None
    within_10_percent: float | None
    interval_coverage: float | None
    mape_roofline: float | None
    mape_nearest: float | None
    mape_flops: float | None = None
    inside: PartErrors | None = None
    outside: PartErrors | None = None
    noise_floor: float | None = None
    points: list[Point]


class FitResult(BaseModel):
    """What ``python -m cost_models.fit`` found. ``skipped`` says what had too few rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["shiftadd-fit"] = "shiftadd-fit"
    version: Literal[1, 2] = 2
    store: str
    device: DeviceInfo
    seed: int
    created_at: str
    fits: list[LoweringFit]
    skipped: dict[str, str]

    def save(self, path: Path) -> None:
        """Writes fit.json."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> FitResult:
        """Reads fit.json.

        Raises:
            ValueError: If it is none of ours or of another version.
        """
        return cls.model_validate_json(path.read_text())
