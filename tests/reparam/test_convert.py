import copy

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from kernels.forms import FORMS
from reparam.add_attention import AddAttention
from reparam.convert import ConversionError, LayerConfig, LayerRule, ReparamConfig, reparameterize_
from reparam.linear_forms import LINEAR_FORMS
from reparam.moe import MoEMlp, moe_layers
from reparam.mult import MultLinear
from reparam.shift import ShiftLinear

STAGE1 = ReparamConfig(attention="add")
SHIFT = ReparamConfig(attention_linears="shift_int8", mlp="shift_fp32")
MOE = ReparamConfig(attention_linears="shift_int8", mlp="moe")
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**more):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **more})


def pvt():
    torch.manual_seed(0)
    return timm.create_model("pvt_v2_b0", num_classes=3, depths=(1, 1, 1, 1))


def types(model, kind):
    return {fqn for fqn, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("make", [vit, pvt])
@pytest.mark.parametrize("stage2", [SHIFT, MOE, ReparamConfig(mlp="moe", shift_variant="PS")])
def test_both_stages_train_and_leave_the_head_alone(make, stage2):
    model = make()
    head = copy.deepcopy(model.get_classifier().state_dict())
    first = reparameterize_(model, STAGE1)
    assert types(model, AddAttention) == set(first.converted) and first.converted
    second = reparameterize_(model, stage2)
    assert all(isinstance(m, AddAttention) for n, m in model.named_modules() if n.endswith(".attn"))
    for fqn in second.converted:
        assert isinstance(model.get_submodule(fqn), ShiftLinear | MoEMlp)
    y = model.train()(IMAGE)
    assert y.shape == (2, 3) and y.isfinite().all()
    y.square().sum().backward()
    assert type(model.get_classifier()) is nn.Linear
    assert all(torch.equal(head[n], t) for n, t in model.get_classifier().state_dict().items())
    assert all(type(moe.router.gate) is nn.Linear for _, moe in moe_layers(model))
    assert first.skipped["head"] == "classifier head, never converted"
    assert first.skipped["patch_embed"] == "patch embedding, never converted"


def test_what_is_converted_is_named():
    model = vit()
    assert reparameterize_(model, STAGE1).converted == {
        "blocks.0.attn": "add attention (pm1)",
        "blocks.1.attn": "add attention (pm1)",
    }
    converted = reparameterize_(model, MOE).converted
    assert converted["blocks.0.attn.qkv"] == "shift_int8 (Q)"
    assert converted["blocks.1.mlp"] == "MoE (mult mult_int8, shift shift_int8)"
    assert types(model, MoEMlp) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert type(model.blocks[0].mlp.experts["mult"].fc1) is MultLinear
    assert type(model.blocks[0].mlp.experts["shift"].fc2) is ShiftLinear


def test_pvt_keeps_its_convolution_and_reports_the_dropped_spatial_reduction():
    model = pvt()
    converted = reparameterize_(model, STAGE1).converted
    assert "without spatial reduction (sr, norm)" in converted["stages.0.blocks.0.attn"]
    assert "without" not in converted["stages.3.blocks.0.attn"]
    dwconv = model.stages[0].blocks[0].mlp.dwconv
    reparameterize_(model, MOE)
    mlp = model.stages[0].blocks[0].mlp
    assert mlp.dwconv is dwconv and type(mlp.fc1) is type(mlp.fc2) is MoEMlp
    assert type(mlp.fc1.experts["shift"]) is ShiftLinear


def test_both_stages_at_once_are_the_same_as_one_after_the_other():
    at_once, stepwise = vit(), vit()
    reparameterize_(at_once, SHIFT.model_copy(update={"attention": "add"}))
    reparameterize_(stepwise, STAGE1)
    reparameterize_(stepwise, SHIFT)
    assert types(at_once, nn.Linear) == {"head"}
    assert torch.equal(at_once.eval()(IMAGE), stepwise.eval()(IMAGE))


def test_linears_of_kept_attention_are_converted():
    model = pvt()
    reparameterize_(model, ReparamConfig(attention_linears="shift_fp32"))
    attention = model.stages[0].blocks[0].attn
    assert not isinstance(attention, AddAttention)
    assert all(type(getattr(attention, n)) is ShiftLinear for n in ("q", "kv", "proj"))
    assert model.eval()(IMAGE).isfinite().all()


def test_filter_fn_restricts():
    model = vit()
    done = reparameterize_(model, STAGE1, lambda module, fqn: fqn != "blocks.1.attn")
    assert set(done.converted) == {"blocks.0.attn"}
    assert done.skipped["blocks.1.attn"] == "rejected by filter_fn"
    assert not isinstance(model.blocks[1].attn, AddAttention)
    asked = {}
    reparameterize_(model, SHIFT, lambda module, fqn: asked.setdefault(fqn, module) is not None)
    assert set(asked) == {
        f"blocks.{i}.{part}"
        for i in range(2)
        for part in ("attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.fc2")
    }


@pytest.mark.parametrize("config", [STAGE1, SHIFT, MOE])
def test_a_rule_that_matched_nothing_fails_and_changes_nothing(config):
    model = vit()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ConversionError, match=r"matched nothing.*rejected by filter_fn"):
        reparameterize_(model, config, lambda module, fqn: False)
    only_mlp = config.model_copy(update={"mlp": "shift_int8", "attention": "add"})
    with pytest.raises(ConversionError, match="attention: 'add' matched nothing"):
        reparameterize_(model, only_mlp, lambda module, fqn: "mlp" in fqn)
    assert before == {name: id(module) for name, module in model.named_modules()}


