"""reparameterize_: replaces the multiplications of a timm model by adds and shifts, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cost_models.advice_result import Advice
from profiler.command_line import one_line
from reparam.add_attention import AddAttention
from reparam.attention_fit import Arguments, Calibration, calibrate_, captured_arguments
from reparam.attention_forms import linear_form, quadratic_form
from reparam.attention_structure import ModelTrace, example_input, open_, trace
from reparam.coded_attention import CodedAttention
from reparam.conversion_rules import LayerConfig, LayerRule, ReparamConfig, ShiftForm
from reparam.linear_forms import linear_in_form
from reparam.model_structure import (
    candidates,
    does_nothing,
    is_attention,
    is_gelu,
    linear_parts,
    protected_parts,
    replace_,
)
from reparam.moe import MoEMlp
from reparam.pointwise import Pointwise, as_linear, is_pointwise, mlp_of_tokens
from reparam.quadratic_attention import QuadraticCore
from reparam.shift import ShiftLinear
from reparam.where_it_pays import advice_for, parts_of, why_not

__all__ = [
    "Conversion",
    "ConversionError",
    "FilterFn",
    "LayerConfig",
    "LayerRule",
    "ReparamConfig",
    "ShiftForm",
    "reparameterize_",
    "reparameterize_by_parts_",
]

_ONE_PIXEL = "sees an image as one pixel"

FilterFn = Callable[[nn.Module, str], bool]


class ConversionError(ValueError):
    """A conversion that cannot be done as asked; the model is left as it was."""


@dataclass(frozen=True)
class Conversion:
    """What ``reparameterize_`` did.

    Attributes:
        converted: What each replaced module became, by qualified name, the first if it has several.
        skipped: Why each candidate that stayed did, by qualified name.
        calibration: Error of each converted attention against the original on the example, by
            qualified name; empty without an example.
        advice: What was converted and not, and why, where only what pays was asked for.
    """

    converted: dict[str, str]
    skipped: dict[str, str]
    calibration: dict[str, Calibration] = field(default_factory=dict)
    advice: Advice | None = None


def reparameterize_(
    model: nn.Module,
    config: ReparamConfig,
    filter_fn: FilterFn | None = None,
    example: Tensor | None = None,
) -> Conversion:
    """Replaces attentions, their linears and MLPs of a timm model, in place.

    Attentions are found by what they compute in one forward pass
    (``attention_structure.trace``), MLPs by their linears (``model_structure``), neither by class
    names. The classifier head and the patch embedding are never touched, nor is a router, nor what
    makes position biases of coordinates: its rows are as many for any number of images. A plain 1×1
    convolution of an attention or MLP is a linear, but where it sees an image as one pixel. In an
    MLP with another convolution between its linears each linear becomes an MoE of its own. A second
    call goes on from what the first one made; what already is as asked is skipped.

    Args:
        model: A timm model.
        config: What to replace by what.
        filter_fn: ``filter_fn(module, fqn)`` is False for what shall stay. It is asked for each
            attention, each linear of an attention and each MLP, and for each linear of an MLP
            that is converted one by one.
        example: Images that the model takes. Hash functions and the magnitudes of linear
            attention are then fitted to them. Without it the model is watched on noise of its own
            input size, and nothing is fitted.

    Raises:
        ConversionError: If nothing was asked, a rule matched nothing, the model does not take the
            example, or is none of timm's. The model is unchanged then.
        TableError: If ``config.where`` is ``pays`` and its latency table cannot be read.
    """
    asked = [config, *(rule.config for rule in config.rules)]
    if not any(layer.asked for layer in asked):
        raise ConversionError("attention, attention_linears and mlp all say keep: nothing to do")
    if not hasattr(model, "get_classifier"):
        raise ConversionError(f"{type(model).__name__} has no get_classifier: not a timm model")
    images = example_input(model) if example is None else example
    watched = _watch(model, images)
    others = _watch(model, torch.cat((images[:1],) * (3 if len(images) == 2 else 2)))
    protected = protected_parts(model, watched.same_as_for(others))
    skipped: dict[str, str] = {}
    found = list(candidates(model, watched.attentions, protected, skipped))
    advice = None
    if config.where == "pays":
        parts = parts_of(found, watched.attentions, protected)
        advice = advice_for(model, config, images, parts)
    allows = filter_fn or (lambda module, fqn: True)
    plan = _Plan(config, allows, watched, protected, advice, skipped=skipped)
    if example is not None and any(layer.attention != "keep" for layer in asked):
        plan.arguments = captured_arguments(model, example, watched.attentions)
    for fqn, module in found:
        if is_attention(fqn, module, watched.attentions):
            plan.attention_linears(fqn, plan.attention(fqn, module))
        else:
            plan.mlp(fqn, module)
    plan.finish(type(model).__name__)
    for fqn, replacement in plan.replacements.items():
        replace_(model, fqn, replacement)
    for fqn in plan.opened:
        open_(model.get_submodule(fqn))
    return Conversion(plan.converted, plan.skipped, plan.calibration, advice)


def reparameterize_by_parts_(
    model: nn.Module, *parts: Sequence[ReparamConfig]
) -> tuple[dict[str, str], list[str]]:
    """Converts part by part, where a model may have nothing for some.

    Args:
        model: A timm model.
        parts: In order; each by one configuration after the other, those of the first preference
            first.

    Returns:
        What each replaced module became, by qualified name, and why each part of which no
        configuration had an effect had none by the first.

    Raises:
        ConversionError: If none had an effect; says what the first of them does.
    """
    converted: dict[str, str] = {}
    failed: list[ConversionError] = []
    for configs in parts:
        errors: list[ConversionError] = []
        for config in configs:
            try:
                converted |= reparameterize_(model, config).converted
            except ConversionError as error:
                errors.append(error)
        if len(errors) == len(configs):
            failed.append(errors[0])
    if not converted and failed:
        raise failed[0]
    return converted, [str(error) for error in failed]


def _watch(model: nn.Module, example: Tensor) -> ModelTrace:
    try:
        return trace(model, example)
    except Exception as error:  # whatever a model raises on an input that it does not take
        reason = one_line(error)[:200]
        raise ConversionError(
            f"example: {type(model).__name__} does not take {tuple(example.shape)}, pass one that"
            f" it takes: {reason}"
        ) from error


@dataclass
class _Plan:
    """Replacements to make, in the order in which they have to be made."""

    config: ReparamConfig
    allows: FilterFn
    watched: ModelTrace
    protected: dict[int, str]
    advice: Advice | None = None
    arguments: dict[str, Arguments] = field(default_factory=dict)
    replacements: dict[str, nn.Module] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    used_rules: list[LayerRule | None] = field(default_factory=list)

    def options(self, *names: str) -> LayerConfig:
        """The options of a layer, by its own name and then by its parent's."""
        rule = self.config.first_rule(*names)
        self.used_rules.append(rule)
        return rule.config if rule else self.config

    def refused(self, module: nn.Module, fqn: str) -> str | None:
        """Why a module stays although it could be converted."""
        if not self.allows(module, fqn):
            return "rejected by filter_fn"
        if self.advice is not None and not self.advice.allows(module, fqn):
            return why_not(self.advice, fqn)
        return None

    def is_one_pixel(self, fqn: str) -> bool:
        """Whether what a module of images sees of each is one pixel, as in squeeze-and-excite."""
        return self.watched.called.get(fqn, ())[2:] == (1, 1)

    def replace(self, rule: str, fqn: str, replacement: nn.Module, what: str) -> None:
        self.replacements[fqn] = replacement
        self.converted[fqn] = what
        self.done.add(rule)

    def already(self, rule: str, fqn: str, what: str) -> None:
        self.skipped[fqn] = f"is {what} already"
        self.done.add(rule)

    def attention(self, fqn: str, module: nn.Module) -> nn.Module:
        """Plans one attention; returns what will stand there."""
        options = self.options(fqn)
        if options.attention == "keep":
            return module
        if isinstance(module, AddAttention | CodedAttention):
            self._attention_again(fqn, module, options)
            return module
        if refused := self.refused(module, fqn):
            self.skipped[fqn] = refused
            return module
        traced = self.watched.attentions[fqn]
        form = quadratic_form if options.attention == "quadratic" else linear_form
        new, what = form(module, traced, options)
        if new is None:
            self.skipped[fqn] = what
            return module
        if fqn in self.arguments:
            self.calibration[fqn] = calibrate_(new, module, self.arguments[fqn])
        elif options.hashing == "kernelised":
            what += ", hashing not fitted yet: see refit_hashing_"
        self.replace("attention", fqn, new, what)
        return new

    def _attention_again(
        self, fqn: str, module: AddAttention | CodedAttention, options: LayerConfig
    ) -> None:
        quadratic = isinstance(module, CodedAttention) and isinstance(module.core, QuadraticCore)
        is_now = "quadratic" if quadratic else "add"
        coder: Any = module if isinstance(module, AddAttention) else module.core
        now = coder.hashing.alphabet
        if is_now != options.attention:
            self.skipped[fqn] = f"is {is_now} attention"
        elif now == options.alphabet:
            self.already("attention", fqn, f"{is_now} attention ({options.alphabet})")
        else:
            self.skipped[fqn] = f"is {is_now} attention with codes {now}"

    def attention_linears(self, fqn: str, attention: nn.Module) -> None:
        """Plans the linears of one attention."""
        for name, part in linear_parts(attention).items():
            own = f"{fqn}.{name}"
            options = self.options(own, fqn)
            if options.attention_linears != "keep":
                called = isinstance(attention, AddAttention) or own in self.watched.called
                form = options.attention_linears
                self.linear("attention_linears", own, part, form, options, called)
                self.opened.add(fqn)

    def mlp(self, fqn: str, module: nn.Module) -> None:
        """Plans one MLP."""
        options, of_tokens = self.options(fqn), mlp_of_tokens(module)
        as_one = options.mlp == "moe" and options.moe_granularity == "mlp" and _is_expert(of_tokens)
        if isinstance(module, MoEMlp):
            if options.mlp == "moe":
                self.already("mlp", fqn, "MoE")
            elif options.mlp != "keep":
                self.skipped[fqn] = "is MoE"
        elif options.mlp != "keep" and (refused := self.refused(module, fqn)):
            self.skipped[fqn] = refused
        elif as_one and of_tokens is module:
            self.replace("mlp", fqn, _moe(module, options), _moe_of(options))
        elif as_one and self.is_one_pixel(fqn):
            self.skipped[fqn] = _ONE_PIXEL
        elif as_one:
            self.replace("mlp", fqn, Pointwise(_moe(of_tokens, options)), _moe_of(options))
        else:
            for name, part in linear_parts(module).items():
                own = f"{fqn}.{name}"
                options = self.options(own, fqn)
                if options.mlp != "keep":
                    called = own in self.watched.called
                    self.linear("mlp", own, part, options.mlp, options, called)

    def linear(
        self,
        rule: str,
        fqn: str,
        linear: nn.Module,
        form: str,
        options: LayerConfig,
        called: bool,
    ) -> None:
        """Plans one linear; ``form`` may also be ``moe``."""
        if getattr(linear, "form", None) == form or (form == "moe" and isinstance(linear, MoEMlp)):
            self.already(rule, fqn, form)
        elif id(linear) in self.protected:
            self.skipped[fqn] = self.protected[id(linear)]
        elif type(linear) is not nn.Linear and not is_pointwise(linear):
            self.skipped[fqn] = f"is {type(linear).__name__}, not nn.Linear"
        elif not called:
            self.skipped[fqn] = "its weight is used without calling it"
        elif is_pointwise(linear) and self.is_one_pixel(fqn):
            self.skipped[fqn] = _ONE_PIXEL
        elif refused := self.refused(linear, fqn):
            self.skipped[fqn] = refused
        else:
            plain = as_linear(linear) if is_pointwise(linear) else cast(nn.Linear, linear)
            made, what = _in_form(plain, form, options)
            self.replace(rule, fqn, Pointwise(made) if is_pointwise(linear) else made, what)

    def finish(self, model_name: str) -> None:
        """Adds attentions of other kinds to what was skipped.

        Raises:
            ConversionError: If an option or a rule had no effect.
        """
        if "attention" in self.config.asked:
            for fqn in self.watched.unpaired:
                if not any(fqn == name or fqn.startswith(f"{name}.") for name in self.skipped):
                    self.skipped[fqn] = "its softmax is of no product of queries and keys"
        for rule in self.config.rules:
            if rule not in self.used_rules:
                raise ConversionError(f"rules: {rule.match!r} matched nothing in {model_name}")
        for asked in self.config.asked:
            # With advice, converting nothing is an answer.
            if asked not in self.done and self.advice is None:
                raise ConversionError(
                    f"{asked}: {getattr(self.config, asked)!r} matched nothing in"
                    f" {model_name}{_hint(self.skipped)}"
                )


