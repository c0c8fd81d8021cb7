"""Measurements for other tools: all rows as Parquet or CSV, whole models in timm's columns.

python -m profiler.export --store runs/quick/measurements.sqlite --to rows.parquet
python -m profiler.export --store runs/quick/measurements.sqlite --timm results.csv
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from profiler.command_line import BadInput, output_folder, run
from profiler.measurement import Measurement
from profiler.store import open_store
from profiler.whole_file import whole_file

# Of timm's benchmark.py. Step time is in ms, parameters in millions; the fastest comes first.
TIMM_COLUMNS = {
    "model": "string",
    "infer_samples_per_sec": "float64",
    "infer_step_time": "float64",
    "infer_batch_size": "Int64",
    "infer_img_size": "Int64",
    "param_count": "float64",
}
_ORIGINAL, _TORCH = "original", "torch"

WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
}

app = typer.Typer(add_completion=False)


def flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with their JSON columns, ``workload`` and ``details``, as text."""
    return frame.assign(
        **{
            name: frame[name].map(
                lambda value: json.dumps(value, sort_keys=True), na_action="ignore"
            )
            for name in ("workload", "details")
        }
    )


def timm_rows(rows: Sequence[Measurement]) -> pd.DataFrame:
    """The whole models among some rows in TIMM_COLUMNS; what a row does not say is empty.

    The original carries timm's name, a reparameterised form that name, a dot and its own.
    """
    found = []
    for row in rows:
        if row.kind != "model" or row.latency_ms is None:
            continue
        name = str(row.details.get("model") or row.subject)
        batch, image_size, parameters = (
            _number(row.details.get(fact)) for fact in ("batch", "image_size", "parameters")
        )
        # reparam.evaluate names its rows by model and batch, and tells forms by their lowering.
        own = row.lowering if row.subject.startswith(f"{name}, ") else row.subject
        found.append(
            {
                "model": name if own in (_ORIGINAL, name, _TORCH) else f"{name}.{own}",
                "infer_samples_per_sec": batch and round(batch / row.latency_ms * 1e3, 2),
                "infer_step_time": round(row.latency_ms, 3),
                "infer_batch_size": batch,
                "infer_img_size": image_size,
                "param_count": parameters and round(parameters / 1e6, 2),
            }
        )
    frame = pd.DataFrame(found, columns=list(TIMM_COLUMNS))
    return frame.astype(TIMM_COLUMNS).sort_values("infer_samples_per_sec", ascending=False)


def _number(fact: object) -> float | None:
    return fact if isinstance(fact, int | float) and fact > 0 else None


def write(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table in the format of the file's name, whole or not at all.

    Raises:
        BadInput: If it cannot be written.
    """
    output_folder(path.parent)
    try:
        with whole_file(path) as part:
            WRITERS[path.suffix](frame, part)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error


@app.command(help=__doc__)
def main(
    store: Annotated[str, typer.Option(help="Measurements: file or SQL URL.")],
    to: Annotated[Path | None, typer.Option(help="All rows: a .parquet or .csv file.")] = None,
    timm: Annotated[Path | None, typer.Option(help="Whole models, timm's columns: .csv.")] = None,
) -> None:
    """Reads, then writes."""
    if to is None and timm is None:
        raise BadInput("--to or --timm: give at least one of them")
    if to is not None and to.suffix not in WRITERS:
        raise BadInput(f"--to {to}: must end in {' or '.join(WRITERS)}")
    if timm is not None and timm.suffix != ".csv":
        raise BadInput(f"--timm {timm}: must end in .csv")
    with closing(open_store(store)) as opened:
        rows = list(opened.rows())
        frame = flat(opened.frame())
    models = timm_rows(rows)
    if timm is not None and models.empty:
        raise BadInput(f"{store}: has no rows of whole models; reparam.finetune writes them")
    if to is not None:
        write(frame, to)
        print(f"{len(frame)} rows → {to}")
    if timm is not None:
        write(models, timm)
        print(f"{len(models)} models → {timm}")


if __name__ == "__main__":
    run(app)
