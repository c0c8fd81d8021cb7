"""Workload: the key under which a product is built, measured, modelled and deployed.

Standard library only: everything in the suite may import it at no cost.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from kernels.forms import AROUND, FORMS

Primitive = Literal["mult", "shift", "add"]
Alphabet = Literal["real", "pow2", "01", "pm1"]

DTYPE_BITS: dict[str, int] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "int32": 32,
    "int8": 8,
    "uint8": 8,
    "bit": 1,
}


# What plain JSON may say of a field, where a value of another type would fail only later.
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("x_dtype", "w_dtype", "acc_dtype", "out_dtype"), (str,)),
    **dict.fromkeys(("exponent_min", "exponent_max"), (int, type(None))),
    "fused": (list, tuple),
}


class WorkloadError(ValueError):
    """A workload that cannot exist; ``key`` names the offending field."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One product ``out[b, m, n] = sum_k x[b, m, k] * w[b, n, k]`` and how it is represented.

    Linears have ``b = 1`` and fold the batch into ``m`` (tokens). The two products of linear
    attention have ``b = batch * heads``: in KᵀV, ``m`` is the code bits, ``k`` the tokens and
    ``n`` the value dimension; in Q(KᵀV), alone or with KᵀV, ``m`` is the tokens and ``k`` the code
    bits.

    Attributes:
        primitive: What stands in for the multiplication: mult, shift or add.
        b, m, k, n: Sizes of the product, each at least 1.
        x_layout: Memory order of x, ``mk`` or ``km`` (the last letter is contiguous).
        w_layout: Memory order of w before packing, ``nk`` or ``kn``.
        coded: Which operand is written in ``alphabet``.
        alphabet: ``real``; ``pow2`` (±2^p); ``01`` or ``pm1`` (binary codes).
        code_bits: Bits of one code in storage (32 for real fp32).
        exponent_min, exponent_max: Range of p for ``pow2``, else None.
        x_dtype, w_dtype: The types the products are computed from. With ``quantise`` or ``pack``
            in ``fused`` the kernel reads x as out_dtype and makes x_dtype itself.
        acc_dtype, out_dtype: Types of the accumulator and of the result.
        fused: Sorted names of what the kernel does beside the product: ``bias``; ``scale`` (one
            factor per output channel); ``quantise`` (x to x_dtype, one scale per row);
            ``pack`` (x to bits by its sign); ``cast`` (x to x_dtype); ``both`` (both products of
            linear attention in one kernel); and around any linear ``layer_norm`` (of x, first),
            ``gelu`` (of the result) and ``residual`` (added last).
    """

    primitive: Primitive
    b: int = 1
    m: int
    k: int
    n: int
    x_layout: Literal["mk", "km"] = "mk"
    w_layout: Literal["nk", "kn"] = "nk"
    coded: Literal["none", "x", "w"] = "none"
    alphabet: Alphabet = "real"
    code_bits: int = 32
    exponent_min: int | None = None
    exponent_max: int | None = None
    x_dtype: str = "float32"
    w_dtype: str = "float32"
    acc_dtype: str = "float32"
    out_dtype: str = "float32"
    fused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("b", "m", "k", "n", "code_bits"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise WorkloadError(name, f"must be a whole number of at least 1, got {size!r}")
        for name in ("primitive", "x_layout", "w_layout", "coded", "alphabet"):
            allowed = _allowed(name)
            if getattr(self, name) not in allowed:
                raise WorkloadError(
                    name, f"must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("x_dtype", "w_dtype", "acc_dtype", "out_dtype"):
            if getattr(self, name) not in DTYPE_BITS:
                raise WorkloadError(
                    name, f"must be one of {', '.join(DTYPE_BITS)}, got {getattr(self, name)!r}"
                )
        if (self.alphabet == "real") != (self.coded == "none"):
            raise WorkloadError("alphabet", f"{self.alphabet!r} contradicts coded={self.coded!r}")
        if (self.alphabet == "pow2") != (self.exponent_min is not None):
            raise WorkloadError("exponent_min", "is given exactly for the alphabet pow2")
        if tuple(sorted(self.fused)) != self.fused:
            object.__setattr__(self, "fused", tuple(sorted(self.fused)))

    @property
    def kind(self) -> str:
        """``linear``, ``kv`` (KᵀV), ``qkv`` (Q(KᵀV)) or ``attention`` (Q(KᵀV) from Q, K and V)."""
        if "both" in self.fused:
            return "attention"
        if self.w_layout == "nk":
            return "linear"
        return "kv" if self.x_layout == "km" else "qkv"

    @property
    def form(self) -> str:
        """Name in FORMS of what is computed, whatever its sizes; ``custom`` if it has none."""
        return _form_and_canonical(_kind_of(self))[0]

    @property
    def is_canonical(self) -> bool:
        """Whether this is its form at some sizes and nothing else: a latency model fits no more."""
        return _form_and_canonical(_kind_of(self))[1]

    @property
    def product(self) -> str:
        """The mathematical product, equal for all forms that can replace each other in a model."""
        shape = f"{self.b}x{self.m}x{self.k}x{self.n}"
        codes = f" {self.alphabet}" if self.kind != "linear" else ""
        codes += " bf16" if self.out_dtype == "bfloat16" else ""
        order = ("layer_norm", "bias", "gelu", "residual")
        beside = [name for name in order if name in self.fused]
        return f"{self.kind} {shape}{codes}" + "".join(f" +{name}" for name in beside)

    @property
    def label(self) -> str:
        """Short text for people."""
        return f"{self.form} {self.product}"

    @property
    def key(self) -> str:
        """Canonical JSON: equal exactly for equal workloads, stable across versions of Python."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def dynamic(self) -> tuple[str, ...]:
        """The sizes that a built kernel takes from its operands at each launch."""
        if self.kind == "linear":
            return ("m",)
        return ("b", "k") if self.kind == "kv" else ("b", "m")

    @property
    def family(self) -> Workload:
        """This workload with its dynamic sizes set to 1: one built kernel serves them all."""
        return self.with_sizes(**dict.fromkeys(self.dynamic, 1))

    @property
    def alone(self) -> Workload:
        """This workload without what is fused around it."""
        return replace(self, fused=tuple(name for name in self.fused if name not in AROUND))

    @property
    def tokens(self) -> int:
        """Tokens that pass through: rows of a linear, sequence length of an attention product."""
        return self.k if self.kind == "kv" else self.m

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense product, or of both."""
        return self.b * self.m * self.k * self.n * (2 if self.kind == "attention" else 1)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored parameters (codes, scales, bias); attention products have none."""
        if self.kind != "linear":
            return 0
        w_bits = self.code_bits if self.coded == "w" else DTYPE_BITS[self.w_dtype]
        per_channel = 4 * (("scale" in self.fused) + ("bias" in self.fused))
        per_input = 8 if "layer_norm" in self.fused else 0
        return (self.n * self.k * w_bits + 7) // 8 + self.n * per_channel + self.k * per_input

    @property
    def traffic_bytes(self) -> int:
        """Compulsory memory traffic: each operand read once, the result written once."""
        made_inside = {"quantise", "pack", "cast"} & set(self.fused)
        x_bits = DTYPE_BITS[self.out_dtype if made_inside else self.x_dtype]
        if self.coded == "x" and not made_inside:
            x_bits = self.code_bits
        if self.kind == "linear":
            w_bytes = self.weight_bytes
        elif self.kind == "attention":
            values = self.b * self.m * self.n * DTYPE_BITS[self.w_dtype]
            keys = self.b * self.m * self.k * x_bits
            w_bytes = (values + keys + 7) // 8
        else:
            w_bytes = self.b * self.k * self.n * DTYPE_BITS[self.w_dtype] // 8
        x_bytes = (self.b * self.m * self.k * x_bits + 7) // 8
        out_bytes = self.b * self.m * self.n * DTYPE_BITS[self.out_dtype] // 8
        return x_bytes + w_bytes + out_bytes * (2 if "residual" in self.fused else 1)

    def with_sizes(self, **sizes: int) -> Workload:
        """The same form at other sizes."""
        return Workload.from_dict(self.to_dict() | sizes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``from_dict`` is its inverse."""
        return {**asdict(self), "fused": list(self.fused)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Workload:
        """Inverse of ``to_dict``.

        Raises:
            WorkloadError: On an unknown, missing or impossible field.
        """
        known = {field.name for field in fields(cls)}
        for name in data:
            if name not in known:
                raise WorkloadError(name, "is no field of a workload")
        for name in ("primitive", "m", "k", "n"):
            if name not in data:
                raise WorkloadError(name, "is missing")
        for name, types in _JSON_TYPES.items():
            if name in data and not isinstance(data[name], types):
                raise WorkloadError(name, f"cannot be {data[name]!r}")
        for name in data.get("fused", ()):
            if not isinstance(name, str):
                raise WorkloadError("fused", f"names what is done beside, got {name!r}")
        return cls(**{**data, "fused": tuple(data.get("fused", ()))})


@functools.cache
def _allowed(name: str) -> tuple[str, ...]:
    """Values of a field whose type is a Literal; once, since it takes longer than all the rest."""
    return get_args(get_type_hints(Workload)[name])


_SIZES = ("b", "m", "k", "n")
_KIND = tuple(field.name for field in fields(Workload) if field.name not in _SIZES)
_kind_of = attrgetter(*_KIND)


@functools.cache
def _form_and_canonical(kind: tuple[Any, ...]) -> tuple[str, bool]:
    """By all that a form fixes: looking through the forms takes long, and lookups ask often."""
    whole = Workload(m=1, k=1, n=1, **dict(zip(_KIND, kind)))
    alone = whole.alone
    for name, form in FORMS.items():
        if all(getattr(alone, key) == value for key, value in form.items()):
            return name, whole == Workload(m=1, k=1, n=1, **form)
    return "custom", False


def linear(form: str, m: int, k: int, n: int, around: tuple[str, ...] = ()) -> Workload:
    """Workload of a linear layer: x ``(m, k)`` times W ``(n, k)`` transposed, plus bias ``(n,)``.

    Args:
        form: A name in FORMS of a linear.
        m: Tokens (batch folded in).
        k: Input features.
        n: Output features.
        around: Names in AROUND: what of its neighbours the kernel does as well.

    Raises:
        WorkloadError: On an unknown form or name, or a size below 1.
    """
    if form not in FORMS or FORMS[form]["w_layout"] != "nk":
        names = ", ".join(name for name, f in FORMS.items() if f["w_layout"] == "nk")
        raise WorkloadError("form", f"{form!r} is no linear form; known: {names}")
    for name in around:
        if name not in AROUND:
            raise WorkloadError("around", f"{name!r} is none of {', '.join(AROUND)}")
    fused = (*FORMS[form]["fused"], *around)
    return Workload(m=m, k=k, n=n, **{**FORMS[form], "fused": fused})


class AttentionForms(NamedTuple):
    """The products of linear attention: KᵀV, Q(KᵀV), and the two in one."""

    kv: Workload
    qkv: Workload
    both: Workload


def attention(
    b: int, tokens: int, bits: int, n: int, alphabet: str = "pm1", dtype: str = "float32"
) -> AttentionForms:
    """The products of linear attention with binary codes.

    Args:
        b: Batch × heads.
        tokens: Sequence length.
        bits: Code bits of a query or a key.
        n: Value dimension of a head.
        alphabet: ``pm1`` for ±1 codes, ``01`` for {0, 1}.
        dtype: ``float32`` or ``bfloat16``: of queries, keys, values and result.

    Raises:
        WorkloadError: On an unknown alphabet or type, or a size below 1.
    """
    if f"add_kv_{alphabet}" not in FORMS:
        raise WorkloadError("alphabet", f"{alphabet!r} is no binary alphabet; known: pm1, 01")
    if dtype not in ("float32", "bfloat16"):
        raise WorkloadError("dtype", f"{dtype!r} is none of float32, bfloat16")
    name = alphabet + ("_bf16" if dtype == "bfloat16" else "")
    return AttentionForms(
        kv=Workload(b=b, m=bits, k=tokens, n=n, **FORMS[f"add_kv_{name}"]),
        qkv=Workload(b=b, m=tokens, k=bits, n=n, **FORMS[f"add_qkv_{name}"]),
        both=Workload(b=b, m=tokens, k=bits, n=n, **FORMS[f"add_attention_{name}"]),
    )
