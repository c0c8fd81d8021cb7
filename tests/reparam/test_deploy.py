import pytest
import timm
import torch
from timm.layers import GluMlp
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.packing import quantise_weight
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy, stored_bytes
from reparam.deployed import DeployedLayerNorm, DeployedLinear
from reparam.deployed_mlps import DeployedDepthwiseMlp, DeployedMoE
from reparam.moe import moe_layers
from reparam.plan import Plan

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_int_mm", "einsum", "mv", "dot")


def _vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=4, **sizes | changes)


def _converted(*configs, model=None):
    model = model or _vit()
    converted = {}
    for config in configs:
        converted |= reparameterize_(model, ReparamConfig(**config)).converted
    return model.eval(), converted


STAGE1 = {"attention": "add"}
SHIFT = {"attention_linears": "shift_int8", "mlp": "shift_int8"}
SHIFT_FP32 = {"attention_linears": "shift_fp32", "mlp": "shift_fp32", "shift_variant": "PS"}
MOE = {"attention_linears": "shift_int8", "mlp": "moe"}


def _off(actual, expected):
    """A code within rounding of its threshold may fall on either side."""
    return float((actual - expected).norm() / expected.norm())


class _Recorder(TorchDispatchMode):
    """Names of the operators that run while one of some modules does."""

    def __init__(self, model, names):
        super().__init__()
        self.inside, self.calls = [], []
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
            module.register_forward_hook(lambda *_: self.inside.pop() and None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.inside:
            self.calls.append(function._schema.name.split("::"))
        return function(*args, **(kwargs or {}))


def _torch_products(recorder):
    return [name for library, name in recorder.calls if library == "aten" and name in PRODUCTS]


@pytest.mark.parametrize("stages", [(STAGE1,), (STAGE1, SHIFT), (STAGE1, MOE)])
def test_no_torch_product_runs_inside_a_converted_layer(stages):
    model, converted = _converted(*stages)
    deployed = deploy(model)
    with _Recorder(deployed, converted) as recorder:
        deployed(torch.randn(3, 1, 16, 16))
    assert not _torch_products(recorder)
    ours = {name for library, name in recorder.calls if library == "shiftadd"}
    assert ours == {"linear", "angular_attention"} | ({"moe"} if MOE in stages else set())


def test_the_recorder_sees_products_of_an_undeployed_model():
    model, converted = _converted(STAGE1, MOE)
    with _Recorder(model, converted) as recorder:
        model(torch.randn(3, 1, 16, 16))
    assert _torch_products(recorder)


@pytest.mark.parametrize(
    "stages", [(STAGE1,), (STAGE1, SHIFT), (STAGE1, SHIFT_FP32), (STAGE1, MOE)]
)
def test_each_deployed_layer_agrees_with_its_training_form(stages):
    model, converted = _converted(*stages)
    deployed = deploy(model, fuse=False)
    seen = {}
    for name in converted:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, (inputs, output))
        )
    with torch.no_grad():
        model(torch.randn(3, 1, 16, 16))
        for name, (inputs, output) in seen.items():
            again = deployed.get_submodule(name)(*inputs)
            torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "name, changes, mlp",
    [
        ("vit_tiny_patch16_224", {"img_size": 48, "depth": 2}, "shift_int8"),
        ("deit3_small_patch16_224", {"img_size": 48, "depth": 2}, "moe"),
        ("pvt_v2_b0", {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2)}, "moe"),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2,), "embed_dim": 48}, "moe"),
    ],
)
def test_a_fused_model_computes_what_the_layers_compute(name, changes, mlp):
    torch.manual_seed(0)
    model = timm.create_model(name, **changes)
    stages = [{"mlp": mlp}]
    if not name.startswith("swin"):
        stages = [STAGE1, {"attention_linears": "shift_int8", "mlp": mlp}]
    model, _ = _converted(*stages, model=model)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.randn(2, 3, *([48, 48] if "patch16" in name else [56, 56]))
    with torch.no_grad():
        separate, fused = deploy(model, fuse=False), deploy(model)
        assert any(isinstance(part, torch.fx.GraphModule) for part in fused.modules())
        expected, actual = separate(x), fused(x)
    # A code within rounding of its threshold may fall on either side.
    assert (actual - expected).norm() < 2e-2 * expected.norm()
    norms = sum(isinstance(part, torch.nn.LayerNorm) for part in separate.modules())
    alone = sum(isinstance(part, DeployedLayerNorm) for part in fused.modules())
    assert alone < norms and not any(isinstance(p, torch.nn.LayerNorm) for p in fused.modules())


@pytest.mark.parametrize(
    "name, changes",
    [
        # A bias of its own is added to the qkv linear; its mask may be absent.
        ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 8, "depths": (2,)}),
        # Asks its convolution for its window.
        ("davit_tiny", {"depths": (1, 1), "embed_dims": (96, 192), "num_heads": (3, 6)}),
        # Its convolutions standardise their weights and pad as TensorFlow does.
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}),
    ],
)
def test_what_only_looks_like_something_to_fuse_is_left_alone(name, changes):
    torch.manual_seed(0)
    model, _ = _converted(
        {"attention_linears": "shift_int8", "mlp": "moe"}, model=timm.create_model(name, **changes)
    )
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        separate, fused = deploy(model, fuse=False)(x), deploy(model)(x)
    assert (fused - separate).norm() < 0.1 * separate.norm()


def test_a_sum_with_fewer_values_than_outputs_is_added():
    linear = DeployedLinear.of(quantise_weight("shift_int8", torch.randn(40, 24), torch.randn(40)))
    x, vector = torch.randn(3, 5, 24), torch.randn(40)
    torch.testing.assert_close(linear(x, vector), linear(x) + vector)
    torch.testing.assert_close(linear(x, x.new_ones(3, 1, 40)), linear(x) + 1)


