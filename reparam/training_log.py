"""training.csv: one row an epoch, of all stages of a run."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from profiler.whole_file import whole_file
from reparam.results import Epoch

COLUMNS = tuple(Epoch.model_fields)


def log_epochs(path: Path, stage: str, history: Iterable[Epoch]) -> None:
    """Writes the epochs of one stage where it had its rows, or at the end; others' rows stay.

    A figure that an epoch does not have is an empty cell.

    Args:
        path: The CSV; made where there is none.
        stage: Name of the stage.
        history: All of its epochs so far.
    """
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    stages = [row.get("stage") for row in rows]
    place = stages.index(stage) if stage in stages else len(rows)
    others = [row for row in rows if row.get("stage") != stage]
    rows = others[:place] + [entry.model_dump() for entry in history] + others[place:]
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
