"""One unit of an ablation: a variant trained with one seed, deployed, evaluated and measured."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable
from profiler.command_line import BadInput, output_folder
from profiler.device import cpu_info
from profiler.samples import TimingSettings
from reparam.ablation_results import AblationRow, AblationUnit
from reparam.ablation_variants import (
    ATTENTIONS,
    BASE_ATTENTION,
    ORIGINAL,
    VARIANTS,
    shift_share,
    title_of,
)
from reparam.accuracy import dispatch_shares, predict
from reparam.convert import reparameterize_
from reparam.data import folder_contents
from reparam.deploy import deploy, stored_bytes
from reparam.model_cost import measure_energies, measure_latencies
from reparam.model_energy import COVERS, modelled_energy_mj
from reparam.outcome import Candidate
from reparam.plan import planned
from reparam.recipe import Recipe
from reparam.results import Interval
from reparam.stages import (
    Run,
    check_budget,
    open_task,
    train_attention,
    train_original,
    train_variant,
)

TIMING = TimingSettings(max_time_s=2.0)


@dataclass(frozen=True)
class Study:
    """What all units of an ablation share.

    Attributes:
        data: Folder of images for a recipe that asks for one.
        out: Units go to its ``ablation`` folder.
        console: Where to say what is going on.
    """

    recipe: Recipe
    table: LatencyTable
    data: Path | None
    out: Path
    console: Console

    @cached_property
    def identity(self) -> dict[str, str]:
        """What every unit depends on: recipe, images and the device that it is measured on.

        Raises:
            BadInput: If the folder of images cannot be used.
        """
        device = cpu_info(self.recipe.threads).fingerprint
        found = {"recipe": self.recipe.sha256, "device": device}
        if self.data is None:
            return found
        return {**found, "data": str(self.data), "images": folder_contents(self.data)}


@dataclass(frozen=True)
class Unit:
    """One variant, trained with one seed."""

    variant: str
    seed: int
    fold: int | None = None

    @property
    def draw(self) -> str:
        """Name of the data's split and seed, which its variants share."""
        return f"seed{self.seed}" + ("" if self.fold is None else f"-fold{self.fold}")

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.variant}-{self.draw}"


def check_units(study: Study, units: list[Unit]) -> None:
    """Converts for each variant and asks the table for its experts, before time goes into training.

    Variants with a budget are timed as well: nothing else runs yet.

    Raises:
        ConversionError: If a variant cannot be made of the model.
        TableError: If the table cannot answer for an expert.
        BadInput: If a budget cannot be met, or a finished unit is of another run.
    """
    open_units = [unit for unit in units if finished(study, unit) is None]
    for name in dict.fromkeys(unit.variant for unit in open_units):
        run, model = _open(study, Unit(name, 0))
        converted = _untrained(run, name, model)
        if name in VARIANTS:
            check_budget(run, VARIANTS[name], converted)


def run_unit(study: Study, unit: Unit) -> AblationUnit:
    """Trains, deploys and measures one unit; one that is finished already is read.

    Raises:
        BadInput: If the unit that is there is of another run.
    """
    found = finished(study, unit)
    if found is not None:
        return found
    run, original, candidate = train_unit(study, unit)
    row, correct = _evaluated(study, run, unit, original, candidate)
    result = AblationUnit(identity=_identity(study, unit), row=row, correct=correct)
    result.save(_file(study, unit))
    return result


def train_unit(study: Study, unit: Unit) -> tuple[Run, Candidate, Candidate]:
    """The run, the original and the variant; what other units have trained is read."""
    run, model = _open(study, unit)
    output_folder(run.out)
    original = train_original(run, model)
    return run, original, _trained(run, unit.variant, original)


def _file(study: Study, unit: Unit) -> Path:
    return study.out / "ablation" / f"{unit.name}.json"


def _identity(study: Study, unit: Unit) -> dict[str, str]:
    if unit.variant in VARIANTS:
        # Nothing of the others is asked of the table.
        driven_by = {"latency_table": study.table.sha256}
        variant = VARIANTS[unit.variant].model_dump_json()
    else:
        driven_by = {}
        variant = str(ATTENTIONS.get(unit.variant, ORIGINAL))
    return {
        **study.identity,
        **driven_by,
        "variant": hashlib.sha256(variant.encode()).hexdigest(),
        "seed": str(unit.seed),
        "fold": json.dumps(unit.fold),
    }


