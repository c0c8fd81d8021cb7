"""The command of evaluations: input that a person can mend ends in one line, nothing written."""

import sys
from importlib.util import find_spec

import pytest
import timm
import torch

from cost_models.latency_table import LatencyTable, TableError
from kernels import expert_ops
from profiler.command_line import run
from profiler.device import cpu_info
from profiler.samples import TimingSettings
from reparam import other_runtimes
from reparam.convert import ConversionError, ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.deployed import DeployedAddAttention, DeployedQuadraticCore
from reparam.deployed_mlps import DeployedMoE
from reparam.evaluate import app, prepared
from reparam.moe import moe_layers
from reparam.scaling import attention_sizes, measure_scaling
from reparam.versus_torch import compare, torch_contestants


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """The one line on stderr; nothing is written."""
    folder = tmp_path / "out"

    def refuse(*arguments):
        given = ["reparam.evaluate", *map(str, arguments), "--out", str(folder)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as stopped:
            run(app, (ConversionError, TableError))
        assert stopped.value.code == 2 and not folder.exists()
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    return refuse


@pytest.fixture
def foreign_table(tmp_path):
    table = LatencyTable.load("amd-zen4-avx512-2c-1t")
    device = table.device.model_copy(update={"name": "another CPU"})
    path = tmp_path / "foreign.json"
    table.model_copy(update={"device": device}).save(path)
    return path


def test_bad_input_is_named(tmp_path, refused, foreign_table):
    assert "--versus-torch" in refused()
    assert "--table" in refused("--predicted-versus-measured")
    line = refused("--predicted-versus-measured", "--table", foreign_table)
    assert "another CPU" in line
    absent = tmp_path / "absent.json"
    assert "absent.json" in refused("--predicted-versus-measured", "--table", absent)
    assert "--batch" in refused("--scaling", "--batch", "none")
    assert "mult_int7" in refused("--dispatch", "--mult", "mult_int9")
    assert "--mult" in refused("--predicted-versus-measured", "--mult", "mult_int7")
    for option, value in (("--model", "pvt_v2_b0"), ("--share", "50"), ("--threads", "1")):
        assert option in refused("--predicted-versus-measured", option, value)


def test_all_models_are_known_before_the_first_is_measured(tmp_path, refused):
    table, path = LatencyTable.load("amd-zen4-avx512-2c-1t"), tmp_path / "own.json"
    table.model_copy(update={"device": cpu_info(1)}).save(path)
    names = ("--models", "test_vit,vit_tiny_patch16_225")
    line = refused("--predicted-versus-measured", "--table", path, *names)
    assert "--models vit_tiny_patch16_225" in line


def test_the_mult_expert_is_of_the_form_that_is_named():
    for named, form in (((), "mult_int8"), (("mult_int7",), "mult_int7")):
        _, deployed_at = prepared("test_vit", *named)
        mixtures = [m for m in deployed_at(0.5).modules() if isinstance(m, DeployedMoE)]
        forms = {linear.form for mixture in mixtures for linear in mixture.linears}
        assert forms == {form, "shift_int8"}


def test_attention_grows_as_that_of_the_model_that_is_named():
    model = timm.create_model("pvt_v2_b0").eval()
    reparameterize_(model, ReparamConfig(attention="add"))
    assert attention_sizes(deploy(model)) == (1, 32)
    assert attention_sizes(torch.nn.Linear(2, 2)) is None
    rows = measure_scaling(TimingSettings(max_time_s=0.2), 2, 16, tokens=(64,))
    assert [row.way for row in rows] == ["add", "softmax", "softmax, matrix"]
    assert all(row.peak_bytes >= 64 * 2 * 16 * 4 for row in rows)


def test_other_runtimes_are_measured_where_installed_and_say_why_they_fail(monkeypatch):
    model, x = torch.nn.Linear(3, 2), torch.randn(1, 3)
    runtimes = {
        "there": (("torch",), lambda model, example: model),
        "fails": (("torch",), lambda model, example: 1 / 0),
        "absent": (("torch", "no_such_package"), lambda model, example: model),
    }
    monkeypatch.setattr(other_runtimes, "_RUNTIMES", runtimes)
    found = {name: (run, why) for name, run, why in other_runtimes.runtime_contestants(model, x)}
    assert list(found) == ["there", "fails"]
    assert found["there"][0] is model and found["fails"] == (None, "failed: division by zero")
    comparison = compare("linear", model, {"ours": model}, x, TimingSettings(max_time_s=0.2))
    ways = [one.name for one in comparison.contestants]
    assert {"there", "fails", "eager fp32", "ours"} <= set(ways)
    assert comparison.best_torch != "there"


def test_a_model_that_convolves_meets_its_original_with_channels_last_too(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    patches, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, 2)), torch.randn(1, 3, 4, 4)
    more = torch.nn.Sequential(*patches, torch.nn.Conv2d(4, 5, 3))
    plain = {name for name, _, _ in torch_contestants(patches, x)}
    found = {name: run for name, run, _ in torch_contestants(more, torch.randn(1, 3, 8, 8))}
    assert found.keys() - plain == {
        f"{way}, channels last" for way in ("eager fp32", "compile fp32", "compile bf16")
    }
    laid = found["eager fp32, channels last"]
    assert laid[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert not found["eager fp32"][1].weight.is_contiguous(memory_format=torch.channels_last)
    assert more[1].weight.is_contiguous()


@pytest.mark.skipif(
    not all(map(find_spec, ("onnxruntime", "onnx", "onnxscript"))), reason="not installed"
)
def test_onnx_runtime_computes_the_same():
    _computes_the_same("ONNX Runtime fp32")


@pytest.mark.skipif(not find_spec("openvino"), reason="not installed")
def test_openvino_computes_the_same():
    _computes_the_same("OpenVINO fp32")


def _computes_the_same(name):
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU()).eval(), torch.randn(2, 8)
    with torch.no_grad():
        launches = {way: run for way, run, _ in other_runtimes.runtime_contestants(model, x)}
        found = torch.as_tensor(launches[name](x))
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_attention_that_cannot_be_linear_is_deployed_in_the_quadratic_form(capsys):
    original, deployed_at = prepared("tiny_vit_5m_224")
    assert "without that" not in capsys.readouterr().out
    assert not list(moe_layers(original))
    # Its MLPs hold a layer norm: each of their linears is a mixture, with a share too.
    deployed, x = deployed_at(0.25), torch.randn(1, 3, 224, 224, generator=torch.manual_seed(1))
    kinds = {type(part) for part in deployed.modules()}
    assert DeployedQuadraticCore in kinds and DeployedAddAttention not in kinds
    counts = []

    def count(layer, args):
        tokens = args[0].reshape(-1, args[0].shape[-1])
        counts.append(expert_ops.route(tokens, layer.norm, layer.gate, layer.gate_bias)[2])

    for part in deployed.modules():
        if isinstance(part, DeployedMoE):
            part.register_forward_pre_hook(count)
    with torch.no_grad():
        deployed(x)
    share = torch.stack(counts).sum(0)[1] / torch.stack(counts).sum()
    assert len(counts) > 10 and 0.1 < share < 0.4


def test_a_model_is_deployed_with_the_parts_that_it_has(capsys):
    _, deployed_at = prepared("mixer_s32_224")
    assert sum(isinstance(part, DeployedMoE) for part in deployed_at(0.5).modules()) == 16
    printed = " ".join(capsys.readouterr().out.split())
    assert "attention: 'add'" in printed and "attention_linears: 'shift_int8'" in printed


@pytest.mark.parametrize(
    "name", ["nonesuch", "vit_tiny_patch16_224.bogus", "", "hf-hub:", "local-dir:/x"]
)
def test_a_name_that_is_no_model_is_refused_in_one_line(refused, name):
    assert refused("--dispatch", "--model", name).startswith(f"error: --model {name}: ")


def test_a_model_of_which_nothing_can_be_converted_is_refused(refused):
    assert "--model resnet10t: nothing of it" in refused("--dispatch", "--model", "resnet10t")
