"""What a run folder holds, and which command makes what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from cost_models.advice_result import Advice
from cost_models.fit_result import FitResult
from cost_models.latency_table import LatencyTable
from profiler.command_line import BadInput, explain
from profiler.device import DeviceInfo
from profiler.store import Measurement, open_store
from reparam.ablation_results import AblationResults
from reparam.results import FinetuneResults
from reparam.scaling_result import Scaling
from reparam.versus_torch_result import VersusTorch

SWEEP, FIT, FINETUNE, ABLATE, ADVISE = (
    "python -m profiler.sweep",
    "python -m cost_models.fit",
    "python -m reparam.finetune",
    "python -m reparam.ablate",
    "python -m cost_models.advise",
)
EVALUATE = "python -m reparam.evaluate"

Content = TypeVar("Content")


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder; None for what is not there.

    Attributes:
        rows: Measurements.
        fit: How well the latency models do.
        results: What fine-tuning found.
        table: The latency table.
        ablation: What each replacement does, over several seeds; a run is whole without it.
        advice: What to convert, said without training; a run is whole without it.
        versus_torch: Whole models against PyTorch's best; a run is whole without it.
        scaling: How attention grows with its tokens; a run is whole without it.
    """

    path: Path
    rows: tuple[Measurement, ...] | None
    fit: FitResult | None
    results: FinetuneResults | None
    table: LatencyTable | None
    ablation: AblationResults | None = None
    advice: Advice | None = None
    versus_torch: VersusTorch | None = None
    scaling: Scaling | None = None

    @property
    def commands(self) -> dict[str, str]:
        """The command that makes each file, filled in for this folder."""
        folder, known = self.path, self._evaluated
        table = folder / "latency_table.json"
        # The shipped recipe trains a model of its own.
        recipe = "RECIPE.toml --data IMAGES" if known else "digits-quick"
        fit = f"{FIT} --store {folder / 'measurements.sqlite'} --out {folder}"
        return {
            "measurements.sqlite": f"{SWEEP}{f' --model {known}' if known else ''} --out {folder}",
            "latency_table.json": fit,
            "fit.json": fit,
            "results.json": f"{FINETUNE} --recipe {recipe} --latency-table {table} --out {folder}",
        }

    @property
    def more_commands(self) -> dict[str, str]:
        """The same for what a run is whole without; layers are rows of measurements.sqlite."""
        folder, model = self.path, self._evaluated or "MODEL"
        table = folder / "latency_table.json"
        return {
            "advice.json": f"{ADVISE} --model {model} --table {table} --out {folder}",
            "versus_torch.json": f"{EVALUATE} --model {model} --versus-torch --out {folder}",
            "scaling.json": f"{EVALUATE} --scaling --out {folder}",
            "layers": f"{EVALUATE} --predicted-versus-measured --table {table} --out {folder}",
            "ablation.json": f"{ABLATE} --latency-table {table} --out {folder}",
        }

    @property
    def _evaluated(self) -> str | None:
        """A timm model at its own sizes; a fine-tuned one may have its name and other sizes."""
        if self.versus_torch and self.versus_torch.comparisons:
            return self.versus_torch.comparisons[0].model
        return self.advice.model if self.advice else None

    @property
    def models(self) -> dict[str, str]:
        """The models that its files are about, the first that a file names first: name to file."""
        found = {}
        if self.results:
            found[self.results.model] = "results.json"
        if self.versus_torch:
            for one in self.versus_torch.comparisons:
                found.setdefault(one.model, "versus_torch.json")
        if self.advice:
            found.setdefault(self.advice.model, "advice.json")
        return found

    @property
    def missing(self) -> dict[str, str]:
        """The files that are not there, with the command that makes each."""
        present = {
            "measurements.sqlite": self.rows is not None,
            "latency_table.json": self.table is not None,
            "fit.json": self.fit is not None,
            "results.json": self.results is not None,
        }
        return {name: command for name, command in self.commands.items() if not present[name]}

    def absence(self, name: str) -> str:
        """What to say where a file is missing."""
        command = (self.commands | self.more_commands)[name]
        return f"{name} is missing. This makes it: {command}"

    @property
    def beside(self) -> tuple[AblationResults | VersusTorch | Scaling | Advice | None, ...]:
        """What a run is whole without."""
        return (self.versus_torch, self.ablation, self.scaling, self.advice)

    @property
    def device(self) -> DeviceInfo | None:
        """Who the verdict is about: the device of the results, else of most measurements."""
        if self.results:
            return self.results.device
        if self.rows:
            devices = [row.device for row in self.rows]
            counts: dict[str, int] = {}
            for device in devices:
                counts[device.fingerprint] = counts.get(device.fingerprint, 0) + 1
            return max(devices, key=lambda device: counts[device.fingerprint])
        return next((part.device for part in (self.fit, *self.beside) if part), None)


def _read(path: Path, load: Callable[[Path], Content]) -> Content | None:
    if not path.exists():
        return None
    try:
        return load(path)
    except ValidationError as error:
        raise BadInput(f"{path}: is none of ours: {explain(error)}") from error
    except (OSError, ValueError, SQLAlchemyError) as error:
        message = str(error).removeprefix(f"{path}: ")
        raise BadInput(f"{path}: cannot be read: {message}") from error


def _rows(path: Path) -> tuple[Measurement, ...]:
    with closing(open_store(path)) as store:
        return tuple(store.rows())


def rows_with_bursts(path: Path) -> tuple[Measurement, ...]:
    """The measurements of a run folder with their samples: what a comparison of runs needs.

    Raises:
        BadInput: If they are not readable.
    """

    def read(store_path: Path) -> tuple[Measurement, ...]:
        with closing(open_store(store_path)) as store:
            return tuple(store.rows(samples=True))

    return _read(path / "measurements.sqlite", read) or ()


def load_run(path: Path) -> RunFolder:
    """Reads what a run folder holds.

    Raises:
        BadInput: If it is no folder, holds none of our files, or one of them is not readable.
    """
    if not path.is_dir():
        raise BadInput(f"--run {path}: no such folder")
    run = RunFolder(
        path=path,
        rows=_read(path / "measurements.sqlite", _rows),
        fit=_read(path / "fit.json", FitResult.load),
        results=_read(path / "results.json", FinetuneResults.load),
        table=_read(path / "latency_table.json", LatencyTable.load),
        ablation=_read(path / "ablation.json", AblationResults.load),
        advice=_read(path / "advice.json", Advice.load),
        versus_torch=_read(path / "versus_torch.json", VersusTorch.load),
        scaling=_read(path / "scaling.json", Scaling.load),
    )
    if len(run.missing) == len(run.commands) and not any(run.beside):
        raise BadInput(f"--run {path}: holds none of {', '.join(run.commands)}")
    return run
