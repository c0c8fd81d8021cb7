"""Schema of results.json: what a fine-tuning run found. The contract with reports."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from profiler.device import DeviceInfo
from profiler.ratios import paired_ratio
from profiler.samples import Timing
from profiler.whole_file import write_whole


class Interval(BaseModel):
    """A figure with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float

    @classmethod
    def of_latency(cls, timing: Timing) -> Interval | None:
        """A measured latency in ms; None if there is none."""
        value, low, high = timing.latency_ms, timing.latency_low_ms, timing.latency_high_ms
        if value is None or low is None or high is None:
            return None
        return cls(value=value, low=low, high=high)

    @classmethod
    def of_ratio(cls, of: Timing, to: Timing) -> Interval | None:
        """A ratio of latencies measured in turns; None if one is missing."""
        found = paired_ratio(of, to)
        return cls(value=found.value, low=found.low, high=found.high) if found else None


class LayerDispatch(BaseModel):
    """Where one MoE layer sends its tokens, over the test set.

    Attributes:
        layer: Qualified name of the module.
        share: Share of tokens by expert, adding up to 1.
        optimal_share: Share at which all experts take equally long (proportional to 1/α): the
            minimum of the paper's loss, were there no noise in the router.
        expert_latency_ms: Latency of each expert for all tokens of the layer, from the table.
        expert_source: Where that latency is from: measured, predicted or extrapolated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    share: dict[str, float]
    optimal_share: dict[str, float]
    expert_latency_ms: dict[str, float]
    expert_source: dict[str, str]


class DispatchExample(BaseModel):
    """Where the tokens of one test image went.

    Attributes:
        image: Grey values from 0 to 255, rows of a small picture.
        label, guess: True and predicted class.
        experts: Names, in the order that ``layers`` counts them.
        layers: By MoE layer the expert of each patch, rows of a grid over the image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: list[list[int]]
    label: int
    guess: int
    experts: list[str]
    layers: dict[str, list[list[int]]]


class Agreement(BaseModel):
    """How far the deployed model agrees with the trained one.

    Attributes:
        images: Test images compared end to end.
        differing: Images whose predicted class differs.
        traced: How many of those were traced to a code or gate within rounding of its threshold.
        max_layer_error: Largest relative error of a deployed layer fed its trained form's input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    differing: int
    traced: int
    max_layer_error: float


class Epoch(BaseModel):
    """One epoch of training.

    Attributes:
        latency_loss: Mean of the routers' loss, unweighted; None where there was none.
        latency_weight: What it was weighted with.
        expected_latency_ms: From the latency curves, at the dispatch of the validation images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    epoch: int
    train_loss: float
    latency_loss: float | None
    latency_weight: float | None = None
    expected_latency_ms: float | None = None
    validation_top1: float
    seconds: float


class VariantResult(BaseModel):
    """One model of the comparison: the original or a reparameterised form of it.

    Attributes:
        name: ``original``, ``stage1``, ``shift``, ``moe_no_loss`` or ``moe``.
        title: The same for people.
        top1: Test accuracy in percent of the trained form, with its Wilson interval.
        deployed_top1: Test accuracy in percent of what was deployed; None where not deployed.
        difference: deployed top-1 minus the original's in points, with the paired interval.
        latency_ms: Measured end to end at ``deploy_batch``; None with a reason.
        predicted_latency_ms: From the latency table, None with a reason.
        predicted_interval: 90 % interval of it; None where the table gives none.
        predicted_reason: What the prediction covers, or why there is none.
        weight_bytes: Stored parameters of the deployed form.
        energy_mj: Energy of one inference at ``deploy_batch``, measured or modelled.
        energy_source: ``measured`` or ``modelled``.
        energy_reason: What a modelled figure covers, and why there is no measured one.
        converted, skipped: Layers by name; for skipped ones with the reason.
        dispatch: One entry for each MoE layer.
        examples: Some test images, patch by patch; none where no layer's tokens are patches.
        agreement: None for variants that were not deployed on our kernels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    top1: Interval
    deployed_top1: Interval | None = None
    difference: Interval | None = None
    latency_ms: Interval | None = None
    latency_reason: str | None = None
    predicted_latency_ms: float | None = None
    predicted_interval: Interval | None = None
    predicted_reason: str | None = None
    weight_bytes: int
    energy_mj: float | None = None
    energy_source: Literal["measured", "modelled"] | None = None
    energy_reason: str | None = None
    converted: dict[str, str] = {}
    skipped: dict[str, str] = {}
    dispatch: list[LayerDispatch] = []
    examples: list[DispatchExample] = []
    agreement: Agreement | None = None
    history: list[Epoch] = []


class FinetuneResults(BaseModel):
    """What ``python -m reparam.finetune`` found.

    Attributes:
        top1: Test accuracy in percent of the last variant, deployed.
        latency_table_sha256: Which table drove the router's loss.
        split: Images in train, validation and test.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["shiftadd-results"] = "shiftadd-results"
    version: Literal[1] = 1
    top1: float
    recipe: str
    model: str
    data: str
    split: dict[str, int]
    classes: int
    seed: int
    device: DeviceInfo
    deploy_batch: int
    latency_table_sha256: str
    created_at: str
    command: str
    variants: list[VariantResult]

    def save(self, path: Path) -> None:
        """Writes results.json."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> FinetuneResults:
        """Reads results.json.

        Raises:
            ValueError: If it is none of ours or of another version.
        """
        return cls.model_validate_json(path.read_text())
