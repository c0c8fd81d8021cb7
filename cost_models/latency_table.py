"""LatencyTable: Workload -> latency and energy on one device, as versioned plain JSON.

The contract with training, reports and users. Loading one executes nothing and needs neither
torch nor scikit-learn.

    table = LatencyTable.load("latency_table.json")
    table.lookup(linear("shift_int8", m=784, k=128, n=1024)).latency_ms

Field by field: docs/latency-table.md and latency_table.schema.json.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cost_models.entry import EnergySource, Entry
from cost_models.fitted_model import STRICT, FittedModel
from cost_models.operation_energy import operation_energy
from cost_models.overheads import LayerOverhead
from cost_models.own_speeds import OwnSpeed
from cost_models.shipped_tables import shipped_path, shipped_tables
from kernels.workload import Workload
from profiler.device import DeviceInfo
from profiler.whole_file import write_whole

Source = Literal["measured", "predicted", "extrapolated"]

MODELLED_ENERGY = "45 nm operation and traffic counts, not this device"
DEVICE_ENERGY = "from the measured energies of this device"

# Answers kept: a router's loss asks for the same few shapes at each step.
_ANSWERS = 2**16
# A damaged or hostile archive must not fill the memory.
_MAX_BYTES = 2**28


class TableError(ValueError):
    """A table that cannot be read, or a question that it cannot answer."""


class Estimate(NamedTuple):
    """What a table knows of one workload.

    Attributes:
        latency_ms: Per launch: the measured median, or the predicted one.
        low_ms, high_ms: 90 % interval of a prediction; for a measured figure the 95 % confidence
            interval of its median.
        energy_mj: Per launch; None with ``energy_reason``.
        energy_source: ``measured`` on the device or ``modelled`` by operation counts.
        energy_reason: Why the energy is not a measured one; None if it is.
        source: ``measured`` (this very workload), ``predicted`` (inside the training shapes) or
            ``extrapolated`` (outside of them, with a wider interval).
        lowering: The implementation that the figures are of.
        on_shared_core: Whether what was measured, or most of what the model has learned from, is of
            a core that another guest of the host worked on as well: 1.2 to 1.8 times too slow.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    energy_mj: float | None
    energy_source: EnergySource | None
    energy_reason: str | None
    source: Source
    lowering: str
    on_shared_core: bool = False


