"""FORMS: what can be computed, apart from its sizes, as fields of a Workload.

Standard library only, as kernels/workload.py.
"""

from __future__ import annotations

from typing import Any

_LINEAR = {"w_layout": "nk"}
_MULT_INT = {
    **_LINEAR,
    "primitive": "mult",
    "x_dtype": "int8",
    "w_dtype": "int8",
    "acc_dtype": "int32",
    "fused": ("bias", "quantise", "scale"),
}
# ±2^0 … ±2^6 are the powers of two that an int8 weight can hold with either sign.
_SHIFT_INT = {
    **_LINEAR,
    "primitive": "shift",
    "coded": "w",
    "alphabet": "pow2",
    "exponent_min": -6,
    "exponent_max": 0,
    "x_dtype": "int8",
    "w_dtype": "int8",
    "acc_dtype": "int32",
    "fused": ("bias", "quantise", "scale"),
}
_SHIFT_FLOAT = {
    **_LINEAR,
    "primitive": "shift",
    "coded": "w",
    "alphabet": "pow2",
    "code_bits": 8,
    "exponent_min": -15,
    "exponent_max": 0,
    "w_dtype": "int8",
}
_ADD = {
    "primitive": "add",
    "coded": "x",
    "code_bits": 1,
    "x_dtype": "bit",
    "w_dtype": "float32",
    "out_dtype": "float32",
    "w_layout": "kn",
    "fused": ("pack",),
}
_BOTH = {"x_layout": "mk", "fused": ("both", "pack")}
_BF16 = {"w_dtype": "bfloat16", "out_dtype": "bfloat16"}

# A sweep, a recipe and a table speak these names.
FORMS: dict[str, dict[str, Any]] = {
    "mult_fp32": {
        **_LINEAR,
        "primitive": "mult",
        "w_dtype": "float32",
        "fused": ("bias",),
    },
    "mult_bf16": {
        **_LINEAR,
        "primitive": "mult",
        "code_bits": 16,
        "x_dtype": "bfloat16",
        "w_dtype": "bfloat16",
        "fused": ("bias", "cast"),
    },
    "mult_int8": {**_MULT_INT, "code_bits": 8},
    # In a byte as well: what CPUs without VNNI multiply faster, as they do ±2^p in int8.
    "mult_int7": {**_MULT_INT, "code_bits": 7},
    # Sign and p + 127 in one byte: any p of an fp32 number of at most 1. The range is DeepShift's.
    "shift_fp32": {**_SHIFT_FLOAT, "fused": ("bias", "scale")},
    # The same codes on bf16 activations, in which they are exact as well.
    "shift_bf16": {**_SHIFT_FLOAT, "x_dtype": "bfloat16", "fused": ("bias", "cast", "scale")},
    "shift_int8": {**_SHIFT_INT, "code_bits": 8},
    # Twice the range, by two products: of the small powers and of the large ones.
    "shift_int8_wide": {**_SHIFT_INT, "code_bits": 8, "exponent_min": -13},
    # The same numbers, stored as a sign and three bits of exponent.
    "shift_int4": {**_SHIFT_INT, "code_bits": 4},
    # A weight of ±1 is added or taken off, and stored as one bit.
    "add_int8": {**_MULT_INT, "primitive": "add", "coded": "w", "alphabet": "pm1", "code_bits": 1},
    "add_kv_pm1": {**_ADD, "x_layout": "km", "alphabet": "pm1"},
    "add_kv_01": {**_ADD, "x_layout": "km", "alphabet": "01"},
    "add_qkv_pm1": {**_ADD, "x_layout": "mk", "alphabet": "pm1"},
    "add_qkv_01": {**_ADD, "x_layout": "mk", "alphabet": "01"},
    "add_attention_pm1": {**_ADD, **_BOTH, "alphabet": "pm1"},
    "add_attention_01": {**_ADD, **_BOTH, "alphabet": "01"},
    # Queries, keys, values and result in bf16; the sums still in fp32.
    "add_kv_pm1_bf16": {**_ADD, **_BF16, "x_layout": "km", "alphabet": "pm1"},
    "add_kv_01_bf16": {**_ADD, **_BF16, "x_layout": "km", "alphabet": "01"},
    "add_qkv_pm1_bf16": {**_ADD, **_BF16, "x_layout": "mk", "alphabet": "pm1"},
    "add_qkv_01_bf16": {**_ADD, **_BF16, "x_layout": "mk", "alphabet": "01"},
    "add_attention_pm1_bf16": {**_ADD, **_BOTH, **_BF16, "alphabet": "pm1"},
    "add_attention_01_bf16": {**_ADD, **_BOTH, **_BF16, "alphabet": "01"},
}

# What may be fused around a linear form without making another form of it.
AROUND = ("layer_norm", "gelu", "residual")


def quantises(form: str) -> bool:
    """Whether a linear form reads its input as int8 codes."""
    return "quantise" in FORMS[form]["fused"]
