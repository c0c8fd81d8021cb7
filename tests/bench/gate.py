"""The regression gate: the code as it stands against a base commit, in turns in one job.

Three processes take turns at bursts of some 10 ms: the base, the base once more, and the head.
Each turn gives one ratio head / base, free of what the machine did meanwhile; base against base,
two processes of equal code, gives the noise floor, where the kernels' arrays lie included. All is
done again with fresh processes, for longer where the floor of a case hides what matters, and the
verdicts are those of ``profiler.verdicts``. Figures of different jobs are never compared.

Both trees are measured by the head's benchmarks. A gate that measured nothing must fail: so does a
side without figures, a wrong result, or figures of different devices or of the wrong code.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import turns
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, run
from profiler.compare import VERDICTS
from profiler.verdicts import Effect, Verdict, holm, judge, paired_effect

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path("tests/bench")

# How much longer a noisy machine may take.
MOST_RESTARTS = 3

app = typer.Typer(add_completion=False)


class GateError(RuntimeError):
    """Why there is no verdict; the gate fails."""


@dataclass(frozen=True)
class Tree:
    """Code to measure.

    Attributes:
        path: Folder that holds the packages.
        launches: In one sample; None for the usual number. More of them are a slowdown.
    """

    path: Path
    launches: int | None = None


@dataclass(frozen=True)
class Run:
    """What one process measured.

    Attributes:
        device: Fingerprint of the device that was measured.
        source: Folder whose code was measured.
        bursts_ms: By case, the median sample of each turn.
    """

    device: str
    source: str
    bursts_ms: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class CaseVerdict:
    """One case over all turns: latency of head / base, its interval, and the noise floor."""

    case: str
    base_ms: float
    head_ms: float
    effect: Effect
    floor: float
    verdict: Verdict


def parse_run(content: Mapping[str, Any], side: str) -> Run:
    """Reads what pytest-benchmark wrote.

    Raises:
        GateError: If it holds no figures, or they do not say of one device and one source.
    """
    benchmarks = content.get("benchmarks") or []
    if not benchmarks:
        raise GateError(f"{side} measured nothing: no benchmark ran")
    about = {}
    for name in ("device", "source"):
        found = {benchmark.get("extra_info", {}).get(name) for benchmark in benchmarks}
        if len(found) != 1 or None in found:
            raise GateError(
                f"{side}: extra_info names {len(found - {None})} {name}s instead of one"
            )
        about[name] = found.pop()
    bursts_ms = {each.get("param") or each["name"]: _bursts_ms(each) for each in benchmarks}
    return Run(**about, bursts_ms=bursts_ms)


def _bursts_ms(benchmark: Mapping[str, Any]) -> tuple[float, ...]:
    samples_s = np.reshape(benchmark["stats"]["data"], (benchmark["extra_info"]["turns"], -1))
    return tuple(float(median_s) * 1e3 for median_s in np.median(samples_s, axis=1))


def compare_runs(
    bases: Sequence[Run], agains: Sequence[Run], heads: Sequence[Run], threshold: float = 0.05
) -> list[CaseVerdict]:
    """Judges every case that all sides measured, turn by turn.

    Args:
        bases, agains, heads: Runs of the base, of the base once more, and of the head; those of
            equal index took turns.
        threshold: Least relative difference that matters.

    Raises:
        GateError: If the runs do not match, are of several devices, or have no case in common.
    """
    if not bases or not len(bases) == len(agains) == len(heads):
        raise GateError(f"{len(bases)} runs of base and {len(heads)} of head took no turns")
    runs = (*bases, *agains, *heads)
    devices = {each.device for each in runs}
    if len(devices) > 1:
        raise GateError(f"different devices were measured: {', '.join(sorted(devices))}")
    rounds = list(zip(bases, agains, heads))
    cases = [
        case for case in heads[0].bursts_ms if all(case in each.bursts_ms for each in rounds[0])
    ]
    if not cases:
        raise GateError("base and head have no case in common")
    of_base, of_again, of_head = (
        {case: _all_bursts(rounds, side, case) for case in cases} for side in range(3)
    )
    effects = {case: _effect(of_base[case], of_head[case]) for case in cases}
    floors = {case: _floor(_effect(of_base[case], of_again[case])) for case in cases}
    p_values = dict(zip(cases, holm([effects[case].p_value for case in cases])))
    return [
        CaseVerdict(
            case,
            statistics.median(of_base[case]),
            statistics.median(of_head[case]),
            effects[case],
            floors[case],
            judge(effects[case], p_values[case], threshold, floors[case]),
        )
        for case in cases
    ]


def _all_bursts(rounds: Sequence[tuple[Run, ...]], side: int, case: str) -> list[float]:
    """Of one side, where all sides took turns at the case: later jobs measure what is noisy."""
    together = [each for each in rounds if all(case in run.bursts_ms for run in each)]
    return [burst_ms for each in together for burst_ms in each[side].bursts_ms[case]]


def _effect(a_ms: Sequence[float], b_ms: Sequence[float]) -> Effect:
    effect = paired_effect(a_ms, b_ms)
    if effect is None:
        raise GateError(f"{len(a_ms)} turns are too few for a verdict")
    return effect


def _floor(equals: Effect) -> float:
    return max(equals.high, 1 / equals.low) - 1


def export(revision: str, folder: Path) -> None:
    """Writes the tree of a commit into a folder.

    Raises:
        BadInput: If there is no such commit.
    """
    resolved = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if resolved.returncode != 0:
        raise BadInput(f"--base {revision}: no such commit")
    archive = subprocess.run(
        ["git", "archive", resolved.stdout.strip()], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def with_own_benchmarks(tree: Path) -> Path:
    """Puts this tree's benchmarks into another one: both sides are measured with one ruler."""
    shutil.rmtree(tree / BENCHMARKS, ignore_errors=True)
    shutil.copytree(ROOT / BENCHMARKS, tree / BENCHMARKS)
    return tree


