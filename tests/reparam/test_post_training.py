import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels.packing import nearest_pow2
from reparam.convert import ReparamConfig, reparameterize_
from reparam.linear_forms import linear_in_form
from reparam.post_training import best_codes, post_training_
from reparam.shift import SHIFT_FORMS


def correlated(rows, k, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, k) @ torch.randn(k, k) / k**0.5 + 0.3


def model_of(linear):
    model = nn.Sequential(linear)
    return model.eval()


@settings(max_examples=10)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 20),
    exponent_min=st.sampled_from([-3, -6, -15]),
    feedback=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_was_chosen_is_in_the_alphabet_and_stays_when_rounded_again(
    n, k, exponent_min, feedback, seed
):
    x = correlated(32, k, seed)
    weight = torch.randn(n, k)
    made = best_codes(weight, x, exponent_min, feedback)
    values, scale = nearest_pow2(made, exponent_min, 0)
    assert torch.equal(values * scale[:, None], made)
    plain, scale = nearest_pow2(weight, exponent_min, 0)
    error = ((made - weight) @ x.T).square().sum(1)
    assert (error <= ((plain * scale[:, None] - weight) @ x.T).square().sum(1) * 1.01 + 1e-5).all()


@pytest.mark.parametrize("form", SHIFT_FORMS)
@pytest.mark.parametrize("bits", [3, None])
def test_fitting_halves_the_error_and_feedback_does_better_than_scales(form, bits):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 24), correlated(512, 48)
    errors = []
    for feedback in (False, True):
        model = model_of(linear_in_form(linear, form, bits=bits))
        fit = post_training_(model, x, feedback)["0"]
        with torch.no_grad():
            got, expected = model(x), linear(x)
        assert fit.after == pytest.approx(float((got - expected).norm() / expected.norm()), rel=0.2)
        errors.append(fit.after / fit.before)
    assert errors[1] < errors[0] < 1.001 and errors[1] < 0.7


def test_a_clip_is_found_where_few_activations_are_large():
    torch.manual_seed(0)
    linear = nn.Linear(64, 16)
    x = torch.randn(256, 64)
    x[:, 0] = 60.0 * torch.rand(256).round()
    with torch.no_grad():
        linear.weight[:, 0] = 0
    model = model_of(linear_in_form(linear, "shift_int8", clip="calibrated"))
    fit = post_training_(model, x)["0.linear"]
    limit = float(model[0].clip.limit)
    assert limit < 60 and fit.after < fit.before
    assert torch.isinf(linear_in_form(linear, "shift_int8", clip="learned").clip.limit)
    assert not isinstance(linear_in_form(linear, "shift_fp32", clip="learned"), nn.Sequential)


@torch.no_grad()
def test_a_whole_model_comes_closer_to_the_original_and_ps_is_left_alone_with_the_reason():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 7}
    state = timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()
    x = torch.randn(8, 3, 32, 32)

    def made(variant=None):
        model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
        model.load_state_dict(state)
        if variant:
            config = ReparamConfig(
                attention_linears="shift_int8", mlp="shift_int8", shift_variant=variant
            )
            reparameterize_(model, config)
        return model

    expected = made()(x)
    model = made("Q").train()
    before = (model.eval()(x) - expected).norm()
    fits = post_training_(model, x)
    assert len(fits) == 8 and all(fit.after <= fit.before for fit in fits.values())
    assert (model(x) - expected).norm() < 0.7 * before
    fits = post_training_(made("PS"), x)
    assert all(fit.before is None and "PS" in fit.reason for fit in fits.values())
