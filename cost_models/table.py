"""Latency tables as files: what is in one, as CSV, against another, its schema, shipping one.

python -m cost_models.table show amd-zen4-avx512-2c-1t
python -m cost_models.table csv runs/quick/latency_table.json --out rows.csv
python -m cost_models.table diff runs/a/latency_table.json runs/b/latency_table.json
"""

from __future__ import annotations

import csv as csv_format
import gzip
import io
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cost_models import table_diff
from cost_models.latency_table import LatencyTable, TableError
from cost_models.shipped_rows import rows_path, rows_to_bytes, shipped_rows
from cost_models.shipped_tables import FOLDER, shipped_tables, table_name
from cost_models.training_rows import read_store, store_name
from profiler.command_line import BadInput, run
from profiler.whole_file import whole_file

app = typer.Typer(add_completion=False, help=__doc__)

Name = Annotated[str, typer.Argument(help="latency_table.json, or the name of one that ships.")]

COLUMNS = (
    "form",
    "product",
    "b",
    "m",
    "k",
    "n",
    "lowering",
    "is_baseline",
    "latency_ms",
    "low_ms",
    "high_ms",
    "weight_bytes",
    "energy_mj",
    "energy_source",
    "energy_reason",
    "on_shared_core",
    "device",
    "workload",
)


def to_csv(table: LatencyTable) -> str:
    """The measured rows, one a line; an empty cell is a figure that is missing.

    ``device`` is the fingerprint, ``workload`` the whole key as JSON. Models have no rows.
    """
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in table.entries:
        of_workload: dict[str, Any] = {
            "form": entry.workload.form,
            "product": entry.workload.product,
            "device": table.device.fingerprint,
            "workload": entry.workload.key,
        } | {size: getattr(entry.workload, size) for size in ("b", "m", "k", "n")}
        writer.writerow(
            of_workload[column] if column in of_workload else getattr(entry, column)
            for column in COLUMNS
        )
    return text.getvalue()


def schema() -> dict[str, Any]:
    """JSON schema of a table. What a model is made of may change and is left open."""
    found = LatencyTable.model_json_schema(mode="serialization")
    definitions: dict[str, Any] = found["$defs"]
    model = definitions["FittedModel"]
    described = ("form", "lowering", "is_baseline")
    open_model = {
        "description": "A latency model as plain numbers; only these fields are for others.",
        "type": "object",
        "title": "FittedModel",
        "properties": {name: model["properties"][name] for name in described},
        "required": list(described),
    }
    definitions["FittedModel"] = open_model
    return found | {"$defs": {name: definitions[name] for name in _named_in(found, definitions)}}


def _named_in(node: Any, definitions: dict[str, Any]) -> list[str]:
    """Definitions that a part of a schema refers to, directly or through others, in order."""
    found: dict[str, None] = {}
    todo = [{key: value for key, value in node.items() if key != "$defs"}]
    while todo:
        for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(todo.pop())):
            if name not in found:
                found[name] = None
                todo.append(definitions[name])
    return sorted(found)


@app.command()
def show(
    table: Annotated[
        str | None, typer.Argument(help="As above; without one, those that ship are listed.")
    ] = None,
) -> None:
    """Says whose table it is and what it knows."""
    if table is None:
        print("\n".join(shipped_tables()))
        return
    found = LatencyTable.load(table)
    console = Console()
    lines = (
        f"{found.device.label}, fingerprint {found.device.fingerprint}",
        f"fitted {found.created_at} on {found.store}, SHA-256 {found.sha256}",
        f"{len(found.entries)} measured rows, {len(found.models)} models",
        *([f"caution: {found.caution}"] if found.caution else []),
        *(f"{form}: {', '.join(found.lowerings(form))}" for form in found.forms),
        *(
            f"{form}: {own.mean:.2f}× as fast as our int8 mult in common rounds"
            f" ({own.least:.2f} to {own.most:.2f}, {own.products} products)"
            for form, own in found.own_speeds.items()
        ),
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def csv(
    table: Name,
    out: Annotated[Path | None, typer.Option(help="File; printed if not given.")] = None,
) -> None:
    """Writes the measured rows as CSV."""
    text = to_csv(LatencyTable.load(table))
    if out is None:
        print(text, end="")
    else:
        _write(out, text.encode())


@app.command()
def diff(
    first: Name,
    second: Name,
    threshold: Annotated[
        float, typer.Option(min=0, help="Relative difference below which nothing is called one.")
    ] = table_diff.THRESHOLD,
) -> None:
    """Says what is faster, slower, added or missing in the second table."""
    left, right = LatencyTable.load(first), LatencyTable.load(second)
    rows = table_diff.diff(left, right, threshold)
    console = Console()
    if any(row.change != "same" for row in rows):
        console.print(table_diff.diff_table(rows))
    for line in table_diff.summary(left, right, rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command(name="schema")
def print_schema() -> None:
    """Prints the JSON schema of the format."""
    print(json.dumps(schema(), indent=1))


@app.command()
def ship(
    table: Name,
    store: Annotated[
        str | None, typer.Option(help="The sweep it was fitted on, to ship beside it.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where to.")] = FOLDER,
) -> None:
    """Puts a table among those of the package; name it in shipped_tables.py then."""
    found = LatencyTable.load(table)
    name = table_name(found.device)
    if store is not None:
        rows = [r for r in read_store(store) if r.device.fingerprint == found.device.fingerprint]
        if not rows:
            raise BadInput(f"--store {store_name(store)}: no row is of {found.device.label}")
        _write(rows_path(name, folder), rows_to_bytes(rows))
    _ship(found, folder)
    print(f'"{name}": "{found.device.fingerprint}",')


@app.command()
def refit(
    folder: Annotated[Path, typer.Option(help="Where they ship.")] = FOLDER,
) -> None:
    """Fits every shipped table again from the rows behind it, as after a change of the models."""
    from cost_models.fit import fit  # scikit-learn, which no other command needs

    for name in shipped_tables():
        table, _ = fit(shipped_rows(name, folder), f"{name}.rows.jsonl.gz")
        _ship(table, folder)
        print(f"{name}: {len(table.entries)} measured rows, {len(table.models)} models")


def _ship(table: LatencyTable, folder: Path) -> None:
    content = json.dumps(table.model_dump(mode="json"), separators=(",", ":")).encode()
    # Without a time in the archive, equal tables are equal files.
    _write(folder / f"{table_name(table.device)}.json.gz", gzip.compress(content, mtime=0))


def _write(path: Path, content: bytes) -> None:
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run(app, (TableError,))
