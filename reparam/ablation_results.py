"""Schema of ablation.json: what each replacement did to accuracy and costs, over several seeds.

The contract with reports. Each unit, one variant trained with one seed, is a file of its own as
well: what an interrupted ablation goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from profiler.command_line import BadInput, explain
from profiler.device import DeviceInfo
from profiler.whole_file import write_whole
from reparam.results import Interval

_STRICT = ConfigDict(frozen=True, extra="forbid")


class AblationRow(BaseModel):
    """One variant trained with one seed, evaluated on the test set.

    Attributes:
        variant: ``original``, or what of it was replaced.
        title: The same for people.
        fold: Which fold of the data was the test set; None for a test set by seed.
        validation_top1: Of the last epoch, in percent; None where nothing was trained.
        top1: Test accuracy in percent of the trained form.
        deployed_top1: Of the deployed form; None for the original, which is not converted.
        latency_ms: Measured end to end at ``deploy_batch`` with its 95 % interval; None with
            ``latency_reason``.
        latency_ratio: Latency over that of the original of the same seed, measured in turns with
            it in one run; None with ``latency_reason``, and for the original.
        weight_bytes: Stored parameters of the deployed form.
        energy_mj: Of one inference, measured or modelled; None with ``energy_reason``.
        shares: By MoE layer, the share of the test tokens of each expert.
        shift_share: Mean over the MoE layers of the share on shift experts; None without any.
        latency_budget_ms: What the routers were asked to keep to; None where nothing.
        expected_latency_ms: By the curves that the budget was set by, at the dispatch of the test
            images; None without a latency curve.
        seconds: Training of this stage.
    """

    model_config = _STRICT

    variant: str
    title: str
    seed: int
    fold: int | None
    validation_top1: float | None
    top1: float
    deployed_top1: float | None
    latency_ms: Interval | None
    latency_ratio: Interval | None
    latency_reason: str | None
    weight_bytes: int
    energy_mj: float | None
    energy_source: Literal["measured", "modelled"] | None
    energy_reason: str | None
    shares: dict[str, dict[str, float]]
    shift_share: float | None
    latency_budget_ms: float | None
    expected_latency_ms: float | None
    seconds: float

    @property
    def final_top1(self) -> float:
        """Of what would be used: the deployed form where there is one."""
        return self.top1 if self.deployed_top1 is None else self.deployed_top1


class AblationUnit(BaseModel):
    """A finished unit, as it lies in its own file.

    Attributes:
        identity: What it depends on; a unit of another identity is not taken for this one.
        correct: Whether the final form is right, for each test image in the task's order.
    """

    model_config = _STRICT

    format: Literal["shiftadd-ablation-unit"] = "shiftadd-ablation-unit"
    version: Literal[1] = 1
    identity: dict[str, str]
    row: AblationRow
    correct: list[bool]

    def save(self, path: Path) -> None:
        """Writes the unit, whole or not at all."""
        _write(path, self)

    @classmethod
    def load(cls, path: Path) -> AblationUnit:
        """Reads a unit.

        Raises:
            BadInput: If it is none of ours.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise BadInput(f"{path}: is no unit of an ablation: {explain(error)}") from error


class AblationSummary(BaseModel):
    """One variant over all seeds: means with 95 % intervals of Student's t over the seeds.

    Attributes:
        seeds: Number of seeds.
        top1: Test accuracy in percent of the final form.
        difference: To the original of the same seed, in points; None for the original itself.
        latency_ms: Mean of the measured latencies.
        latency_ratio: Mean of the ratios to the original.
        energy_mj: Mean over the seeds.
        shift_share: Mean share of tokens on shift experts.
        over_budget: Seeds whose expected latency exceeds the budget; None without a budget.

    An interval is None where there are fewer than two seeds: the mean alone says nothing of how
    far another seed would be.
    """

    model_config = _STRICT

    variant: str
    title: str
    seeds: int
    top1_mean: float
    top1: Interval | None
    difference_mean: float | None
    difference: Interval | None
    latency_ms: float | None
    latency_ratio: float | None
    latency_ratio_interval: Interval | None
    weight_bytes: int
    energy_mj: float | None
    energy_source: Literal["measured", "modelled"] | None
    energy_reason: str | None
    shift_share: float | None
    over_budget: int | None


class AblationResults(BaseModel):
    """What ``python -m reparam.ablate`` found.

    Attributes:
        latency_table_sha256: Which table drove the routers' losses.
        missing: Units that are not finished yet, by name.
    """

    model_config = _STRICT

    format: Literal["shiftadd-ablation"] = "shiftadd-ablation"
    version: Literal[1] = 1
    preset: str
    recipe: str
    model: str
    data: str
    device: DeviceInfo
    deploy_batch: int
    latency_table_sha256: str
    created_at: str
    command: str
    rows: list[AblationRow]
    summaries: list[AblationSummary]
    missing: list[str]

    def save(self, path: Path) -> None:
        """Writes ablation.json, whole or not at all."""
        _write(path, self)

    @classmethod
    def load(cls, path: Path) -> AblationResults:
        """Reads ablation.json.

        Raises:
            ValueError: If it is none of ours or of another version.
        """
        return cls.model_validate_json(path.read_text())


def _write(path: Path, content: BaseModel) -> None:
    write_whole(path, content.model_dump_json(indent=1) + "\n")
