"""Measurement rows in a SQL database: the contract between the profiler and its readers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pandas as pd
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kernels.workload import Workload
from profiler.device import DeviceInfo

SCHEMA_VERSION = 1


class StoreError(ValueError):
    """A store that is absent, foreign or of another version."""


class Measurement(BaseModel):
    """One measured figure, or the reason why there is none.

    Attributes:
        kind: ``primitive`` (one kernel), ``layer`` (an MoE or attention layer), ``model``.
        workload: For primitives; None for layers and models.
        subject: What was measured, in words: workload label, layer or model name.
        device: Who was measured.
        lowering: Which implementation: ``mult.tiled``, ``torch.fp32``, ``deployed``, ….
        is_baseline: True for an implementation of another project.
        cache: ``hot`` or ``cold``.
        latency_ms: Median of the kept samples, per launch.
        latency_low_ms, latency_high_ms: 95 % confidence interval of that median.
        latency_p10_ms, latency_p90_ms: Percentiles of the kept samples.
        samples_kept, samples_discarded: Clean and contaminated samples.
        stop_reason: Why sampling stopped: ``precision``, ``max_time``, ``contended``.
        energy_mj, energy_net_mj: Measured energy per launch, gross and above idle.
        energy_window_s: Total length of the energy windows.
        energy_source: ``nvml-counter``, ``nvml-power``, ``rapl``, ``replay``; None if unmeasured.
        energy_reason: Why energy is None.
        weight_bytes: Stored parameters.
        peak_memory_bytes: None where not tracked.
        max_abs_error: Against the float64 oracle, on fresh random inputs.
        status: ``ok``; ``contended``, ``failed`` or ``skipped`` have latency None and a reason.
        run: Name of the sweep that wrote the row.
        details: Further facts as plain JSON (model rows: batch size, share of tokens, …).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: Literal["primitive", "layer", "model"] = "primitive"
    workload: Workload | None = None
    subject: str
    device: DeviceInfo
    lowering: str
    is_baseline: bool = False
    cache: Literal["hot", "cold"] = "hot"
    latency_ms: float | None = Field(None, gt=0)
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_p10_ms: float | None = None
    latency_p90_ms: float | None = None
    samples_kept: int = 0
    samples_discarded: int = 0
    stop_reason: str | None = None
    energy_mj: float | None = Field(None, gt=0)
    energy_net_mj: float | None = None
    energy_window_s: float | None = None
    energy_source: str | None = None
    energy_reason: str | None = None
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None
    max_abs_error: float | None = None
    status: Literal["ok", "contended", "failed", "skipped"] = "ok"
    reason: str | None = None
    run: str = ""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    details: dict[str, str | float | int | bool | None] = {}

    @model_validator(mode="after")
    def _a_missing_figure_has_a_reason(self) -> Measurement:
        if (self.latency_ms is None) == (self.status == "ok"):
            raise ValueError("latency_ms is given exactly when status is ok")
        if self.status != "ok" and not self.reason:
            raise ValueError("a row that is not ok needs a reason")
        if self.energy_mj is None and not self.energy_reason:
            raise ValueError("energy_reason is needed where energy_mj is missing")
        return self

    @property
    def key(self) -> str:
        """Identity of the row: what was measured, how, on which device. Resume looks it up."""
        return row_key(
            self.workload.key if self.workload else f"{self.kind}:{self.subject}",
            self.lowering,
            self.cache,
            self.device.fingerprint,
        )


def row_key(subject_key: str, lowering: str, cache: str, fingerprint: str) -> str:
    """Content hash of a row's identity."""
    return hashlib.sha256(
        "|".join((subject_key, lowering, cache, fingerprint)).encode()
    ).hexdigest()[:24]


_metadata = sa.MetaData()
_meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
_devices = sa.Table(
    "devices",
    _metadata,
    sa.Column("fingerprint", sa.String, primary_key=True),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("info", sa.JSON, nullable=False),
)

_SQL_TYPES = {str: sa.String, float: sa.Float, int: sa.Integer, bool: sa.Boolean}
_PLAIN_COLUMNS: dict[str, type] = {
    "kind": str,
    "subject": str,
    "lowering": str,
    "is_baseline": bool,
    "cache": str,
    "latency_ms": float,
    "latency_low_ms": float,
    "latency_high_ms": float,
    "latency_p10_ms": float,
    "latency_p90_ms": float,
    "samples_kept": int,
    "samples_discarded": int,
    "stop_reason": str,
    "energy_mj": float,
    "energy_net_mj": float,
    "energy_window_s": float,
    "energy_source": str,
    "energy_reason": str,
    "weight_bytes": int,
    "peak_memory_bytes": int,
    "max_abs_error": float,
    "status": str,
    "reason": str,
    "run": str,
    "created_at": str,
}
# Written for whoever queries the database by hand; the workload column is what is read back.
_DERIVED_COLUMNS: dict[str, type] = {
    "form": str,
    "product": str,
    "primitive": str,
    "b": int,
    "m": int,
    "k": int,
    "n": int,
}
_measurements = sa.Table(
    "measurements",
    _metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, sa.ForeignKey("devices.fingerprint"), nullable=False),
    sa.Column("workload", sa.JSON),
    sa.Column("details", sa.JSON, nullable=False),
    *(sa.Column(name, _SQL_TYPES[kind]) for name, kind in _PLAIN_COLUMNS.items()),
    *(sa.Column(name, _SQL_TYPES[kind]) for name, kind in _DERIVED_COLUMNS.items()),
)


