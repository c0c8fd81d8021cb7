"""Tuning records: which schedule was the fastest, on what, measured when. JSON, a line each.

Records ship in ``kernels/tuned``, a file for each chip. Those of one's own machine are used where
the environment variable ``SHIFTADD_RECORDS`` names their file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from kernels.workload import Workload

SHIPPED = Path(__file__).parent / "tuned"
OWN_RECORDS = "SHIFTADD_RECORDS"
TVM_VERSION = metadata.version("apache-tvm")

# A schedule is trusted up to this many times more or fewer tokens than it was tuned for.
_BUCKET = 2.0


class RecordError(ValueError):
    """A file of records that this version cannot read; the message names file, line and key."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of tuning one workload with one lowering on one device.

    Attributes:
        family: ``Workload.family``: what the kernel was compiled for.
        tokens: ``Workload.tokens`` that it was timed with.
        lowering: A name in ``kernels.build.LOWERINGS``.
        chip: ``KernelTarget.chip``.
        threads: CPU threads; 0 for a GPU.
        schedule: The fastest schedule found; the default one where none was faster.
        latency_ms, default_latency_ms: That schedule's and the default one's, measured in turns.
        device: ``DeviceInfo.fingerprint``.
        tvm: Version of TVM: another one may compile the same schedule otherwise.
        created_at: ISO 8601, UTC.
    """

    family: Workload
    tokens: int
    lowering: str
    chip: str
    threads: int
    schedule: dict[str, int]
    latency_ms: float
    default_latency_ms: float
    device: str
    tvm: str
    created_at: str

    @property
    def key(self) -> tuple[Workload, int, str, str, int]:
        """What one record is kept of: a newer one takes its place."""
        return self.family, self.tokens, self.lowering, self.chip, self.threads

    @property
    def speedup(self) -> float:
        """How many times the default schedule's speed."""
        return self.default_latency_ms / self.latency_ms

    def to_line(self) -> str:
        """One line of JSON; ``from_line`` is its inverse."""
        values = asdict(self) | {"family": self.family.to_dict()}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Inverse of ``to_line``.

        Raises:
            ValueError: If the line is none of ours or of another version of TVM.
        """
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"is no JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError("is no record")
        for field in fields(cls):
            if field.name not in values:
                raise ValueError(f"{field.name}: is missing")
        for name, value in values.items():
            if name not in _IS_VALID:
                raise ValueError(f"{name}: is no field of a record")
            if not _IS_VALID[name](value):
                raise ValueError(f"{name}: {value!r} cannot be")
        if values["tvm"] != TVM_VERSION:
            raise ValueError(f"tvm: tuned with {values['tvm']}, this is {TVM_VERSION}")
        return cls(**values | {"family": Workload.from_dict(values["family"])})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_latency(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


_IS_VALID = {
    "family": lambda value: isinstance(value, dict),
    "tokens": lambda value: _is_whole(value, 1),
    "lowering": _is_text,
    "chip": _is_text,
    "threads": _is_whole,
    "schedule": lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
    "latency_ms": _is_latency,
    "default_latency_ms": _is_latency,
    "device": _is_text,
    "tvm": _is_text,
    "created_at": _is_text,
}


def load_records(path: Path) -> list[Record]:
    """All records of a file, one for each key: the last.

    Raises:
        RecordError: If it cannot be read, at the first line that is malformed or of another
            version of TVM.
    """
    found: dict[tuple, Record] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = Record.from_line(line)
        except ValueError as error:
            raise RecordError(f"{path}: line {number}: {error}") from error
        found[record.key] = record
    return list(found.values())


def append_record(path: Path, record: Record) -> None:
    """Adds a record as one write: an interruption leaves whole lines."""
    with path.open("a") as file:
        file.write(record.to_line() + "\n")


def known_records(chip: str) -> tuple[Record, ...]:
    """The records that ship for a chip and those that the environment names, which come last.

    A file that cannot be read is warned about, once: kernels are built without its records.
    """
    own = os.environ.get(OWN_RECORDS)
    shipped = SHIPPED / f"{chip}.jsonl"
    paths = [*([shipped] if shipped.is_file() else []), *([Path(own)] if own else [])]
    return tuple(record for path in paths for record in _load_or_warn(path))


@functools.cache
def _load_or_warn(path: Path) -> tuple[Record, ...]:
    try:
        return tuple(load_records(path))
    except RecordError as error:
        warnings.warn(f"tuning records ignored: {error}", stacklevel=2)
        return ()


def lookup(
    records: Iterable[Record], workload: Workload, lowering: str, chip: str, threads: int
) -> Record | None:
    """The record to build a workload with, if there is one.

    Chip, lowering and family must be the same; of those, the nearest number of tokens decides,
    then the nearest number of threads, then the later record. Beyond twice or half the tokens
    none applies. A workload equal to its family stands for any number of tokens: it takes the
    record of the most, where most time is spent.
    """
    same = [
        record
        for record in records
        if (record.family, record.lowering, record.chip) == (workload.family, lowering, chip)
    ]
    any_tokens = workload == workload.family

    def distance(record: Record) -> tuple[float, int]:
        tokens = -record.tokens if any_tokens else _ratio(record.tokens, workload.tokens)
        return tokens, abs(record.threads - threads)

    near = [r for r in same if any_tokens or _ratio(r.tokens, workload.tokens) <= _BUCKET]
    return min(reversed(near), key=distance, default=None)


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)