def _in_form(linear: nn.Linear, form: str, options: LayerConfig) -> tuple[nn.Module, str]:
    """What stands for one linear, and what it is called."""
    if form == "moe":
        return _moe(linear, options), f"{_moe_of(options)}, this linear alone"
    variant = options.shift_variant
    made = linear_in_form(linear, form, variant, options.shift_bits, options.activation_clip)
    is_shift = any(isinstance(part, ShiftLinear) for part in made.modules())
    return made.train(linear.training), f"{form} ({variant})" if is_shift else form


def _moe(module: nn.Module, options: LayerConfig) -> MoEMlp:
    return MoEMlp.from_module(module, options.experts, options.shift_variant, options.shift_bits)


def _moe_of(options: LayerConfig) -> str:
    experts = ", ".join(f"{name} {form}" for name, form in options.experts.items())
    return f"MoE ({experts})"


def _is_expert(mlp: nn.Module) -> bool:
    """Whether an MLP can be an expert as a whole: what one kernel computes of each token alone.

    Of others, gated ones say, each linear is a mixture: deployed, tokens are dispatched by kernels.
    """
    parts = dict(mlp.named_children())
    fc1, fc2, act = parts.pop("fc1", None), parts.pop("fc2", None), parts.pop("act", None)
    return (
        type(fc1) is nn.Linear
        and type(fc2) is nn.Linear
        and fc1.out_features == fc2.in_features
        and act is not None
        and is_gelu(act)
        and does_nothing(parts.values())
    )


def _hint(skipped: dict[str, str]) -> str:
    reasons = [f"{fqn} {reason}" for fqn, reason in skipped.items() if "never" not in reason]
    return f" ({reasons[0]})" if reasons else ""
