"""The command of evaluations: input that a person can mend ends in one line, nothing written."""

import subprocess
import sys

import pytest
import torch

from cost_models.latency_table import LatencyTable
from reparam.evaluate import prepared
from reparam.moe import moe_layers


def refused(folder, *arguments):
    command = [sys.executable, "-m", "reparam.evaluate", *map(str, arguments), "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not folder.exists()
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.fixture
def foreign_table(tmp_path):
    table = LatencyTable.load("amd-zen4-avx512-2c-1t")
    device = table.device.model_copy(update={"name": "another CPU"})
    path = tmp_path / "foreign.json"
    table.model_copy(update={"device": device}).save(path)
    return path


def test_bad_input_is_named(tmp_path, foreign_table):
    out = tmp_path / "out"
    assert "--versus-torch" in refused(out)
    assert "--table" in refused(out, "--predicted-versus-measured")
    line = refused(out, "--predicted-versus-measured", "--table", foreign_table)
    assert "another CPU" in line
    assert "absent.json" in refused(
        out, "--predicted-versus-measured", "--table", tmp_path / "absent.json"
    )
    assert "--batch" in refused(out, "--scaling", "--batch", "none")


def test_a_model_whose_attention_cannot_be_linear_is_deployed_with_its_own(capsys):
    original, deployed_at = prepared("tiny_vit_5m_224")
    assert "its attention stays as it is" in " ".join(capsys.readouterr().out.split())
    assert not list(moe_layers(original))
    # Its MLPs hold a layer norm: they stay mixtures of deployed linears, with a share too.
    deployed, x = deployed_at(0.25), torch.randn(1, 3, 224, 224, generator=torch.manual_seed(1))
    with torch.no_grad():
        deployed(x)
    counts = torch.stack([layer.routing.counts for _, layer in moe_layers(deployed)])
    share = counts.sum(0)[1] / counts.sum()
    assert len(counts) > 5 and 0.1 < share < 0.4
