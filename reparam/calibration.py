"""The latency curves of a model, stretched to what it was seen to take on its device.

A table knows kernels, and what other models took beside theirs; of a model far smaller than those
it can be a quarter off. A budget is to be kept on the device: so the converted model is deployed
and timed at a few dispatches before it is trained. Weights do not change its latency.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError, model_validator
from rich.console import Console
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable
from kernels.torch_ops import set_threads
from profiler.command_line import BadInput, explain, output_folder
from profiler.device import cpu_info
from profiler.samples import PRESETS, TimingSettings
from profiler.whole_file import write_whole
from reparam.deploy import deploy
from reparam.forced_dispatch import force_share_
from reparam.latency_curves import LayerCurves, ModelCurves
from reparam.model_cost import measure_latencies
from reparam.moe import moe_layers
from reparam.plan import planned
from reparam.recipe import Recipe, Variant

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# What is thought of a figure before it is measured, as standard deviations: of a timing, of the
# table's difference between two dispatches, and of what a model takes more where both experts work.
_NOISE, _DOUBT, _BOTH = 0.01, 0.3, 0.05
# What both take more was seen in full at all of 10 to 90 % of the tokens; below it is made to rise,
# lest the first token of an expert bear all of it.
_FULL_FROM = 0.1


class Calibration(BaseModel):
    """Latencies of a converted model on the device of its table, before it was trained.

    Attributes:
        identity: What they hold for: hashes of recipe, variant and table.
        shares: Of the tokens of every MoE layer, those of its last expert.
        latency_ms: At each share; None with a reason.
        reason: Why there is none. A run that is taken up again then goes on without, as it began.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: dict[str, str]
    shares: tuple[float, ...]
    latency_ms: tuple[PositiveFloat, ...] | None
    reason: str | None = None

    @model_validator(mode="after")
    def _a_figure_for_each(self) -> Calibration:
        if (self.latency_ms is None) == (self.reason is None):
            raise ValueError("latency_ms: is missing exactly where there is a reason")
        if self.latency_ms is not None and not len(self.latency_ms) == len(self.shares) > 1:
            raise ValueError("latency_ms: needs a figure for each of two or more shares")
        return self


def calibrate(
    variant: Variant,
    model: nn.Module,
    recipe: Recipe,
    table: LatencyTable,
    example: Tensor,
    folder: Path,
    console: Console,
    settings: TimingSettings = PRESETS["standard"],
) -> None:
    """Measures what a variant with a budget takes and leaves it in a folder, if it is not there.

    Nothing is done without a budget, for a table of another device than this CPU, and for layers
    of more than two experts.

    Args:
        variant: Of a recipe.
        model: Converted as the variant says.
        recipe: For the number of threads.
        table: Whose curves are to be stretched.
        example: Input at the deployed batch.
        folder: Gets ``calibration_NAME.json``.
        console: Where to say what was found.
        settings: How precisely.
    """
    here = table.device.fingerprint == cpu_info(recipe.threads).fingerprint
    in_twos = all(len(layer.experts) == 2 for _, layer in moe_layers(model))
    known = calibration_of(variant, recipe, table, folder)
    if not (variant.has_budget and here and in_twos) or known is not None:
        return
    set_threads(recipe.threads)
    deployed, plans = deploy(copy.deepcopy(model).cpu().eval()), {}
    for share in SHARES:
        forced = copy.deepcopy(deployed)
        force_share_(forced, share, example)
        plans[f"{share:g}"] = planned(forced, example)
    timings = measure_latencies(plans, example, settings).values()
    took = [timing.latency_ms for timing in timings if timing.latency_ms is not None]
    reason = next((timing.reason for timing in timings if timing.latency_ms is None), None)
    found = Calibration(
        identity=_identity(variant, recipe, table),
        shares=SHARES,
        latency_ms=tuple(took) if reason is None else None,
        reason=reason,
    )
    write_whole(_file(variant, output_folder(folder)), found.model_dump_json(indent=2))
    figures = ", ".join(f"{ms:.3f}" for ms in took)
    said = reason or f"{figures} ms with 0 to 100 % of the tokens on the last expert"
    console.print(f"{variant.name}: timed before training: {said}", soft_wrap=True)


def calibration_of(
    variant: Variant, recipe: Recipe, table: LatencyTable, folder: Path
) -> Calibration | None:
    """What ``calibrate`` left of this variant, recipe and table; None if there is nothing.

    Raises:
        BadInput: If the file cannot be read.
    """
    path = _file(variant, folder)
    if not path.is_file():
        return None
    try:
        found = Calibration.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error)}") from error
    return found if found.identity == _identity(variant, recipe, table) else None


def _file(variant: Variant, folder: Path) -> Path:
    return folder / f"calibration_{variant.name}.json"


def _identity(variant: Variant, recipe: Recipe, table: LatencyTable) -> dict[str, str]:
    asked = hashlib.sha256(variant.model_dump_json().encode()).hexdigest()
    return {"recipe": recipe.sha256, "variant": asked, "latency_table": table.sha256}


def stretched(curves: ModelCurves, calibration: Calibration) -> ModelCurves:
    """The curves that come closest to the measurements, and do not leave the table without cause.

    ``latency = rest + speed · kernels + both · (layers with work for both experts)``, by least
    squares: what the measurements cannot tell, such as the difference between two experts that are
    equally fast, stays as the table says.

    Args:
        curves: Of the table; each layer has two experts.
        calibration: Of the same model.
    """
    if calibration.latency_ms is None:
        return curves
    layers = len(curves.layers)
    dispatches = [torch.tensor([1 - share, share]) for share in calibration.shares]
    kernels, busy = np.array([_of_layers(curves, one) for one in dispatches]).T
    took = np.array(calibration.latency_ms)
    factor = took.mean() / (curves.rest_ms + kernels).mean()
    seen = np.stack([np.ones_like(took), kernels, busy], axis=1) / (_NOISE * took)[:, None]
    thought = np.diag([0.0, 1 / (_DOUBT * factor), layers / (_BOTH * took.mean())])[1:]
    sides = np.concatenate([np.full(len(took), 1 / _NOISE), [1 / _DOUBT, 0.0]])
    rest_ms, speed, both_ms = lsq_linear(np.concatenate([seen, thought]), sides, (0, np.inf)).x

    def stretch(layer: LayerCurves) -> LayerCurves:
        latency_ms = speed * layer.latency_ms + both_ms * _at_work(layer)
        return replace(layer, latency_ms=latency_ms.to(layer.latency_ms))

    found = {fqn: stretch(layer) for fqn, layer in curves.layers.items()}
    return ModelCurves(found, float(rest_ms - both_ms * layers))


def _of_layers(curves: ModelCurves, dispatch: Tensor) -> tuple[float, float]:
    """Latency of all layers at one dispatch, and in how many of them both experts have work."""
    each = curves.layers.values()
    kernels_ms = sum(float(layer.layer_latency_ms(dispatch)) for layer in each)
    at_work = [replace(layer, latency_ms=_at_work(layer)) for layer in each]
    both = sum(float(layer.layer_latency_ms(dispatch)) - 1 for layer in at_work)
    return kernels_ms, both


def _at_work(layer: LayerCurves) -> Tensor:
    """1 where an expert has its part of the tokens, less towards none, ``(experts, points)``."""
    return (layer.tokens / (_FULL_FROM * layer.tokens[:, -1:])).clamp(max=1.0)
