"""How often the regression gate errs: false alarms on unchanged code, misses of a 10 % slowdown.

Each job is the gate's own, of one commit against itself, with a fourth process in turns whose
samples do a tenth more work (11 launches instead of 10). Every case of a job gives one verdict of
each kind: head against base must not be SLOWER, the slowed side must be. Verdicts are appended to
a file as they come, and a run that was interrupted goes on from there.

The bounds are Clopper and Pearson's. Verdicts of one job share its processes; how many jobs had an
error is printed beside.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import gate
from gate import Run, Tree

from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, output_folder, run

LAUNCHES, SLOWED_LAUNCHES = 10, 11
KINDS = {
    "false alarms": ("on unchanged code", lambda verdict: verdict == "SLOWER"),
    "misses": ("of a 10 % slowdown", lambda verdict: verdict != "SLOWER"),
}

app = typer.Typer(add_completion=False)


def judge_job(runs: Mapping[str, Sequence[Run]], job: int) -> list[dict[str, Any]]:
    """The verdicts of one job, two of each case."""
    found = []
    for kind, side in zip(KINDS, ("head", "slowed")):
        for each in gate.compare_runs(runs["base"], runs["base again"], runs[side]):
            found.append(
                {
                    "kind": kind,
                    "job": job,
                    "device": runs["base"][0].device,
                    "case": each.case,
                    "ratio": each.effect.ratio,
                    "low": each.effect.low,
                    "high": each.effect.high,
                    "floor": each.floor,
                    "verdict": each.verdict,
                }
            )
    return found


def measure_job(tree: Path, restarts: int) -> dict[str, list[Run]]:
    """One job of the gate, with the slowed side in turns."""
    trees = {
        "base": Tree(tree),
        "base again": Tree(tree),
        "head": Tree(tree),
        "slowed": Tree(tree, launches=SLOWED_LAUNCHES),
    }
    with tempfile.TemporaryDirectory() as folder:
        return gate.repeat(
            lambda _, wanted: gate.measure_in_turns(trees, Path(folder), wanted)[0], restarts
        )


def error_rate(errors: int, verdicts: int) -> tuple[float, float, float]:
    """Share of errors with its 95 % bounds, by Clopper and Pearson."""
    bounds = stats.binomtest(errors, verdicts).proportion_ci(0.95, method="exact")
    return errors / verdicts, float(bounds.low), float(bounds.high)


def report(records: Sequence[Mapping[str, Any]], target: float) -> tuple[list[str], bool]:
    """Lines for people, and whether every upper bound is within the target."""
    lines, held = [], True
    for kind, (of_what, is_error) in KINDS.items():
        found = [record for record in records if record["kind"] == kind]
        wrong = [record for record in found if is_error(record["verdict"])]
        rate, low, high = error_rate(len(wrong), len(found))
        jobs = {record["job"] for record in found}
        held &= high <= target
        lines.append(
            f"{kind} {of_what}: {len(wrong)} of {len(found)} verdicts, {rate:.1%}, "
            f"95 % bounds {low:.1%} to {high:.1%} (target: {target:.0%} at most); "
            f"in {len({record['job'] for record in wrong})} of {len(jobs)} jobs"
        )
        lines += [
            f"  {record['case']}: {record['verdict']}, ratio {record['ratio']:.3f} "
            f"[{record['low']:.3f}, {record['high']:.3f}], floor {record['floor']:.1%}"
            for record in wrong
        ]
    return lines, held


def load(path: Path) -> list[dict[str, Any]]:
    """The verdicts so far.

    Raises:
        BadInput: If the file is none of this script.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        records = [json.loads(line) for line in lines]
        assert all({"kind", "job", "verdict", "device"} <= record.keys() for record in records)
    except (ValueError, AttributeError, AssertionError):
        raise BadInput(f"{path}: holds other than the verdicts of this script") from None
    return records


@app.command(help=__doc__)
def main(
    verdicts: Annotated[int, typer.Option(help="Of each kind, at least.", min=1)] = 200,
    restarts: Annotated[int, typer.Option(help="As of the gate.", min=1)] = 2,
    target: Annotated[float, typer.Option(help="Largest upper bound.")] = 0.03,
    jobs: Annotated[int | None, typer.Option(help="Do no more than so many now.", min=0)] = None,
    base: Annotated[str, typer.Option(help="Commit that is set against itself.")] = "HEAD",
    out: Annotated[Path, typer.Option(help="Folder of the verdicts.")] = Path("runs/gate"),
) -> None:
    """Measures until there are enough verdicts, and prints the rates."""
    path = output_folder(out) / f"error-rates-{restarts}-restarts.jsonl"
    records = load(path)

    def done() -> int:
        return sum(record["kind"] == "misses" for record in records)

    columns = (TextColumn("verdicts of each kind"), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory() as temporary,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        tree = Path(temporary) / "tree"
        gate.export(base, tree)
        gate.with_own_benchmarks(tree)
        task = progress.add_task("", total=verdicts, completed=done())
        while done() < verdicts and jobs != 0:
            job = 1 + max((record["job"] for record in records), default=0)
            new = judge_job(measure_job(tree, restarts), job)
            if records and new[0]["device"] != records[0]["device"]:
                raise BadInput(f"{path}: is of another device; choose another --out")
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in new)
            records += new
            progress.update(task, completed=done())
            jobs = None if jobs is None else jobs - 1
    if not records:
        return
    lines, held = report(records, target)
    print("\n".join(lines))
    if done() < verdicts:
        print(f"{done()} of {verdicts} verdicts so far; run the same command again to go on")
    elif not held:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app)
