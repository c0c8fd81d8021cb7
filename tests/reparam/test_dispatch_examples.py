"""Examples of dispatch say where each patch of the shown image went."""

import timm
import torch

from reparam.convert import ReparamConfig, reparameterize_
from reparam.dispatch_examples import EXAMPLES, dispatch_examples
from reparam.moe import moe_layers


def converted(name, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **changes).eval()
    reparameterize_(model, ReparamConfig(mlp="moe"))
    return model


def test_each_patch_has_the_expert_that_the_router_chose():
    model = converted("vit_tiny_patch16_224", img_size=(32, 64), depth=2)
    x, labels = torch.randn(6, 3, 32, 64), torch.tensor([1, 1, 4, 0, 2, 4])
    model.train()
    found = dispatch_examples(model, x, labels)
    assert model.training
    assert [one.label for one in found] == [1, 4, 0][:EXAMPLES]
    with torch.no_grad():
        guesses = model.eval()(x[[0, 2, 3]]).argmax(1)
    assert [one.guess for one in found] == guesses.tolist()
    for fqn, layer in moe_layers(model):
        expected = layer.routing.choice.view(3, 9)[:, 1:].view(3, 2, 4)
        assert [one.layers[fqn] for one in found] == expected.tolist()
        assert found[0].experts == list(layer.experts)
    pictures = [value for one in found for line in one.image for value in line]
    assert min(pictures) == 0 and max(pictures) == 255
    assert len(found[0].image) == 28 and len(found[0].image[0]) == 28


def test_layers_whose_tokens_are_too_many_or_no_grid_are_left_out():
    model = converted(
        "pvt_v2_b0", depths=(1, 1), embed_dims=(32, 64), num_heads=(1, 2), mlp_ratios=(8, 8)
    )
    found = dispatch_examples(model, torch.randn(2, 3, 96, 96), torch.tensor([0, 1]))
    assert {fqn.split(".")[1] for fqn in found[0].layers} == {"1"}
    assert len(found[0].layers["stages.1.blocks.0.mlp.fc1"]) == 12


def test_a_model_without_routers_has_none():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    assert dispatch_examples(model, torch.randn(1, 3, 32, 32), torch.tensor([0])) == []


def test_a_router_of_something_else_than_the_images_is_left_out():
    model = converted("vit_tiny_patch16_224", img_size=32, depth=2)
    of_coordinates = model.blocks[1].mlp
    of_coordinates.register_forward_pre_hook(lambda module, args: (args[0][:1, :3],))
    of_coordinates.register_forward_hook(lambda module, args, y: y.mean())
    found = dispatch_examples(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert set(found[0].layers) == {"blocks.0.mlp"}
