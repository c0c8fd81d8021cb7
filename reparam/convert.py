"""reparameterize_: replaces the multiplications of a timm model by adds and shifts, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from reparam.add_attention import (
    AddAttention,
    dropped_parts,
    is_softmax_attention,
    refusal,
)
from reparam.moe import MoEMlp, linear_in_form
from reparam.mult import MULT_FORMS
from reparam.shift import SHIFT_FORMS, ShiftVariant

FilterFn = Callable[[nn.Module, str], bool]
ShiftForm = Literal["shift_fp32", "shift_int8", "shift_int4"]

ATTENTION_LINEARS = ("qkv", "q", "kv", "proj")
MLP_LINEARS = ("fc1", "fc2")
# An MLP of these alone treats each token by itself, and can be an expert as a whole.
_TOKEN_WISE = {"fc1", "act", "drop1", "norm", "fc2", "drop2"}


class ConversionError(ValueError):
    """A conversion that cannot be done as asked; the model is left as it was."""


def _trainable_form(form: str) -> str:
    if form not in MULT_FORMS + SHIFT_FORMS:
        raise ValueError(f"{form!r} is not one of {', '.join(MULT_FORMS + SHIFT_FORMS)}")
    return form


class ReparamConfig(BaseModel):
    """What to replace by what. Stage 1 replaces the attention, stage 2 the linears.

    Attributes:
        attention: ``add`` makes softmax attention linear, with binary queries and keys.
        alphabet: Binary alphabet of their codes.
        attention_linears: Form of the linears around the attention, of either kind.
        mlp: Form of the MLPs' linears, or ``moe`` for experts of different forms.
        experts: Form of each expert by name, at least two.
        shift_variant: How shift weights are trained, DeepShift-Q or -PS.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["keep", "add"] = "keep"
    alphabet: Literal["pm1", "01"] = "pm1"
    attention_linears: Literal["keep"] | ShiftForm = "keep"
    mlp: Literal["keep", "moe"] | ShiftForm = "keep"
    experts: Annotated[
        dict[str, Annotated[str, AfterValidator(_trainable_form)]], Field(min_length=2)
    ] = {"mult": "mult_int8", "shift": "shift_int8"}
    shift_variant: ShiftVariant = "Q"


@dataclass(frozen=True)
class Conversion:
    """What ``reparameterize_`` did.

    Attributes:
        converted: What each replaced module became, by qualified name.
        skipped: Why each candidate that stayed did, by qualified name.
    """

    converted: dict[str, str]
    skipped: dict[str, str]


def reparameterize_(
    model: nn.Module, config: ReparamConfig, filter_fn: FilterFn | None = None
) -> Conversion:
    """Replaces attentions, their linears and MLPs of a timm model, in place.

    Modules are found by their structure: an attention has ``num_heads``, ``proj`` and ``qkv``, or
    ``q`` and ``kv``; an MLP has ``fc1`` and ``fc2``. The classifier head and the patch embedding
    are never touched, nor is a router. In an MLP with a convolution between its linears each
    linear becomes an MoE of its own. A second call goes on from what the first one made; what
    already is as asked is skipped.

    Args:
        model: A timm model.
        config: What to replace by what.
        filter_fn: ``filter_fn(module, fqn)`` is False for what shall stay. It is asked for each
            attention, each linear of an attention and each MLP, and for each linear of an MLP
            that is converted one by one.

    Raises:
        ConversionError: If nothing was asked, a rule matched nothing, or the model is none of
            timm's. The model is unchanged then.
    """
    plan = _Plan(config, filter_fn or (lambda module, fqn: True))
    wanted = [rule for rule in _RULES if getattr(config, rule) != "keep"]
    if not wanted:
        raise ConversionError("attention, attention_linears and mlp all say keep: nothing to do")
    for fqn, module in _candidates(model, plan.skipped):
        if hasattr(module, "fc1") or isinstance(module, MoEMlp):
            plan.mlp(fqn, module)
        else:
            plan.attention_linears(fqn, plan.attention(fqn, module))
    for rule in wanted:
        if rule not in plan.matched:
            raise ConversionError(
                f"{rule}: {getattr(config, rule)!r} matched nothing in"
                f" {type(model).__name__}{_hint(plan.skipped)}"
            )
    for fqn, replacement in plan.replacements.items():
        model.set_submodule(fqn, replacement)
    return Conversion(plan.converted, plan.skipped)


_RULES = ("attention", "attention_linears", "mlp")


