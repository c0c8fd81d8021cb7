"""Kills a sweep at random moments, resumes it, and counts what was lost.

python tests/prove/kill_sweep.py --kills 100 --out runs/prove

After each kill the store must be sound, hold every row that it held before, and nothing that an
uninterrupted sweep would not; once it is complete it must have the same keys, and the next store
is begun. Interrupted, the same command goes on: what was counted is kept in ``kill_sweep.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sqlite3
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from profiler.command_line import EXIT_VERDICT_AGAINST, output_folder, run
from profiler.contamination import NO_CONTAMINATION
from profiler.samples import PRESETS, TimingSettings
from profiler.settings import settings_for
from profiler.store import create_store, open_store
from profiler.sweep_config import SweepConfig

CONFIG = SweepConfig(
    timing="quick",
    forms=("mult_fp32", "shift_int8"),
    shapes=({"m": list(range(1, 17)), "k": 16, "n": 32},),
)
# Its figures mean nothing and are not looked at: what counts is what is in the store.
TIMING = TimingSettings(
    sample_ms=0.05,
    rest_ms=0,
    warmup_ms=0,
    warmup_max_ms=0.1,
    burst_ms=0.5,
    rounds_min=6,
    max_time_s=0.01,
)

app = typer.Typer(add_completion=False)


@dataclass
class Tally:
    """What was seen so far; ``lost`` are rows that a store held before a kill and not after."""

    kills: int = 0
    kills_with_rows: int = 0
    damaged: int = 0
    lost: int = 0
    foreign: int = 0
    complete: int = 0

    @property
    def faults(self) -> int:
        """All that may not be."""
        return self.damaged + self.lost + self.foreign


def sweep_into(path: str) -> None:
    """The victim, in a process of its own."""
    from profiler import sweep

    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    PRESETS["quick"] = TIMING
    import profiler.sites
    import profiler.timing

    profiler.timing.host_contamination = lambda: NO_CONTAMINATION
    # A copy past the caches takes longer than all of the rows, which the kills are to meet.
    profiler.sites.measure_roofs = lambda *_: {}
    (setting,) = settings_for(CONFIG, "victim", "cpu", "1")
    with closing(create_store(path)) as store:
        sweep.sweep(setting, store)


def victims() -> multiprocessing.context.ForkServerContext:
    """Processes that start at once: what they import was imported before, by the one they fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["profiler.sweep"])
    return context


def run_whole(context: multiprocessing.context.ForkServerContext, path: Path) -> float:
    """An undisturbed sweep; returns its length in s."""
    start = time.monotonic()
    victim = context.Process(target=sweep_into, args=(str(path),))
    victim.start()
    victim.join()
    if victim.exitcode != 0:
        raise RuntimeError("the sweep failed without being killed")
    return time.monotonic() - start


def keys_of(path: Path) -> set[str] | None:
    """Keys of all rows with their samples read too; None where the store cannot be read."""
    if not path.exists() or path.stat().st_size == 0:
        return set()
    try:
        with closing(sqlite3.connect(path)) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                return None
        with closing(open_store(path)) as store:
            return {row.key for row in store.rows(samples=True)}
    except (sqlite3.DatabaseError, ValueError):
        return None


def remove(path: Path) -> None:
    """A store with what SQLite keeps beside it."""
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()


def kill_once(
    context: multiprocessing.context.ForkServerContext,
    path: Path,
    wanted: set[str],
    after_s: float,
    tally: Tally,
) -> None:
    """Lets a sweep go on for a while, kills it and looks at what it left."""
    before = keys_of(path) or set()
    victim = context.Process(target=sweep_into, args=(str(path),))
    victim.start()
    victim.join(after_s)
    if victim.is_alive():
        victim.kill()
        tally.kills += 1
    victim.join()
    after = keys_of(path)
    if after is None:
        tally.damaged += 1
        remove(path)
        return
    tally.kills_with_rows += victim.exitcode != 0 and bool(after)
    tally.lost += len(before - after)
    tally.foreign += len(after - wanted)
    if after == wanted:
        tally.complete += 1
        remove(path)
    elif victim.exitcode == 0:
        tally.lost += len(wanted - after)
        remove(path)


def prove(kills: int, folder: Path, seed: int | None = None) -> Tally:
    """Kills that often, then lets the last sweep finish."""
    note, path = folder / "kill_sweep.json", folder / "killed.sqlite"
    tally = Tally(**json.loads(note.read_text())) if note.exists() else Tally()
    context = victims()
    whole = folder / "whole.sqlite"
    remove(whole)
    run_whole(context, whole)  # also fills the caches of the disk
    remove(whole)
    length_s = run_whole(context, whole)
    wanted = keys_of(whole)
    assert wanted
    chance = random.Random(seed)
    for _ in track(range(tally.kills, kills), description="kill and resume"):
        known = tally.kills
        while tally.kills == known:
            kill_once(context, path, wanted, chance.uniform(0, length_s), tally)
        note.write_text(json.dumps(asdict(tally)))
    while path.exists():
        kill_once(context, path, wanted, 100 * length_s, tally)
    note.write_text(json.dumps(asdict(tally)))
    return tally


@app.command(help=__doc__)
def main(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/prove"),
    seed: Annotated[int | None, typer.Option(help="Of the moments.")] = None,
) -> None:
    """Prints the figure; exit code 1 if anything was lost."""
    tally = prove(kills, output_folder(out), seed)
    print(
        f"{tally.kills} kills ({tally.kills_with_rows} of a store with rows): {tally.lost} rows"
        f" lost, {tally.foreign} rows too many, {tally.damaged} stores damaged;"
        f" {tally.complete} stores completed with the keys of an uninterrupted sweep"
    )
    if tally.faults:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app)
