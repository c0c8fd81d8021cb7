"""What all commands share: bad input is one clear line and exit code 2, nothing written."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from typer.exceptions import TyperException

from kernels.workload import WorkloadError
from profiler.device import DeviceError
from profiler.store import StoreError

Config = TypeVar("Config", bound=BaseModel)

EXIT_VERDICT_AGAINST = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class BadInput(ValueError):
    """Input that a person can mend; the message names the file and the key."""


def run(app: typer.Typer, errors: tuple[type[ValueError], ...] = ()) -> NoReturn:
    """Runs a command; ``errors`` and the suite's own input errors become one line and exit 2."""
    expected: tuple[type[Exception], ...] = (BadInput, WorkloadError, DeviceError, StoreError)
    try:
        code = app(standalone_mode=False)
    except expected + errors as error:
        _fail(str(error))
    except typer.Abort:
        code = EXIT_INTERRUPTED
    except TyperException as error:
        _fail(getattr(error, "format_message", error.__str__)())
    if code == EXIT_INTERRUPTED:  # typer makes it of a KeyboardInterrupt
        print("interrupted; run the same command again to go on", file=sys.stderr)
    raise SystemExit(code or 0)


def _fail(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT) from None


def one_line(message: object) -> str:
    """An error, or what it says, without line breaks."""
    return " ".join(str(message).split())


def explain(error: ValidationError) -> str:
    """The first problem of a failed validation as ``key: message``."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{more}"


def shipped(folder: Path) -> list[str]:
    """Names of the TOML files that ship in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load_config(name_or_path: str, folder: Path, model: type[Config]) -> tuple[str, Config]:
    """Loads a shipped configuration by name, or any TOML by path.

    Returns:
        Its name (the file's stem) and the validated configuration.

    Raises:
        BadInput: If there is none, it is no TOML, or a key is unknown or of a wrong type.
    """
    path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise BadInput(f"{name_or_path}: no such file; shipped: {', '.join(shipped(folder))}")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is no TOML: {error}") from error
    try:
        return path.stem, model.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error)}") from error


def output_folder(path: Path) -> Path:
    """Makes the folder for ``--out``.

    Raises:
        BadInput: If it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be written ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise BadInput(f"--out {path}: cannot be written (permission denied)")
    return path
