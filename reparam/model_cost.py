"""What whole models cost: measured latency and energy of one inference, and predicted latency."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable, TableError
from cost_models.overheads import LayerOverhead
from profiler.command_line import one_line
from profiler.device import DeviceInfo
from profiler.energy import (
    EnergyReading,
    EnergySettings,
    Unavailable,
    find_meter,
    measure_energy,
)
from profiler.samples import PRESETS, Timing, TimingSettings
from profiler.timing import measure_interleaved
from reparam.expert_latency import layer_workloads
from reparam.moe import moe_layers
from reparam.results import Interval
from reparam.watched_work import work_of

# Whole models draw power for long enough that short windows suffice.
ENERGY_SETTINGS = EnergySettings(windows=3, window_s=1.0, idle_s=1.0)


@dataclass(frozen=True)
class Prediction:
    """Latency of a model, or of its converted layers, from a latency table.

    Attributes:
        latency_ms: With its interval; None where there is nothing to sum.
        note: What the sum covers, or why there is none.
    """

    latency_ms: Interval | None
    note: str


def launch_of(model: nn.Module, example: Tensor) -> Callable[[], None]:
    """One inference of a model as a launch."""

    @torch.no_grad()
    def launch() -> None:
        model(example)

    return launch


def convolves(model: nn.Module) -> bool:
    """Whether a model has more convolutions than the one that makes its patches.

    PyTorch may run such a model faster with channels last in memory: pvt_v2_b0 1.4 times, one image
    on two threads of Zen 3.
    """
    return sum(isinstance(part, nn.Conv2d) for part in model.modules()) > 1


def channels_last(model: nn.Module) -> nn.Module:
    """Lays a model's weights out, in place, so that its images have channels last in memory."""
    return model.to(memory_format=torch.channels_last)


def compiled(model: nn.Module, example: Tensor) -> tuple[nn.Module | None, str]:
    """The model under ``torch.compile``, run once; None with the reason where that fails.

    Images have channels last in memory where it ``convolves``.
    """
    if not shutil.which("g++"):
        return None, "torch.compile needs g++, which is not installed"
    candidate = copy.deepcopy(model)
    try:
        if convolves(candidate):
            channels_last(candidate)
        candidate.compile()
        launch_of(candidate, example)()
    except Exception as error:  # whatever its back end raises, the other models are measured
        return None, f"torch.compile failed: {one_line(error)[:200]}"
    return candidate, ""


def measure_latencies(
    models: Mapping[str, nn.Module], example: Tensor, settings: TimingSettings = PRESETS["standard"]
) -> dict[str, Timing]:
    """Latency of one inference of each model, all interleaved in one run.

    Args:
        models: By name, in evaluation mode, on the CPU.
        example: Input at the deployed batch.
        settings: How precisely.
    """
    launches = {name: launch_of(model.eval(), example) for name, model in models.items()}
    return measure_interleaved(launches, settings)


def measure_energies(
    models: Mapping[str, nn.Module], example: Tensor, device: DeviceInfo
) -> dict[str, EnergyReading]:
    """Energy of one inference of each model, or why there is none."""
    try:
        meter = find_meter(device)
    except Unavailable as error:
        return dict.fromkeys(models, EnergyReading(reason=str(error)))

    def repeated(launch: Callable[[], None]) -> Callable[[int], None]:
        def run(number: int) -> None:
            for _ in range(number):
                launch()

        return run

    return {
        name: measure_energy(repeated(launch_of(model.eval(), example)), meter, ENERGY_SETTINGS)
        for name, model in models.items()
    }


def predict_latency(
    model: nn.Module,
    example: Tensor,
    table: LatencyTable,
    shares: Mapping[str, Mapping[str, float]],
    deployed: nn.Module | None = None,
) -> Prediction:
    """Sums what the table says of each kernel, one after the other.

    With a deployed model, and a table that was fitted on measured models too, it is the latency of
    the whole model. Else normalisation, activation, routing and all layers that were not converted
    are not in it. The ends of the interval are summed as well, as if all errors went the same way.

    Args:
        model: Converted model.
        example: Input at the deployed batch.
        table: Latencies by workload.
        shares: Share of tokens by MoE layer and expert.
        deployed: What was made of the model; routes the tokens of the example itself.
    """
    whole = table.overhead("model", "deployed")
    if deployed is not None and whole is not None:
        return _predict_whole(deployed, example, table, whole)
    layer_workloads(model, example)  # runs the routers once: each layer's number of tokens
    expert_tokens = {
        fqn: _split(int(layer.routing.counts.sum()), shares[fqn])
        for fqn, layer in moe_layers(model)
        if layer.routing is not None
    }
    layers = layer_workloads(model, example, expert_tokens)
    if not layers:
        return Prediction(None, "no layer was converted")
    try:
        estimates = [table.lookup(w) for workloads in layers.values() for w in workloads]
    except TableError as error:
        return Prediction(None, str(error))
    unsure = sum(estimate.source == "extrapolated" for estimate in estimates)
    return Prediction(
        Interval(
            value=sum(estimate.latency_ms for estimate in estimates),
            low=sum(estimate.low_ms for estimate in estimates),
            high=sum(estimate.high_ms for estimate in estimates),
        ),
        f"sum over the kernels of {len(layers)} converted layers, nothing else"
        + (f"; {unsure} of {len(estimates)} kernels extrapolated" if unsure else ""),
    )


def _predict_whole(
    deployed: nn.Module, example: Tensor, table: LatencyTable, whole: LayerOverhead
) -> Prediction:
    work = work_of(deployed, example)
    try:
        estimates = work.kernels(table.lookup)
    except TableError as error:
        return Prediction(None, str(error))
    ends = [
        sum(number * getattr(estimate, end) for number, estimate in estimates)
        for end in ("latency_ms", "low_ms", "high_ms")
    ]
    value, low, high = (whole.latency_ms(end, work.counts) for end in ends)
    doubt = "" if whole.mape is None else f", off by {whole.mape:.0f} % on models left out"
    return Prediction(
        Interval(value=value, low=low, high=high),
        f"the whole model: its kernels, and what was fitted beside those of {whole.models} measured"
        f" models{doubt}",
    )


def _split(tokens: int, shares: Mapping[str, float]) -> dict[str, int]:
    return {expert: round(share * tokens) for expert, share in shares.items()}
