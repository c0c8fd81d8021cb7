"""A deployed model against the best that PyTorch offers for the original, on this machine."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from profiler.command_line import one_line
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved
from reparam.model_cost import channels_last, convolves
from reparam.other_runtimes import runtime_contestants
from reparam.plan import planned
from reparam.results import Interval
from reparam.versus_torch_result import Comparison, Contestant


def _eager(model: nn.Module) -> nn.Module:
    return model


def _bf16(model: nn.Module) -> nn.Module:
    return _Cast(model.bfloat16())


def _int8(model: nn.Module) -> nn.Module:
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(
        model, {nn.Linear}, dtype=torch.qint8
    )
    return quantised


def _bf16_last(model: nn.Module) -> nn.Module:
    return _bf16(channels_last(model))


class _Cast(nn.Module):
    """fp32 in and out around a model in bf16: as all others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.bfloat16()).float()


# What a user of PyTorch could pick without another package: how, and whether it is compiled.
_TORCH: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "eager fp32": (_eager, False),
    "eager bf16": (_bf16, False),
    "eager int8 dynamic": (_int8, False),
    "compile fp32": (_eager, True),
    "compile bf16": (_bf16, True),
}
# The same with another layout of images, of models to which that matters.
_LAST: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "eager fp32, channels last": (channels_last, False),
    "compile fp32, channels last": (channels_last, True),
    "compile bf16, channels last": (_bf16_last, True),
}
EAGER = "eager fp32"


def torch_contestants(
    model: nn.Module, example: Tensor
) -> Iterator[tuple[str, nn.Module | None, str]]:
    """PyTorch's ways to run a model: (name, the model run once, or None with the reason).

    Compiled ones are frozen (constants folded, weights packed), the fastest that inductor offers.
    """
    for name, (prepare, compiled) in (_TORCH | (_LAST if convolves(model) else {})).items():
        if compiled and not shutil.which("g++"):
            yield name, None, "torch.compile needs g++, which is not installed"
            continue
        try:
            candidate = prepare(copy.deepcopy(model).eval())
            if compiled:
                candidate.compile(options={"freezing": True})
            with torch.no_grad():
                candidate(example)
        except Exception as error:  # whatever its back end raises, the others are measured
            yield name, None, f"failed: {one_line(error)[:200]}"
            continue
        yield name, candidate, ""


def compare(
    name: str,
    original: nn.Module,
    deployed: dict[str, nn.Module],
    example: Tensor,
    settings: TimingSettings,
) -> Comparison:
    """Times ours, PyTorch's ways of one model and other runtimes in turns, in one run.

    Ours are planned for the example, as PyTorch's are compiled for it.

    Args:
        name: Of the model.
        original: Before any conversion.
        deployed: Ours by name.
        example: ``(b, c, h, w)``.
        settings: How precisely.
    """
    of_torch: dict[str, Callable[[Tensor], Any]] = {}
    others: dict[str, Callable[[Tensor], Any]] = {}
    failed: list[Contestant] = []
    for found, contestants_of in ((of_torch, torch_contestants), (others, runtime_contestants)):
        for way, run, reason in contestants_of(original, example):
            if run is None:
                failed.append(
                    Contestant(
                        name=way,
                        ours=False,
                        other_runtime=found is others,
                        latency_ms=None,
                        reason=reason,
                    )
                )
            else:
                found[way] = run
    ours = {way: planned(model, example) for way, model in deployed.items()}
    every = of_torch | others | ours
    launches = {way: partial(run, example) for way, run in every.items()}
    with torch.no_grad():
        timings = measure_interleaved(launches, settings)
    contestants = [
        Contestant(
            name=way,
            ours=way in deployed,
            other_runtime=way in others,
            latency_ms=Interval.of_latency(timings[way]),
            reason=timings[way].reason,
        )
        for way in launches
    ]
    known = {way: t.latency_ms for way in of_torch if (t := timings[way]).latency_ms is not None}
    best = min(known, key=lambda way: known[way]) if known else None

    def speedups(against: str | None) -> dict[str, Interval]:
        if against is None or against not in timings:
            return {}
        ratios = {way: Interval.of_ratio(timings[against], timings[way]) for way in deployed}
        return {way: ratio for way, ratio in ratios.items() if ratio is not None}

    return Comparison(
        model=name,
        batch=len(example),
        image_size=example.shape[-1],
        contestants=contestants + failed,
        best_torch=best,
        speedup=speedups(best),
        speedup_eager=speedups(EAGER),
    )
