import sys
import tomllib

import numpy as np
import pytest

from cost_models.fitted_model import changed
from cost_models.held_out import is_locked
from cost_models.models import LearnedLatency
from cost_models.shape_pool import LinearGroup
from cost_models.suggest import app, design, least_sure, pool, sweep_toml
from kernels.workload import attention, linear
from profiler.command_line import run
from profiler.device import DeviceInfo
from profiler.store import create_store
from profiler.sweep_config import AttentionShape, SweepConfig

CPU = DeviceInfo(kind="cpu", name="synthetic", threads=1, cores=4)
NARROW = [LinearGroup(k, n, (10, 1000)) for k in (64, 80, 96) for n in (64, 80, 96)]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cost_models.suggest", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run(app)
    return stopped.value.code


@pytest.fixture(scope="module")
def model():
    """A model that knows narrow linears only, of a law with a bend that its core has not."""
    workloads = [linear("mult_fp32", m, g.k, g.n) for g in NARROW for m in (10, 100, 1000)]
    latency = [w.macs / 1e6 * (1 + 0.3 * np.sin(np.log2(w.m))) for w in workloads]
    return LearnedLatency("mult_fp32", "x", False, CPU).fit(workloads, latency).fitted_


def unlocked(k, n):
    """Widths near these that are not of the test part."""
    return next((k, n + i) for i in range(100) if not is_locked(linear("mult_fp32", 1, k, n + i)))


def test_far_shapes_are_chosen_first_and_not_twice_the_same_region(model):
    near, far, beside = unlocked(80, 80), unlocked(2000, 2000), unlocked(2000, 2200)
    other = unlocked(16, 4000)
    groups = [LinearGroup(*widths, (10, 1000)) for widths in (near, far, beside, other)]
    chosen = least_sure([model], groups, 2)
    assert LinearGroup(*near, (10, 1000)) not in chosen
    assert LinearGroup(*other, (10, 1000)) in chosen


def test_a_model_that_has_learned_nothing_beside_its_core_remembers_regions_too(model):
    core = changed(model, length_scales={}, points=((),) * len(model.points))
    far, beside, other = unlocked(2000, 2000), unlocked(2000, 2200), unlocked(16, 1500)
    groups = [LinearGroup(*widths, (10, 1000)) for widths in (far, beside, other)]
    chosen = least_sure([core], groups, 2)
    assert LinearGroup(*other, (10, 1000)) in chosen


def test_the_locked_part_is_never_a_reason(model):
    k, n = next((2000, n) for n in range(2000, 3000) if is_locked(linear("mult_fp32", 1, 2000, n)))
    assert least_sure([model], [LinearGroup(k, n, (10, 1000))], 1) == []


def test_the_pool_keeps_to_its_limits():
    for group in design():
        workloads = group.workloads("mult_fp32") if isinstance(group, LinearGroup) else None
        for workload in workloads or group.workloads():
            assert workload.macs <= 1.1e10
            assert workload.traffic_bytes <= 1.1 * 2**30
    assert design() == design()
    assert pool(1) != pool(2)


def test_the_sweep_holds_the_suggested_workloads():
    groups = [design()[0], design()[-1]]
    config = SweepConfig.model_validate(tomllib.loads(sweep_toml(groups, ("shift_int8",), "x")))
    expected = {*groups[0].workloads("shift_int8"), *groups[1].workloads()}
    assert set(config.workloads) == expected
    assert not config.baselines


def test_the_command(store, tmp_path, monkeypatch, capsys):
    out = tmp_path / "first.toml"
    assert command(monkeypatch, "--out", out) == 0
    assert SweepConfig.model_validate(tomllib.loads(out.read_text())).shapes
    more = tmp_path / "more.toml"
    assert command(monkeypatch, "--store", store, "--out", more, "--number", 2) == 0
    assert SweepConfig.model_validate(tomllib.loads(more.read_text())).forms == ("shift_int8",)
    done = tmp_path / "done.toml"
    assert command(monkeypatch, "--store", store, "--out", done, "--target", 99) == 1
    assert "nothing more to measure" in capsys.readouterr().out and not done.exists()
    assert command(monkeypatch, "--out", tmp_path / "none" / "x.toml") == 2


def suggested(monkeypatch, tmp_path, measure, law, workloads):
    """The sweep for a store of these."""
    store, out = tmp_path / "rows.sqlite", tmp_path / "more.toml"
    opened = create_store(store)
    opened.put(*(measure(w, law(w)) for w in workloads))
    opened.close()
    assert command(monkeypatch, "--store", store, "--out", out, "--number", 2) == 0
    return SweepConfig.model_validate(tomllib.loads(out.read_text()))


LINEARS = [linear("mult_int7", m, g.k, g.n) for g in NARROW for m in (10, 1000)]
ATTENTIONS = [
    attention(b, tokens, bits, 32) for bits in (16, 32, 64) for b in (1, 8) for tokens in (49, 196)
]


@pytest.mark.parametrize("product", ["kv", "qkv"])
def test_products_that_no_suggestion_can_measure_are_no_reason(
    product, monkeypatch, tmp_path, measure, law
):
    single = [getattr(products, product) for products in ATTENTIONS]
    assert sum(not is_locked(w) for w in single) >= 4
    config = suggested(monkeypatch, tmp_path, measure, law, [*single, *LINEARS])
    assert config.forms == ("mult_int7",)
    assert not any(isinstance(shape, AttentionShape) for shape in config.shapes)


def test_where_only_attention_is_unsure_nothing_else_is_measured(
    monkeypatch, tmp_path, measure, law
):
    config = suggested(monkeypatch, tmp_path, measure, law, [both.both for both in ATTENTIONS])
    assert {workload.form for workload in config.workloads} == {"add_attention_pm1"}
