"""Measures workloads on this machine: configuration -> build all -> check all -> measure -> rows.

python -m profiler.sweep                                  the quick sweep of this CPU
python -m profiler.sweep --config pvt                     a shipped sweep, or any TOML by path
python -m profiler.sweep --model pvt_v2_b0 --batch 1      the layers of any timm model
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kernels import baselines
from kernels.build import Kernel, build, lowerings, set_threads
from kernels.reference import Operands, max_abs_error, random_operands
from kernels.targets import KernelTarget, cpu_target, cuda_target
from kernels.workload import Workload
from profiler import nvml
from profiler.command_line import BadInput, load_config, output_folder, run
from profiler.device import DeviceInfo, cpu_info
from profiler.energy import EnergyReading, EnergySettings, find_meter, measure_energy
from profiler.model_workloads import ModelError, model_layers
from profiler.nvml import Unavailable
from profiler.roofline import measure_roofs, roofline_share
from profiler.samples import PRESETS, Timing, paired_ratio
from profiler.store import Measurement, Store, create_store, row_key
from profiler.summary import headlines, problems, summary_table
from profiler.sweep_config import SweepConfig
from profiler.timing import cache_flush, measure_cuda, measure_interleaved

SWEEPS = Path(__file__).parent / "sweeps"

# Inexact baselines round otherwise than they declare; beyond this they compute something else.
_INEXACT_TOLERANCE = 0.1

# Piped into a file there is no terminal to ask for its width.
console = Console() if sys.stdout.isatty() else Console(width=170)
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Candidate:
    """One kernel of a product, on its way to a row; ``problem`` once it cannot be measured."""

    workload: Workload
    lowering: str
    is_baseline: bool
    kernel: Kernel | None = None
    error: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Setting:
    """On what and how a sweep measures."""

    device: DeviceInfo
    torch_device: str
    target: KernelTarget
    config: SweepConfig
    run: str
    roofs: dict[str, float] = field(default_factory=dict)


def sweep(setting: Setting, store: Store) -> list[Measurement]:
    """Measures what the store does not hold yet and returns all rows of this configuration."""
    if setting.device.kind == "cpu":
        set_threads(setting.device.threads)
    todo = missing(candidates(setting), setting, store)
    built = list(track("build", todo, try_build, setting))
    checked = list(track("check", built, try_check, setting))
    groups = by_product(checked)
    setting = replace(setting, roofs=roofs_of(setting) if groups else {})
    for rows in track("measure", groups, measure, setting):
        for row in rows:
            store.put(row)
    wanted = {
        key_of(c, cache, setting) for c in candidates(setting) for cache in setting.config.cache
    }
    return [row for row in store.rows() if row.key in wanted]


def roofs_of(setting: Setting) -> dict[str, float]:
    """What the CPU can do at most, by the same clock; a GPU's roofs are not measured yet."""
    if setting.device.kind != "cpu":
        return {}
    return measure_roofs(setting.device, PRESETS[setting.config.timing])


def candidates(setting: Setting) -> list[Candidate]:
    """Our lowerings and torch's baselines for every workload."""
    found = []
    for workload in setting.config.workloads:
        for name in lowerings(workload, setting.target.name):
            found.append(Candidate(workload, name, False))
        for name in baselines.BASELINES.get(workload.form, {}):
            found.append(Candidate(workload, name, True))
    return found


def key_of(candidate: Candidate, cache: str, setting: Setting) -> str:
    """Key of the row that a candidate will become."""
    fingerprint = setting.device.fingerprint
    return row_key(candidate.workload.key, candidate.lowering, cache, fingerprint)


def missing(found: list[Candidate], setting: Setting, store: Store) -> list[Candidate]:
    """Candidates without a figure in the store."""
    finished = store.finished_keys()
    caches = setting.config.cache
    return [c for c in found if not all(key_of(c, cache, setting) in finished for cache in caches)]


def try_build(candidate: Candidate, setting: Setting) -> Candidate:
    """Builds a kernel, or notes why it cannot be built."""
    try:
        if candidate.is_baseline:
            kernel = baselines.baseline(candidate.workload, candidate.lowering)
        else:
            kernel = build(candidate.workload, candidate.lowering, setting.target)
    except Exception as error:
        return replace(candidate, problem=f"build: {_one_line(error)}")
    return replace(candidate, kernel=kernel)