def finished(study: Study, unit: Unit) -> AblationUnit | None:
    """A unit that is there already, None if it is not.

    Raises:
        BadInput: If it is of another run.
    """
    path = _file(study, unit)
    if not path.is_file():
        return None
    found, identity = AblationUnit.load(path), _identity(study, unit)
    for key in sorted(identity.keys() | found.identity.keys()):
        if found.identity.get(key) != identity.get(key):
            raise BadInput(
                f"{path}: {key}: is of another run; choose another --out or delete the file"
            )
    return found


def _open(study: Study, unit: Unit) -> tuple[Run, nn.Module]:
    model, task = open_task(study.recipe, study.data, unit.seed, unit.fold)
    example = next(iter(task.batches("test", study.recipe.deploy_batch, False)))[0]
    units = study.out / "ablation"
    folder = units / unit.draw
    run = Run(study.recipe, study.table, task, example, unit.seed, folder, study.console, units)
    return run, model


def _untrained(run: Run, name: str, model: nn.Module) -> nn.Module:
    """A copy of the original, converted and not trained."""
    model = copy.deepcopy(model)
    if name in ATTENTIONS:
        ATTENTIONS[name].convert_(model, run.recipe, _fitting_images(run))
    elif name in VARIANTS:
        ATTENTIONS[BASE_ATTENTION].convert_(model, run.recipe, _fitting_images(run))
        config = run.recipe.linears_config(VARIANTS[name])
        reparameterize_(model, config, run.recipe.allows(model))
    return model


def _fitting_images(run: Run) -> Tensor:
    """Training images that are the same at each call."""
    return next(iter(run.data.batches("train", len(run.example), False)))[0]


def _trained(run: Run, name: str, original: Candidate) -> Candidate:
    """The candidate of a variant; stages that other units have trained are read."""
    if name == ORIGINAL:
        return original
    attention = name if name in ATTENTIONS else BASE_ATTENTION
    chosen = ATTENTIONS[attention]
    stage1 = train_attention(
        run,
        original,
        attention,
        chosen.title,
        lambda model: chosen.convert_(model, run.recipe, _fitting_images(run)),
    )
    if name in ATTENTIONS:
        return stage1
    return train_variant(run, VARIANTS[name], stage1, original.model)


def _evaluated(
    study: Study, run: Run, unit: Unit, original: Candidate, candidate: Candidate
) -> tuple[AblationRow, list[bool]]:
    """Evaluates a candidate on the test set and measures it in turns with the original."""
    batch, is_original = len(run.example), candidate is original
    with dispatch_shares(candidate.model) as shares:
        guesses, labels = predict(candidate.model, run.data, "test", batch)
    final, final_guesses = candidate.model, guesses
    if not is_original:
        final = deploy(candidate.model)
        final_guesses, _ = predict(final, run.data, "test", batch)
    correct = final_guesses == labels

    timed = final if is_original else planned(final, run.example)
    models = {ORIGINAL: original.model, unit.variant: timed}
    timings = measure_latencies(models, run.example, TIMING)
    timing = timings[unit.variant]
    energy = measure_energies({unit.variant: timed}, run.example, cpu_info(study.recipe.threads))
    reading = energy[unit.variant]
    modelled_mj = modelled_energy_mj(candidate.model, run.example)
    variant, objective = VARIANTS.get(unit.variant), candidate.objective
    expected_ms = None
    if objective is not None and objective.curves is not None:
        expected_ms = objective.curves.expected_ms(shares)
    experts = dict((variant and variant.experts) or study.recipe.experts)
    row = AblationRow(
        variant=unit.variant,
        title=title_of(unit.variant),
        seed=unit.seed,
        fold=unit.fold,
        validation_top1=candidate.history[-1].validation_top1 if candidate.history else None,
        top1=_percent(guesses == labels),
        deployed_top1=None if is_original else _percent(correct),
        latency_ms=Interval.of_latency(timing),
        latency_ratio=None if is_original else Interval.of_ratio(timing, timings[ORIGINAL]),
        latency_reason=timing.reason,
        weight_bytes=stored_bytes(final),
        energy_mj=reading.energy_mj or modelled_mj,
        energy_source="measured" if reading.energy_mj else "modelled",
        energy_reason=None if reading.energy_mj else f"{COVERS}; not measured: {reading.reason}",
        shares=shares,
        shift_share=shift_share(shares, experts),
        latency_budget_ms=objective.budget_ms if objective else None,
        expected_latency_ms=expected_ms,
        seconds=sum(entry.seconds for entry in candidate.history),
    )
    return row, correct.tolist()


def _percent(correct: Tensor) -> float:
    return 100 * float(correct.float().mean())