def measure_in_turns(
    trees: Mapping[str, Tree],
    folder: Path,
    wanted: Container[str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Run], dict[str, list[str]]]:
    """Runs the benchmarks of all trees at once, each in a process of its own, in turns.

    Args:
        trees: By the name of the side.
        folder: For the reports.
        wanted: Cases to measure; None for all that the trees have in common.
        progress: Called after each round of turns.

    Returns:
        What each side measured, and the cases that it could have measured.

    Raises:
        GateError: If one measured nothing, failed, or ran the code of another tree.
    """
    sides = [_start(name, tree, folder / f"{name}.json") for name, tree in trees.items()]
    failure = None
    try:
        cases = turns.take_turns(sides, wanted, progress)
    except turns.OutOfStep as error:
        failure = error
    written = {side.name: side.end() for side in sides}
    for side in sides:
        if side.process.returncode != 0 and (failure is None or failure.side == side.name):
            raise GateError(f"{side.name} failed its benchmarks: {_reason(written[side.name])}")
    if failure:
        raise GateError(str(failure))
    return {name: _read_run(name, tree, folder) for name, tree in trees.items()}, cases


def _start(name: str, tree: Tree, report: Path) -> turns.Side:
    if not (tree.path / BENCHMARKS / "bench_kernels.py").is_file():
        raise GateError(f"{name} measured nothing: it has no {BENCHMARKS}/bench_kernels.py")
    command = [
        *(sys.executable, "-m", "pytest", f"{BENCHMARKS}/bench_kernels.py"),
        *("-q", "--tb=short", "-p", "no:cacheprovider", "--benchmark-enable"),
        f"--benchmark-json={report}",
    ]
    variables = {} if tree.launches is None else {"GATE_LAUNCHES": str(tree.launches)}
    return turns.start(name, command, tree.path, variables)


def _reason(written: str) -> str:
    lines = [line for line in written.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("E  ")), lines[-1] if lines else "")
    return " ".join(reason.split())


def _read_run(name: str, tree: Tree, folder: Path) -> Run:
    report = folder / f"{name}.json"
    content = json.loads(report.read_text()) if report.is_file() and report.stat().st_size else {}
    found = parse_run(content, name)
    if Path(found.source).resolve() != tree.path.resolve():
        raise GateError(f"{name} measured the code of {found.source} instead of {tree.path}")
    return found


