"""1×1 convolutions convert, train, deploy and are charged as the linears that they are."""

import pytest
import timm
import torch
from timm.models import register_model
from timm.models.metaformer import MetaFormer
from torch import nn

from reparam.add_attention import AddAttention
from reparam.convert import LayerConfig, LayerRule, ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed import DeployedLinear
from reparam.deployed_file import load_deployed, save_deployed
from reparam.deployed_mlps import DeployedMlp, DeployedMoE
from reparam.model_energy import modelled_energy_mj
from reparam.moe import MoEMlp
from reparam.mult import MultLinear
from reparam.plan import Plan
from reparam.pointwise import Pointwise, as_linear, is_pointwise
from reparam.shift import ShiftLinear

SIDE = 64


@register_model
def small_poolformer(pretrained=False, num_classes=5, **ignored):
    """As poolformer, of a size for tests."""
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "mlp_act": nn.GELU}
    return MetaFormer(**sizes, layer_scale_init_values=1.0, num_classes=num_classes)


def poolformer():
    """MLPs of two 1×1 convolutions."""
    torch.manual_seed(0)
    return timm.create_model("small_poolformer").eval()


def coatnet():
    """Attention whose projections are 1×1 convolutions, and squeeze-and-excite."""
    torch.manual_seed(0)
    return timm.create_model("test_coatnet", num_classes=5).eval()


def images(number=2, side=SIDE):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution(bias):
    conv, x = nn.Conv2d(5, 7, 1, bias=bias), torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(Pointwise(as_linear(conv))(x), conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Linear(4, 4),
        type("Standardised", (nn.Conv2d,), {})(4, 4, 1),
    ],
)
def test_any_other_is_none(conv):
    assert not is_pointwise(conv)


@torch.no_grad()
def test_each_is_converted_with_its_weights():
    model, x = poolformer(), images()
    expected = model(x)
    done = reparameterize_(model, ReparamConfig(mlp="mult_fp32"))
    assert list(done.converted.values()) == ["mult_fp32"] * 8
    assert isinstance(model.stages[0].blocks[0].mlp.fc1, Pointwise)
    assert isinstance(model.stages[0].blocks[0].mlp.fc1.linear, MultLinear)
    torch.testing.assert_close(model(x), expected)
    again = reparameterize_(model, ReparamConfig(mlp="mult_fp32"))
    assert again.converted == {} and len(again.skipped) >= 8


def test_rules_name_it_as_the_model_does():
    rule = LayerRule(match="stages.1.*.fc2", config=LayerConfig(mlp="shift_fp32"))
    model = poolformer()
    done = reparameterize_(model, ReparamConfig(rules=(rule,), mlp="mult_fp32"))
    fc2 = {fqn: what for fqn, what in done.converted.items() if "shift" in what}
    assert fc2 == {"stages.1.blocks.0.mlp.fc2": "shift_fp32 (Q)"}


def test_what_sees_an_image_as_one_pixel_stays():
    model = coatnet()
    done = reparameterize_(model, ReparamConfig(attention_linears="shift_int8", mlp="shift_int8"))
    stayed = {fqn for fqn, why in done.skipped.items() if why == "sees an image as one pixel"}
    assert stayed and all(".se." in fqn for fqn in stayed)
    assert any(fqn.endswith("attn.qkv") for fqn in done.converted)
    # The last stage of an image of 32 pixels is one, for shifts and mixtures alike.
    for mlp in ("shift_int8", "moe"):
        done = reparameterize_(poolformer(), ReparamConfig(mlp=mlp), example=images(side=32))
        stayed = {fqn for fqn, why in done.skipped.items() if why == "sees an image as one pixel"}
        assert stayed and all(fqn.startswith("stages.3.") for fqn in stayed)
        assert not any(fqn.startswith("stages.3.") for fqn in done.converted)


def test_a_mixture_of_such_mlps_trains():
    model = poolformer()
    done = reparameterize_(model, ReparamConfig(mlp="moe"))
    assert set(done.converted) == {f"stages.{n}.blocks.0.mlp" for n in range(4)}
    moe = model.stages[0].blocks[0].mlp.linear
    assert isinstance(moe, MoEMlp)
    forms = {name: expert.fc1.form for name, expert in moe.experts.items()}
    assert forms == {"mult": "mult_int8", "shift": "shift_int8"}
    model.train()(images()).square().sum().backward()
    assert moe.router.gate.weight.grad.abs().sum() > 0
    assert moe.routing.choice.shape == (2 * (SIDE // 4) ** 2,)


@torch.no_grad()
@pytest.mark.parametrize(("mlp", "kind"), [("moe", DeployedMoE), ("shift_int8", DeployedMlp)])
def test_deployed_it_is_one_kernel_saved_and_planned(mlp, kind, tmp_path):
    model, x = poolformer(), images()
    reparameterize_(model, ReparamConfig(mlp=mlp))
    deployed = deploy(model)
    for stage in deployed.stages:
        assert isinstance(stage.blocks[0].mlp, Pointwise)
        assert isinstance(stage.blocks[0].mlp.linear, kind)
    expected = model(x)
    assert (deployed(x) - expected).norm() < 0.02 * expected.norm()
    others = images(3)[1:]
    for made in (Plan(deployed, x), torch.export.export(deployed, (x,)).module()):
        torch.testing.assert_close(made(others), deployed(others), rtol=1e-4, atol=1e-5)
    create = {"model_name": "small_poolformer"}
    save_deployed(deployed, tmp_path / "model.json", create)
    assert torch.equal(load_deployed(tmp_path / "model.json")(x), deployed(x))


@torch.no_grad()
def test_deployed_layers_agree_one_by_one():
    model = coatnet()
    x = torch.randn(1, 3, *timm.data.resolve_data_config({}, model=model)["input_size"][1:])
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8"))
    layers = deploy(model, fuse=False)
    seen = {}

    def look(part, args, out):
        seen[part] = args[0], out

    names = {part: name for name, part in layers.named_modules() if isinstance(part, Pointwise)}
    for part in names:
        assert isinstance(part.linear, DeployedLinear)
        part.register_forward_hook(look)
    layers(x)
    assert len(seen) > 1
    for part, (given, out) in seen.items():
        trained = model.get_submodule(names[part])
        assert isinstance(trained.linear, ShiftLinear)
        torch.testing.assert_close(out, trained(given), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(part, AddAttention) for part in layers.modules())


def test_it_is_charged_alike_before_and_after():
    model, x = poolformer(), images()
    before = modelled_energy_mj(model, x)
    reparameterize_(model, ReparamConfig(mlp="mult_fp32"))
    assert modelled_energy_mj(model, x) == pytest.approx(before)
    model = poolformer()
    reparameterize_(model, ReparamConfig(mlp="shift_int8"))
    assert modelled_energy_mj(model, x) < before
