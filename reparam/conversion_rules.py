"""What a conversion replaces by what: one set of options for a model, others for layers by name."""

from __future__ import annotations

import fnmatch
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from reparam.kernelised_hashing import ANCHORS, BITS
from reparam.linear_forms import LINEAR_FORMS, ActivationClip
from reparam.quadratic_attention import Similarity
from reparam.shift import ShiftVariant

ShiftForm = Literal["shift_fp32", "shift_bf16", "shift_int8", "shift_int8_wide", "shift_int4"]
MultForm = Literal["mult_fp32", "mult_bf16", "mult_int8", "mult_int7"]
AddForm = Literal["add_int8"]
LinearForm = Literal["keep"] | ShiftForm | MultForm | AddForm
AttentionForm = Literal["keep", "add", "quadratic"]

REGEX = "re:"


def _trainable_form(form: str) -> str:
    if form not in LINEAR_FORMS:
        raise ValueError(f"{form!r} is not one of {', '.join(LINEAR_FORMS)}")
    return form


def _pattern(match: str) -> str:
    if match.startswith(REGEX):
        try:
            re.compile(match.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"{match!r} is no regular expression: {error}") from error
    return match


class LayerConfig(BaseModel):
    """What to replace by what.

    Attributes:
        attention: ``add`` makes attention linear, with binary queries and keys; ``quadratic``
            compares binary queries with binary keys pair by pair, and keeps position biases and
            masks.
        alphabet: Binary alphabet of their codes.
        hashing: ``sign`` takes one bit for each feature; ``kernelised`` fits ``hash_bits`` bits
            to the attention map.
        hash_bits, hash_anchors: Of kernelised hashing.
        similarity: Of the quadratic form.
        drop_bias: Whether the linear form may drop position biases and window masks, which it
            cannot keep; otherwise it refuses attentions that have one.
        attention_linears: Form of the linears around the attention, of any kind.
        mlp: Form of the MLPs' linears, or ``moe`` for experts of different forms.
        experts: Form of each expert by name, at least two.
        moe_granularity: Whether an MLP becomes one MoE where one kernel computes it (two linears
            with a GELU between them), or each of its linears one.
        shift_variant: How shift weights are trained, DeepShift-Q or -PS.
        shift_bits: Bits of a shift weight; None for all that its form stores.
        activation_clip: A limit of the activations that are quantised to int8, see
            ``linear_forms.Clip``; experts of an MoE have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: AttentionForm = "keep"
    alphabet: Literal["pm1", "01"] = "pm1"
    hashing: Literal["sign", "kernelised"] = "sign"
    hash_bits: Annotated[int, Field(ge=1)] = BITS
    hash_anchors: Annotated[int, Field(ge=1)] = ANCHORS
    similarity: Similarity = "softmax"
    drop_bias: bool = False
    attention_linears: LinearForm = "keep"
    mlp: LinearForm | Literal["moe"] = "keep"
    experts: Annotated[
        dict[str, Annotated[str, AfterValidator(_trainable_form)]], Field(min_length=2)
    ] = {"mult": "mult_int8", "shift": "shift_int8"}
    moe_granularity: Literal["mlp", "linear"] = "mlp"
    shift_variant: ShiftVariant = "Q"
    shift_bits: Annotated[int, Field(ge=3, le=8)] | None = None
    activation_clip: ActivationClip = "none"

    @model_validator(mode="after")
    def _a_linear_to_clip(self) -> Self:
        if (
            self.activation_clip != "none"
            and self.mlp == "moe"
            and self.attention_linears == "keep"
        ):
            raise ValueError("activation_clip: experts have none, and no other linear is asked for")
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the options that ask for a replacement."""
        names = ("attention", "attention_linears", "mlp")
        return tuple(name for name in names if getattr(self, name) != "keep")


class LayerRule(BaseModel):
    """The options of the layers of some names, in place of the model's.

    Attributes:
        match: A qualified name with wildcards (``blocks.0.*``; a * also stands for dots), or
            ``re:`` and a regular expression for all of the name.
        config: All options of these layers: what it does not name has its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: Annotated[str, AfterValidator(_pattern)]
    config: LayerConfig

    def matches(self, fqn: str) -> bool:
        """Whether it is for the layer of this name."""
        if self.match.startswith(REGEX):
            return re.fullmatch(self.match.removeprefix(REGEX), fqn) is not None
        return fnmatch.fnmatchcase(fqn, self.match)


class ReparamConfig(LayerConfig):
    """What to replace by what in a model. Stage 1 replaces the attention, stage 2 the linears.

    Attributes:
        rules: Other options for layers by name. The first rule that matches a layer wins; a linear
            that none matches follows its attention or MLP, and what none matches the options
            beside the rules.
        where: ``pays`` converts only what a latency table says is faster on its device than the
            strongest baseline; ``everywhere`` whatever can be converted.
        latency_table: File or shipped name; needed with ``pays``.
        deploy_batch: Images at once when deployed, which that depends on.
    """

    rules: tuple[LayerRule, ...] = ()
    where: Literal["everywhere", "pays"] = "everywhere"
    latency_table: str | None = None
    deploy_batch: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _a_table_to_ask(self) -> ReparamConfig:
        if self.where == "pays" and self.latency_table is None:
            raise ValueError("latency_table: where = pays needs the table of the device")
        return self

    def first_rule(self, *names: str) -> LayerRule | None:
        """The rule for the first of some names, a layer's own and then its parent's."""
        for name in names:
            for rule in self.rules:
                if rule.matches(name):
                    return rule
        return None