@pytest.mark.parametrize("mlp", ["shift_int8", "moe", "shift_fp32"])
def test_codes_lie_between_the_linears_of_a_pvt_mlp_unless_someone_looks(mlp):
    sizes = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2)}
    model, _ = _converted({"mlp": mlp}, model=timm.create_model("pvt_v2_b0", **sizes))
    deployed, x = deploy(model), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        with _Recorder(deployed, ["stages.0"]) as recorder:
            at_once = deployed(x)
        seen = []
        for part in deployed.modules():
            if isinstance(part, DeployedDepthwiseMlp):
                part.fc2.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        by_steps = deployed(x)
    assert (("shiftadd", "depthwise_moe") in map(tuple, recorder.calls)) == (mlp != "shift_fp32")
    assert len(seen) == 2 and seen[0].shape == (2, 14 * 14, 256)
    torch.testing.assert_close(at_once, by_steps, rtol=1e-4, atol=1e-5)


def test_looking_at_each_expert_changes_nothing():
    model, _ = _converted(STAGE1, MOE)
    deployed, x = deploy(model), torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected, seen = deployed(x), []
        for layer in deployed.modules():
            if isinstance(layer, DeployedMoE):
                for expert in layer.experts.values():
                    expert.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-5)
    assert seen


def test_a_deployed_model_compiles_and_exports():
    model, _ = _converted(STAGE1, MOE)
    deployed, x = deploy(model), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = deployed(x)
        exported = torch.export.export(deployed, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        compiled = torch.compile(deployed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_deploying_leaves_the_trained_model_alone():
    model, _ = _converted(STAGE1, MOE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deploy(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_shift_weights_are_stored_in_a_quarter_of_the_bytes():
    model, _ = _converted(STAGE1, SHIFT, model=_vit(embed_dim=128, num_heads=4))
    deployed = deploy(model)
    assert 3.4 < stored_bytes(model.blocks) / stored_bytes(deployed.blocks) < 4.0


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_an_expert_may_get_all_tokens_or_none(bias):
    model, _ = _converted(STAGE1, MOE)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.gate.bias.copy_(torch.tensor([bias, -bias]))
        x = torch.randn(2, 1, 16, 16)
        deployed = deploy(model)
        assert isinstance(deployed.blocks[0].mlp, DeployedMoE)
        torch.testing.assert_close(deployed(x), model(x), rtol=1e-2, atol=1e-2)


def test_pvt_deploys():
    torch.manual_seed(0)
    model, converted = _converted(STAGE1, SHIFT, model=timm.create_model("pvt_v2_b0"))
    with torch.no_grad(), _Recorder(deployed := deploy(model), converted) as recorder:
        assert deployed(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert not _torch_products(recorder)


def test_a_process_that_runs_a_fused_model_keeps_its_memory(monkeypatch):
    kept = []
    monkeypatch.setattr("reparam.deploy.keep_freed_memory", lambda: kept.append(1))
    model, _ = _converted(STAGE1)
    deploy(model, fuse=False)
    assert not kept
    deploy(model)
    assert kept


class _Shares(torch.nn.Module):
    """A block with one MLP under two names, each behind a norm of its own; another block has it."""

    def __init__(self, mlp):
        super().__init__()
        self.first = self.second = mlp
        self.norm1, self.norm2 = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)

    def forward(self, x):
        x = x + self.first(self.norm1(x))
        return x + self.second(self.norm2(x))


@pytest.mark.parametrize("mlp", ["shift_int8", "moe"])
def test_a_module_of_several_names_stays_one(mlp):
    model = _vit(depth=1)
    shared = model.blocks[0].mlp
    model.blocks.append(_Shares(shared))
    model.blocks.append(model.blocks[1])
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            torch.nn.init.normal_(part.weight, 1, 0.5)
    model, converted = _converted({"mlp": mlp}, model=model)
    assert {name.split(".")[1] for name in converted} == {"0"}
    block = model.blocks[1]
    assert block.first is block.second is model.blocks[0].mlp
    assert not any(isinstance(part, torch.nn.Linear) for part in block.first.children())
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected = model(x)
        for deployed in (deploy(model, fuse=False), deploy(model)):
            block = deployed.blocks[2]
            assert block is deployed.blocks[1]
            assert _off(deployed(x), expected) < 2e-2


@pytest.mark.parametrize("mlp", ["shift_int8", "moe"])
def test_a_gate_between_the_linears_stays_between_them(mlp):
    model, _ = _converted({"mlp": mlp}, model=_vit(mlp_layer=GluMlp, act_layer=torch.nn.GELU))
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert _off(deploy(model)(x), model(x)) < 2e-2


@pytest.mark.parametrize(
    ("activation", "as_a_whole"), [("gelu", True), ("gelu_tanh", False), ("silu", False)]
)
def test_mixtures_are_dispatched_by_kernels_whatever_lies_between_the_linears(
    activation, as_a_whole
):
    """``gelu`` by name is a class of timm's own; what no kernel computes is a mixture by linear."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, act_layer=activation)
    x = torch.randn(2, 3, 32, 32)
    reparameterize_(model.eval(), ReparamConfig(**MOE))
    assert [fqn for fqn, _ in moe_layers(model)] == (
        ["blocks.0.mlp"] if as_a_whole else ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    )
    deployed = deploy(model)
    assert not list(moe_layers(deployed))
    with torch.no_grad():
        expected = model(x)
        for made in (deployed, Plan(deployed, x), torch.export.export(deployed, (x,)).module()):
            torch.testing.assert_close(made(x), expected, rtol=1e-2, atol=0.05)