class _Header(BaseModel):
    """What every version of the format has in common."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format: Literal["shiftadd-latency-table"]
    version: Literal[2]


class LatencyTable(BaseModel):
    """Measured latencies of one device, and models for the shapes between them.

    Attributes:
        device: Who was measured.
        created_at: When the table was fitted, ISO 8601.
        store: Name of the store that it was fitted on.
        entries: Measured workloads, each lowering once.
        models: One for each form and lowering that had enough rows.
        energy_models: Likewise, of energy in mJ, where enough rows have a measured one.
        overheads: What measured layers and models take beside their kernels; None without such.
        own_speeds: By form, how many times as fast as our int8 mult, in interleaved rounds.
    """

    model_config = STRICT

    format: Literal["shiftadd-latency-table"] = "shiftadd-latency-table"
    version: Literal[2] = 2
    device: DeviceInfo
    created_at: str
    store: str
    entries: tuple[Entry, ...]
    models: tuple[FittedModel, ...]
    energy_models: tuple[FittedModel, ...] = ()
    overheads: tuple[LayerOverhead, ...] | None = None
    # Left out where empty, so that tables without keep the hash that runs of before have noted.
    own_speeds: dict[str, OwnSpeed] = Field(default={}, exclude_if=lambda speeds: not speeds)

    @model_validator(mode="after")
    def _each_once(self) -> LatencyTable:
        if len(self._entries) != len(self.entries):
            raise ValueError("entries: a workload and lowering is given twice")
        if len(self._models) != len(self.models):
            raise ValueError("models: a form and lowering is given twice")
        return self

    @cached_property
    def _entries(self) -> dict[tuple[Workload, str], Entry]:
        return {(entry.workload, entry.lowering): entry for entry in self.entries}

    @cached_property
    def _models(self) -> dict[tuple[str, str], FittedModel]:
        return {(model.form, model.lowering): model for model in self.models}

    @cached_property
    def _known(self) -> dict[str, dict[str, bool]]:
        """Of each form, the lowerings in order, and which of them are baselines."""
        of_entries = {(e.workload.form, e.lowering): e.is_baseline for e in self.entries}
        of_models = {key: model.is_baseline for key, model in self._models.items()}
        known: dict[str, dict[str, bool]] = {}
        for (form, lowering), is_baseline in sorted((of_entries | of_models).items()):
            known.setdefault(form, {})[lowering] = is_baseline
        return known

    @cached_property
    def _own(self) -> dict[str, tuple[str, ...]]:
        """Of each form, the lowerings that are no baselines."""
        return {form: self.lowerings(form, baselines=False) for form in self._known}

    @cached_property
    def _answers(self) -> Callable[[Workload, str | None], Estimate]:
        return lru_cache(_ANSWERS)(self._answer)

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms that the table knows anything of."""
        return tuple(self._known)

    def lowerings(self, form: str, baselines: bool = True) -> tuple[str, ...]:
        """Lowerings of a form that the table knows anything of; none for an unknown form.

        Args:
            form: Name of a form.
            baselines: Whether to include other projects' implementations.
        """
        known = self._known.get(form, {})
        return tuple(name for name, is_baseline in known.items() if baselines or not is_baseline)

    def baselines(self, form: str) -> tuple[str, ...]:
        """Other projects' implementations of a form that the table knows anything of."""
        return tuple(name for name, is_baseline in self._known.get(form, {}).items() if is_baseline)

    @property
    def caution(self) -> str | None:
        """What to know before its latencies are taken for the device's; None if nothing."""
        shared = sum(entry.on_shared_core for entry in self.entries)
        if not shared:
            return None
        return (
            f"{shared} of {len(self.entries)} measured rows are of a core that another guest of the"
            " host worked on as well, and 1.2 to 1.8 times too slow; ratios suffer less. Measure"
            " again when the host is quieter"
        )

    def overhead(self, kind: str, lowering: str) -> LayerOverhead | None:
        """What layers or models take beside their kernels; None where none was measured.

        Args:
            kind: ``layer`` or ``model``.
            lowering: ``deployed``, ``torch``, …
        """
        for found in self.overheads or ():
            if (found.kind, found.lowering) == (kind, lowering):
                return found
        return None

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, equal for equal tables however their JSON is laid out."""
        known = self.model_dump(mode="json")
        content = json.dumps(known, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def lookup(
        self, workload: Workload, lowering: str | None = None, strict: bool = False
    ) -> Estimate:
        """Latency and energy of a workload.

        Args:
            workload: What is asked for.
            lowering: An implementation; None for the fastest of ours that the table can answer
                for. Extrapolations are then only considered where nothing better is known.
            strict: Whether to refuse a workload outside the training shapes.

        Raises:
            TableError: If the table has neither measured it nor a model of its form, the lowering
                is unknown, or ``strict`` refuses.
        """
        best = self._answers(workload, lowering)
        if strict and best.source == "extrapolated":
            raise TableError(
                f"{workload.label} lies outside the measured shapes of {best.lowering}; "
                "measure it with `python -m profiler.sweep`"
            )
        return best

    def _answer(self, workload: Workload, lowering: str | None) -> Estimate:
        form = workload.form
        known = self._known.get(form)
        if not known:
            raise TableError(
                f"form {form!r} is not in the latency table of {self.device.label}; measure it "
                f"with `python -m profiler.sweep` and run `python -m cost_models.fit`"
            )
        if lowering is not None and lowering not in known:
            raise TableError(
                f"form {form!r} has no lowering {lowering!r}; known: {', '.join(known)}"
            )
        asked = self._own[form] if lowering is None else (lowering,)
        if not asked:
            raise TableError(
                f"form {form!r} has only baselines ({', '.join(known)}); name one as the lowering, "
                "or measure ours with `python -m profiler.sweep`"
            )
        answers = (self._estimate(workload, form, name) for name in asked)
        found = [estimate for estimate in answers if estimate]
        if not found:
            raise TableError(
                f"{workload.label} was not measured, and no model of {' or '.join(asked)} "
                "applies to it; measure it with `python -m profiler.sweep`"
            )
        if len(found) == 1:
            return found[0]
        return min(found, key=lambda e: (e.source == "extrapolated", e.latency_ms))

    def _estimate(self, workload: Workload, form: str, lowering: str) -> Estimate | None:
        entry = self._entries.get((workload, lowering))
        if entry:
            return Estimate(
                latency_ms=entry.latency_ms,
                low_ms=entry.low_ms,
                high_ms=entry.high_ms,
                energy_mj=entry.energy_mj,
                energy_source=entry.energy_source,
                energy_reason=entry.energy_reason,
                source="measured",
                lowering=lowering,
                on_shared_core=entry.on_shared_core,
            )
        model = self._models.get((form, lowering))
        if model is None or not workload.is_canonical:
            return None
        try:
            prediction = model.predict(workload)
        except OverflowError as error:
            raise TableError(f"{workload.label}: the model of {lowering} overflows") from error
        if not (prediction.low_ms > 0 and math.isfinite(prediction.high_ms)):
            raise TableError(f"{workload.label}: the model of {lowering} gives no finite latency")
        energy_model = self._energy_models.get((form, lowering))
        if energy_model:
            energy_mj, origin = energy_model.predict(workload).latency_ms, DEVICE_ENERGY
        else:
            energy_mj, origin = operation_energy(workload).with_memory_mj, MODELLED_ENERGY
        return Estimate(
            latency_ms=prediction.latency_ms,
            low_ms=prediction.low_ms,
            high_ms=prediction.high_ms,
            energy_mj=energy_mj,
            energy_source="modelled",
            energy_reason=f"not measured at this shape; {origin}",
            source="extrapolated" if prediction.octaves_outside else "predicted",
            lowering=lowering,
            on_shared_core=(form, lowering) in self._learned_on_shared_cores,
        )

    @cached_property
    def _learned_on_shared_cores(self) -> set[tuple[str, str]]:
        """Kernels whose models have learned from such rows as they are.

        ``training_rows.group_rows`` leaves those out wherever a model can do without.
        """
        return {
            (entry.workload.form, entry.lowering)
            for entry in self.entries
            if entry.on_shared_core and entry.workload.is_canonical
        }

    @cached_property
    def _energy_models(self) -> dict[tuple[str, str], FittedModel]:
        return {(model.form, model.lowering): model for model in self.energy_models}

    def save(self, path: str | Path) -> None:
        """Writes the table; a reader sees the old file or the new one, never a part."""
        write_whole(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Reads a table.

        Args:
            path: A file, plain JSON or gzipped (``.gz``), or the name of a table that ships with
                the package; a file of that name goes first.

        Raises:
            TableError: If the file is missing, no JSON, of another format or version, or a key is
                missing, unknown, of a wrong type or out of range. One line names file and key.
        """
        content = _read(path)
        try:
            _Header.model_validate_json(content)
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "file"
            message = " ".join(first["msg"].removeprefix("Value error, ").split())
            raise TableError(f"{path}: {key}: {message}") from error


def _read(path: str | Path) -> bytes:
    file = Path(path)
    try:
        if not file.exists():
            file = shipped_path(str(path)) or file
        if file.suffix != ".gz":
            return file.read_bytes()
        with gzip.open(file) as archive:
            content = archive.read(_MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TableError(f"{path}: file: is no gzip archive ({error})") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        names = ", ".join(shipped_tables())
        raise TableError(f"{path}: cannot be read ({reason}); tables that ship: {names}") from error
    if len(content) > _MAX_BYTES:
        raise TableError(f"{path}: file: holds more than {_MAX_BYTES >> 20} MiB")
    return content
