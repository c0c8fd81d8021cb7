"""Recipe: what a fine-tuning run does, as a frozen model of its TOML."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import nn

from kernels.forms import FORMS
from profiler.command_line import BadInput, load_config, one_line
from reparam.conversion_rules import AddForm, LinearForm, MultForm, ReparamConfig, ShiftForm
from reparam.convert import FilterFn
from reparam.latency_curves import Schedule
from reparam.shift import ShiftVariant

RECIPES = Path(__file__).parent / "recipes"

# Of whole weights in 8 bits or fewer, those that the latency table's device multiplies fastest.
MULT_FASTEST = "mult_fastest"

ExpertForm = ShiftForm | MultForm | AddForm | Literal["mult_fastest"]


def _named_by_primitive(experts: dict[str, ExpertForm]) -> dict[str, ExpertForm]:
    # Results and reports know an expert by its name alone.
    for name, form in experts.items():
        primitive = "mult" if form == MULT_FASTEST else FORMS[form]["primitive"]
        if not re.fullmatch(rf"{primitive}\w*", name):
            raise ValueError(f"{name!r} is {form}: its name must begin with {primitive!r}")
    return experts


Experts = Annotated[dict[str, ExpertForm], Field(min_length=2), AfterValidator(_named_by_primitive)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Plain = bool | int | float | str


class ModelSettings(_Strict):
    """Which timm model.

    Attributes:
        name: Name for ``timm.create_model``.
        pretrained: Whether timm's trained weights are loaded.
        kwargs: Passed on to ``timm.create_model``, such as ``img_size``, or a
            ``pretrained_cfg_overlay`` that names a file of weights.
    """

    name: str
    pretrained: bool = False
    kwargs: dict[str, _Plain | dict[str, _Plain]] = {}


class Stage(_Strict):
    """One stage of training: AdamW, linear warm-up, then a cosine to zero.

    Attributes:
        lr: Peak learning rate.
        gradient_clip: Largest norm of the gradient; None for no limit.
        mixup, cutmix: Parameter α of each; 0 switches it off.
        distillation: Part of the loss that asks for the original model's class probabilities
            rather than for the labels; has no effect on the original itself.
        refit_hashing_epochs: Every how many epochs kernelised hash functions are fitted to the
            queries and keys of the moment; 0 for never.
        precision: ``bf16`` trains under autocast, with weights and sums in fp32.
    """

    epochs: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    gradient_clip: PositiveFloat | None = None
    label_smoothing: Share = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    refit_hashing_epochs: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"


_OF_ROUTERS = ("latency_loss_weight", "latency_loss", "schedule", "experts", "moe_granularity")


class Variant(_Strict):
    """One outcome of stage 2, trained from the same weights of stage 1.

    Attributes:
        name: Name in results.json and of the weights' file.
        title: The same for people.
        attention_linears: Form of the linears around the attention.
        mlp: Form of the MLPs' linears, or ``moe``.
        experts: Form of each expert in place of the recipe's.
        moe_granularity: Whether an MLP is one MoE, or each of its linears.
        shift_bits: Bits of a shift weight; None for all that its form stores.
        latency_loss_weight: Weight of the routers' loss; 0 trains without it.
        latency_loss: ``balance``: the paper's, at whose minimum all experts take equally long;
            ``balance_dispatched``: the same of the dispatch as deployed, without the router's
            noise; ``expected``: the layers' latency at the dispatch of the moment.
        schedule: Whether experts run one after the other or at once, for the expected latency.
        latency_budget_ms: Most that the model shall take on the CPU of the latency table; by the
            table alone, or of its kernels alone where no models were measured for it, if that is
            another device. None to have the latency as low as it can be.
        latency_budget_share: The same for a device not known yet: 0 is the fastest dispatch of
            that model, 1 the slowest.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    title: str
    attention_linears: LinearForm = "keep"
    mlp: LinearForm | Literal["moe"] = "keep"
    experts: Experts | None = None
    moe_granularity: Literal["mlp", "linear"] = "mlp"
    shift_bits: Annotated[int, Field(ge=3, le=8)] | None = None
    latency_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    latency_loss: Literal["balance", "balance_dispatched", "expected"] = "balance"
    schedule: Schedule = "sequential"
    latency_budget_ms: PositiveFloat | None = None
    latency_budget_share: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Variant:
        if self.mlp != "moe":
            for name in _OF_ROUTERS:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: {self.name} has no router, its mlp is {self.mlp!r}")
        if self.latency_loss != "balance" and not self.latency_loss_weight:
            raise ValueError(f"latency_loss: {self.name} has no latency_loss_weight")
        if self.schedule != "sequential" and self.latency_loss != "expected":
            raise ValueError(f"schedule: {self.name} needs latency_loss = 'expected'")
        budgets = (self.latency_budget_ms, self.latency_budget_share)
        if budgets.count(None) == 0:
            raise ValueError("latency_budget_ms and latency_budget_share: only one can hold")
        is_expected = self.latency_loss_weight and self.latency_loss == "expected"
        if budgets.count(None) == 1 and not is_expected:
            raise ValueError(
                "latency_budget: needs latency_loss = 'expected' and a latency_loss_weight"
            )
        return self

    @property
    def has_budget(self) -> bool:
        """Whether its routers are to keep to a latency."""
        return self.latency_budget_ms is not None or self.latency_budget_share is not None