def repeat(
    measure: Callable[[int, Container[str] | None], dict[str, Run]],
    restarts: int,
    threshold: float = 0.05,
) -> dict[str, list[Run]]:
    """Measures with fresh processes until the base tells a threshold from noise.

    What decides is the base against itself alone: going on until the head looks good, or bad, would
    make errors.

    Args:
        measure: One job by its number and the cases wanted (None: all): a run of each side, among
            them ``base`` and ``base again``.
        restarts: So many jobs of all cases; those that are noisy then get up to MOST_RESTARTS
            times as many.
        threshold: Least relative difference that matters.
    """
    runs: dict[str, list[Run]] = {}
    noisy: list[str] | None = None
    for job in range(MOST_RESTARTS * restarts):
        for side, each in measure(job, noisy).items():
            runs.setdefault(side, []).append(each)
        if job + 1 >= restarts:
            noisy = noisy_cases(runs["base"], runs["base again"], threshold)
            if not noisy:
                break
    return runs


def noisy_cases(bases: Sequence[Run], agains: Sequence[Run], threshold: float) -> list[str]:
    """Cases whose noise floor is more than half of a threshold."""
    judged = compare_runs(bases, agains, bases, threshold)
    return [each.case for each in judged if each.floor > threshold / 2]


def measure_all(
    base: str, restarts: int, threshold: float
) -> tuple[dict[str, list[Run]], dict[str, list[str]]]:
    """Runs base, base once more and head in turns, and all again with fresh processes.

    Raises:
        BadInput: If the base is no commit.
        GateError: If a side measured nothing.
    """
    cases: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        base_tree = Path(temporary) / "base"
        export(base, base_tree)
        tree = Tree(with_own_benchmarks(base_tree))
        trees = {"base": tree, "base again": tree, "head": Tree(ROOT)}
        with Progress(console=Console(stderr=True)) as progress:

            def measure(job: int, wanted: Container[str] | None) -> dict[str, Run]:
                again = f"of {restarts}" if job < restarts else "of what is noisy"
                task = progress.add_task(f"turns, {job + 1} {again}", total=None)
                found, known = measure_in_turns(
                    trees, Path(temporary), wanted, lambda: progress.advance(task)
                )
                cases.update(known)
                return found

            return repeat(measure, restarts, threshold), cases


def table(judged: Sequence[CaseVerdict]) -> Table:
    """The verdicts for people."""
    shown = Table(title="head against base, measured medians in ms", title_justify="left")
    for heading in ("case", "base", "head", "head / base", "interval", "floor", "verdict"):
        shown.add_column(heading, justify="left" if heading in ("case", "verdict") else "right")
    for each in judged:
        shown.add_row(
            each.case,
            f"{each.base_ms:.4g}",
            f"{each.head_ms:.4g}",
            f"{each.effect.ratio:.3f}",
            f"{each.effect.low:.3f} – {each.effect.high:.3f}",
            f"{each.floor:.1%}",
            each.verdict,
            style=VERDICTS[each.verdict],
        )
    return shown


@app.command()
def main(
    base: Annotated[str, typer.Option(help="Commit to compare with.")] = "HEAD~1",
    restarts: Annotated[
        int,
        typer.Option(
            help="How often all is done, each time with fresh processes; up to "
            f"{MOST_RESTARTS} times as often what is noisy, base against itself.",
            min=1,
        ),
    ] = 2,
    threshold: Annotated[
        float, typer.Option(help="Least relative difference that matters.", min=1e-6)
    ] = 0.05,
) -> None:
    """Measures the kernels of this tree against those of a base commit, in turns in one job.

    SLOWER: sure by a signed-rank test over the turns, corrected for the number of cases (Holm),
    and by at least the threshold and the noise floor, which base against base shows.

    Exit code: 0 nothing is SLOWER, 1 something is, or a side measured nothing, failed, or the
    devices differ; 2 bad input.
    """
    try:
        runs, cases = measure_all(base, restarts, threshold)
        judged = compare_runs(runs["base"], runs["base again"], runs["head"], threshold)
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_VERDICT_AGAINST) from None
    # Piped into a file there is no terminal to ask for its width.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(judged))
    for side, other in (("base", "head"), ("head", "base")):
        if alone := [case for case in cases.get(side, []) if case not in cases[other]]:
            console.print(f"only in {side}, not compared: {', '.join(alone)}", markup=False)
    if any(each.verdict == "SLOWER" for each in judged):
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app)