def try_check(candidate: Candidate, setting: Setting) -> Candidate:
    """Compares with the oracle on fresh random inputs: what is wrong is never timed."""
    if candidate.kernel is None:
        return candidate
    seed = int.from_bytes(os.urandom(4))
    operands = random_operands(candidate.workload, seed)
    try:
        out = candidate.kernel(operands.to(setting.torch_device))
    except Exception as error:
        return replace(candidate, problem=f"launch: {_one_line(error)}")
    off_by, within = max_abs_error(candidate.workload, operands, out)
    if not candidate.kernel.exact:
        within = off_by <= _INEXACT_TOLERANCE * float(out.abs().max())
    problem = (
        None if within else f"wrong: off by {off_by:.3g} from the float64 oracle (seed {seed})"
    )
    return replace(candidate, error=off_by, problem=problem)


def by_product(found: list[Candidate]) -> list[list[Candidate]]:
    """Candidates that compute the same product: they are measured interleaved."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in found:
        groups.setdefault(candidate.workload.product, []).append(candidate)
    return list(groups.values())


def measure(group: list[Candidate], setting: Setting) -> list[Measurement]:
    """Rows of one product, all candidates timed in the same rounds."""
    rows = [
        failed_row(c, cache, setting) for c in group if c.problem for cache in setting.config.cache
    ]
    sound = [candidate for candidate in group if not candidate.problem]
    launches = {f"{c.workload.form} {c.lowering}": bind(c, setting.torch_device) for c in sound}
    for cache in setting.config.cache:
        timings = time_launches(launches, cache, setting)
        ratios = compare(sound, timings)
        for candidate, name in zip(sound, launches):
            energy = read_energy(launches[name], setting)
            timing, details = timings[name], ratios.get(name, {})
            share = roofline_share(candidate.workload, timing.latency_ms, setting.roofs)
            details |= {} if share is None else {"roofline_share": share}
            rows.append(finished_row(candidate, cache, timing, energy, details, setting))
    return rows


def bind(candidate: Candidate, torch_device: str) -> Callable[[], None]:
    """A launch on fixed random operands into a fixed output."""
    assert candidate.kernel is not None
    operands: Operands = random_operands(candidate.workload).to(torch_device)
    arguments = (*candidate.kernel.pack(operands), candidate.kernel.allocate(operands))
    launch = candidate.kernel.launch
    return lambda: launch(*arguments)


def time_launches(
    launches: dict[str, Callable[[], None]], cache: str, setting: Setting
) -> dict[str, Timing]:
    """One clock for all candidates of a product."""
    settings = PRESETS[setting.config.timing]
    if setting.device.kind == "cuda":
        l2_bytes = torch.cuda.get_device_properties(setting.torch_device).L2_cache_size
        with torch.cuda.device(setting.torch_device):
            return measure_cuda(launches, settings, l2_bytes if cache == "cold" else None)
    flush = cache_flush(setting.device.last_level_cache_bytes or 2**25) if cache == "cold" else None
    return measure_interleaved(launches, settings, flush=flush)


def compare(sound: list[Candidate], timings: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    """Ratios within this run: ours against the fastest baseline, shift against our int8 mult."""
    names = dict(zip(timings, sound))
    rivals = [name for name, c in names.items() if c.is_baseline and timings[name].latency_ms]
    found: dict[str, dict[str, Any]] = {}
    best = min(rivals, key=lambda name: timings[name].latency_ms or 0.0, default=None)
    int8 = next(
        (n for n, c in names.items() if not c.is_baseline and c.workload.form == "mult_int8"), None
    )
    for name, candidate in names.items():
        details: dict[str, Any] = {}
        if not candidate.is_baseline and best:
            details |= _ratio("speedup", timings[best], timings[name])
            details["speedup_baseline"] = names[best].lowering
        if candidate.workload.form in ("shift_int8", "shift_int4") and int8:
            details |= _ratio("shift_over_int8_mult", timings[name], timings[int8])
        found[name] = details
    return found


def _ratio(label: str, above: Timing, below: Timing) -> dict[str, Any]:
    ratio = paired_ratio(above, below)
    if ratio is None:
        return {}
    return {label: ratio.value, f"{label}_low": ratio.low, f"{label}_high": ratio.high}


def read_energy(launch: Callable[[], None], setting: Setting) -> EnergyReading:
    """Measured energy of a launch, or why there is none."""
    if not setting.config.energy:
        return EnergyReading(reason="the sweep did not ask for energy (energy = true)")
    try:
        meter = find_meter(setting.device)
    except Unavailable as error:
        return EnergyReading(reason=str(error))

    def launches(number: int) -> None:
        for _ in range(number):
            launch()
        if setting.device.kind == "cuda":
            torch.cuda.synchronize(setting.torch_device)

    return measure_energy(launches, meter, EnergySettings())


def failed_row(candidate: Candidate, cache: Any, setting: Setting) -> Measurement:
    """A row that says why there is no figure."""
    return _row(
        candidate,
        cache,
        setting,
        status="failed",
        reason=candidate.problem,
        energy_reason="no figure without a kernel",
    )


def finished_row(
    candidate: Candidate,
    cache: Any,
    timing: Timing,
    energy: EnergyReading,
    details: dict[str, Any],
    setting: Setting,
) -> Measurement:
    """A row with its figures."""
    return _row(
        candidate,
        cache,
        setting,
        **timing.columns,
        energy_mj=energy.energy_mj,
        energy_net_mj=energy.energy_net_mj,
        energy_window_s=energy.window_s,
        energy_source=energy.source,
        energy_reason=energy.reason,
        details=details,
    )


def _row(candidate: Candidate, cache: Any, setting: Setting, **figures: Any) -> Measurement:
    return Measurement(
        workload=candidate.workload,
        subject=candidate.workload.label,
        device=setting.device,
        lowering=candidate.lowering,
        is_baseline=candidate.is_baseline,
        cache=cache,
        weight_bytes=candidate.workload.weight_bytes,
        max_abs_error=candidate.error,
        run=setting.run,
        **figures,
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:300]


def track(label: str, items: list, step: Callable, setting: Setting) -> Iterator:
    """Applies a step to each item under a progress bar with the time left."""
    columns = (
        TextColumn(f"{label:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for item in progress.track(items):
            yield step(item, setting)


def settings_for(
    config: SweepConfig, name: str, device: str, threads: str | None
) -> Iterable[Setting]:
    """One Setting for each device that was asked for.

    Raises:
        BadInput: On a malformed option.
        DeviceError: If a device is not there.
    """
    if device == "cpu":
        counts = _thread_counts(threads) or config.threads or (len(os.sched_getaffinity(0)),)
        infos = [cpu_info(count) for count in counts]
        return [Setting(info, "cpu", cpu_target(), config, name) for info in infos]
    if device == "all":
        indices = list(range(nvml.gpu_count())) or [0]
    elif device.startswith("cuda"):
        index = device.removeprefix("cuda").removeprefix(":") or "0"
        if not index.isdigit():
            raise BadInput(f"--device {device}: must be cpu, cuda:N or all")
        indices = [int(index)]
    else:
        raise BadInput(f"--device {device}: must be cpu, cuda:N or all")
    infos = [nvml.cuda_info(index) for index in indices]
    return [
        Setting(info, f"cuda:{index}", cuda_target(info.isa), config, name)
        for index, info in zip(indices, infos)
    ]


def _thread_counts(threads: str | None) -> tuple[int, ...]:
    if threads is None:
        return ()
    parts = threads.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise BadInput(f"--threads {threads}: must be whole numbers separated by commas")
    return tuple(int(part) for part in parts)


def config_for(config: str | None, model: str | None, batch: int) -> tuple[str, SweepConfig]:
    """The sweep that was asked for: a TOML, or the layers of a model.

    Raises:
        BadInput: If both were given, or the TOML is bad.
        ModelError: If timm does not know the model.
    """
    if model is None:
        return load_config(config or "quick-cpu", SWEEPS, SweepConfig)
    if config is not None:
        raise BadInput("--config and --model: give one of them")
    shapes = dict.fromkeys(layer.shape for layer in model_layers(model, batch))
    return f"{model}-b{batch}", SweepConfig(shapes=tuple(shapes))


@app.command(help=__doc__)
def main(
    config: Annotated[str | None, typer.Option(help="Shipped sweep or path of a TOML.")] = None,
    model: Annotated[str | None, typer.Option(help="Any timm model: its layers.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once, with --model.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda:N or all (every GPU).")] = "cpu",
    threads: Annotated[str | None, typer.Option(help="CPU threads, such as 1,2.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME.")] = None,
    store: Annotated[str | None, typer.Option(help="Database instead: file or SQL URL.")] = None,
) -> None:
    """Reads top to bottom as the story of a sweep."""
    name, chosen = config_for(config, model, batch)
    settings = list(settings_for(chosen, name, device, threads))
    if store is None:
        store = str(output_folder(out or Path("runs") / name) / "measurements.sqlite")
    database = create_store(store)
    for setting in settings:
        title = f"{name} on {setting.device.label}"
        console.print(f"[bold]{title}[/bold]: {len(chosen.workloads)} workloads → {store}")
        rows = sweep(setting, database)
        console.print(summary_table(rows, title))
        for line in problems(rows):
            console.print(line, style="yellow", markup=False)
        for line in headlines(rows):
            console.print(line, markup=False)
    database.close()


if __name__ == "__main__":
    run(app, (ModelError,))