class Recipe(_Strict):
    """A fine-tuning run.

    Attributes:
        data: ``digits``; ``pairs``: which of three digits is there twice; ``pixels``: 1,024 tokens
            of one pixel each; or ``folder`` for the one named by ``--data``.
        deploy_batch: Batch of the deployed model, for which the router's latencies hold.
        threads: CPU threads of the deployed model, and of training on the CPU: a model small
            enough for that gains little by more, and loses much on a machine that is not alone.
        pretrain: Training of the original; None with pre-trained weights.
        stage1, stage2: After the attention, and after linears and MLPs were replaced.
        attention: What stage 1 makes of it: ``add``, or ``quadratic``, which keeps position biases
            and window masks (swin).
        drop_bias: Whether ``add`` may drop those.
        alphabet: Binary alphabet of queries and keys.
        experts: Form of each expert of an MoE, by a name that begins with what it computes with
            (``mult``, ``shift``); ``mult_fastest`` is mult_int8, or mult_int7 on a device that
            multiplies it faster.
        shift_variant: How shift weights are trained (DeepShift-Q or -PS).
        keep: Patterns of modules that stay as they are (``stages.3.*``).
        variants: Outcomes of stage 2, the one that counts last.
    """

    data: Literal["digits", "pairs", "pixels", "folder"]
    deploy_batch: PositiveInt
    threads: PositiveInt
    model: ModelSettings
    pretrain: Stage | None = None
    stage1: Stage
    stage2: Stage
    attention: Literal["add", "quadratic"] = "add"
    drop_bias: bool = False
    alphabet: Literal["pm1", "01"] = "pm1"
    experts: Experts = {
        "mult": "mult_int8",
        "shift": "shift_int8",
    }
    shift_variant: ShiftVariant = "Q"
    keep: Annotated[tuple[str, ...], Field(strict=False)] = ()
    variants: Annotated[tuple[Variant, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = ["original", "stage1", *(variant.name for variant in self.variants)]
        if len(set(names)) < len(names):
            raise ValueError("variants: names must differ from each other, original and stage1")
        if self.pretrain is None and not self.model.pretrained:
            raise ValueError("pretrain: is needed for a model without pre-trained weights")
        for name in ("pretrain", "stage2"):
            stage = getattr(self, name)
            if stage is not None and stage.refit_hashing_epochs:
                raise ValueError(
                    f"{name}.refit_hashing_epochs: hash functions are fitted in stage1 alone"
                )
        channels, expected = self.model.kwargs.get("in_chans", 3), 3 if self.data == "folder" else 1
        if channels != expected:
            raise ValueError(
                f"model.kwargs.in_chans: is {channels}, images of {self.data} have {expected}"
            )
        return self

    @property
    def asks_for_fastest(self) -> bool:
        """Whether an expert's form is still to be chosen for a device."""
        every = (self.experts, *(variant.experts or {} for variant in self.variants))
        return any(MULT_FASTEST in experts.values() for experts in every)

    @property
    def attention_config(self) -> ReparamConfig:
        """What stage 1 replaces."""
        return ReparamConfig(
            attention=self.attention, drop_bias=self.drop_bias, alphabet=self.alphabet
        )

    def linears_config(self, variant: Variant) -> ReparamConfig:
        """What stage 2 replaces in a variant."""
        return ReparamConfig(
            attention_linears=variant.attention_linears,
            mlp=variant.mlp,
            experts=dict(variant.experts or self.experts),
            moe_granularity=variant.moe_granularity,
            shift_variant=self.shift_variant,
            shift_bits=variant.shift_bits,
        )

    def allows(self, model: nn.Module) -> FilterFn:
        """The filter that leaves what matches ``keep`` as it is.

        Raises:
            BadInput: If a pattern matches no module of the model.
        """
        names = [fqn for fqn, _ in model.named_modules()]
        for pattern in self.keep:
            if not fnmatch.filter(names, pattern):
                raise BadInput(f"recipe: keep: {pattern!r} matches no module of {self.model.name}")
        return lambda _, fqn: not any(fnmatch.fnmatch(fqn, pattern) for pattern in self.keep)

    @property
    def sha256(self) -> str:
        """Content hash: equal for equal settings."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_recipe(name_or_path: str) -> tuple[str, Recipe]:
    """Loads a shipped recipe by name, or a TOML by path.

    Returns:
        Its name and the recipe.

    Raises:
        BadInput: If there is none, or a key is unknown or of a wrong type.
    """
    return load_config(name_or_path, RECIPES, Recipe)


def create_model(settings: ModelSettings, classes: int | None = None) -> nn.Module:
    """Creates a timm model.

    Args:
        settings: Which one.
        classes: Outputs of the head; None for the model's own.

    Raises:
        BadInput: If timm does not know it, refuses a keyword or cannot fetch the weights.
    """
    overlay = settings.kwargs.get("pretrained_cfg_overlay")
    file = overlay.get("file") if isinstance(overlay, dict) else None
    if settings.pretrained and file is not None and not Path(str(file)).is_file():
        raise BadInput(f"recipe: model.kwargs.pretrained_cfg_overlay.file: {file}: no such file")
    kwargs: dict[str, Any] = dict(settings.kwargs)
    if classes is not None:
        kwargs["num_classes"] = classes
    try:
        return timm.create_model(settings.name, pretrained=settings.pretrained, **kwargs)
    except Exception as error:  # whatever a model's class raises on keywords and weights
        reason = ": ".join(filter(None, (type(error).__name__, one_line(error))))
        raise BadInput(f"recipe: model {settings.name}: {reason}") from error
