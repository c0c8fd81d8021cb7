"""Measures MoE layers and whole models beside what a latency table predicts of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable, TableError
from cost_models.layer_models import Predicted, kernel_ms, mape
from cost_models.work import Work
from kernels import expert_ops
from profiler.clock import clock_rate
from profiler.device import DeviceInfo
from profiler.passes import of_a_pass, pool
from profiler.samples import Timing, TimingSettings
from profiler.store import Measurement, row_key, subject_key
from profiler.timing import measure_interleaved
from reparam.deploy import stored_bytes
from reparam.deployed_mlps import DeployedMoE
from reparam.forced_dispatch import force_share_
from reparam.one_pass import Hook, watch_pass
from reparam.plan import launches_of, planned
from reparam.watched_work import work_of

RUN = "predicted-versus-measured"
SHARES = tuple(range(0, 101, 10))
PASSES = 3
_NO_ENERGY = "only latency was asked for"


@dataclass(frozen=True)
class Case:
    """A model at one batch.

    Attributes:
        model: Its name.
        original: As timm has it.
        deployed: Converted and deployed.
        example: ``(b, c, h, w)``.
    """

    model: str
    original: nn.Module
    deployed: nn.Module
    example: Tensor

    @property
    def about(self) -> dict[str, Any]:
        """Details of each of its rows."""
        images, _, _, side = self.example.shape
        return {"model": self.model, "batch": images, "image_size": side}


@dataclass(frozen=True)
class _Group:
    """What is timed in turns, by a name of its own, and the rows that come of its timings."""

    name: str
    launches: Mapping[str, Callable[[], Any]]
    rows: Callable[[Mapping[str, Timing]], list[Measurement]]


def measured_rows(
    cases: Callable[[], Iterable[Case]],
    table: LatencyTable,
    settings: TimingSettings,
    known: set[str],
) -> Iterator[Measurement]:
    """One row for each share of each size of MoE layer, and one for each whole model.

    All cases are gone through in passes, as a sweep's products are, so that the passes of a row lie
    minutes apart. Each pass makes them anew: plans and where things lie in memory differ too.

    Args:
        cases: Makes what to measure.
        table: For the sums over kernels that the rows carry.
        settings: How precisely.
        known: Keys of rows that need not be measured again.

    Yields:
        Each row after each pass, which takes the place of that of the pass before.
    """
    rate = partial(clock_rate, table.device.threads or 1)
    short = of_a_pass(settings, PASSES)
    passes: dict[str, list[Mapping[str, Timing]]] = {}
    for _ in range(PASSES):
        for case in cases():
            for group in _groups(case, table, known):
                found = passes.setdefault(group.name, [])
                with torch.no_grad():
                    found.append(measure_interleaved(group.launches, short, clock_rate=rate))
                yield from group.rows(pool(found))
        if not passes:
            break  # all is known


def _groups(case: Case, table: LatencyTable, known: set[str]) -> Iterator[_Group]:
    device, subject = table.device, f"{case.model}, batch {len(case.example)}"
    models = {"deployed": case.deployed, "torch": case.original}
    if not {_key("model", subject, name, device) for name in models} <= known:
        yield _models(case, subject, models, table)
    for fqn, layer, args, kwargs in moe_sizes(case):
        subjects = {share: f"{subject}, {fqn}, {share} % shift" for share in SHARES}
        if not {_key("layer", text, "deployed", device) for text in subjects.values()} <= known:
            about = case.about | {"layer": fqn}
            yield _shares(f"{subject}, {fqn}", subjects, layer, args, kwargs, about, table)


def _models(
    case: Case, subject: str, models: Mapping[str, nn.Module], table: LatencyTable
) -> _Group:
    runs = dict(models) | {"deployed": planned(case.deployed, case.example)}

    def rows(timings: Mapping[str, Timing]) -> list[Measurement]:
        found = []
        for name, model in models.items():
            work = work_of(model, case.example)
            work = work.planned if name == "deployed" else work
            details = case.about | work.details() | _kernels(work, name, table)
            timing = timings[name]
            found.append(_row("model", subject, name, table.device, timing, model, details))
        return found

    launches = {name: partial(run, case.example) for name, run in runs.items()}
    return _Group(subject, launches, rows)


def _shares(
    name: str,
    subjects: Mapping[int, str],
    layer: DeployedMoE,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    about: Mapping[str, Any],
    table: LatencyTable,
) -> _Group:
    made = {}
    for share in subjects:
        made[share] = copy.deepcopy(layer)
        force_share_(made[share], share / 100, *args, **kwargs)

    def rows(timings: Mapping[str, Timing]) -> list[Measurement]:
        found = []
        for share, one in made.items():
            work = work_of(one, *args, **kwargs).planned
            details = dict(about) | {"share": share} | work.details()
            details |= _kernels(work, "deployed", table) | _tokens(one, args[0])
            timing, text = timings[str(share)], subjects[share]
            found.append(_row("layer", text, "deployed", table.device, timing, one, details))
        return found

    launches = {
        str(share): launches_of(partial(one, **kwargs), *args) for share, one in made.items()
    }
    return _Group(name, launches, rows)


def moe_sizes(
    case: Case,
) -> Iterator[tuple[str, DeployedMoE, tuple[Any, ...], Mapping[str, Any]]]:
    """The first MoE layer of each size, with what it is called with for all images together.

    A layer behind a convolution stands here for itself; in the model the two are one operator.
    """
    calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    def note(fqn: str) -> Hook:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            # A layer may be called for some of the images at a time.
            calls.setdefault(fqn, []).append(_arguments(*args, **kwargs))

        return hook

    layers = {
        fqn: part for fqn, part in case.deployed.named_modules() if isinstance(part, DeployedMoE)
    }
    watch_pass(case.deployed, case.example, {part: note(fqn) for fqn, part in layers.items()})
    seen = set()
    for fqn, parts in calls.items():
        x = torch.cat([part for part, _ in parts])
        added = [residual for _, residual in parts if residual is not None]
        sizes = [(p.in_features, p.out_features) for p in layers[fqn].linears]
        size = (x.shape, tuple(sizes))
        if size not in seen:
            seen.add(size)
            yield fqn, layers[fqn], (x,), {"residual": torch.cat(added) if added else None}


def _arguments(x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Of a mixture of experts, however it is called."""
    return x, residual


