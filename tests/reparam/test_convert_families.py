"""Conversion of the many kinds of timm models: what is taken, kept, refused, and why."""

import copy

import pytest
import timm
import torch
from torch import nn

from reparam.add_attention import AddAttention, LinearCore
from reparam.attention_structure import example_input, trace
from reparam.coded_attention import CodedAttention
from reparam.convert import ConversionError, ReparamConfig, reparameterize_
from reparam.moe import moe_layers
from reparam.mult import MultLinear
from reparam.quadratic_attention import QuadraticCore
from reparam.shift import ShiftLinear

STAGE1 = ReparamConfig(attention="add")
MOE = ReparamConfig(attention_linears="shift_int8", mlp="moe")

# One small model of each kind: what is compared, in windows or with biases, by which class.
FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (2, 1)},
    "swinv2_cr_tiny_224": {"img_size": 56, "window_size": 7, "depths": (1, 1, 1, 1)},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 1},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 24, "num_heads": 2, "depth": 1},
    "cait_xxs24_224": {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 1},
    "xcit_nano_12_p16_224": {"depth": 1},
    "levit_128s": {},
    "convit_tiny": {"depth": 2, "local_up_to_layer": 1},
    "coat_lite_tiny": {},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "edgenext_xx_small": {},
    "efficientvit_m0": {},
    "poolformer_s12": {},
    "convnext_atto": {},
    "mixer_s16_224": {},
}


def small(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **FAMILIES[name]).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_converts_or_says_why_not(name):
    model = small(name)
    x = example_input(model)
    attentions = trace(model, x).attentions
    expected = model(x)
    for attention, drop_bias in (("quadratic", False), ("add", True)):
        model = small(name)
        config = ReparamConfig(attention=attention, drop_bias=drop_bias)
        try:
            done = reparameterize_(model, config)
        except ConversionError as error:
            assert "matched nothing" in str(error)
            assert torch.equal(model(x), expected)
            continue
        assert set(attentions) <= set(done.converted) | set(done.skipped)
        assert all(done.skipped.values())
        y = model(x)
        assert y.shape == expected.shape and y.isfinite().all()
        for fqn in done.converted:
            assert isinstance(model.get_submodule(fqn), AddAttention | CodedAttention)
        attentions_left = {fqn for fqn in attentions if fqn not in done.converted}
        assert attentions_left <= set(done.skipped)
    model = small(name)
    try:
        done = reparameterize_(model, ReparamConfig(mlp="shift_int8"))
        assert all("shift_int8" in what for what in done.converted.values())
    except ConversionError as error:
        assert "is Conv2d, not nn.Linear" in str(error)
    assert model(x).shape == expected.shape


@torch.no_grad()
def test_windows_keep_bias_and_mask_in_the_quadratic_form_and_refuse_the_linear_one():
    model = small("swin_tiny_patch4_window7_224")
    x = torch.randn(2, 3, 56, 56)
    with pytest.raises(ConversionError, match=r"position bias or mask.*drop_bias"):
        reparameterize_(model, STAGE1)
    reparameterize_(model, ReparamConfig(attention="quadratic"))
    attention = model.layers[0].blocks[1].attn
    assert isinstance(attention, CodedAttention) and isinstance(attention.core, QuadraticCore)
    before = model(x)
    attention.relative_position_bias_table.add_(torch.randn(169, 1))
    assert not torch.allclose(model(x), before)
    # Tokens of different windows do not see each other: the shifted windows' mask is kept.
    windows = torch.randn(4, 49, 24)
    mask = torch.zeros(4, 49, 49)
    mask[:, :, 48] = -100
    changed = windows.clone()
    changed[:, 48] = torch.randn(24)
    y, z = attention(windows, mask=mask), attention(changed, mask=mask)
    torch.testing.assert_close(y[:, :48], z[:, :48])
    model = small("swin_tiny_patch4_window7_224")
    done = reparameterize_(model, ReparamConfig(attention="add", drop_bias=True))
    assert isinstance(model.layers[0].blocks[1].attn.core, LinearCore)
    assert all("without position bias and mask" in what for what in done.converted.values())
    assert model(x).isfinite().all()


@torch.no_grad()
def test_a_converted_attention_keeps_class_names_and_state():
    model, fresh = small("beit_base_patch16_224"), small("beit_base_patch16_224")
    kind, names = type(model.blocks[0].attn), set(model.state_dict())
    config = ReparamConfig(attention="quadratic", attention_linears="shift_int8")
    reparameterize_(model, config)
    attention = model.blocks[0].attn
    assert isinstance(attention, kind) and isinstance(attention.qkv, ShiftLinear)
    assert names <= set(model.state_dict())
    reparameterize_(fresh, config)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(fresh(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    again = reparameterize_(model, config)
    assert again.converted == {}
    assert again.skipped["blocks.0.attn"] == "is quadratic attention (pm1) already"
    with pytest.raises(ConversionError, match="is quadratic attention"):
        reparameterize_(model, STAGE1)


def test_a_bias_held_apart_does_not_hide_the_linear():
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=24, depths=(1,),
        num_heads=(2,),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    reparameterize_(model, ReparamConfig(attention_linears="mult_fp32"))
    assert type(model.layers[0].blocks[0].attn.qkv) is MultLinear
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_calibration_brings_linear_attention_closer_to_the_original(name):
    model = small(name)
    x = torch.randn(2, *example_input(model).shape[1:])
    done = reparameterize_(model, STAGE1, example=x)
    assert set(done.calibration) == set(done.converted)
    for errors in done.calibration.values():
        assert errors.after < 0.7 * errors.before
    assert model(x).isfinite().all()


@pytest.mark.parametrize(
    "name, changes, positions",
    [
        (
            "vit_srelpos_small_patch16_224",
            {"depth": 1},
            {"shared_rel_pos.mlp.fc1", "shared_rel_pos.mlp.fc2"},
        ),
        (
            "swinv2_tiny_window8_256",
            {"window_size": 4, "embed_dim": 24, "depths": (1,), "num_heads": (2,)},
            {f"layers.0.blocks.0.attn.cpb_mlp.{i}" for i in (0, 2)},
        ),
    ],
)
@pytest.mark.parametrize("images", [1, 2, 3])
def test_what_makes_position_biases_of_coordinates_is_left_alone(name, changes, positions, images):
    model = timm.create_model(name, img_size=32, num_classes=5, **changes).eval()
    x = torch.randn(images, 3, 32, 32)
    done = reparameterize_(model, MOE, example=x)
    reasons = {fqn: reason for fqn, reason in done.skipped.items() if "any images" in reason}
    assert set(reasons) == positions
    assert all(type(model.get_submodule(fqn)) is nn.Linear for fqn in positions)
    model(x)
    counts = {fqn: int(layer.routing.counts.sum()) for fqn, layer in moe_layers(model)}
    assert counts and all(tokens % images == 0 for tokens in counts.values())
