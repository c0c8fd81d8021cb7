import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import packing
from kernels.forms import FORMS

small = st.integers(1, 70)
seeds = st.integers(0, 2**31)


def _normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(small, small, st.sampled_from([1, 4]), seeds)
@settings(max_examples=30)
def test_panels_round_trip(n, k, group, seed):
    w = _normal(seed, n, k)
    panels = packing.pack_panels(w, group)
    assert panels.shape == (-(-n // 32), -(-k // group), 32 * group)
    assert torch.equal(packing.unpack_panels(panels, n, k), w)
    assert torch.isclose(panels.double().sum(), w.double().sum()), "padding must be zero"


@pytest.mark.parametrize("exponent", range(-15, 1))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_bytes_are_sign_and_exponent_of_fp32(sign, exponent):
    value = torch.tensor([sign * 2.0**exponent])
    code = packing.pow2_to_byte(value)
    assert torch.equal(packing.byte_to_pow2(code), value)
    assert int(code.view(torch.uint8)) == (128 if sign < 0 else 0) + exponent + 127


@given(st.integers(1, 4), seeds)
@settings(max_examples=30)
def test_nibbles_round_trip_zeros_of_padding_included(runs, seed):
    generator = torch.Generator().manual_seed(seed)
    power = torch.randint(0, 7, (3, 64 * runs), generator=generator)
    sign = torch.randint(-1, 2, (3, 64 * runs), generator=generator)
    codes = (sign * 2**power).to(torch.int8)
    packed = packing.pack_nibbles(codes)
    assert packed.shape == (3, 32 * runs) and packed.dtype == torch.uint8
    assert torch.equal(packing.unpack_nibbles(packed), codes)


@given(small, small, seeds)
@settings(max_examples=30)
def test_power_of_two_rounding_stays_within_its_range_and_a_factor_of_root_two(n, k, seed):
    weight = _normal(seed, n, k)
    values, scale = packing.nearest_pow2(weight, -6, 0)
    exponents = torch.log2(values.abs())
    assert torch.equal(exponents, exponents.round())
    assert exponents.min() >= -6 and exponents.max() <= 0
    ratio = (values * scale[:, None] / weight).abs()
    above_range = (weight.abs() / scale[:, None]) >= 2.0**-6
    assert (ratio[above_range] <= 2**0.5 * 1.0001).all()
    assert (ratio[above_range] >= 2**-0.5 * 0.9999).all()
    assert torch.equal(torch.sign(values), torch.where(weight < 0, -1.0, 1.0))


@given(small, small, seeds)
@settings(max_examples=30)
def test_row_quantisation_is_within_half_a_step_and_uses_the_whole_range(m, k, seed):
    x = _normal(seed, m, k)
    codes, scale = packing.quantise_rows(x)
    assert torch.equal(codes, codes.round())
    assert torch.equal(codes.abs().amax(dim=1), torch.full((m,), 127.0))
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()


def test_a_row_of_zeros_becomes_zeros():
    codes, scale = packing.quantise_rows(torch.zeros(2, 5))
    assert codes.abs().sum() == 0 and scale.abs().sum() == 0


@pytest.mark.parametrize("form", [f for f in FORMS if FORMS[f]["w_layout"] == "nk"])
def test_quantised_weights_stand_for_the_original(form):
    weight, bias = _normal(0, 40, 50), _normal(1, 40)
    parameters = packing.quantise_weight(form, weight, bias)
    error = (parameters.weight - weight).norm() / weight.norm()
    # Of normal weights a sign and a mean lose √(1 - 2/π).
    assert error < {"mult": 0.02, "shift": 0.25, "add": 0.63}[FORMS[form]["primitive"]]
    assert torch.equal(parameters.bias, bias)