def _kernels(work: Work, lowering: str, table: LatencyTable) -> dict[str, Any]:
    try:
        return {"kernel_ms": kernel_ms(work, lowering, table)}
    except TableError as error:
        return {"kernel_ms": None, "kernel_reason": str(error)}


def _tokens(layer: DeployedMoE, x: Tensor) -> dict[str, int]:
    tokens = x.reshape(-1, x.shape[-1])
    _, _, counts = expert_ops.route(tokens, layer.norm, layer.gate, layer.gate_bias)
    return {f"tokens.{name}": count for name, count in zip(layer.experts, counts.tolist())}


def _key(kind: str, subject: str, lowering: str, device: DeviceInfo) -> str:
    return row_key(subject_key(kind, subject), lowering, "hot", device.fingerprint)


def _row(
    kind: Any,
    subject: str,
    lowering: str,
    device: DeviceInfo,
    timing: Timing,
    module: nn.Module,
    details: Mapping[str, Any],
) -> Measurement:
    return Measurement(
        kind=kind,
        subject=subject,
        device=device,
        lowering=lowering,
        is_baseline=lowering == "torch",
        **timing.columns,
        energy_reason=_NO_ENERGY,
        weight_bytes=stored_bytes(module),
        run=RUN,
        details={**timing.details, **details},
    )


def table_of(predicted: Sequence[Predicted], skipped: Mapping[str, str]) -> list[Table]:
    """For people: whole models one by one, layers by model."""
    models = Table(
        title="Whole models, predicted from the rows of the others",
        caption=_caption([one for one in predicted if one.row.kind == "model"]),
    )
    for heading in ("model", "", "measured ms", "its kernels", "predicted", "off by"):
        models.add_column(heading, justify="left" if heading in ("model", "") else "right")
    layers = Table(
        title="MoE layers at 0, 10, … 100 % shift, predicted from the rows of other models",
        caption=_caption([one for one in predicted if one.row.kind == "layer"]),
    )
    for heading in ("model", "rows", "MAPE", "worst"):
        layers.add_column(heading, justify="left" if heading == "model" else "right")
    by_model: dict[str, list[Predicted]] = {}
    for one in predicted:
        if one.row.kind == "layer":
            name = f"{one.model}, batch {one.row.details.get('batch')}"
            by_model.setdefault(name, []).append(one)
        else:
            figures = (one.row.latency_ms, one.kernel_ms, one.predicted_ms)
            texts = ("–" if figure is None else f"{figure:.3f}" for figure in figures)
            models.add_row(one.row.subject, one.row.lowering, *texts, _off(one))
    for name, rows in by_model.items():
        worst = max(rows, key=lambda one: abs(_error(one) or 0.0))
        found = mape(rows)
        share = "–" if found is None else f"{found:.1f} %"
        layers.add_row(name, str(len(rows)), share, _off(worst))
    if skipped:
        models.add_section()
        for subject, reason in skipped.items():
            models.add_row(subject, reason)
    return [models, layers]


def _error(one: Predicted) -> float | None:
    if one.predicted_ms is None or one.row.latency_ms is None:
        return None
    return one.predicted_ms / one.row.latency_ms - 1


def _off(one: Predicted) -> str:
    error = _error(one)
    return "needs another model" if error is None else f"{100 * error:+.1f} %"


def _caption(rows: Sequence[Predicted]) -> str:
    parts = []
    for lowering in dict.fromkeys(one.row.lowering for one in rows):
        found = mape([one for one in rows if one.row.lowering == lowering])
        parts.append(f"{lowering}: " + ("–" if found is None else f"MAPE {found:.1f} %"))
    return ", ".join(parts)
