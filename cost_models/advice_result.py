"""Schema of advice.json: which layers of a model to convert to what on a device, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from cost_models.break_even import BreakEven
from cost_models.latency_table import TableError
from cost_models.layer_cost import STRICT, Cost
from profiler.device import DeviceInfo
from profiler.whole_file import write_whole

Verdict = Literal["pays", "does not pay", "unknown"]
Rule = Literal["attention", "attention_linears", "mlp", "other"]


class Interval(BaseModel):
    """A figure and the ends between which it lies."""

    model_config = STRICT

    value: float
    low: float
    high: float


class Comparison(BaseModel):
    """How many times faster one is than another, and whether that is sure.

    Attributes:
        speed: Ratio of the latencies with the ratios of their ends; None if one is unknown.
        verdict: ``pays`` if the intervals lie apart in favour, ``does not pay`` if against.
        reason: Why it is unknown; None otherwise.
    """

    model_config = STRICT

    speed: Interval | None
    verdict: Verdict
    reason: str | None = None


class Decision(BaseModel):
    """What to do with one layer.

    Attributes:
        fqn, rule: The module and the rule of a conversion that it falls under.
        form: Form that it was considered in: the fastest of those that pay, or of all if none does,
            and among those that cannot be told from it the one of the fewest bytes. None if no
            form applies.
        verdict, reason: Against the strongest baseline; ``pays`` means: convert it to ``form``.
        original: The layer as it is, in the strongest baseline.
        converted: The layer in ``form``; None if no form applies.
        against_baseline: Speed of the converted over the original.
        against_own_mult: The same over our own bf16 or int8 multiplication, whichever is faster:
            what the shift itself brings. None where there is none, as for attention.
        against_same_product: The same over the baselines of the very product that replaces an
            attention. None for linears.
        break_even: For linears.
        fp32_weight_bytes: Stored parameters of the layer as it was trained.
        energy_saved_mj: By the same rule on both sides: measured if both are, else modelled.
        energy_source: Which of the two.
        note: What the comparison leaves out.
    """

    model_config = STRICT

    fqn: str
    rule: Rule
    form: str | None
    verdict: Verdict
    reason: str
    original: Cost
    converted: Cost | None
    against_baseline: Comparison
    against_own_mult: Comparison | None
    against_same_product: Comparison | None
    break_even: BreakEven | None
    fp32_weight_bytes: int
    energy_saved_mj: float | None
    energy_source: Literal["measured", "modelled"] | None
    note: str | None


class Totals(BaseModel):
    """What following the advice brings for the whole model, per batch.

    Attributes:
        layers, converted, unknown: Numbers of layers that could be converted, that are, and that
            the table cannot decide on.
        saved_ms: Sum over the converted layers; its ends add up, as if all erred together.
        original_ms: Of all layers whose baseline is known, converted or not; the rest of the model
            is not in it.
        uncounted: Layers that are not in ``original_ms``.
        energy_saved_mj, energy_source: Over the converted layers; None if one is unknown.
        fp32_weight_bytes, weight_bytes: Of all linears as they were trained, and as advised.
    """

    model_config = STRICT

    layers: int
    converted: int
    unknown: int
    saved_ms: Interval | None
    original_ms: Interval | None
    uncounted: int
    energy_saved_mj: float | None
    energy_source: Literal["measured", "modelled"] | None
    fp32_weight_bytes: int
    weight_bytes: int


class Advice(BaseModel):
    """The verdict on a model and a device, layer by layer.

    Attributes:
        model, batch: What was asked about.
        device, table, table_sha256: By whose figures; None without a table for the device.
        strict: Whether shapes outside of what was measured were refused.
        verdict, reason: On the model: ``pays`` if any layer does.
        decisions: Of every layer that a rule covers.
        totals: None without a table.
        measure: Commands that would turn what is unknown into figures.
        caution: What to know of the table before its latencies are taken for the device's.
    """

    model_config = STRICT

    format: Literal["shiftadd-advice"] = "shiftadd-advice"
    version: Literal[1] = 1
    model: str
    batch: int
    device: DeviceInfo | None
    table: str | None
    table_sha256: str | None
    strict: bool
    verdict: Verdict
    reason: str
    decisions: tuple[Decision, ...] = ()
    totals: Totals | None = None
    measure: tuple[str, ...] = ()
    caution: str | None = None

    @property
    def convert(self) -> dict[str, str]:
        """Form by qualified name of what to convert; empty: convert none."""
        return {one.fqn: one.form for one in self.decisions if one.verdict == "pays" and one.form}

    def allows(self, module: object, fqn: str) -> bool:
        """Whether a module, or a linear inside of it, is to be converted: a ``filter_fn``."""
        own = [one for one in self.decisions if one.fqn == fqn]
        inside = [one for one in self.decisions if one.fqn.startswith(f"{fqn}.")]
        # An attention holds its linears, but is converted on its own account.
        asked = own or inside
        return any(one.verdict == "pays" for one in asked)

    def save(self, path: Path) -> None:
        """Writes advice.json; a reader sees the old file or the new one."""
        write_whole(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Advice:
        """Reads advice.json.

        Raises:
            TableError: If it is missing, none of ours or of another version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise TableError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "file"
            raise TableError(f"{path}: {key}: {' '.join(first['msg'].split())}") from error
