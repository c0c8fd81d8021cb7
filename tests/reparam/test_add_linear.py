"""Experts and linears that add: weights of one bit."""

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from kernels.packing import pack_bits, pack_linear, unpack_bits
from reparam.add_linear import AddLinear
from reparam.agreement import layer_error
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed_mlps import DeployedMoE
from reparam.moe import moe_layers
from reparam.recipe import Recipe, load_recipe

EXPERTS = {"mult": "mult_int8", "shift": "shift_int4", "add": "add_int8"}


def test_the_scale_leaves_the_least_squared_error():
    torch.manual_seed(0)
    layer = AddLinear.from_linear(nn.Linear(50, 7), "add_int8")
    values, scale = layer.values_and_scale()
    assert set(values.unique().tolist()) == {-1.0, 1.0}

    def error(scale):
        return (values * scale[:, None] - layer.weight).square().sum()

    assert all(error(scale) < error(factor * scale) for factor in (0.99, 1.01))


def test_a_weight_is_a_bit():
    codes = torch.randint(0, 2, (3, 4, 64)) * 2 - 1
    packed = pack_bits(codes.to(torch.int8))
    assert packed.shape == (3, 4, 8) and torch.equal(unpack_bits(packed), codes.to(torch.int8))
    layer = AddLinear.from_linear(nn.Linear(256, 64), "add_int8")
    assert pack_linear(layer.export())[0].nbytes == 256 * 64 // 8


@torch.no_grad()
def test_a_mixture_has_experts_of_every_primitive():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    config = ReparamConfig(attention="add", attention_linears="add_int8", mlp="moe")
    reparameterize_(model, config.model_copy(update={"experts": EXPERTS}))
    for _, layer in moe_layers(model):
        layer.router.gate.weight.normal_(0, 1)
    x = torch.randn(3, 3, 64, 64)
    assert layer_error(model, deploy(model, fuse=False), x) < 1e-4
    deployed = deploy(model)
    assert isinstance(deployed.blocks[0].mlp, DeployedMoE)
    assert all(layer.routing.counts.min() > 0 for _, layer in moe_layers(model))
    # A code within rounding of its threshold may fall on either side.
    assert (deployed(x) - model(x)).norm() < 2e-2 * model(x).norm()


def test_all_of_an_experts_parameters_learn():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    reparameterize_(model, ReparamConfig(mlp="moe", experts=EXPERTS))
    model.train()(torch.randn(16, 3, 32, 32)).square().sum().backward()
    expert = model.blocks[0].mlp.experts["add"]
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in expert.parameters())


def test_a_recipe_may_ask_for_it():
    recipe = load_recipe("digits-quick")[1].model_dump()
    assert Recipe(**recipe | {"experts": EXPERTS}).experts == EXPERTS
    with pytest.raises(ValidationError, match="must begin with 'add'"):
        Recipe(**recipe | {"experts": {"mult": "mult_int8", "shift": "add_int8"}})
