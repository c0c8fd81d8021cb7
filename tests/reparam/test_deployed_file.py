"""Deployed models on disk: what is read back computes the same, in a fresh process too."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from reparam.convert import ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed_file import DeployedFileError, load_deployed, save_deployed
from reparam.moe import MoEMlp

CREATE = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "num_classes": 7}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(**CREATE).eval()
    reparameterize_(model, ReparamConfig(attention="add"))
    reparameterize_(model, ReparamConfig(attention_linears="shift_int4", mlp="moe"))
    deployed = deploy(model)
    path = tmp_path_factory.mktemp("deployed") / "model.json"
    save_deployed(deployed, path, CREATE)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        return path, x, deployed(x)


def test_it_computes_the_same(saved):
    path, x, expected = saved
    with torch.no_grad():
        assert torch.equal(load_deployed(path)(x), expected)


@pytest.mark.parametrize(
    "config", [{"attention_linears": "shift_int8"}, {"mlp": "moe", "attention_linears": "keep"}]
)
def test_a_model_of_which_little_was_converted_computes_the_same(config, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(**CREATE).eval()
    reparameterize_(model, ReparamConfig(**config))
    deployed, x = deploy(model), torch.randn(2, 3, 32, 32)
    save_deployed(deployed, tmp_path / "model.json", CREATE)
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path / "model.json")(x), deployed(x))


def test_a_linear_whose_bias_is_held_apart_is_called_again(tmp_path):
    sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 1, "num_classes": 5}
    create = {"model_name": "beit_base_patch16_224", **sizes}
    model = timm.create_model(**create).eval()
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8"))
    deployed, x = deploy(model), torch.randn(2, 3, 32, 32)
    save_deployed(deployed, tmp_path / "model.json", create)
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path / "model.json")(x), deployed(x))


def test_buffers_that_a_first_pass_has_made_come_back(tmp_path):
    """convit's distances of patches, which it would make anew on its linear's device."""
    sizes = {"img_size": 32, "depth": 2, "local_up_to_layer": 1, "num_classes": 5}
    create = {"model_name": "convit_tiny", **sizes}
    torch.manual_seed(0)
    model, x = timm.create_model(**create).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(x)
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8", mlp="moe"))
    deployed = deploy(model)
    save_deployed(deployed, tmp_path / "model.json", create)
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path / "model.json")(x), deployed(x))


@pytest.mark.parametrize(
    "config, by_hand, named",
    [
        (
            {"attention": "quadratic", "hashing": "kernelised"},
            False,
            "blocks.0.attn.core: a QuadraticCore",
        ),
        ({"attention": "add"}, True, "blocks.0.mlp: a MoEMlp"),
        ({"mlp": "shift_int8", "activation_clip": "calibrated"}, False, "mlp.fc1.clip: a Clip"),
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_what_cannot_be_described_is_refused_and_nothing_written(
    config, by_hand, named, fuse, tmp_path
):
    model = timm.create_model(**CREATE).eval()
    reparameterize_(model, ReparamConfig(**config))
    if by_hand:  # no kernel dispatches to experts with a SiLU in them
        mlp, forms = model.blocks[0].mlp, {"mult": "mult_int8", "shift": "shift_int8"}
        mlp.act = torch.nn.SiLU()
        model.blocks[0].mlp = MoEMlp.from_module(mlp, forms)
    deployed = deploy(model, fuse)
    with pytest.raises(DeployedFileError, match=named):
        save_deployed(deployed, tmp_path / "model.json", CREATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, changes, config",
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, {"attention": "quadratic"}),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32},
            {"attention": "quadratic", "similarity": "angular", "alphabet": "01"},
        ),
        ("eva02_tiny_patch14_224", {"img_size": 28}, {"attention": "add"}),
        ("swin_tiny_patch4_window7_224", {}, {"attention": "add", "drop_bias": True}),
        ("swin_tiny_patch4_window7_224", {}, {"attention": "quadratic"}),
    ],
)
def test_an_attention_with_another_core_comes_back(name, changes, config, tmp_path):
    depth = (1, 1, 1, 1) if "swin" in name else 1
    key = "depths" if "swin" in name else "depth"
    create = {"model_name": name, key: depth, **changes}
    torch.manual_seed(0)
    model = timm.create_model(**create).eval()
    reparameterize_(model, ReparamConfig(**config))
    reparameterize_(model, ReparamConfig(attention_linears="shift_int8", mlp="moe"))
    deployed = deploy(model)
    x = torch.randn(2, 3, *[create.get("img_size", 224)] * 2)
    save_deployed(deployed, tmp_path / "model.json", create)
    loaded = load_deployed(tmp_path / "model.json")
    with torch.no_grad():
        assert torch.equal(loaded(x), deployed(x))
    kinds = [type(part).__name__ for part in loaded.modules()]
    assert kinds == [type(part).__name__ for part in deployed.modules()]
    assert any(kind.startswith("Coded") for kind in kinds)


def test_it_loads_in_a_fresh_process(saved, tmp_path):
    path, x, expected = saved
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from reparam.deployed_file import load_deployed\n"
        "y = load_deployed(sys.argv[1])(torch.load(sys.argv[2], weights_only=True))\n"
        "print(y.argmax(-1).tolist())"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "x.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == expected.argmax(-1).tolist()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"format": "other"}, "format"),
        ({"version": 1}, "version"),
        ({"modules": {"blocks.0.attn": {"is": "magic"}}}, "magic"),
        ({"modules": {}}, "safetensors"),
    ],
)
def test_bad_files_are_refused_by_name(saved, tmp_path, change, named):
    path, _, _ = saved
    content = json.loads(path.read_text()) | change
    (tmp_path / "bad.json").write_text(json.dumps(content))
    (tmp_path / "bad.safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes())
    with pytest.raises(DeployedFileError, match=named):
        load_deployed(tmp_path / "bad.json")


def test_missing_tensors_are_refused(saved, tmp_path):
    path, _, _ = saved
    (tmp_path / "bad.json").write_text(path.read_text())
    with pytest.raises(DeployedFileError, match="bad"):
        load_deployed(tmp_path / "bad.json")
