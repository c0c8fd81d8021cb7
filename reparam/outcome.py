"""What became of a run's models: each evaluated, deployed, measured, and set against the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable
from kernels.torch_ops import set_threads
from profiler.device import DeviceInfo
from profiler.energy import EnergyReading
from profiler.samples import Timing
from profiler.store import Measurement, create_store
from reparam.accuracy import dispatch_shares, paired_difference, predict, top1
from reparam.agreement import agreement
from reparam.data import Data
from reparam.deploy import deploy, stored_bytes
from reparam.dispatch_examples import dispatch_examples
from reparam.losses import LatencyObjective, optimal_share
from reparam.model_cost import compiled, measure_energies, measure_latencies, predict_latency
from reparam.model_energy import COVERS, modelled_energy_mj
from reparam.plan import planned
from reparam.results import Epoch, FinetuneResults, Interval, LayerDispatch, VariantResult

COMPILED = "original_compiled"
_LOWERINGS = {"original": "torch", COMPILED: "torch.compile"}


@dataclass(frozen=True)
class Candidate:
    """A trained model of the comparison.

    Attributes:
        name, title, history, converted, skipped: As in ``VariantResult``.
        model: The trained form.
        expert_latencies: By MoE layer and expert, latency in ms and its source.
        objective: What its routers were trained for; None where nothing.
    """

    name: str
    title: str
    model: nn.Module
    history: list[Epoch]
    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    expert_latencies: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)
    objective: LatencyObjective | None = None


@dataclass(frozen=True)
class Costs:
    """Measured costs of all models by name, and why a model has none.

    Attributes:
        parameters: Of the trained forms; deployment packs them.
        image_size: Pixels along a side.
    """

    timings: Mapping[str, Timing]
    energies: Mapping[str, EnergyReading]
    reasons: Mapping[str, str]
    parameters: Mapping[str, int]
    image_size: int


def evaluate_candidates(
    candidates: list[Candidate],
    data: Data,
    table: LatencyTable,
    example: Tensor,
    device: DeviceInfo,
    console: Console,
) -> tuple[list[VariantResult], Costs]:
    """Evaluates the original and what was made of it; all but the original are deployed.

    The original is timed as it is and under ``torch.compile``, interleaved with the deployed.

    Args:
        candidates: The original first.
        data: Task.
        table: For the predicted latencies.
        example: Input at the deployed batch.
        device: The CPU and threads that the deployed models are measured on.
        console: Where to say what is going on.
    """
    original, *others = candidates
    console.print("deploying and comparing on the test set")
    deployed = {candidate.name: deploy(candidate.model) for candidate in others}
    results = [_original(original, data, len(example))]
    reference, _ = predict(original.model, data, "test", len(example))
    for candidate in others:
        results.append(
            _variant(candidate, deployed[candidate.name], data, table, example, reference)
        )
    set_threads(device.threads)
    console.print("measuring all models, interleaved")
    parameters = {
        candidate.name: sum(weight.numel() for weight in candidate.model.parameters())
        for candidate in candidates
    }
    parameters[COMPILED] = parameters[original.name]
    plans = {name: planned(model, example) for name, model in deployed.items()}
    costs = _measure({"original": original.model, **plans}, example, device, parameters)
    modelled = {
        candidate.name: modelled_energy_mj(candidate.model, example) for candidate in candidates
    }
    modelled[COMPILED] = modelled[original.name]
    results.insert(1, results[0].model_copy(update=_COMPILED_FIELDS))
    return [_with_costs(result, costs, modelled[result.name]) for result in results], costs


_COMPILED_FIELDS = {"name": COMPILED, "title": "original, torch.compile", "history": []}


def _original(candidate: Candidate, data: Data, batch_size: int) -> VariantResult:
    return VariantResult(
        name=candidate.name,
        title=candidate.title,
        top1=top1(*predict(candidate.model, data, "test", batch_size)),
        predicted_reason="no layer was converted",
        weight_bytes=stored_bytes(candidate.model),
        history=candidate.history,
    )


def _variant(
    candidate: Candidate,
    deployed: nn.Module,
    data: Data,
    table: LatencyTable,
    example: Tensor,
    reference: Tensor,
) -> VariantResult:
    batch_size = len(example)
    with dispatch_shares(candidate.model) as shares:
        trained_guesses, labels = predict(candidate.model, data, "test", batch_size)
    guesses, _ = predict(deployed, data, "test", batch_size)
    prediction = predict_latency(candidate.model, example, table, shares, deployed)
    differing = guesses != trained_guesses
    return VariantResult(
        name=candidate.name,
        title=candidate.title,
        top1=top1(trained_guesses, labels),
        deployed_top1=top1(guesses, labels),
        difference=paired_difference(guesses, reference, labels),
        predicted_latency_ms=prediction.latency_ms.value if prediction.latency_ms else None,
        predicted_interval=prediction.latency_ms,
        predicted_reason=prediction.note,
        weight_bytes=stored_bytes(deployed),
        converted=candidate.converted,
        skipped=candidate.skipped,
        dispatch=[
            _dispatch(layer, share, candidate.expert_latencies[layer])
            for layer, share in shares.items()
        ],
        examples=dispatch_examples(
            candidate.model, *next(iter(data.batches("test", batch_size, False)))
        ),
        agreement=agreement(candidate.model, deployed, data, differing, batch_size),
        history=candidate.history,
    )


def _dispatch(
    layer: str, share: dict[str, float], latencies: dict[str, tuple[float, str]]
) -> LayerDispatch:
    optimum = optimal_share(torch.tensor([latency_ms for latency_ms, _ in latencies.values()]))
    return LayerDispatch(
        layer=layer,
        share=share,
        optimal_share=dict(zip(latencies, optimum.tolist())),
        expert_latency_ms={name: latency_ms for name, (latency_ms, _) in latencies.items()},
        expert_source={name: source for name, (_, source) in latencies.items()},
    )


def _measure(
    models: dict[str, nn.Module], example: Tensor, device: DeviceInfo, parameters: dict[str, int]
) -> Costs:
    baseline, reason = compiled(models["original"], example)
    reasons = {} if baseline is not None else {COMPILED: reason}
    if baseline is not None:
        models = {**models, COMPILED: baseline}
    timings = measure_latencies(models, example)
    energies = measure_energies(models, example, device)
    reasons |= {name: timing.reason for name, timing in timings.items() if timing.reason}
    return Costs(timings, energies, reasons, parameters, example.shape[-1])


def _with_costs(result: VariantResult, costs: Costs, modelled_mj: float) -> VariantResult:
    timing, energy = costs.timings.get(result.name), costs.energies.get(result.name)
    measured_mj = energy.energy_mj if energy else None
    why_not = energy.reason if energy else "was not run"
    return result.model_copy(
        update={
            "latency_ms": Interval.of_latency(timing) if timing else None,
            "latency_reason": costs.reasons.get(result.name),
            "energy_mj": measured_mj or modelled_mj,
            "energy_source": "measured" if measured_mj else "modelled",
            "energy_reason": None if measured_mj else f"{COVERS}; not measured: {why_not}",
        }
    )


def rows_of(results: FinetuneResults, costs: Costs) -> Iterator[Measurement]:
    """One store row for each model that was, or should have been, measured."""
    for variant in results.variants:
        timing, energy = costs.timings.get(variant.name), costs.energies.get(variant.name)
        columns = (
            timing.columns
            if timing
            else {"status": "skipped", "reason": costs.reasons[variant.name]}
        )
        yield Measurement(
            kind="model",
            subject=variant.name,
            device=results.device,
            lowering=_LOWERINGS.get(variant.name, "deployed"),
            is_baseline=variant.name in _LOWERINGS,
            **columns,
            energy_mj=energy.energy_mj if energy else None,
            energy_net_mj=energy.energy_net_mj if energy else None,
            energy_window_s=energy.window_s if energy else None,
            energy_source=energy.source if energy else None,
            energy_reason=variant.energy_reason,
            weight_bytes=variant.weight_bytes,
            run=results.recipe,
            details={
                "model": results.model,
                "batch": results.deploy_batch,
                "image_size": costs.image_size,
                "parameters": costs.parameters[variant.name],
                "top1": (variant.deployed_top1 or variant.top1).value,
                **{
                    f"share.{layer.layer}.{expert}": share
                    for layer in variant.dispatch
                    for expert, share in layer.share.items()
                },
            },
        )


def write_rows(path: Path, rows: Iterator[Measurement]) -> None:
    """Writes rows into a store, creating it where there is none.

    Raises:
        StoreError: If what is there is no store of ours.
    """
    store = create_store(path)
    for row in rows:
        store.put(row)
    store.close()
