"""The regression gate: the code as it stands against a base commit, interleaved in one job.

Each pair is one short benchmark run of either side, base and head in turns (the order swaps from
pair to pair, so that a steady drift cancels). A figure is the ratio of the two medians of a pair;
over the pairs it has a median and an order-statistic interval. Figures of different jobs are never
compared: between jobs they differ by far more than within one.

A gate that measured nothing must fail: so does a side without figures, a wrong result, or figures
of different devices or of the wrong code.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, run
from profiler.compare import VERDICTS, Verdict, judge
from profiler.samples import median_interval

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = Path("tests/bench/bench_kernels.py")

app = typer.Typer(add_completion=False)


class GateError(RuntimeError):
    """Why there is no verdict; the gate fails."""


@dataclass(frozen=True)
class Run:
    """One benchmark run of one side.

    Attributes:
        device: Fingerprint of the device that was measured.
        source: Folder whose code was measured.
        medians_ms: Median latency by case.
    """

    device: str
    source: str
    medians_ms: dict[str, float]


@dataclass(frozen=True)
class CaseRatio:
    """One case over all pairs: latency of head / base, median and interval over the pairs."""

    case: str
    base_ms: float
    head_ms: float
    ratio: float
    low: float
    high: float
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
    medians_ms = {
        each.get("param") or each["name"]: each["stats"]["median"] * 1e3 for each in benchmarks
    }
    return Run(**about, medians_ms=medians_ms)


def compare_pairs(
    bases: Sequence[Run], heads: Sequence[Run], threshold: float = 0.05
) -> list[CaseRatio]:
    """Judges every case that all runs measured, pair by pair.

    Args:
        bases, heads: Runs of either side; those of equal index ran one after the other.
        threshold: Least relative difference that matters.

    Raises:
        GateError: If there are no pairs, several devices, or no case in common.
    """
    if not bases or len(bases) != len(heads):
        raise GateError(f"{len(bases)} runs of base and {len(heads)} of head make no pairs")
    devices = {each.device for each in (*bases, *heads)}
    if len(devices) > 1:
        raise GateError(f"different devices were measured: {', '.join(sorted(devices))}")
    common = set.intersection(*(set(each.medians_ms) for each in (*bases, *heads)))
    if not common:
        raise GateError("base and head have no case in common")
    judged = []
    for case in (case for case in heads[0].medians_ms if case in common):
        base_ms = [each.medians_ms[case] for each in bases]
        head_ms = [each.medians_ms[case] for each in heads]
        ratios = [head / base for base, head in zip(base_ms, head_ms)]
        ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
        verdict = judge(ratio, low, high, threshold)
        medians = statistics.median(base_ms), statistics.median(head_ms)
        judged.append(CaseRatio(case, *medians, ratio, low, high, verdict))
    return judged


def unpaired(bases: Sequence[Run], heads: Sequence[Run]) -> dict[str, list[str]]:
    """Cases that a side measured and the other did not, by the side that has them."""
    of_base, of_head = (set().union(*(each.medians_ms for each in runs)) for runs in (bases, heads))
    return {"base": sorted(of_base - of_head), "head": sorted(of_head - of_base)}


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


def measure(side: str, tree: Path, report: Path) -> Run:
    """Runs the benchmarks of a tree in a process of their own.

    Raises:
        GateError: If they measured nothing, failed, or ran the code of another tree.
    """
    if not (tree / BENCHMARKS).is_file():
        raise GateError(f"{side} measured nothing: it has no {BENCHMARKS}")
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", str(BENCHMARKS), "-q", "-p", "no:cacheprovider"),
            *("--benchmark-enable", "--benchmark-warmup=on", "--benchmark-max-time=0.3"),
            f"--benchmark-json={report}",
        ],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("E  ")), lines[-1])
        raise GateError(f"{side} failed its benchmarks: {' '.join(reason.split())}")
    content = json.loads(report.read_text()) if report.is_file() and report.stat().st_size else {}
    found = parse_run(content, side)
    if Path(found.source).resolve() != tree.resolve():
        raise GateError(f"{side} measured the code of {found.source} instead of {tree}")
    return found


def measure_pairs(base: str, pairs: int) -> tuple[list[Run], list[Run]]:
    """Runs both sides in turns.

    Raises:
        BadInput: If the base is no commit.
        GateError: If either side measured nothing.
    """
    runs: dict[str, list[Run]] = {"base": [], "head": []}
    with tempfile.TemporaryDirectory() as temporary:
        trees = {"base": Path(temporary) / "base", "head": ROOT}
        export(base, trees["base"])
        turns = [
            side
            for pair in range(pairs)
            for side in (("base", "head") if pair % 2 == 0 else ("head", "base"))
        ]
        console = Console(stderr=True)
        for side in track(turns, description="base and head in turns", console=console):
            report = Path(temporary) / f"{side}-{len(runs[side])}.json"
            runs[side].append(measure(side, trees[side], report))
    return runs["base"], runs["head"]


def table(judged: Sequence[CaseRatio]) -> Table:
    """The verdicts for people."""
    shown = Table(title="head against base, measured medians in ms", title_justify="left")
    for heading in ("case", "base", "head", "head / base", "interval", "verdict"):
        shown.add_column(heading, justify="left" if heading in ("case", "verdict") else "right")
    for each in judged:
        shown.add_row(
            each.case,
            f"{each.base_ms:.4g}",
            f"{each.head_ms:.4g}",
            f"{each.ratio:.3f}",
            f"{each.low:.3f} – {each.high:.3f}",
            each.verdict,
            style=VERDICTS[each.verdict],
        )
    return shown


@app.command()
def main(
    base: Annotated[str, typer.Option(help="Commit to compare with.")] = "HEAD~1",
    pairs: Annotated[
        int, typer.Option(help="Pairs of runs; from 6 on the interval covers 95 %.", min=5)
    ] = 6,
    threshold: Annotated[
        float, typer.Option(help="Least relative difference that matters.", min=1e-6)
    ] = 0.05,
) -> None:
    """Measures the kernels of this tree against those of a base commit, in turns in one job.

    SLOWER: the median ratio over the pairs is beyond the threshold and its interval excludes 1.

    Exit code: 0 nothing is SLOWER, 1 something is, or a side measured nothing, failed, or the
    devices differ; 2 bad input.
    """
    try:
        bases, heads = measure_pairs(base, pairs)
        judged = compare_pairs(bases, heads, threshold)
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_VERDICT_AGAINST) from None
    console = Console()
    console.print(table(judged))
    for side, cases in unpaired(bases, heads).items():
        if cases:
            console.print(f"only in {side}, not compared: {', '.join(cases)}", markup=False)
    if any(each.verdict == "SLOWER" for each in judged):
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app)