@dataclass
class _Plan:
    """Replacements to make, in the order in which they have to be made."""

    config: ReparamConfig
    allows: FilterFn
    replacements: dict[str, nn.Module] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)

    def replace(self, rule: str, fqn: str, replacement: nn.Module, what: str) -> None:
        self.replacements[fqn] = replacement
        self.converted[fqn] = what
        self.matched.add(rule)

    def already(self, rule: str, fqn: str, what: str) -> None:
        self.skipped[fqn] = f"is {what} already"
        self.matched.add(rule)

    def attention(self, fqn: str, module: nn.Module) -> nn.Module:
        """Plans one attention; returns what will stand there."""
        if self.config.attention == "keep":
            return module
        alphabet = self.config.alphabet
        if isinstance(module, AddAttention):
            if module.alphabet == alphabet:
                self.already("attention", fqn, f"add attention ({alphabet})")
            else:
                self.skipped[fqn] = f"is add attention with codes {module.alphabet}"
            return module
        if not self.allows(module, fqn):
            self.skipped[fqn] = "rejected by filter_fn"
            return module
        if reason := refusal(module):
            self.skipped[fqn] = reason
            return module
        dropped = dropped_parts(module)
        without = f", without spatial reduction ({', '.join(dropped)})" if dropped else ""
        new = AddAttention.from_attention(module, alphabet)
        self.replace("attention", fqn, new, f"add attention ({alphabet}){without}")
        return new

    def attention_linears(self, fqn: str, attention: nn.Module) -> None:
        """Plans the linears of one attention."""
        if self.config.attention_linears != "keep":
            for name in ATTENTION_LINEARS:
                if hasattr(attention, name):
                    self.linear(
                        "attention_linears",
                        f"{fqn}.{name}",
                        getattr(attention, name),
                        self.config.attention_linears,
                    )

    def mlp(self, fqn: str, module: nn.Module) -> None:
        """Plans one MLP."""
        if self.config.mlp == "keep":
            return
        if isinstance(module, MoEMlp):
            if self.config.mlp == "moe":
                self.already("mlp", fqn, "MoE")
            else:
                self.skipped[fqn] = "is MoE"
        elif not self.allows(module, fqn):
            self.skipped[fqn] = "rejected by filter_fn"
        elif self.config.mlp == "moe" and _token_wise(module):
            moe = MoEMlp.from_module(module, self.config.experts, self.config.shift_variant)
            self.replace("mlp", fqn, moe, _moe_of(self.config))
        else:
            for name in MLP_LINEARS:
                self.linear("mlp", f"{fqn}.{name}", getattr(module, name), self.config.mlp)

    def linear(self, rule: str, fqn: str, linear: nn.Module, form: str) -> None:
        """Plans one linear; ``form`` may also be ``moe``."""
        forms, variant = self.config.experts, self.config.shift_variant
        if getattr(linear, "form", None) == form or (form == "moe" and isinstance(linear, MoEMlp)):
            self.already(rule, fqn, form)
        elif type(linear) is not nn.Linear:
            self.skipped[fqn] = f"is {type(linear).__name__}, not nn.Linear"
        elif not self.allows(linear, fqn):
            self.skipped[fqn] = "rejected by filter_fn"
        elif form == "moe":
            moe = MoEMlp.from_module(linear, forms, variant)
            self.replace(rule, fqn, moe, f"{_moe_of(self.config)}, this linear alone")
        else:
            self.replace(rule, fqn, linear_in_form(linear, form, variant), f"{form} ({variant})")


def _moe_of(config: ReparamConfig) -> str:
    experts = ", ".join(f"{name} {form}" for name, form in config.experts.items())
    return f"MoE ({experts})"


def _token_wise(mlp: nn.Module) -> bool:
    return {name for name, _ in mlp.named_children()} <= _TOKEN_WISE and all(
        type(getattr(mlp, name)) is nn.Linear for name in MLP_LINEARS
    )


def _hint(skipped: dict[str, str]) -> str:
    reasons = [f"{fqn} {reason}" for fqn, reason in skipped.items() if "never" not in reason]
    return f" ({reasons[0]})" if reasons else ""


def _candidates(model: nn.Module, skipped: dict[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Attentions and MLPs outside of protected modules; does not look inside of what it found."""
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        raise ConversionError(f"{type(model).__name__} has no get_classifier: not a timm model")
    classifier = get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    protected = {id(head): "classifier head, never converted" for head in heads}
    if hasattr(model, "patch_embed"):
        protected[id(model.patch_embed)] = "patch embedding, never converted"

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            fqn = f"{prefix}{name}"
            if id(child) in protected:
                skipped[fqn] = protected[id(child)]
            elif (
                isinstance(child, AddAttention | MoEMlp)
                or is_softmax_attention(child)
                or all(hasattr(child, linear) for linear in MLP_LINEARS)
            ):
                yield fqn, child
            else:
                yield from walk(child, f"{fqn}.")

    yield from walk(model, "")