def test_models_without_attention_or_of_no_timm_fail():
    with pytest.raises(ConversionError, match="attention: 'add' matched nothing in ResNet"):
        reparameterize_(timm.create_model("resnet10t"), STAGE1)
    with pytest.raises(ConversionError, match="get_classifier"):
        reparameterize_(nn.Linear(2, 2), STAGE1)
    with pytest.raises(ConversionError, match="nothing to do"):
        reparameterize_(vit(), ReparamConfig())


def test_a_second_time_is_skipped_with_the_reason():
    model = vit()
    full = MOE.model_copy(update={"attention": "add"})
    reparameterize_(model, full)
    before = {name: id(module) for name, module in model.named_modules()}
    again = reparameterize_(model, full)
    assert again.converted == {}
    assert again.skipped["blocks.0.attn"] == "is add attention (pm1) already"
    assert again.skipped["blocks.0.mlp"] == "is MoE already"
    assert before == {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ConversionError, match="codes pm1"):
        reparameterize_(model, ReparamConfig(attention="add", alphabet="01"))
    with pytest.raises(ConversionError, match=r"mlp: 'shift_int8' matched nothing.*is MoE"):
        reparameterize_(model, ReparamConfig(mlp="shift_int8"))


def test_an_attention_that_pools_is_not_taken_for_self_attention():
    model = vit(global_pool="map", class_token=False)
    skipped = reparameterize_(model, STAGE1).skipped
    assert skipped["attn_pool"].startswith("queries are not of the same tokens as keys")
    assert not isinstance(model.attn_pool, AddAttention)
    assert model(IMAGE).isfinite().all()


def test_both_heads_of_a_distilled_model_are_protected():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=16, num_heads=2, depth=1
    )
    skipped = reparameterize_(model, STAGE1).skipped
    assert {"head", "head_dist"} <= set(skipped)
    assert model.eval()(IMAGE).shape == (2, 1000)


@pytest.mark.parametrize("config", [SHIFT, MOE, MOE.model_copy(update={"shift_variant": "PS"})])
def test_state_dict_round_trips_strictly(config):
    both = config.model_copy(update={"attention": "add"})
    model, fresh = vit(), vit()
    reparameterize_(model, both)
    reparameterize_(fresh, both)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(IMAGE), fresh.eval()(IMAGE))


@pytest.mark.parametrize(
    "bad",
    [
        {"attention": "hash"},
        {"mlp": "shift_int3"},
        {"shift_bits": 2},
        {"rules": [{"match": "re:(", "config": {}}]},
        {"experts": {"mult": "mult_int8"}},
        {"experts": {"mult": "mult_int8", "shift": "shift_int3"}},
        {"alphabets": "pm1"},
        {"activation_clip": "calibrated", "mlp": "moe"},
    ],
)
def test_bad_configs_are_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ReparamConfig(**bad)


def test_a_weight_that_is_used_without_its_linear_is_skipped():
    model = vit(depth=1)
    mlp = model.blocks[0].mlp
    mlp.act = nn.Sequential(nn.GELU())
    mlp.act.add_module("unused", nn.Linear(64, 64))
    mlp.act.forward = lambda x: nn.functional.linear(x, mlp.act.unused.weight)
    done = reparameterize_(model, ReparamConfig(mlp="shift_int8"))
    assert done.skipped["blocks.0.mlp.act.unused"] == "its weight is used without calling it"
    assert {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} == set(done.converted)


@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_every_form_converts_and_trains(form):
    model = vit(depth=1)
    reparameterize_(model, ReparamConfig(attention_linears=form, mlp=form))
    assert model.blocks[0].attn.qkv.form == form
    model.train()(IMAGE).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_first_rule_that_matches_wins():
    keep = LayerConfig()
    narrow = LayerConfig(attention_linears="shift_int4", mlp="shift_int4", shift_bits=3)
    config = ReparamConfig(
        attention_linears="shift_int8",
        mlp="mult_int8",
        rules=(
            LayerRule(match="blocks.0.attn.qkv", config=keep),
            LayerRule(match=r"re:blocks\.0\..*", config=narrow),
            LayerRule(match="blocks.0.mlp.*", config=keep),
        ),
    )
    model = vit()
    with pytest.raises(ConversionError, match=r"rules: 'blocks.0.mlp.\*' matched nothing"):
        reparameterize_(model, config)
    assert types(model, ShiftLinear) == set()
    done = reparameterize_(model, config.model_copy(update={"rules": config.rules[:2]}))
    first, second = model.blocks[0], model.blocks[1]
    assert type(first.attn.qkv) is nn.Linear and "blocks.0.attn.qkv" not in done.converted
    assert first.attn.proj.form == first.mlp.fc1.form == "shift_int4"
    assert first.mlp.fc1.exponent_min == -3
    assert second.attn.qkv.form == "shift_int8" and second.mlp.fc2.form == "mult_int8"


def test_moe_of_single_linears_and_clips_are_built_where_asked():
    model = vit(depth=1)
    config = ReparamConfig(
        attention_linears="shift_int8",
        mlp="moe",
        moe_granularity="linear",
        activation_clip="learned",
    )
    reparameterize_(model, config)
    assert types(model, MoEMlp) == {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    qkv = model.blocks[0].attn.qkv
    assert isinstance(qkv.linear, ShiftLinear) and "quantise" in FORMS[qkv.linear.form]["fused"]
    with torch.no_grad():
        qkv.clip.limit.fill_(0.5)
    model(IMAGE).square().sum().backward()
    assert qkv.clip.limit.grad.abs() > 0


def test_an_example_that_the_model_does_not_take_is_named():
    with pytest.raises(ConversionError, match=r"example: .* does not take \(1, 5, 32, 32\)"):
        reparameterize_(vit(), STAGE1, example=torch.zeros(1, 5, 32, 32))
