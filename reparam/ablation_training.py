"""The trainings of an ablation side by side: each draw of data and seed in a process of its own.

Variants of one draw start from each other, draws from nothing; only what is measured must have the
machine for itself, and that comes afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from cost_models.latency_table import LatencyTable
from profiler.workers import end_with_parent
from reparam.ablation_unit import Study, Unit, finished, train_unit
from reparam.recipe import Recipe


def default_workers(recipe: Recipe) -> int:
    """As many trainings at once as have cores of their own."""
    return max(1, len(os.sched_getaffinity(0)) // recipe.threads)


def train_draws(study: Study, table: Path, units: Sequence[Unit], workers: int) -> None:
    """Trains what is not trained yet, some draws at a time; a single one is left to ``run_unit``.

    Args:
        study: What all units share.
        table: The file of its latency table.
        units: All of them; those of a draw are trained in this order.
        workers: Processes at most.
    """
    draws: dict[str, list[Unit]] = {}
    for unit in units:
        if finished(study, unit) is None:
            draws.setdefault(unit.draw, []).append(unit)
    workers = min(workers, len(draws))
    if workers < 2:
        return
    study.console.print(f"training {len(draws)} draws, {workers} at a time")
    work = partial(_train_draw, study.recipe, table, study.data, study.out)
    # They fork a process that has imported all and computed nothing: ten seconds once, not each.
    context = get_context("forkserver")
    context.set_forkserver_preload(["reparam.ablation_unit"])
    with context.Pool(workers, initializer=end_with_parent) as pool:
        for draw in pool.imap_unordered(work, draws.values()):
            study.console.print(f"{draw}: trained")


def _train_draw(
    recipe: Recipe, table: Path, data: Path | None, out: Path, units: Sequence[Unit]
) -> str:
    torch.set_num_threads(recipe.threads)
    # Bars of several processes would overwrite each other.
    quiet, console = Console(quiet=True), Console(stderr=True)
    study = Study(recipe, LatencyTable.load(table), data, out, quiet)
    for unit in units:
        train_unit(study, unit)
        console.print(f"{unit.name}: trained")
    return units[0].draw
