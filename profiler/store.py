"""Measurement rows in a SQL database: the contract between the profiler and its readers."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from kernels.workload import Workload
from profiler.device import DeviceInfo
from profiler.measurement import Measurement, full_clock, row_key, subject_key
from profiler.samples import CLOCK_RATE

__all__ = [
    "CLOCK_RATE",
    "SCHEMA_VERSION",
    "Measurement",
    "Store",
    "StoreError",
    "create_store",
    "full_clock",
    "open_store",
    "row_key",
    "subject_key",
]

SCHEMA_VERSION = 2

_STATE_MARK = "-"


class StoreError(ValueError):
    """A store that is absent, foreign, damaged or of another version."""


_metadata = sa.MetaData()
_meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
# A device in each of the states that it was measured in: driver, clocks and software are not in its
# fingerprint, and change from one sweep to the next. The column holds "fingerprint-state", and just
# the fingerprint in stores of before, whose rows are all of the first state of their device.
_devices = sa.Table(
    "devices",
    _metadata,
    sa.Column("fingerprint", sa.String, key="device_id", primary_key=True),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("info", sa.JSON, nullable=False),
)

_SQL_TYPES = {str: sa.String, float: sa.Float, int: sa.Integer, bool: sa.Boolean}
_FRAME_TYPES = {str: "string", float: "float64", int: "Int64", bool: "boolean"}
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
    "noise_floor": float,
    "energy_mj": float,
    "energy_net_mj": float,
    "energy_window_s": float,
    "energy_source": str,
    "energy_reason": str,
    "weight_bytes": int,
    "peak_memory_bytes": int,
    "max_abs_error": float,
    "relative_error": float,
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
    sa.Column(
        "fingerprint",
        sa.String,
        sa.ForeignKey("devices.device_id"),
        key="device_id",
        nullable=False,
    ),
    sa.Column("workload", sa.JSON),
    sa.Column("details", sa.JSON, nullable=False),
    *(sa.Column(name, _SQL_TYPES[kind]) for name, kind in _PLAIN_COLUMNS.items()),
    *(sa.Column(name, _SQL_TYPES[kind]) for name, kind in _DERIVED_COLUMNS.items()),
)
# Beside the rows, so that reading these does not drag the samples along. Each blob is a zlib
# stream of little-endian float64; NaN stands for None.
_samples = sa.Table(
    "samples",
    _metadata,
    sa.Column("key", sa.String, sa.ForeignKey("measurements.key"), primary_key=True),
    sa.Column("samples_ms", sa.LargeBinary, nullable=False),
    sa.Column("bursts_ms", sa.LargeBinary, nullable=False),
)

# What a damaged database raises: SQLAlchemy's own errors, and those of converting its values.
_DAMAGE = (sa.exc.SQLAlchemyError, ValueError, TypeError, AttributeError)


class Store:
    """Measurements in a SQL database; SQLite in WAL mode unless a URL says otherwise."""

    def __init__(self, engine: sa.Engine, location: str) -> None:
        self._engine = engine
        self._location = location

    def put(self, *rows: Measurement) -> None:
        """Writes rows at once, samples included: all of them or, if interrupted, none.

        A row of the same key is replaced.

        Raises:
            StoreError: If the database cannot be written.
        """
        with _damage(self._location, "cannot be written"), self._engine.begin() as connection:
            _lock(connection)
            for row in rows:
                _write(connection, row)

    def finished_keys(self) -> set[str]:
        """Keys of rows with a figure, or too short for one: those are not measured again.

        Raises:
            StoreError: If the database cannot be read.
        """
        query = sa.select(_measurements.c.key).where(_measurements.c.status.in_(("ok", "skipped")))
        with _damage(self._location, "cannot be read"), self._engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def rows(self, samples: bool = False) -> Iterator[Measurement]:
        """All rows, oldest first.

        Args:
            samples: With their samples, which are most of the bytes and which few readers need.

        Raises:
            StoreError: If the database, or one of its rows, cannot be read.
        """
        query = sa.select(_measurements).order_by(_measurements.c.created_at, _measurements.c.key)
        if samples:
            blobs = (_samples.c.samples_ms, _samples.c.bursts_ms)
            query = query.outerjoin(_samples).add_columns(*blobs)
        with _damage(self._location, "cannot be read"), self._engine.connect() as connection:
            records = connection.execute(query).mappings().all()
            known = connection.execute(sa.select(_devices.c.device_id, _devices.c.info)).all()
        devices: dict[str, Any] = dict(known)
        for record in records:
            try:
                device = DeviceInfo.model_validate(devices[record[_measurements.c.device_id]])
                yield _row(record, device, samples)
            except (*_DAMAGE, KeyError, zlib.error) as error:
                raise StoreError(f"{self._location}: row {record['key']}: {error}") from error

    def frame(self) -> pd.DataFrame:
        """All rows as a table, one column a field, with the device's label and fingerprint.

        Raises:
            StoreError: If the database cannot be read.
        """
        query = sa.select(_measurements, _devices.c.label.label("device")).join(_devices)
        columns = (_PLAIN_COLUMNS | _DERIVED_COLUMNS).items()
        with _damage(self._location, "cannot be read"), self._engine.connect() as connection:
            result = connection.execute(query)
            frame = pd.DataFrame(result.all(), columns=list(result.keys()))
            frame["fingerprint"] = frame["fingerprint"].str.split(_STATE_MARK).str[0]
            # Else a column without any figure, such as energy, would have no type.
            return frame.astype({name: _FRAME_TYPES[kind] for name, kind in columns})

    def close(self) -> None:
        """Releases the database."""
        self._engine.dispose()


@contextmanager
def _damage(location: str, meaning: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except _DAMAGE as error:
        # Without the statement and the address of the manual that SQLAlchemy adds.
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        raise StoreError(f"{location}: {meaning} ({cause})") from error


def _device_id(device: DeviceInfo) -> str:
    facts = json.dumps(device.model_dump(), sort_keys=True)
    state = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return f"{device.fingerprint}{_STATE_MARK}{state}"


def _write(connection: sa.Connection, row: Measurement) -> None:
    device_id = _device_id(row.device)
    known = sa.select(_devices.c.device_id).where(_devices.c.device_id == device_id)
    if connection.execute(known).first() is None:
        info = row.device.model_dump()
        connection.execute(
            _devices.insert().values(device_id=device_id, label=row.device.label, info=info)
        )
    connection.execute(_samples.delete().where(_samples.c.key == row.key))
    connection.execute(_measurements.delete().where(_measurements.c.key == row.key))
    connection.execute(
        _measurements.insert().values(
            key=row.key,
            device_id=device_id,
            workload=row.workload.to_dict() if row.workload else None,
            details=dict(row.details),
            **{name: getattr(row, name) for name in _PLAIN_COLUMNS},
            **{name: getattr(row.workload, name, None) for name in _DERIVED_COLUMNS},
        )
    )
    if row.samples_ms or row.bursts_ms:
        connection.execute(
            _samples.insert().values(
                key=row.key,
                samples_ms=_compress(row.samples_ms),
                bursts_ms=_compress(row.bursts_ms),
            )
        )


def _row(record: Any, device: DeviceInfo, samples: bool) -> Measurement:
    workload = record["workload"]
    fields = {name: record[name] for name in _PLAIN_COLUMNS}
    if samples and record["samples_ms"] is not None:
        bursts_ms = _decompress(record["bursts_ms"])
        fields["samples_ms"] = _decompress(record["samples_ms"])
        fields["bursts_ms"] = [None if math.isnan(median) else median for median in bursts_ms]
    return Measurement(
        **fields,
        workload=Workload.from_dict(workload) if workload else None,
        device=device,
        details=record["details"],
    )


def _compress(values: Sequence[float | None]) -> bytes:
    return zlib.compress(np.array(values, dtype="<f8").tobytes())


def _decompress(blob: bytes) -> list[float]:
    return np.frombuffer(zlib.decompress(blob), dtype="<f8").tolist()


def _url(location: str) -> str | sa.URL:
    return location if "://" in location else sa.URL.create("sqlite", database=location)


def _engine(location: str) -> sa.Engine:
    try:
        engine = sa.create_engine(_url(location))
    except (sa.exc.SQLAlchemyError, ImportError, ValueError) as error:
        raise StoreError(f"{location}: names no database ({error})") from error
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
    with _damage(location, "is no measurement store"), engine.connect() as connection:
        version = connection.execute(
            sa.select(_meta.c.value).where(_meta.c.name == "schema_version")
        ).scalar()
    if version != str(SCHEMA_VERSION):
        raise StoreError(
            f"{location}: schema_version is {version}, this version reads {SCHEMA_VERSION}; "
            "measure into a new store"
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
    return Store(engine, location)


def create_store(location: str | Path) -> Store:
    """Opens a store, creating it where there is none.

    Raises:
        StoreError: If what is there is no store of ours, or nothing can be written there.
    """
    location = str(location)
    engine = _engine(location)
    with _damage(location, "cannot be written"):
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
    _check_version(engine, location)
    return Store(engine, location)