class Store:
    """Measurements in a SQL database; SQLite in WAL mode unless a URL says otherwise."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def put(self, row: Measurement) -> None:
        """Writes one row at once; a row of the same key is replaced."""
        values = {name: getattr(row, name) for name in _PLAIN_COLUMNS}
        values |= {name: getattr(row.workload, name, None) for name in _DERIVED_COLUMNS}
        values |= {
            "key": row.key,
            "fingerprint": row.device.fingerprint,
            "workload": row.workload.to_dict() if row.workload else None,
            "details": dict(row.details),
        }
        device = {
            "fingerprint": row.device.fingerprint,
            "label": row.device.label,
            "info": row.device.model_dump(),
        }
        with self._engine.begin() as connection:
            _lock(connection)
            known = connection.execute(
                sa.select(_devices.c.fingerprint).where(
                    _devices.c.fingerprint == device["fingerprint"]
                )
            ).first()
            if known is None:
                connection.execute(_devices.insert().values(device))
            connection.execute(_measurements.delete().where(_measurements.c.key == row.key))
            connection.execute(_measurements.insert().values(values))

    def finished_keys(self) -> set[str]:
        """Keys of the rows with a figure: what a resumed sweep need not measure again."""
        query = sa.select(_measurements.c.key).where(_measurements.c.status == "ok")
        with self._engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def rows(self) -> Iterator[Measurement]:
        """All rows, oldest first.

        Raises:
            StoreError: On a row that this version cannot read.
        """
        with self._engine.connect() as connection:
            devices = {
                fingerprint: DeviceInfo.model_validate(info)
                for fingerprint, info in connection.execute(
                    sa.select(_devices.c.fingerprint, _devices.c.info)
                )
            }
            query = sa.select(_measurements).order_by(
                _measurements.c.created_at, _measurements.c.key
            )
            for record in connection.execute(query).mappings():
                try:
                    workload = record["workload"]
                    yield Measurement(
                        **{name: record[name] for name in _PLAIN_COLUMNS},
                        workload=Workload.from_dict(workload) if workload else None,
                        device=devices[record["fingerprint"]],
                        details=record["details"],
                    )
                except (ValueError, KeyError, TypeError) as error:
                    raise StoreError(f"row {record['key']}: {error}") from error

    def frame(self) -> pd.DataFrame:
        """All rows as a table, one column a field, with the device's label and fingerprint."""
        query = sa.select(_measurements, _devices.c.label.label("device")).join(_devices)
        with self._engine.connect() as connection:
            return pd.read_sql(query, connection)

    def close(self) -> None:
        """Releases the database."""
        self._engine.dispose()


def _url(location: str) -> str:
    return location if "://" in location else f"sqlite:///{location}"


def _engine(location: str) -> sa.Engine:
    engine = sa.create_engine(_url(location))
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _pragmas(connection, _record) -> None:
            connection.execute("PRAGMA busy_timeout=30000")

    return engine


def _lock(connection: sa.Connection) -> None:
    """Makes the transaction a writer's from its first statement on: what it reads stays true."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_version(engine: sa.Engine, location: str) -> None:
    try:
        with engine.connect() as connection:
            version = connection.execute(
                sa.select(_meta.c.value).where(_meta.c.name == "schema_version")
            ).scalar()
    except sa.exc.DatabaseError as error:
        raise StoreError(f"{location}: is no measurement store ({error.orig})") from error
    if version != str(SCHEMA_VERSION):
        raise StoreError(
            f"{location}: schema_version is {version}, this version reads {SCHEMA_VERSION}"
        )


def open_store(location: str | Path) -> Store:
    """Opens an existing store for reading and writing.

    Args:
        location: Path of an SQLite file, or any SQLAlchemy URL.

    Raises:
        StoreError: If it does not exist, is no store of ours or has another schema version.
    """
    location = str(location)
    if "://" not in location and not Path(location).is_file():
        raise StoreError(f"{location}: no such store")
    engine = _engine(location)
    _check_version(engine, location)
    return Store(engine)


def create_store(location: str | Path) -> Store:
    """Opens a store, creating it where there is none.

    Raises:
        StoreError: If what is there is no store of ours, or nothing can be written there.
    """
    location = str(location)
    engine = _engine(location)
    try:
        with engine.begin() as connection:
            _lock(connection)
            is_new = not sa.inspect(connection).get_table_names()
            if is_new:
                _metadata.create_all(connection)
                connection.execute(
                    _meta.insert().values(name="schema_version", value=str(SCHEMA_VERSION))
                )
        if is_new and engine.dialect.name == "sqlite":
            # Stays with the file. Never asked of a file that is not ours: it would rewrite it.
            # Another writer may be at work already; the store is as safe without, only slower.
            with engine.connect() as connection, suppress(sa.exc.OperationalError):
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    except sa.exc.SQLAlchemyError as error:
        raise StoreError(f"{location}: cannot be written ({error})") from error
    _check_version(engine, location)
    return Store(engine)
