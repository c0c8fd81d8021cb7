"""Rows of the sweeps behind the shipped tables: one JSON a line, gzipped, without raw samples.

From these a shipped table can be fitted again, by ``python -m cost_models.table refit``.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from cost_models.latency_table import TableError
from cost_models.shipped_tables import FOLDER, shipped_tables
from profiler.command_line import explain
from profiler.store import Measurement

_BULKY = {"samples_ms", "bursts_ms"}


def rows_path(name: str, folder: Path = FOLDER) -> Path:
    """File of the rows behind a table."""
    return folder / f"{name}.rows.jsonl.gz"


def rows_to_bytes(rows: Iterable[Measurement]) -> bytes:
    """The content of such a file; equal rows are equal files."""
    text = "".join(
        row.model_dump_json(exclude=_BULKY, exclude_defaults=True) + "\n" for row in rows
    )
    return gzip.compress(text.encode(), mtime=0)


def shipped_rows(name: str, folder: Path = FOLDER) -> list[Measurement]:
    """The measurements behind a shipped table.

    Args:
        name: Of the table.
        folder: Where they ship.

    Raises:
        TableError: If none ship under that name, or the file is damaged; it then names the line.
    """
    path = rows_path(name, folder)
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TableError(f"{path}: is no gzip archive ({error})") from error
    except OSError as error:
        names = ", ".join(shipped_tables())
        raise TableError(f"{name}: no rows ship under this name; known: {names}") from error
    return [_row(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, where: str) -> Measurement:
    try:
        return Measurement.model_validate_json(line)
    except ValidationError as error:
        raise TableError(f"{where}: {explain(error)}") from error
