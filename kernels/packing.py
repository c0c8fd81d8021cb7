"""Weights and codes to and from packed form.

A linear's parameters travel as ``LinearParameters``: what the codes stand for, in fp32, with one
scale per output channel. Quantisers make them, ``pack_linear`` lays them out for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.forms import FORMS

# One packed panel: output channels that a micro-kernel computes side by side. 32 = two AVX-512
# vectors of fp32; narrower instruction sets split it without a change of layout.
PANEL = 32
# Neighbouring inputs that one dot-product instruction consumes (vpdpbusd, sdot, dp4a).
DOT_GROUP = 4
# Neighbouring inputs that one bf16 dot product consumes (vdpbf16ps).
BF16_GROUP = 2
INT8_MAX = 127
# Largest whole weight of the mult forms that have such.
WHOLE_WEIGHTS: dict[str, int] = {"mult_int8": INT8_MAX, "mult_int7": 63}
# Powers of two that an int8 weight can hold with either sign: 2^0 … 2^6.
PLANE_EXPONENTS = 7
LARGEST_POWER = 1 << PLANE_EXPONENTS - 1
# Two codes to a byte, and those of one vector of a dot product.
NIBBLE_BITS, NIBBLE_RUN = 4, 64
# Eight codes to a byte.
BYTE_BITS = 8


@dataclass(frozen=True)
class LinearParameters:
    """Parameters of one linear, ``weight = values * scale[:, None]``.

    Attributes:
        form: A linear form in ``kernels.workload.FORMS``.
        values: fp32 ``(n, k)``: the weights themselves (mult_fp32), whole numbers in ±127
            (mult_int8) or ±63 (mult_int7), ±2^p in the form's range of p (shift forms), or ±1
            (add_int8).
        scale: fp32 ``(n,)``; ones for mult_fp32 and mult_bf16.
        bias: fp32 ``(n,)``.
    """

    form: str
    values: Tensor
    scale: Tensor
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """The fp32 weight ``(n, k)`` that the codes stand for."""
        return self.values * self.scale[:, None]


def quantise_rows(x: Tensor, at_most: int = INT8_MAX) -> tuple[Tensor, Tensor]:
    """Quantises activations to int8, one symmetric scale per row, as the kernels do.

    Rounds half to even; a row of zeros gets scale 0. Every step is a single fp32 operation, so
    that training, oracle and kernel come to the same codes.

    Args:
        x: fp32 ``(..., k)``.
        at_most: Largest code.

    Returns:
        Whole numbers in ±at_most as fp32 ``(..., k)``, and the scale ``(..., 1)``.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, at_most / largest, torch.zeros_like(largest))
    return torch.round(x * inverse), largest * (1.0 / at_most)


def quantise_channels(weight: Tensor, at_most: int = INT8_MAX) -> tuple[Tensor, Tensor]:
    """Quantises a weight, one symmetric scale per output channel.

    Args:
        weight: fp32 ``(n, k)``.
        at_most: Largest code.

    Returns:
        Whole numbers in ±at_most as fp32 ``(n, k)``, and the scale ``(n,)``.
    """
    codes, scale = quantise_rows(weight, at_most)
    return codes, scale[:, 0]


def nearest_pow2(weight: Tensor, exponent_min: int, exponent_max: int) -> tuple[Tensor, Tensor]:
    """Rounds each weight to a signed power of two after a scale per output channel.

    Args:
        weight: fp32 ``(n, k)``.
        exponent_min, exponent_max: Range of the exponent.

    Returns:
        ``±2^p`` as fp32 ``(n, k)``, and the scale ``(n,)``: the channel's largest magnitude over
        2^exponent_max, 1 for a channel of zeros.

    Source:
        DeepShift-Q (arXiv 1905.13298), rounding in the log domain; the scale is ours, since
        |W| <= 1 cannot be relied on.
    """
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest * 2.0**-exponent_max, torch.ones_like(largest))
    return round_to_pow2(weight / scale[:, None], exponent_min, exponent_max), scale


