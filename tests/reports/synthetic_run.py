"""A made-up run folder for tests: the figures are invented, and the device says so."""

from __future__ import annotations

import math
import random
from pathlib import Path

from cost_models.entry import Entry
from cost_models.fit_result import FitResult, LoweringFit, PartErrors, Point
from cost_models.latency_table import LatencyTable
from kernels.workload import Workload, attention, linear
from profiler.device import DeviceInfo
from profiler.store import Measurement, create_store
from reparam.results import (
    Agreement,
    DispatchExample,
    Epoch,
    FinetuneResults,
    Interval,
    LayerDispatch,
    VariantResult,
)

DEVICE = DeviceInfo(
    kind="cpu",
    name="Synthetic CPU",
    isa="fake64 avx512_vnni",
    threads=2,
    cores=2,
    memory_bytes=8_000_000_000,
    last_level_cache_bytes=32_000_000,
    os="Synthetic 1.0 fake64",
    software={"python": "3.11.0", "torch": "2.15.0", "apache-tvm": "0.27.0.post1"},
)
NO_ENERGY = "RAPL is not readable on this machine"

LINEARS = ((784, 64, 512), (784, 512, 64), (196, 128, 1024), (196, 1024, 128), (49, 320, 1280))
ATTENTIONS = ((8, 784, 16, 32), (16, 196, 16, 32))
# (lowering, form, relative speed on the synthetic device, is it a baseline)
LINEAR_LOWERINGS = (
    ("torch.fp32", "mult_fp32", 1.0, True),
    ("torch.bf16", "mult_bf16", 1.3, True),
    ("torch.int8", "mult_int8", 2.0, True),
    ("mult.tiled", "mult_fp32", 0.9, False),
    ("mult.dot", "mult_int8", 2.9, False),
    ("shift.tiled", "shift_fp32", 0.6, False),
    ("shift.dot", "shift_int8", 2.95, False),
)


