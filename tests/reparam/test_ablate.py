"""The ablation as a command: units that are files, skipped when finished, refused when foreign."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from statistics import fmean

import psutil
import pytest
import timm
import torch
from brief_timing import BRIEF
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_data import make_images
from test_finetune import TINY, table_of
from typer.testing import CliRunner
from waiting import wait_until

from cost_models.latency_table import LatencyTable
from kernels.workload import attention, linear
from profiler.command_line import BadInput
from profiler.device import cpu_info
from reparam import ablation_unit
from reparam.ablate import app, find_table
from reparam.ablation_results import AblationResults, AblationRow, AblationUnit
from reparam.ablation_summary import mean_interval, summarise
from reparam.ablation_training import train_draws
from reparam.ablation_unit import Study, Unit, finished, train_unit
from reparam.ablation_variants import ATTENTIONS, PRESETS, VARIANTS, shift_share
from reparam.convert import ConversionError
from reparam.latency_curves import token_grid
from reparam.linear_attention import LinearAttention, LinearProducts, linearise_
from reparam.recipe import create_model, load_recipe
from reparam.results import Interval

TOKENS = 4 * 16


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    workloads = [
        linear(form, m, k, n)
        for form in ("mult_int8", "shift_int8")
        for m in token_grid(TOKENS)[1:]
        for k, n in ((16, 64), (64, 16))
    ]
    workloads += [linear("shift_int8", TOKENS, 16, n) for n in (48, 16)]
    workloads += [linear("mult_fp32", TOKENS, 16, 2), attention(8, 16, 8, 8, "pm1").both]
    table_of(workloads).save(tmp_path / "latency_table.json")
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(ablation_unit, "TIMING", BRIEF)


def invoke(folder, *more):
    arguments = ["--recipe", str(folder / "tiny.toml"), "--out", str(folder), *more]
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def test_units_are_kept_and_only_missing_ones_are_made(folder, quick, monkeypatch):
    names = "linear,moe_expected"
    done = invoke(folder, "--variants", names, "--seeds", "1")
    assert done.exit_code == 0, done.exception
    results = AblationResults.load(folder / "ablation.json")
    rows = {row.variant: row for row in results.rows}
    assert list(rows) == ["original", *names.split(",")]
    assert results.missing == []
    assert rows["original"].deployed_top1 is None and rows["original"].latency_ratio is None
    for name in names.split(","):
        row = rows[name]
        assert row.deployed_top1 == pytest.approx(row.top1, abs=1)
        assert (row.latency_ms is None) == (row.latency_reason is not None)
        assert row.energy_source == "modelled" and "measured" in row.energy_reason
        assert row.latency_ratio is None or row.latency_ratio.low <= row.latency_ratio.high
    moe = rows["moe_expected"]
    assert moe.shift_share == pytest.approx(moe.shares["blocks.0.mlp"]["shift"])
    assert moe.latency_budget_ms is not None and moe.expected_latency_ms > 0
    # The table's figures are made up, the budget is of what the deployed model was seen to take.
    seen = json.loads((folder / "ablation" / "calibration_moe_expected.json").read_text())
    if seen["latency_ms"]:
        assert moe.latency_budget_ms == pytest.approx(fmean(seen["latency_ms"]), rel=0.3)
    assert moe.weight_bytes < rows["original"].weight_bytes
    unit = AblationUnit.load(folder / "ablation" / "moe_expected-seed0.json")
    assert 100 * sum(unit.correct) / len(unit.correct) == pytest.approx(moe.deployed_top1)
    log = (folder / "ablation" / "seed0" / "training.csv").read_text()
    assert log.count("moe_expected") == 1

    def trained(run, name, original):
        made.append(name)
        return trained_before(run, name, original)

    made: list[str] = []
    trained_before = ablation_unit._trained
    monkeypatch.setattr(ablation_unit, "_trained", trained)
    (folder / "ablation" / "linear-seed0.json").unlink()
    assert invoke(folder, "--variants", names, "--seeds", "1").exit_code == 0
    assert made == ["linear"]

    # Another table is a matter of those whose training or figures ask one.
    _, recipe = load_recipe(str(folder / "tiny.toml"))
    table = table_of([linear("mult_fp32", TOKENS, 16, 2)])
    study = Study(recipe, table, None, folder, Console(quiet=True))
    assert finished(study, Unit("original", 0)) and finished(study, Unit("linear", 0))
    with pytest.raises(BadInput, match="latency_table: is of another run"):
        finished(study, Unit("moe_expected", 0))

    elsewhere = cpu_info(1).model_copy(update={"name": "another CPU"})
    with monkeypatch.context() as patched:
        patched.setattr(ablation_unit, "cpu_info", lambda threads: elsewhere)
        with pytest.raises(BadInput, match=r"original-seed0\.json: device: is of another run"):
            finished(replace(study), Unit("original", 0))

    path = folder / "tiny.toml"
    path.write_text(TINY.replace("lr = 3e-3", "lr = 2e-3"))
    other = invoke(folder, "--variants", names, "--seeds", "1")
    assert "original-seed0.json: recipe: is of another run" in str(other.exception)


def test_a_unit_is_of_its_images(folder):
    """Of the same folder with one image more as of another folder."""
    _, digits = load_recipe(str(folder / "tiny.toml"))
    recipe = digits.model_copy(update={"data": "folder"})
    table = table_of([linear("mult_fp32", TOKENS, 16, 2)])
    for name in "ab":
        make_images(folder / name)

    def study(name):
        return Study(recipe, table, folder / name, folder, Console(quiet=True))

    unit, path = Unit("original", 0), folder / "ablation" / "original-seed0.json"
    path.parent.mkdir()
    identity = ablation_unit._identity(study("a"), unit)
    AblationUnit(identity=identity, row=row("original", 0, 50.0), correct=[True]).save(path)
    assert finished(study("a"), unit) is not None
    with pytest.raises(BadInput, match="data: is of another run"):
        finished(study("b"), unit)
    (folder / "a" / "cat" / "0.png").rename(folder / "a" / "dog" / "more.png")
    with pytest.raises(BadInput, match="images: is of another run"):
        finished(study("a"), unit)


def test_seeds_trained_side_by_side_are_the_same(folder):
    _, recipe = load_recipe(str(folder / "tiny.toml"))
    table = folder / "latency_table.json"
    study = Study(recipe, LatencyTable.load(table), None, folder, Console(quiet=True))
    alone, units = replace(study, out=folder / "alone"), [Unit("moe_balance", n) for n in range(2)]
    train_draws(study, table, units, workers=2)
    for unit in units:
        train_unit(alone, unit)
        for name in ("original", "add", "moe_balance"):
            found = [
                out / "ablation" / unit.draw / f"{name}.safetensors" for out in (folder, alone.out)
            ]
            assert found[0].read_bytes() == found[1].read_bytes()


def test_trainings_side_by_side_end_with_a_parent_that_is_killed(folder):
    path = folder / "tiny.toml"
    path.write_text(TINY.replace("epochs = 2", "epochs = 100000", 1))
    command = [sys.executable, "-m", "reparam.ablate", "--recipe", str(path), "--out", str(folder)]
    command += ["--variants", "moe_balance", "--seeds", "2", "--workers", "2"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = [folder / "ablation" / f"seed{n}" / "training.csv" for n in range(2)]
    wait_until(lambda: all(log.is_file() for log in logs))
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_bad_input_is_named_before_anything_is_written(folder, tmp_path):
    quadratic = tmp_path / "quadratic.toml"
    quadratic.write_text(TINY.replace("threads = 1", 'threads = 1\nattention = "quadratic"'))
    for more, word in (
        (("--recipe", str(quadratic)), "quadratic: attention: an ablation is of add attention"),
        (("--preset", "none"), "--preset none"),
        (("--variants", "moe,nothing"), "--variants moe"),
        (("--latency-table", str(tmp_path / "no.json")), "no.json"),
    ):
        assert word in str(invoke(folder, *more).exception)
    (folder / "latency_table.json").unlink()
    table_of([linear("shift_int8", 1, 8, 8)]).save(folder / "latency_table.json")
    assert "profiler.sweep" in str(invoke(folder, "--variants", "moe_expected").exception)
    assert not (folder / "ablation").exists()


def test_a_missing_table_names_the_commands_that_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"profiler\.sweep.*cost_models\.fit"):
        find_table(None, tmp_path)
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    (tmp_path / "runs" / "quick" / "latency_table.json").touch()
    assert str(find_table(None, tmp_path)) == "runs/quick/latency_table.json"
    (tmp_path / "latency_table.json").touch()
    assert find_table(None, tmp_path) == tmp_path / "latency_table.json"


def test_presets_name_what_there_is():
    for preset in PRESETS.values():
        load_recipe(preset.recipe)
        assert set(preset.names) <= {"original", *ATTENTIONS, *VARIANTS}
    assert len(PRESETS["quick"].names) == 7
    assert PRESETS["quick"].seeds == 3


def row(variant, seed, top1, **more) -> AblationRow:
    none = dict.fromkeys(
        (
            "fold",
            "validation_top1",
            "deployed_top1",
            "latency_ms",
            "latency_ratio",
            "latency_reason",
            "energy_mj",
            "energy_source",
            "energy_reason",
            "shift_share",
            "latency_budget_ms",
            "expected_latency_ms",
        )
    )
    plain = {"title": variant, "weight_bytes": 1, "shares": {}, "seconds": 1.0}
    return AblationRow(**none | plain | more | {"variant": variant, "seed": seed, "top1": top1})


def test_differences_are_paired_by_seed():
    rows = [row("original", seed, 90.0 + seed) for seed in range(3)]
    rows += [row("add", seed, 0.0, deployed_top1=89.0 + seed) for seed in (2, 0, 1)]
    original, add = summarise(rows)
    assert (original.difference, original.difference_mean) == (None, None)
    assert add.difference_mean == pytest.approx(-1)
    assert add.difference.low == pytest.approx(-1)
    assert add.top1.high - add.top1.low == pytest.approx(2 * 4.3027 / 3**0.5, rel=1e-3)


def test_a_missing_figure_stays_missing_and_budgets_are_counted():
    rows = [
        row("original", 0, 90.0),
        row("moe", 0, 90.0, latency_budget_ms=1.0, expected_latency_ms=1.1),
        row("moe", 1, 90.0, latency_budget_ms=1.0, expected_latency_ms=0.9),
    ]
    original, moe = summarise(rows)
    assert (moe.latency_ms, moe.latency_ratio, moe.energy_mj) == (None, None, None)
    assert (moe.over_budget, original.over_budget) == (1, None)
    assert moe.difference is None and moe.difference_mean == 0


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=10), st.floats(-10, 10))
def test_interval_holds_the_mean_and_moves_with_the_values(values, shift):
    found = mean_interval(values)
    moved = mean_interval([value + shift for value in values])
    assert found.low <= found.value <= found.high
    assert moved.low == pytest.approx(found.low + shift, abs=1e-6)
    assert mean_interval(values[:1]) is None


def test_results_are_written_whole(tmp_path):
    unit = AblationUnit(identity={"a": "b"}, row=row("add", 0, 1.0), correct=[True, False])
    unit.save(tmp_path / "unit.json")
    assert AblationUnit.load(tmp_path / "unit.json") == unit
    (tmp_path / "unit.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(BadInput, match=r"unit\.json"):
        AblationUnit.load(tmp_path / "unit.json")
    assert not list(tmp_path.glob("*.part"))
    assert Interval(value=1, low=0, high=2).value == 1


def test_shift_share_counts_experts_by_what_they_compute_with():
    shares = {"a": {"mult": 0.25, "shift": 0.75}, "b": {"mult": 0.75, "shift": 0.25}}
    assert shift_share(shares, {"mult": "mult_int8", "shift": "shift_int4"}) == 0.5
    assert shift_share({}, {}) is None


def test_linear_attention_is_add_attention_without_codes():
    settings = load_recipe("digits-quick")[1].model
    torch.manual_seed(0)
    model = create_model(settings, 10)
    assert len(linearise_(model).converted) == 4
    assert {type(block.attn) for block in model.blocks} == {LinearAttention}
    q, k, v = torch.randn(3, 2, 5, 16).unbind(0)
    scaled = LinearProducts()(q * 3, k * 7, v)
    torch.testing.assert_close(scaled, LinearProducts()(q, k, v))
    binary = torch.sign(q), torch.sign(k)
    expected = binary[0] @ (binary[1].transpose(1, 2) @ v)
    torch.testing.assert_close(LinearProducts()(*binary, v), expected)


def test_each_attention_keeps_what_the_recipe_keeps():
    _, recipe = load_recipe("imagenet-pvt_v2_b0")
    sizes = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 2)}
    images = torch.randn(2, 3, 64, 64)
    for chosen in ATTENTIONS.values():
        model = timm.create_model("pvt_v2_b0", **sizes)
        done = chosen.convert_(model, recipe, images)
        assert list(done.converted) == [f"stages.{stage}.blocks.0.attn" for stage in range(3)]


@pytest.mark.parametrize("name", ["linear", "add"])
def test_position_biases_are_dropped_where_the_recipe_says_so(name):
    """Inside of an attention whose class knows windows, the products alone are replaced."""
    _, recipe = load_recipe("digits-quick")
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "num_classes": 3}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(2,), num_heads=(2,), **sizes
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ConversionError, match="drop_bias"):
        ATTENTIONS[name].convert_(model, recipe, images)
    dropping = recipe.model_copy(update={"drop_bias": True})
    assert len(ATTENTIONS[name].convert_(model, dropping, images).converted) == 2
    assert model(images).isfinite().all()
    replaced = [part for part in model.modules() if isinstance(part, LinearProducts)]
    assert len(replaced) == (2 if name == "linear" else 0)
