"""A deployed layer on a few images at a time computes what it computes on all of them."""

from unittest.mock import Mock

import pytest
import timm
import torch

from reparam import by_images as room
from reparam.by_images import by_images
from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed_mlps import DeployedMoE
from reparam.forced_dispatch import force_share_


def deployed_pvt():
    torch.manual_seed(0)
    sizes = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2)}
    model = timm.create_model("pvt_v2_b0", num_classes=5, **sizes).eval()
    reparameterize_(model, ReparamConfig(attention="add"))
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8", mlp="moe"))
    return deploy(model)


@pytest.mark.parametrize("images", [1, 5])
def test_a_model_gives_the_same(monkeypatch, images):
    model, x = deployed_pvt(), torch.randn(images, 3, 64, 64)
    with torch.no_grad():
        whole = model(x)
        # Two images of the widest layer at a time.
        monkeypatch.setattr(room, "_CACHED_BYTES", 2 * 4 * 256 * 256)
        # A code within rounding of its threshold may fall on either side.
        assert (model(x) - whole).norm() < 2e-2 * whole.norm()


@pytest.mark.parametrize("images, calls", [(0, [0]), (3, [3]), (4, [3, 1]), (7, [3, 3, 1])])
def test_as_many_images_at_once_as_fit(monkeypatch, images, calls):
    monkeypatch.setattr(room, "_CACHED_BYTES", 4 * 30)
    layer = Mock(side_effect=lambda x, residual: x + residual)
    x, residual = torch.randn(images, 5), torch.randn(images, 5)
    torch.testing.assert_close(by_images(layer, 10, x, residual), x + residual)
    assert [len(call.args[0]) for call in layer.call_args_list] == calls


def test_an_image_that_never_fits_goes_alone(monkeypatch):
    monkeypatch.setattr(room, "_CACHED_BYTES", 1)
    layer = Mock(side_effect=lambda x, residual: x)
    by_images(layer, 10, torch.randn(3, 5))
    assert layer.call_count == 3


def test_a_share_is_of_all_images_also_where_a_layer_sees_some_at_a_time(monkeypatch):
    monkeypatch.setattr(room, "_CACHED_BYTES", 1)
    model = deployed_pvt()
    # Images of other contrast: their tokens lie elsewhere along any direction.
    x = torch.randn(4, 3, 64, 64) * torch.tensor([0.1, 1.0, 3.0, 10.0]).view(-1, 1, 1, 1)
    force_share_(model, 0.25, x)
    counts = {}

    def count(layer, args, out):
        tokens = args[0].flatten(0, -2)
        got = torch.ops.shiftadd.route(tokens, layer.norm, layer.gate, layer.gate_bias)[2]
        counts[layer] = counts.get(layer, 0) + got

    for part in model.modules():
        if isinstance(part, DeployedMoE):
            part.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    first = next(iter(counts.values()))
    assert abs(float(first[1] / first.sum()) - 0.25) < 0.01
