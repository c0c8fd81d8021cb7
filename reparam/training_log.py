"""training.csv: one row an epoch, of all stages of a run."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from profiler.whole_file import whole_file
from reparam.results import Epoch

COLUMNS = tuple(Epoch.model_fields)


def log_epochs(path: Path, stage: str, history: Iterable[Epoch]) -> None:
    """Writes the epochs of one stage in place of those that it had; other stages' rows stay.

    A figure that an epoch does not have is an empty cell.

    Args:
        path: The CSV; made where there is none.
        stage: Name of the stage.
        history: All of its epochs so far.
    """
    rows: list[dict[str, object]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("stage") != stage]
    rows += [entry.model_dump() for entry in history]
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