def round_to_pow2(x: Tensor, exponent_min: int, exponent_max: int) -> Tensor:
    """The nearest ``±2^p`` in the log domain, the same shape; a zero becomes the smallest."""
    magnitude = x.abs().clamp_min(2.0 ** (exponent_min - 1))
    exponent = torch.round(torch.log2(magnitude)).clamp(exponent_min, exponent_max)
    return torch.where(x < 0, -1.0, 1.0) * torch.exp2(exponent)


def signs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Writes each weight as ±1, after a scale per output channel; a zero becomes +1.

    Args:
        weight: fp32 ``(n, k)``.

    Returns:
        ±1 as fp32 ``(n, k)``, and the scale ``(n,)``: the mean magnitude, which leaves the least
        squared error.

    Source:
        XNOR-Net, arXiv 1603.05279, eq. 6.
    """
    return torch.where(weight < 0, -1.0, 1.0), weight.abs().mean(dim=1)


def quantise_weight(form: str, weight: Tensor, bias: Tensor | None = None) -> LinearParameters:
    """Writes a weight in the alphabet of a form.

    Args:
        form: A linear form.
        weight: fp32 ``(n, k)``.
        bias: fp32 ``(n,)`` or None for zeros.
    """
    weight = weight.detach().float()
    n = weight.shape[0]
    bias = weight.new_zeros(n) if bias is None else bias.detach().float()
    if FORMS[form]["primitive"] == "shift":
        values, scale = nearest_pow2(
            weight, FORMS[form]["exponent_min"], FORMS[form]["exponent_max"]
        )
    elif FORMS[form]["primitive"] == "add":
        values, scale = signs(weight)
    elif form in WHOLE_WEIGHTS:
        values, scale = quantise_channels(weight, WHOLE_WEIGHTS[form])
    else:
        values = weight.bfloat16().float() if FORMS[form]["w_dtype"] == "bfloat16" else weight
        scale = weight.new_ones(n)
    return LinearParameters(form, values, scale, bias)


def pow2_to_byte(values: Tensor) -> Tensor:
    """Encodes ±2^p as ``sign << 7 | (p + 127)``: the sign and exponent of an fp32 number.

    Args:
        values: ±2^p with p in [-126, 0], any shape.

    Returns:
        int8, same shape.
    """
    exponent = torch.frexp(values.abs()).exponent - 1
    return ((exponent + 127) | ((values < 0).int() << 7)).to(torch.uint8).view(torch.int8)


def byte_to_pow2(codes: Tensor) -> Tensor:
    """Inverse of ``pow2_to_byte``."""
    code = codes.view(torch.uint8).int()
    return torch.exp2((code & 127).float() - 127) * (1 - 2 * (code >> 7))


def pack_panels(w: Tensor, group: int = 1) -> Tensor:
    """Lays a weight out in the order in which a micro-kernel reads it, padded with zeros.

    Args:
        w: ``(n, k)``.
        group: Neighbouring inputs that stay together.

    Returns:
        ``(ceil(n / PANEL), ceil(k / group), PANEL * group)``, contiguous.
    """
    n, k = w.shape
    padded = w.new_zeros(-(-n // PANEL) * PANEL, -(-k // group) * group)
    padded[:n, :k] = w
    panels = padded.view(-1, PANEL, padded.shape[1] // group, group)
    return panels.permute(0, 2, 1, 3).flatten(2).contiguous()


def unpack_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """Inverse of ``pack_panels``: ``(n, k)``."""
    blocks, groups, width = panels.shape
    group = width // PANEL
    panels = panels.view(blocks, groups, PANEL, group)
    return panels.permute(0, 2, 1, 3).reshape(blocks * PANEL, groups * group)[:n, :k].contiguous()


def pad_channels(per_channel: Tensor) -> Tensor:
    """Pads ``(n,)`` with zeros to whole panels."""
    n = per_channel.shape[0]
    return torch.nn.functional.pad(per_channel.float(), (0, -n % PANEL)).contiguous()


def pack_linear(parameters: LinearParameters) -> tuple[Tensor, ...]:
    """Packs a linear for its kernel.

    Returns:
        ``(w, bias)`` for real weights; ``(w, scale, bias)`` for shift_fp32 and shift_bf16; ``(w,
        scale, bias, offset)`` for the int8 forms, where offset makes up for the unsigned
        activations of the dot product: ``128 * sum_k w``, for each plane in turn.

    Raises:
        ValueError: If a whole weight is larger than its form's: some CPUs' sums would saturate.
    """
    form, values = parameters.form, parameters.values
    if form in WHOLE_WEIGHTS and (values.abs() > WHOLE_WEIGHTS[form]).any():
        raise ValueError(f"{form}: a weight is beyond ±{WHOLE_WEIGHTS[form]}")
    scale, bias = pad_channels(parameters.scale), pad_channels(parameters.bias)
    if form == "mult_fp32":
        return pack_panels(values), bias
    if form == "mult_bf16":
        return pack_panels(values.bfloat16().view(torch.int16), BF16_GROUP), bias
    if form in ("shift_fp32", "shift_bf16"):
        group = BF16_GROUP if form == "shift_bf16" else 1
        return pack_panels(pow2_to_byte(values), group), scale, bias
    # ±2^p with p >= exponent_min is a whole number once multiplied by 2^-exponent_min.
    unit = 2.0 ** FORMS[form].get("exponent_min", 0)
    whole = (values / unit).to(torch.int32)
    if form == "shift_int8_wide":
        high = whole.abs() >= 1 << PLANE_EXPONENTS
        planes = [whole * ~high, (whole >> PLANE_EXPONENTS) * high]
        panels = whole_to_byte(pack_panels(whole, DOT_GROUP))
    else:
        planes = [whole]
        panels = pack_panels(whole.to(torch.int8), DOT_GROUP)
    offset = torch.cat([pad_channels(128 * plane.sum(dim=1)) for plane in planes]).to(torch.int32)
    if form == "shift_int4":
        panels = pack_nibbles(panels)
    if form == "add_int8":
        panels = pack_bits(panels)
    return panels, scale * unit, bias, offset


def whole_to_byte(whole: Tensor) -> Tensor:
    """Encodes ±2^p, p in 0..13, as ``sign << 7 | p``.

    Args:
        whole: int32, any shape. A 0, as padding has it, is written as p = 15.

    Returns:
        int8, same shape.
    """
    exponent = torch.frexp(whole.abs().float()).exponent - 1
    exponent = torch.where(whole == 0, 15, exponent)
    return (exponent | ((whole < 0).int() << 7)).to(torch.uint8).view(torch.int8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs ±2^p, p in 0..6, as ``sign << 3 | p``, two to a byte.

    The first half of each run of ``NIBBLE_RUN`` goes into the low halves of the bytes, so that one
    mask and one shift unpack a vector in order.

    Args:
        codes: int8 ``(..., width)``, width a multiple of ``NIBBLE_RUN``. A 0, as padding has it,
            is written as p = 7.

    Returns:
        uint8 ``(..., width / 2)``.
    """
    exponent = torch.frexp(codes.abs().float()).exponent - 1
    exponent = torch.where(codes == 0, 7, exponent)
    nibbles = (exponent | ((codes < 0).int() << 3)).to(torch.uint8)
    low, high = nibbles.unflatten(-1, (-1, 2, NIBBLE_RUN // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of ``pack_nibbles``: int8 ``(..., 2 * width)``."""
    runs = packed.unflatten(-1, (-1, NIBBLE_RUN // 2))
    nibbles = torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3).int()
    return ((1 << (nibbles & 7) & 127) * (1 - 2 * (nibbles >> 3))).to(torch.int8)


def pack_bits(codes: Tensor) -> Tensor:
    """Packs the signs of ±1, eight to a byte, the first into the lowest bit.

    Args:
        codes: int8 ``(..., width)``, width a multiple of ``BYTE_BITS``. A 0, as padding has it, is
            written as -1.

    Returns:
        uint8 ``(..., width / 8)``.
    """
    bits = (codes > 0).unflatten(-1, (-1, BYTE_BITS)).int()
    return (bits << torch.arange(BYTE_BITS)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Inverse of ``pack_bits``: int8 ``(..., 8 * width)``."""
    bits = packed[..., None].int() >> torch.arange(BYTE_BITS) & 1
    return (2 * bits - 1).flatten(-2).to(torch.int8)
