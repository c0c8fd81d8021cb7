"""Measures workloads on this machine: configuration -> build all -> check all -> measure -> rows.

python -m profiler.sweep                                  the quick sweep of this CPU
python -m profiler.sweep --config pvt                     a shipped sweep, or any TOML by path
python -m profiler.sweep --model pvt_v2_b0 --batch 1      the layers of any timm model
python -m profiler.sweep --device all                     every GPU of this machine at once
python -m profiler.sweep --rpc HOST:9190 --key rasp5      a device behind TVM's RPC tracker

An interrupted sweep goes on where it stopped: run the same command again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from profiler.accounting import process_age_s
from profiler.candidates import (
    Candidate,
    candidates,
    key_of,
    rivals,
    try_build,
    try_check,
    unfinished,
)
from profiler.command_line import BadInput, output_folder, run
from profiler.measurement import Measurement
from profiler.model_workloads import ModelError
from profiler.noise import measure_noise_floor
from profiler.passes import pass_lines
from profiler.progress import console, track
from profiler.rows import Product, failed_row, lacks_energy, measure, products_of
from profiler.settings import Setting, config_for, remote_settings, settings_for
from profiler.store import Store, create_store
from profiler.summary import (
    headlines,
    noise_line,
    overhead_lines,
    own_mult_lines,
    problems,
    shared_lines,
    summary_table,
)
from profiler.sweep_config import SweepConfig
from profiler.workers import one_each

# Products that are gone through between two passes over the same: a minute or two.
_BLOCK = 30

app = typer.Typer(add_completion=False)


def sweep(
    setting: Setting, store: Store, ready: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measures what the store does not hold yet and returns all rows of this configuration.

    Args:
        setting: On what and how.
        store: Gets the rows of a product as soon as they are measured.
        ready: Called when all is built and checked; a worker among several waits in it.
    """
    setting.site.prepare()
    every = candidates(setting)
    known = store.finished_keys()
    finished = known - keys_without_energy(setting, store)
    checked = prepared(unfinished(every, setting, finished), setting)
    checked += prepared(rivals(checked, every), setting)
    products = products_of(checked, setting, finished)
    tell_energy(products, setting)
    ready()
    setting = calibrated(setting, checked)
    store.put(*failed_rows(checked, setting, known))
    measure_all(products, setting, store, known)
    wanted = {key_of(c, cache, setting) for c in every for cache in setting.config.cache}
    return [row for row in store.rows() if row.key in wanted]


def prepared(todo: Sequence[Candidate], setting: Setting) -> list[Candidate]:
    """Builds all of them, then checks all."""
    built = list(track("build", todo, partial(try_build, setting=setting)))
    return list(track("check", built, partial(try_check, setting=setting)))


def failed_rows(
    checked: Sequence[Candidate], setting: Setting, finished: Collection[str]
) -> list[Measurement]:
    """Rows of what cannot be measured; a finished row is never given up for one."""
    rows = [
        failed_row(candidate, cache, setting)
        for candidate in checked
        if candidate.problem
        for cache in setting.config.cache
    ]
    return [row for row in rows if row.key not in finished]


def keys_without_energy(setting: Setting, store: Store) -> set[str]:
    """Keys of the rows that are to be measured again for their energy."""
    if not setting.config.energy_workloads or setting.site.energy_s() is None:
        return set()
    return {row.key for row in store.rows() if lacks_energy(row, setting)}


def tell_energy(products: Sequence[Product], setting: Setting) -> None:
    """Says beforehand how long the energy windows will take, if there are to be any."""
    found = [c for product in products if "hot" in product.caches for c in product.group]
    wanted = [c for c in found if c.workload in setting.config.energy_workloads]
    each_s = setting.site.energy_s() if wanted else None
    if each_s is not None:
        minutes = len(wanted) * each_s / 60
        console.print(f"energy of {len(wanted)} rows: some {each_s:.0f} s each, {minutes:.0f} min")


def unasked_energy_lines(setting: Setting) -> list[str]:
    """That the device has a meter that the sweep made no use of."""
    each_s = None if setting.config.energy_workloads else setting.site.energy_s()
    if each_s is None:
        return []
    return [f"energy was not asked for: --energy measures it, some {each_s:.0f} s a row"]


def calibrated(setting: Setting, checked: Sequence[Candidate]) -> Setting:
    """The setting with what the device can do at most, and with how finely it can be measured."""
    sound = [candidate for candidate in checked if not candidate.problem]
    if not sound:
        return setting
    with setting.accounting.charge("sampling"):
        roofs = setting.site.roofs(setting.timing)
        overheads = setting.site.launch_overheads(setting.timing)
    floor = measure_noise_floor(sound, setting)
    return replace(setting, roofs=roofs, launch_overheads=overheads, noise_floor=floor)


