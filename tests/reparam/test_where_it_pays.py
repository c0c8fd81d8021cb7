"""A conversion that keeps to what a latency table says, on a table whose figures are made up."""

import math

import pytest
import timm
import torch
from torch import nn

from cost_models.entry import Entry
from cost_models.latency_table import LatencyTable, TableError
from kernels.workload import linear
from profiler.device import DeviceInfo
from profiler.model_workloads import layers_of
from profiler.sweep_config import LinearShape
from reparam.attention_structure import example_input, trace
from reparam.convert import ReparamConfig, reparameterize_
from reparam.moe import MoEMlp
from reparam.shift import ShiftLinear

BATCH = 3
LINEARS = ("qkv", "proj")


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()


def entry(workload, lowering, latency_ms, is_baseline):
    return Entry(
        workload=workload,
        lowering=lowering,
        is_baseline=is_baseline,
        latency_ms=latency_ms,
        low_ms=0.99 * latency_ms,
        high_ms=1.01 * latency_ms,
        weight_bytes=None,
        energy_mj=None,
        energy_source=None,
        energy_reason="made up",
    )


def saved_table(path, linears):
    """A table of linears by ``(m, k, n)``: how long shift takes where torch takes 1 ms."""
    entries = {}
    for sizes, ratio in linears.items():
        for form, lowering, latency_ms in (
            ("mult_fp32", "torch.fp32", 1.0),
            ("mult_bf16", "torch.bf16", 1.0),
            ("mult_int8", "torch.int8", 1.0),
            ("shift_int8", "shift.dot", ratio),
        ):
            made = entry(linear(form, *sizes), lowering, latency_ms, lowering.startswith("torch"))
            entries[made.workload, lowering] = made
    LatencyTable(
        device=DeviceInfo(kind="cpu", name="made up", threads=1, cores=1),
        created_at="today",
        store="made up",
        entries=tuple(entries.values()),
        models=(),
    ).save(path)
    return path


@pytest.fixture
def table(tmp_path):
    """Shift is twice as fast as torch around the attention, half as fast in the MLP."""
    linears = {}
    for layer in layers_of(vit(), torch.zeros(BATCH, 3, 32, 32)):
        if isinstance(layer.shape, LinearShape):
            ratio = 0.5 if layer.rule == "attention_linears" else 2.0
            linears[layer.shape.m, layer.shape.k, layer.shape.n] = ratio
    return saved_table(tmp_path / "table.json", linears)


def config(table, **changes):
    options = {"attention_linears": "shift_int8", "mlp": "shift_int8", "attention": "add"}
    return ReparamConfig(
        where="pays", latency_table=str(table), deploy_batch=BATCH, **(options | changes)
    )


def test_only_what_pays_is_converted_and_the_rest_says_why(table):
    model = vit()
    done = reparameterize_(model, config(table))
    shifts = {fqn for fqn, part in model.named_modules() if isinstance(part, ShiftLinear)}
    assert shifts == {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")}
    assert "does not pay" in done.skipped["blocks.0.mlp"]
    assert "unknown" in done.skipped["blocks.1.attn"]
    assert done.advice.verdict == "pays" and done.advice.batch == BATCH
    assert isinstance(model.blocks[0].mlp.fc1, nn.Linear)


def test_a_form_is_judged_by_its_own_figures(table):
    """That a shift pays says nothing of a multiplication of ours, which the table has not."""
    done = reparameterize_(vit(), config(table, attention_linears="mult_int8"))
    assert not done.converted and "unknown" in done.skipped["blocks.0.attn.qkv"]


def test_quadratic_attention_is_not_judged_by_the_linear_one(table):
    model = vit()
    done = reparameterize_(model, config(table, attention="quadratic"))
    assert "no table says what quadratic attention" in done.skipped["blocks.0.attn"]
    assert set(done.converted) == {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in LINEARS}


def test_where_nothing_pays_nothing_is_converted(table):
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = reparameterize_(model, config(table, attention_linears="keep", attention="keep"))
    assert not done.converted and not any(isinstance(part, MoEMlp) for part in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_everywhere_asks_no_table_and_pays_needs_one(table, tmp_path):
    model = vit()
    everywhere = ReparamConfig(attention_linears="shift_int8", mlp="shift_int8")
    assert reparameterize_(model, everywhere).advice is None
    assert any(isinstance(part, ShiftLinear) for part in model.blocks[0].mlp.modules())
    with pytest.raises(ValueError, match="latency_table"):
        ReparamConfig(mlp="moe", where="pays")
    with pytest.raises(TableError, match="absent"):
        reparameterize_(vit(), config(tmp_path / "absent.json"))


def test_a_filter_still_has_its_say(table):
    model = vit()
    done = reparameterize_(model, config(table), filter_fn=lambda module, fqn: "blocks.0" in fqn)
    assert {fqn.split(".")[1] for fqn in done.converted} == {"0"}
    assert done.skipped["blocks.1.attn.qkv"] == "rejected by filter_fn"


@pytest.mark.parametrize(
    "name, changes",
    [
        # A bias of qkv that is held apart, and a gated MLP.
        (
            "eva02_tiny_patch14_224",
            {"img_size": 28, "embed_dim": 24, "num_heads": 2, "depth": 2},
        ),
        # Linears within attn.qkv and mlp.ln1, each with a norm.
        ("levit_128s", {}),
        # MLPs in a position of their own, no attention of timm's names.
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}),
    ],
)
def test_layers_are_decided_on_by_what_they_are_and_not_by_their_names(name, changes, tmp_path):
    def model():
        return timm.create_model(name, num_classes=5, **changes).eval()

    options = {
        "rules": ({"match": "*.attn", "config": {"attention_linears": "shift_int8"}},),
        "mlp": "shift_int8",
    }
    everywhere = reparameterize_(model(), ReparamConfig(**options))
    assert {fqn.split(".attn.")[-1] == fqn for fqn in everywhere.converted} == {True, False}
    x = example_input(model())[:1].repeat(BATCH, 1, 1, 1)
    sizes = {
        (math.prod(product.left[:-1]), *product.right): 0.5
        for product in trace(model(), x).products
        if product.is_linear
    }
    table = saved_table(tmp_path / "all.json", sizes)
    where = {"where": "pays", "latency_table": str(table), "deploy_batch": BATCH}
    pays = reparameterize_(model(), ReparamConfig(**options, **where))
    assert pays.converted == everywhere.converted
    assert not any("no decision" in reason for reason in pays.skipped.values())