def primitive_row(
    workload: Workload,
    lowering: str,
    latency_ms: float | None,
    is_baseline: bool = False,
    spread: float = 0.02,
    **changes,
) -> Measurement:
    """One row, ok if it has a latency."""
    figures = (
        {
            "latency_ms": latency_ms,
            "latency_low_ms": latency_ms * (1 - spread),
            "latency_high_ms": latency_ms * (1 + spread),
            "latency_p10_ms": latency_ms * 0.97,
            "latency_p90_ms": latency_ms * 1.08,
            "samples_kept": 200,
            "samples_discarded": 3,
            "stop_reason": "precision",
            "max_abs_error": 2e-6,
        }
        if latency_ms is not None
        else {"status": "failed", "reason": "no such instruction on this device"}
    )
    values = {
        "workload": workload,
        "subject": workload.label,
        "device": DEVICE,
        "lowering": lowering,
        "is_baseline": is_baseline,
        "weight_bytes": workload.weight_bytes,
        "energy_reason": NO_ENERGY,
        "run": "synthetic",
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return Measurement(**(values | figures | changes))


def measurements(seed: int = 0, shapes=LINEARS) -> list[Measurement]:
    """Rows of a sweep: one baseline failed, one kernel was contended, a few are cold."""
    chance = random.Random(seed)
    rows = []
    for m, k, n in shapes:
        for lowering, form, speed, is_baseline in LINEAR_LOWERINGS:
            workload = linear(form, m, k, n)
            latency = workload.macs / 4e7 / speed * chance.uniform(0.85, 1.15)
            failed = lowering == "torch.bf16" and m == 49
            rows.append(primitive_row(workload, lowering, None if failed else latency, is_baseline))
    for b, tokens, bits, n in ATTENTIONS:
        for workload in attention(b, tokens, bits, n):
            for lowering, speed in (("torch.fp32", 1.0), ("add.buckets", 1.6), ("add.tables", 0.7)):
                latency = workload.macs / 2e7 / speed * chance.uniform(0.9, 1.1)
                is_baseline = lowering.startswith("torch")
                rows.append(primitive_row(workload, lowering, latency, is_baseline))
    cold = linear("mult_int8", *LINEARS[0])
    rows.append(primitive_row(cold, "mult.dot", 0.5, cache="cold"))
    contended = {"status": "contended", "reason": "3 clean samples of 200"}
    rows.append(primitive_row(linear("mult_bf16", *LINEARS[0]), "mult.tiled", None, **contended))
    rows.append(
        Measurement(
            kind="model",
            subject="synthetic_net, batch 8",
            device=DEVICE,
            lowering="deployed",
            latency_ms=5.2,
            energy_reason=NO_ENERGY,
        )
    )
    return rows


def fit_result(seed: int = 0) -> FitResult:
    """Fits of two lowerings; one without held-out rows."""
    chance = random.Random(seed)
    points = []
    for index in range(40):
        measured = 10 ** chance.uniform(-2, 1)
        predicted = measured * math.exp(chance.gauss(0, 0.05))
        points.append(
            Point(
                label=f"mult_int8 shape {index}",
                split="test" if index % 4 == 0 else "train",
                measured_ms=measured,
                predicted_ms=predicted,
                low_ms=predicted * 0.9,
                high_ms=predicted * 1.12,
            )
        )
    errors = {
        "mape": 4.25,
        "within_10_percent": 90.0,
        "interval_coverage": 80.0,
        "mape_roofline": 23.5,
        "mape_nearest": 41.75,
    }
    nothing = dict.fromkeys(errors)
    return FitResult(
        store="measurements.sqlite",
        device=DEVICE,
        seed=0,
        created_at="2026-01-01T00:10:00+00:00",
        fits=[
            LoweringFit(
                form="mult_int8",
                lowering="mult.dot",
                is_baseline=False,
                rows_train=30,
                rows_test=10,
                inside=PartErrors(rows=7, mape=3.5, interval_coverage=100.0),
                outside=PartErrors(rows=3, mape=6.0, interval_coverage=50.0),
                points=points,
                **errors,
            ),
            LoweringFit(
                form="shift_fp32",
                lowering="shift.tiled",
                is_baseline=False,
                rows_train=6,
                rows_test=0,
                points=[],
                **nothing,
            ),
        ],
        skipped={"add_kv_pm1 add.tables": "2 rows, 8 needed"},
    )


def latency_table(rows: list[Measurement]) -> LatencyTable:
    """The measured entries only; energies are modelled."""
    return LatencyTable(
        device=DEVICE,
        created_at="2026-01-01T00:10:00+00:00",
        store="measurements.sqlite",
        entries=tuple(
            Entry(
                workload=row.workload,
                lowering=row.lowering,
                is_baseline=row.is_baseline,
                latency_ms=row.latency_ms,
                low_ms=row.latency_low_ms,
                high_ms=row.latency_high_ms,
                weight_bytes=row.weight_bytes,
                energy_mj=row.workload.macs * 3e-9,
                energy_source="modelled",
                energy_reason="operation counts",
            )
            for row in rows
            if row.workload and row.latency_ms and row.cache == "hot"
        ),
        models=(),
    )


def interval(value: float, half: float) -> Interval:
    """A symmetric interval."""
    return Interval(value=value, low=value - half, high=value + half)


def _examples() -> list[DispatchExample]:
    """Two images of 6 × 6 grey values, patch by patch in two layers of different grids."""
    return [
        DispatchExample(
            image=[[(row * column * 7) % 256 for column in range(6)] for row in range(6)],
            label=label,
            guess=3,
            experts=["mult", "shift"],
            layers={
                f"stages.{stage}.blocks.0.mlp": [
                    [(row + column + label) % 2 for column in range(side)] for row in range(side)
                ]
                for stage, side in ((0, 4), (1, 2))
            },
        )
        for label in (3, 8)
    ]


def _dispatch(shares: list[float]) -> list[LayerDispatch]:
    return [
        LayerDispatch(
            layer=f"stages.{stage}.blocks.0.mlp.fc{part}",
            share={"mult_int8": round(1 - share, 6), "shift_int8": share},
            optimal_share={"mult_int8": 0.48, "shift_int8": 0.52},
            expert_latency_ms={"mult_int8": 0.0813, "shift_int8": 0.0751},
            expert_source={"mult_int8": "measured", "shift_int8": "predicted"},
        )
        for (stage, part), share in zip([(s, p) for s in range(3) for p in (1, 2)], shares)
    ]


def _history(stages: tuple[str, ...], top: float, with_latency: bool) -> list[Epoch]:
    return [
        Epoch(
            stage=stage,
            epoch=epoch,
            train_loss=1.4 * math.exp(-epoch / 4) / (1 + index) + 0.15,
            latency_loss=0.02 / (1 + epoch) if with_latency else None,
            validation_top1=top - 14 * math.exp(-epoch / 3) / (1 + index),
            seconds=3.2,
        )
        for index, stage in enumerate(stages)
        for epoch in range(10)
    ]


def results(latencies: dict[str, float | None] | None = None) -> FinetuneResults:
    """Five variants of a made-up network.

    Args:
        latencies: Measured latency in ms by variant; others keep the default. None: unmeasured.
    """
    measured = {"original": 3.1, "stage1": 3.62, "shift": 4.4, "moe_no_loss": 5.6, "moe": 5.2}
    measured |= latencies or {}
    facts = {
        "original": ("Original", 97.11, 1_204_000, [], ()),
        "stage1": ("Add attention", 96.8, 1_206_500, [], ("stage1",)),
        "shift": ("Add attention, all shift", 95.2, 322_000, [], ("stage1", "stage2")),
        "moe_no_loss": (
            "MoE without the latency loss",
            96.6,
            612_000,
            [0.31, 0.22, 0.44, 0.18, 0.36, 0.29],
            ("stage1", "stage2"),
        ),
        "moe": (
            "MoE with the latency loss",
            96.32,
            612_000,
            [0.53, 0.47, 0.55, 0.5, 0.58, 0.49],
            ("stage1", "stage2"),
        ),
    }
    variants = []
    for name, (title, top1, weight_bytes, shares, stages) in facts.items():
        latency = measured[name]
        is_original = name == "original"
        deployed = name not in ("stage1",)
        variants.append(
            VariantResult(
                name=name,
                title=title,
                top1=interval(top1 + 0.06, 0.9),
                deployed_top1=interval(top1, 0.9) if deployed else None,
                difference=None
                if is_original or not deployed
                else Interval(
                    value=round(top1 - 97.11, 2),
                    low=round(top1 - 97.11 - 0.85, 2),
                    high=round(top1 - 97.11 + 0.85, 2),
                ),
                latency_ms=interval(latency, 0.08) if latency is not None else None,
                latency_reason=None if latency is not None else "contended: 2 clean samples",
                predicted_latency_ms=None if is_original else round((latency or 4) * 0.93, 3),
                predicted_interval=None if is_original else interval((latency or 4) * 0.93, 0.3),
                predicted_reason="its forms are not in the table" if is_original else None,
                weight_bytes=weight_bytes,
                energy_mj=None if is_original else weight_bytes * 2e-6 + 1,
                energy_source=None
                if is_original
                else ("measured" if name == "stage1" else "modelled"),
                energy_reason=NO_ENERGY if name != "stage1" else None,
                converted={} if is_original else {"stages.0.blocks.0.mlp.fc1": "shift_int8"},
                skipped={} if is_original else {"head": "classifier is kept"},
                dispatch=_dispatch(shares),
                examples=_examples() if shares else [],
                agreement=Agreement(images=1797, differing=4, traced=4, max_layer_error=3.1e-5)
                if deployed and not is_original
                else None,
                history=_history(stages, top1, name == "moe"),
            )
        )
    return FinetuneResults(
        top1=variants[-1].deployed_top1.value,
        recipe="digits-quick",
        model="synthetic_net",
        data="digits",
        split={"train": 1078, "validation": 359, "test": 360},
        classes=10,
        seed=0,
        device=DEVICE,
        deploy_batch=8,
        latency_table_sha256="0" * 64,
        created_at="2026-01-01T00:30:00+00:00",
        command="python -m reparam.finetune --recipe digits-quick",
        variants=variants,
    )


def write_store(folder: Path, rows: list[Measurement]) -> Path:
    """Writes a run folder that holds measurements and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    store = create_store(folder / "measurements.sqlite")
    for row in rows:
        store.put(row)
    store.close()
    return folder


def write_run(
    folder: Path,
    rows: list[Measurement] | None = None,
    fit: FitResult | None = None,
    found: FinetuneResults | None = None,
) -> Path:
    """Writes a whole run folder; what is not given is made up."""
    rows = measurements() if rows is None else rows
    write_store(folder, rows)
    table = latency_table(rows)
    table.save(folder / "latency_table.json")
    (fit or fit_result()).save(folder / "fit.json")
    found = found or results().model_copy(update={"latency_table_sha256": table.sha256})
    found.save(folder / "results.json")
    return folder
