import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels.forms import FORMS
from kernels.packing import byte_to_pow2, pack_linear, pow2_to_byte, quantise_rows
from reparam.add_linear import ADD_FORMS
from reparam.fake_quantise import straight_through
from reparam.hashing import binarise, code_source
from reparam.linear_forms import linear_in_form
from reparam.mult import MULT_FORMS, MultLinear
from reparam.shift import SHIFT_FORMS, ShiftLinear


def make_linear(k, n, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


def layers(linear):
    return [ShiftLinear.from_linear(linear, f, v) for f in SHIFT_FORMS for v in ("Q", "PS")] + [
        linear_in_form(linear, form) for form in (*MULT_FORMS, *ADD_FORMS)
    ]


def oracle(parameters, x):
    """What a kernel computes from exported parameters, in float64."""
    w = parameters.values.double().numpy()
    scale, bias = parameters.scale.double().numpy(), parameters.bias.double().numpy()
    if "quantise" in FORMS[parameters.form]["fused"]:
        codes, x_scale = quantise_rows(x)
        return (codes.double().numpy() @ w.T) * x_scale.double().numpy() * scale + bias
    if "cast" in FORMS[parameters.form]["fused"]:
        x = x.bfloat16()
    return (x.double().numpy() @ w.T) * scale + bias


@settings(max_examples=25)
@given(
    m=st.integers(1, 9),
    k=st.integers(1, 40),
    n=st.integers(1, 20),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_is_what_the_exported_codes_give(m, k, n, bias, seed):
    linear = make_linear(k, n, bias, seed)
    x = torch.randn(m, k) * 10
    for layer in layers(linear):
        expected = oracle(layer.export(), x)
        error = np.abs(layer(x).detach().numpy() - expected).max()
        assert error <= 1e-5 * (1 + np.abs(expected).max()), layer


@pytest.mark.parametrize("form", SHIFT_FORMS)
@pytest.mark.parametrize("variant", ["Q", "PS"])
def test_exported_values_are_powers_of_two_in_range_and_near_the_weight(form, variant):
    linear = make_linear(48, 8)
    parameters = ShiftLinear.from_linear(linear, form, variant).export()
    exponent = torch.log2(parameters.values.abs())
    assert torch.equal(byte_to_pow2(pow2_to_byte(parameters.values)), parameters.values)
    assert exponent.min() >= FORMS[form]["exponent_min"]
    assert exponent.max() == FORMS[form]["exponent_max"]
    ratio = (parameters.weight / linear.weight.detach())[exponent > FORMS[form]["exponent_min"]]
    assert ((ratio > 2**-0.51) & (ratio < 2**0.51)).all()


def test_ps_keeps_values_in_range_when_the_exponent_leaves_it():
    layer = ShiftLinear.from_linear(make_linear(8, 4), "shift_int8", "PS")
    with torch.no_grad():
        layer.exponent[0] = 3.0
        layer.exponent[1] = -20.0
        layer.sign[2] = -0.3
    values = layer.export().values
    assert (values[0].abs() == 1).all() and (values[1].abs() == 2.0**-6).all()
    assert (values[2] < 0).all()


def test_gradients_reach_every_parameter_and_the_input():
    linear = make_linear(16, 8)
    for layer in layers(linear):
        x = torch.randn(5, 16, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (layer, name)


@pytest.mark.parametrize("form", SHIFT_FORMS)
@pytest.mark.parametrize("variant", ["Q", "PS"])
@pytest.mark.parametrize("bits", range(3, 9))
def test_bits_narrow_the_exponents_and_export_exactly(form, variant, bits):
    layer = ShiftLinear.from_linear(make_linear(64, 8), form, variant, bits)
    lowest = max(FORMS[form]["exponent_min"], 1 - 2 ** (bits - 1))
    exponent = torch.log2(layer.export().values.abs())
    assert exponent.min() >= lowest and exponent.max() == 0
    # A narrower range is a subset of the form's own: packing it loses nothing.
    packed = pack_linear(layer.export())
    assert len(packed) == (4 if "int" in form else 3)
    if bits == 3:
        assert exponent.min() == -3
    with pytest.raises(ValueError, match="bits"):
        ShiftLinear.from_linear(make_linear(4, 4), form, variant, bits + 6)


@pytest.mark.parametrize("form", ["shift_fp32", "shift_int8", "mult_int8", "mult_bf16", "add_int8"])
def test_gradient_is_that_of_the_linear_it_stands_for(form):
    linear = make_linear(16, 8)
    layer = linear_in_form(linear, form)
    x, weights = torch.randn(5, 16), torch.randn(5, 8)
    seen = quantise_rows(x)[0] * quantise_rows(x)[1] if "int8" in form else x
    seen = x.bfloat16().float() if form == "mult_bf16" else seen
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weights.T @ seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["Q", "PS"])
def test_training_brings_the_loss_down(variant):
    torch.manual_seed(1)
    x, target = torch.randn(64, 8), make_linear(8, 4, seed=2)
    layer = ShiftLinear.from_linear(make_linear(8, 4, seed=3), "shift_fp32", variant)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        loss = (layer(x) - target(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_zero_channels_and_zero_rows_give_the_bias_and_no_nan():
    linear = make_linear(8, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    for layer in layers(linear):
        x = torch.zeros(2, 8, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        torch.testing.assert_close(y, linear.bias.detach().expand(2, -1))
        assert all(p.grad.isfinite().all() for p in [x, *layer.parameters()])
    assert MultLinear.from_linear(linear, "mult_int8")(torch.ones(1, 8))[0, 1] == linear.bias[1]


def test_the_start_is_a_copy_and_the_state_dict_round_trips():
    linear = make_linear(8, 4)
    before = copy.deepcopy(linear.state_dict())
    for layer, fresh in zip(layers(linear), layers(make_linear(8, 4, seed=9))):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(1)
        fresh.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(fresh.export().weight, layer.export().weight)
    assert all(torch.equal(before[name], linear.state_dict()[name]) for name in before)


def test_unknown_forms_are_refused():
    linear = make_linear(4, 4)
    with pytest.raises(ValueError, match=r"mult_int8.*shift_fp32"):
        ShiftLinear.from_linear(linear, "mult_int8")
    with pytest.raises(ValueError, match="shift_int8"):
        MultLinear.from_linear(linear, "shift_int8")
    with pytest.raises(ValueError, match="variant"):
        ShiftLinear.from_linear(linear, "shift_int8", "R")


def test_straight_through_returns_the_value_bit_for_bit():
    surrogate = torch.tensor([1e8, 0.1], requires_grad=True)
    value = torch.tensor([0.3, 7.7])
    out = straight_through(surrogate, value)
    out.backward(torch.tensor([2.0, 3.0]))
    assert torch.equal(out, value) and torch.equal(surrogate.grad, torch.tensor([2.0, 3.0]))


def test_binarise_codes_and_clipped_gradient():
    x = torch.tensor([-2.0, -0.7, -0.2, 0.0, 0.2, 0.7, 2.0], requires_grad=True)
    pm1 = binarise(x, "pm1")
    assert pm1.tolist() == [-1, -1, -1, -1, 1, 1, 1]
    assert torch.autograd.grad(pm1.sum(), x)[0].tolist() == [0, 1, 1, 1, 1, 1, 0]
    zero_one = binarise(x, "01")
    assert zero_one.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert torch.autograd.grad(zero_one.sum(), x)[0].tolist() == [0, 0, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="alphabet"):
        binarise(x, "real")


def test_zero_one_codes_are_set_above_the_mean_of_the_features():
    x = torch.randn(5, 16) + 3
    assert torch.equal(binarise(code_source(x, "01"), "01") == 1, x > x.mean(-1, keepdim=True))
    assert torch.equal(code_source(x, "pm1"), x)
