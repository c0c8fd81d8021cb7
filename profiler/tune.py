"""Looks for the fastest schedules on this machine: workloads -> search -> tuning records.

python -m profiler.tune --model pvt_v2_b0 --batch 1 --threads 1
python -m profiler.tune --config shiftaddvit-paper --out my-machine.jsonl

Kernels are built by the records that ship for a chip and by those in the file that the environment
variable SHIFTADD_RECORDS names. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kernels.build import LOWERINGS, build, lowerings, set_threads
from kernels.records import TVM_VERSION, Record, RecordError, append_record, load_records
from kernels.reference import checker, random_operands
from kernels.search import Schedule, Step, search
from kernels.workload import Workload
from profiler.command_line import BadInput, output_folder, run
from profiler.model_workloads import ModelError
from profiler.progress import console
from profiler.ratios import paired_ratio
from profiler.samples import PRESETS, Timing, TimingSettings
from profiler.settings import Setting, config_for, settings_for
from profiler.timing import measure_interleaved

# A search compares many, most of them briefly; what its record says is measured a little longer.
_SCREEN = TimingSettings(
    sample_ms=0.3,
    rest_ms=1.0,
    warmup_ms=1.0,
    warmup_max_ms=20.0,
    burst_ms=4.0,
    rounds_min=6,
    max_time_s=0.1,
    patience=0.0,
)
_SEARCH = replace(PRESETS["quick"], patience=0.0)
_RECORD = replace(_SEARCH, min_time_s=0.3)

app = typer.Typer(add_completion=False)


class TuneError(ValueError):
    """A workload that could not be tuned; the message says why."""


@dataclass(frozen=True)
class Task:
    """One workload with one lowering on one device: what one record is kept of."""

    workload: Workload
    lowering: str
    setting: Setting

    @property
    def label(self) -> str:
        """Short text for people."""
        threads = self.setting.device.threads
        return f"{self.workload.label}, {self.lowering}, {threads} thread{'s' * (threads != 1)}"

    @property
    def space(self) -> dict[str, tuple[int, ...]]:
        """What may be chosen."""
        return LOWERINGS[self.lowering].schedule_space(self.setting.target)

    @property
    def default(self) -> Schedule:
        """The schedule without a record."""
        known = LOWERINGS[self.lowering]
        return known.default_schedule(self.workload, self.setting.target)

    def record(self, schedule: Schedule, latency_ms: float, default_latency_ms: float) -> Record:
        """What was found, here and now."""
        return Record(
            family=self.workload.family,
            tokens=self.workload.tokens,
            lowering=self.lowering,
            chip=self.setting.target.chip,
            threads=self.setting.device.threads,
            schedule=schedule,
            latency_ms=latency_ms,
            default_latency_ms=default_latency_ms,
            device=self.setting.device.fingerprint,
            tvm=TVM_VERSION,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def key(self) -> tuple[Workload, int, str, str, int]:
        """``Record.key`` of its outcome."""
        target, device = self.setting.target, self.setting.device
        return (
            self.workload.family,
            self.workload.tokens,
            self.lowering,
            target.chip,
            device.threads,
        )


def tasks_of(setting: Setting) -> list[Task]:
    """Every workload of a sweep with each lowering that leaves something to choose."""
    return [
        Task(workload, name, setting)
        for workload in setting.config.workloads
        for name in lowerings(workload, setting.target)
        if LOWERINGS[name].schedule_space(setting.target)
    ]


def tune(tasks: Sequence[Task], path: Path, seed: int = 0) -> list[str]:
    """Tunes what the file does not hold yet, and writes each record as soon as it is found.

    Returns:
        One line for each task that stays without a record.
    """
    known = {record.key for record in existing(path)}
    todo = [task for task in tasks if task.key not in known]
    problems = []
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo))

        def see(task: Task, step: Step) -> None:
            progress.update(bar, description=f"{task.label}: {_so_far(step)}")

        for task in todo:
            progress.update(bar, description=task.label)
            try:
                record = tune_one(task, seed, see)
            except TuneError as error:
                problems.append(f"{task.label}: {error}")
            else:
                append_record(path, record)
                console.print(f"{task.label}: {_outcome(record)}", markup=False, highlight=False)
            progress.advance(bar)
    return problems


def tune_one(
    task: Task, seed: int = 0, see: Callable[[Task, Step], None] = lambda task, step: None
) -> Record:
    """Searches the schedules of one workload, then measures the best against the default one.

    The winner of many noisy comparisons flatters itself: it stands only where this last
    comparison finds it faster too, with its whole interval above 1. Where the search ends at the
    default itself there is nothing to compare.

    Raises:
        TuneError: If a kernel is wrong, or the machine too busy for a figure.
    """
    set_threads(task.setting.device.threads)
    launch_of = launches(task)
    what = (task.workload, task.lowering, task.setting.target)

    def measure(settings: TimingSettings, schedules: list[Schedule]) -> list[float | None]:
        with ThreadPoolExecutor(task.setting.device.cores) as compilers:
            list(compilers.map(partial(build, *what), schedules))
        return [timing.latency_ms for timing in time(launch_of, schedules, settings)]

    best = task.default
    latency_ms: float | None = None
    found = search(
        task.space,
        task.default,
        partial(measure, _SEARCH),
        screen=partial(measure, _SCREEN),
        seed=seed,
    )
    for step in found:
        see(task, step)
        best, latency_ms = step.best, step.latency_ms
    if best == task.default and latency_ms is not None:
        return task.record(best, latency_ms, latency_ms)
    default_timing, best_timing = time(launch_of, [task.default, best], _RECORD)
    if default_timing.latency_ms is None or best_timing.latency_ms is None:
        raise TuneError(default_timing.reason or best_timing.reason)
    ratio = paired_ratio(default_timing, best_timing)
    if best == task.default or ratio is None or ratio.low <= 1:
        return task.record(task.default, default_timing.latency_ms, default_timing.latency_ms)
    return task.record(best, best_timing.latency_ms, default_timing.latency_ms)


def launches(task: Task) -> Callable[[Schedule], Callable[[], None]]:
    """Schedule -> a launch on fixed random operands; each kernel is checked before its first.

    Raises:
        TuneError: From the returned function, if a kernel's result is wrong.
    """
    operands = random_operands(task.workload, seed=int.from_bytes(os.urandom(4)))
    check = checker(task.workload, operands)
    found: dict[tuple[tuple[str, int], ...], Callable[[], None]] = {}

    def launch_of(schedule: Schedule) -> Callable[[], None]:
        key = tuple(schedule.items())
        if key not in found:
            kernel = build(task.workload, task.lowering, task.setting.target, schedule)
            arguments = (*kernel.pack(operands), out := kernel.allocate(operands))
            kernel.launch(*arguments)
            error, within = check(out)
            if not within:
                raise TuneError(f"{schedule}: wrong: off by {error:.3g} from the float64 oracle")
            found[key] = lambda: kernel.launch(*arguments)
        return found[key]

    return launch_of


def time(
    launch_of: Callable[[Schedule], Callable[[], None]],
    schedules: Sequence[Schedule],
    settings: TimingSettings,
) -> list[Timing]:
    """Builds and checks all, then times them in turns; the same order as ``schedules``."""
    named = {str(place): launch_of(schedule) for place, schedule in enumerate(schedules)}
    return list(measure_interleaved(named, settings).values())


def _values(schedule: Schedule) -> str:
    return " ".join(f"{name}={value}" for name, value in schedule.items())


def _so_far(step: Step) -> str:
    figure = "no figure" if step.latency_ms is None else f"{step.latency_ms * 1e3:.1f} µs"
    return f"best of {step.measured}: {figure}, {_values(step.best)}"


def _outcome(record: Record) -> str:
    return (
        f"{record.default_latency_ms * 1e3:.1f} → {record.latency_ms * 1e3:.1f} µs "
        f"(×{record.speedup:.3f}), {_values(record.schedule)}"
    )


def summary(records: Sequence[Record], title: str) -> Table:
    """Default against tuned speed, one line a workload, with the geometric mean."""
    shares = [1 / record.speedup for record in records]
    table = Table(
        title=title,
        caption=f"the default schedule reaches {geometric_mean(shares):.1%} of the tuned speed "
        f"(geometric mean of {len(shares)}), {min(shares):.1%} at worst",
    )
    for name in ("family", "tokens", "threads", "default µs", "tuned µs", "speed-up", "schedule"):
        table.add_column(name, justify="left" if name in ("family", "schedule") else "right")
    for record in records:
        table.add_row(
            f"{record.family.form} {record.family.k}→{record.family.n}",
            str(record.tokens),
            str(record.threads),
            f"{record.default_latency_ms * 1e3:.1f}",
            f"{record.latency_ms * 1e3:.1f}",
            f"{record.speedup:.3f}",
            _values(record.schedule),
        )
    return table


def existing(path: Path) -> list[Record]:
    """The records of a file, none where there is none yet."""
    return load_records(path) if path.exists() else []


def records_file(out: Path | None, chip: str) -> Path:
    """Where the records go, its folder made; what is there already must be records of ours.

    Raises:
        BadInput: If it cannot be written.
        RecordError: If it holds something else, or records of another version of TVM.
    """
    path = out or Path("runs") / "tuned" / f"{chip}.jsonl"
    existing(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise BadInput(f"--out {path}: cannot be written (permission denied)")
    output_folder(path.parent)
    return path


@app.command(help=__doc__)
def main(
    config: Annotated[str | None, typer.Option(help="Shipped sweep or path of a TOML.")] = None,
    model: Annotated[str | None, typer.Option(help="Any timm model: its layers.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once, with --model; default 1.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu: a GPU's kernels have no schedules yet.")
    ] = "cpu",
    threads: Annotated[str | None, typer.Option(help="CPU threads, such as 1,2.")] = None,
    out: Annotated[Path | None, typer.Option(help="File; default runs/tuned/CHIP.jsonl.")] = None,
    seed: Annotated[int, typer.Option(help="Order in which parameters are searched.")] = 0,
) -> None:
    """Reads top to bottom as the story of a tuning run."""
    if device != "cpu":
        raise BadInput(f"--device {device}: only the CPU's lowerings have schedules to choose")
    name, chosen = config_for(config, model, batch)
    tasks = [task for s in settings_for(chosen, name, device, threads) for task in tasks_of(s)]
    if not tasks:
        raise BadInput(f"{name}: none of its workloads leaves a schedule to choose")
    path = records_file(out, tasks[0].setting.target.chip)
    console.print(f"[bold]{name}[/bold]: {len(tasks)} workloads to tune → {path}")
    problems = tune(tasks, path, seed)
    wanted = {task.key for task in tasks}
    found = [record for record in existing(path) if record.key in wanted]
    if found:
        console.print(summary(found, f"{name}: default against tuned"))
    for line in problems:
        console.print(f"no record: {line}", style="yellow", markup=False)


if __name__ == "__main__":
    run(app, (ModelError, RecordError))