def measure_all(
    products: Sequence[Product], setting: Setting, store: Store, finished: Collection[str]
) -> None:
    """Measures every product in several passes that lie some time apart, and stores its rows.

    A block of products is gone through time and again, then the next: rows get better with each
    pass, and what an interrupted sweep has stored counts as measured. A finished row is never given
    up for one without a figure.
    """
    steps = [
        product
        for first in range(0, len(products), _BLOCK)
        for _ in range(setting.config.passes)
        for product in products[first : first + _BLOCK]
    ]
    for states in track("measure", steps, partial(measure, setting=setting)):
        for rows in states:
            store.put(*(row for row in rows if row.status == "ok" or row.key not in finished))


def report(
    setting: Setting, location: str, ready: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Sweeps one device and shows what came of it; returns the rows that are new."""
    title = f"{setting.run} on {setting.device.label}"
    console.print(f"[bold]{title}[/bold]: {len(setting.config.workloads)} workloads → {location}")
    with closing(create_store(location)) as store:
        known = store.finished_keys()
        rows = sweep(setting, store, ready)
    console.print(summary_table(rows, title))
    for line in problems(rows):
        console.print(line, style="yellow", markup=False)
    said = [*headlines(rows), *own_mult_lines(rows), *overhead_lines(rows), noise_line(rows)]
    for line in [*said, *pass_lines(rows), *shared_lines(rows), *unasked_energy_lines(setting)]:
        console.print(line, markup=False, highlight=False)
    return [row for row in rows if row.key not in known]


def work(device: str, ready: Callable[[], None], config: str, name: str, location: str) -> None:
    """What one of several processes does: the sweep of its GPU."""
    (setting,) = settings_for(SweepConfig.model_validate_json(config), name, device, None)
    rows = report(setting, location, ready)
    for line in setting.accounting.lines(process_age_s(), rows):
        console.print(f"{device}: {line}", markup=False, highlight=False)


@app.command(help=__doc__)
def main(
    config: Annotated[str | None, typer.Option(help="Shipped sweep or path of a TOML.")] = None,
    model: Annotated[str | None, typer.Option(help="Any timm model: its layers.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once, with --model; default 1.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:N or all (every GPU).")] = "cpu",
    threads: Annotated[str | None, typer.Option(help="CPU threads, such as 1,2.")] = None,
    isa: Annotated[
        str | None, typer.Option(help="Build for less than this CPU has: avx2 or avx512f.")
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure energy too, where the device has a meter.")
    ] = False,
    rpc: Annotated[str | None, typer.Option(help="HOST:PORT of TVM's RPC tracker.")] = None,
    key: Annotated[str | None, typer.Option(help="The device's key there, with --rpc.")] = None,
    chip: Annotated[
        str | None, typer.Option(help="LLVM's name of its CPU; else it is asked.")
    ] = None,
    triple: Annotated[
        str | None, typer.Option(help="LLVM's name of its platform, likewise.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME.")] = None,
    store: Annotated[str | None, typer.Option(help="Database instead: file or SQL URL.")] = None,
) -> None:
    """Reads top to bottom as the story of a sweep."""
    name, chosen = config_for(config, model, batch)
    if energy:
        chosen = chosen.model_copy(update={"energy": True})
    if out is not None and store is not None:
        raise BadInput("--out and --store: give one of them")
    if rpc or key or chip or triple:
        if isa is not None:
            raise BadInput(f"--isa {isa}: applies to this CPU; with --rpc, --chip says what it is")
        settings = remote_settings(chosen, name, device, threads, rpc, key, chip, triple)
    else:
        settings = settings_for(chosen, name, device, threads, isa)
    location = store or str(output_folder(out or Path("runs") / name) / "measurements.sqlite")
    create_store(location).close()
    if len(settings) > 1 and device == "all":
        devices = [f"cuda:{index}" for index in range(len(settings))]
        failed = one_each(work, devices, chosen.model_dump_json(), name, location)
        for gpu in failed:
            print(f"error: {gpu}: its sweep ended early; run the command again", file=sys.stderr)
        raise typer.Exit(int(bool(failed)))
    rows = [row for setting in settings for row in report(setting, location)]
    for line in settings[0].accounting.lines(process_age_s(), rows):
        console.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    run(app, (ModelError,))
